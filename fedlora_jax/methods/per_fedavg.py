"""Per-FedAvg: *Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic Meta-Learning Approach*,
Fallah et al., NeurIPS 2020, arXiv 2002.07948.

    w_c <- w_c - eta grad F_c(w_c)        F_c(w) = f_c(w - al grad f_c(w))        w = sum_c p_c w_c

Clients train the global adapter for what it becomes after one more step. ``exact`` differentiates that step,
``first_order`` takes its shift as given (FO-MAML). Everything travels. Ours: one batch serves both steps; the paper
draws another for each. In the paper a client's model is w after one plain step of its own, ``w - al grad f_c(w)``; the
``after`` of ``Scores`` follows the local steps of training, along the meta-gradient and as long as eta, and is not it.
"""

from __future__ import annotations

from typing import Literal

import jax

from fedlora_jax.checks import refuse_outside
from fedlora_jax.method import About, MetaGradient, Method
from fedlora_jax.methods.fedit import fedit

ABOUT = About("Per-FedAvg", "Fallah et al. NeurIPS 2020", "2002.07948", "a, b, head", "a, b, head", "no")


def per_fedavg(al: float = 0.05, order: Literal["exact", "first_order"] = "exact") -> Method:
    """Per-FedAvg.

    Args:
      al: length of the inner step; 0: FedIT.
      order: of the derivative.

    Raises:
      ValueError: al below 0, or an unknown order.
    """
    refuse_outside("[0, inf)", al=al)
    if order not in ("exact", "first_order"):
        raise ValueError(f"order must be 'exact' or 'first_order', got {order!r}")

    def objective(task, w, context):
        loss, grads = jax.value_and_grad(task)(w)
        grads = jax.lax.stop_gradient(grads) if order == "first_order" else grads
        return task(jax.tree.map(lambda w, g: w - al * g, w, grads)), loss

    return fedit()._replace(
        objective=objective,
        meta_gradient=MetaGradient(fedit().meta_gradient.train, lambda steps: steps * (3 if order == "exact" else 2)),
    )
