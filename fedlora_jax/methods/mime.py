"""MimeLite: *Mime: Mimicking Centralized Stochastic Algorithms in Federated Learning*, Karimireddy et al., NeurIPS
2021, arXiv 2008.03606, alg. 1 with momentum.

    y <- y - eta ((1 - beta) grad f_i(y) + beta m)        m <- (1 - beta) sum_c p_c grad f_c(w) + beta m

The server's momentum m is applied in every local step and changed in none: it is made of gradients at the model that is
sent, on examples that a client keeps apart (``query``; the paper takes all that it has). Under plain SGD this is the
gradient of ``(1 - beta) f + beta <w, m>``; no momentum and no Adam inside. An adapter and as much again travels both
ways. Mime itself corrects local gradients as well by those of the same batch at w, and by their mean over the cohort,
which would have to be gathered before anybody takes a step: a second exchange in each round.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedlora_jax.checks import refuse_outside
from fedlora_jax.lora import Adapter
from fedlora_jax.method import About, MetaGradient, Method, Traffic, mean
from fedlora_jax.methods.fedit import FedITState, fedit

ABOUT = About(
    "MimeLite",
    "Karimireddy et al. NeurIPS 2021",
    "2008.03606",
    "a, b, head",
    "a, b, head; momentum",
    "no",
    tells="its gradient",
)


class MimeState(NamedTuple):
    """adapter: w. momentum: m."""

    adapter: Adapter
    momentum: Adapter


def mime(beta: float = 0.9, query: int = 32) -> Method:
    """MimeLite.

    Args:
      beta: of the momentum, at least 0 and below 1; 0: FedIT of fewer examples.
      query: examples that a client keeps apart for its gradient.

    Raises:
      ValueError: another beta, or no examples kept apart.
    """
    refuse_outside("[0, 1)", beta=beta)
    refuse_outside("[1, inf)", query=query)
    inner = fedit()

    def init(key, adapter):
        return MimeState(adapter, jax.tree.map(jnp.zeros_like, adapter))

    def dispatch(base, state, cohort):
        sent = inner.dispatch(base, FedITState(state.adapter), cohort)
        rows = jax.tree.map(lambda m, x, held: jnp.broadcast_to(m, x.shape) * held, state.momentum, *sent[1:3])
        return sent._replace(context=rows)

    def objective(task, adapter, m):
        loss = task(adapter)
        along = sum(jnp.sum(x * y) for x, y in zip(*map(jax.tree.leaves, (adapter, m)), strict=True))
        return (1 - beta) * loss + beta * along, loss

    def train(tune, judge, start):
        return *tune(start), jax.grad(judge)(start)

    def learn(state, cohort, gradients):
        new = mean(gradients, cohort.weights)
        return state._replace(momentum=jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, state.momentum, new))

    def aggregate(base, state, cohort, sent, received):
        new = inner.aggregate(base, FedITState(state.adapter), cohort, sent, received)
        return state._replace(adapter=new.adapter)

    return Method(
        init,
        dispatch,
        aggregate,
        objective=objective,
        traffic=lambda own, cohort: Traffic(up=(own, own), down=(own, own)),
        meta_gradient=MetaGradient(train, lambda steps: steps + 1),
        learn=learn,
        query=query,
    )
