"""FLoRIST: *Singular Value Thresholding for Efficient and Accurate Federated Fine-Tuning of Large Language Models*,
Ramesh and Dass, MLSys 2026, arXiv 2506.09199.

    M = sum_c p_c a_c b_c = U S V^T        (a, b) = (U_p, S_p V_p^T)
    p: the least with  sum_{i <= p} S_i^2 >= tau sum_i S_i^2

FlexLoRA that sends as much rank as the aggregate has: every layer keeps so many singular values that a share tau of its
energy is there, all clients get the same, and the rest is dropped. Ours: at most the rank that clients train, and
columns that are dropped go on with the ``a`` that they would have had and ``b = 0``, so that clients can train them
again (SpecTraL, of the same authors, pads with Gaussian columns there). How many are left is the ``rank`` of the
round's report.
"""

from __future__ import annotations

import jax.numpy as jnp

from fedlora_jax import lora, product
from fedlora_jax.checks import refuse_outside
from fedlora_jax.lora import LoRA
from fedlora_jax.method import About, Method
from fedlora_jax.methods.flexlora import flexlora

ABOUT = About("FLoRIST", "Ramesh and Dass MLSys 2026", "2506.09199", "a, b, head", "a, b, head", "to a share tau")


def florist(tau: float = 0.9) -> Method:
    """FLoRIST.

    Args:
      tau: share of each layer's energy that is kept, above 0; 1: FlexLoRA.

    Raises:
      ValueError: another share.
    """
    refuse_outside("(0, 1]", tau=tau)
    inner = flexlora("left")

    def aggregate(base, state, cohort, sent, received):
        new = inner.aggregate(base, state, cohort, sent, received)
        energy = lambda x: product.norm(product.total(x, cohort.weights)) ** 2
        cut = lambda x, y: thresholded(x, energy(y), tau)
        return new._replace(adapter=lora.tree_map(cut, new.adapter, received))

    return inner._replace(aggregate=aggregate, report=mean_rank)


def thresholded(x: LoRA, energy, tau: float) -> LoRA:
    """``x`` with the rows of ``b`` at zero that come after a share ``tau`` of ``energy [...]``.

    Args:
      x: factors ``(U, S V^T)`` in the order of singular values.
      energy: squared norm of the whole, scale included.
      tau: the share.
    """
    squares = x.scale**2 * jnp.sum(x.b**2, -1)
    before = jnp.cumsum(squares, -1) - squares
    kept = before < tau * energy[..., None] * (1 - 1e-6 * (tau < 1))  # what is there to rounding is there
    return LoRA(x.a, jnp.where(kept[..., None], x.b, 0.0), x.scale)


def mean_rank(state) -> dict:
    """How many columns of a layer are not empty, on average."""
    counts = [x.b.any(-1).sum(-1).astype(jnp.float32).ravel() for x in lora.low_rank_leaves(state.adapter)]
    return {"rank": jnp.concatenate(counts).mean()} if counts else {}
