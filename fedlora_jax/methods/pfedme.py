"""pFedMe: *Personalized Federated Learning with Moreau Envelopes*, Dinh et al., NeurIPS 2020, arXiv 2006.08848.

    theta(w) ~ argmin  f_c(theta) + lam / 2 |theta - w|^2           a few gradient steps on one batch, from w
    w_c <- w_c - eta lam (w_c - theta(w_c))                         local steps: w descends the Moreau envelope
    w <- (1 - beta) w + beta sum_c p_c w_c

w travels, theta is what a client uses. A local step is the local optimizer's on lam / 2 |w - theta|^2 with theta held,
so with SGD at eta it is the line above; eta lam should stay below 1. Ours: the theta that a client keeps is that of its
last w, computed on the examples it keeps apart, because there are no batches when models are used; further local steps
after that move w alone and leave theta as it is. Whoever differentiates a round takes theta in local steps as given.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from fedlora_jax import personal
from fedlora_jax.checks import is_concrete, refuse_outside
from fedlora_jax.lora import Adapter
from fedlora_jax.method import About, MetaGradient, Method
from fedlora_jax.methods.fedit import FedITState, fedit
from fedlora_jax.personal import squared_distance

ABOUT = About("pFedMe", "Dinh et al. NeurIPS 2020", "2006.08848", "a, b, head", "a, b, head", "n/a")


def pfedme(lam: float = 15.0, steps: int = 5, lr: float = 0.05, beta: float = 1.0, query: int = 16) -> Method:
    """pFedMe.

    Args:
      lam: how strongly theta is drawn to w.
      steps, lr: gradient steps towards theta, and their length; ``lr * lam`` must be below 2.
      beta: the server's step.
      query: examples a client keeps apart to compute its theta at the end.

    Raises:
      ValueError: lam not above 0, no steps, a step towards theta that diverges, or no examples kept apart.
    """
    refuse_outside("(0, inf)", lam=lam, lr=lr, beta=beta)
    refuse_outside("[1, 1000000]", steps=steps, query=query)
    if is_concrete(lr, lam) and not 0 < lr * lam < 2:
        raise ValueError(f"theta diverges unless lr * lam is above 0 and below 2: got {lr} * {lam}, lower lr")

    def towards(f: Callable, w: Adapter) -> Adapter:
        def step(theta, _):
            grads = jax.grad(f)(theta)
            return jax.tree.map(lambda t, g, w: t - lr * (g + lam * (t - w)), theta, grads, w), None

        return jax.lax.scan(step, w, length=steps)[0]

    def objective(task, carried, context):
        w = carried["shared"]
        theta = jax.lax.stop_gradient(towards(task, w))
        return lam / 2 * squared_distance(w, theta), task(theta)

    def train(tune, judge, start):
        end, trace = tune(start)
        f = lambda theta: judge(end | {"personal": theta})
        return end | {"personal": towards(f, end["shared"])}, trace, ()

    inner = personal.side_by_side(fedit())

    def dispatch(base, state, cohort):
        sent = inner.dispatch(base, state, cohort)
        return sent._replace(mask=inner.upload_mask(sent.mask))  # theta is computed, not trained

    def aggregate(base, state, cohort, sent, received):
        new = inner.aggregate(base, state, cohort, sent, received)
        return FedITState(jax.tree.map(lambda w, x: (1 - beta) * w + beta * x, state.adapter, new.adapter))

    return inner._replace(
        dispatch=dispatch,
        aggregate=aggregate,
        objective=objective,
        meta_gradient=MetaGradient(train, lambda local: local * (steps + 1) + steps),
        query=query,
    )
