"""LoRA-FAIR: *Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement*, Bian et al., ICCV 2025,
arXiv 2411.14961, eq. 8.

    a = abar        b = bbar + d        d = argmin_d  S(M, abar (bbar + d)) + lam |d|^2        M = sum_c p_c a_c b_c

S pulls the product towards the mean of products, the penalty keeps b near the mean every client started from.
Factors and head travel, both ways; no state beyond the factors. Not published, hence our choice: the squared norm, one
cosine per layer (flattened), the start at d = 0 and plain gradient descent.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import lora
from fedlora_jax.lora import LoRA
from fedlora_jax.method import About, Method, mean
from fedlora_jax.methods.fedit import FedITState, fedit
from fedlora_jax.product import matmul, norm, total

ABOUT = About("LoRA-FAIR", "Bian et al. ICCV 2025", "2411.14961", "a, b, head", "a, b, head", "no (less bias)")


def lora_fair(
    lam: float | Array = 0.01, solver: Literal["cosine", "ridge"] = "cosine", steps: int = 1000, lr: float = 0.01
) -> Method:
    """LoRA-FAIR.

    Args:
      lam: weight of ``|d|^2``; as it grows the method becomes FedIT.
      solver: ``cosine``, S = 1 - cos, minimised by ``steps`` of gradient descent at ``lr``; ``ridge``, S = squared
        Frobenius distance, solved exactly.
      steps, lr: of ``cosine`` only; ``lr`` is the longest step, see there.
    """
    if not isinstance(lam, Array) and lam < 0:  # a traced lam is being learned
        raise ValueError(f"lam is the weight of a penalty: got {lam}, expected 0 or more")
    if solver not in ("cosine", "ridge"):
        raise ValueError(f"solver must be 'cosine' or 'ridge', got {solver!r}")

    def aggregate(base, state, cohort, sent, received):
        p = cohort.weights

        def corrected(x: LoRA) -> LoRA:
            abar, bbar = mean(x.a, p), mean(x.b, p)
            g = matmul(abar.mT, abar)  # G = abar^T abar  [.., r, r]
            y = jnp.einsum("...ir,c,c...iq,c...qo->...ro", abar, p, x.a, x.b, precision="highest")  # Y = abar^T M
            if solver == "ridge":
                return LoRA(abar, bbar + ridge(g, y, bbar, lam), x.scale)
            return LoRA(abar, bbar + cosine(g, y, bbar, norm(total(x, p)) / x.scale, lam, steps, lr), x.scale)

        return FedITState(lora.tree_map(corrected, received, full=lambda x: mean(x, p)))

    return fedit()._replace(aggregate=aggregate)


def ridge(g: Array, y: Array, bbar: Array, lam: float | Array) -> Array:
    """``d = (G + lam I)^-1 (Y - G bbar)``, the minimiser of ``|M - abar (bbar + d)|^2 + lam |d|^2``."""
    identity = jnp.eye(g.shape[-1], dtype=g.dtype)
    return jnp.linalg.solve(g + lam * identity, y - matmul(g, bbar))


def cosine(g: Array, y: Array, bbar: Array, m: Array, lam: float | Array, steps: int, lr: float | Array) -> Array:
    """Descend ``1 - <Y, b'> / (m n) + lam |d|^2`` from d = 0.

    Here ``b' = bbar + d`` and ``n = |abar b'| = sqrt(<b', G b'>)``.

    A step is ``lr``, and never more than ``1 / L`` with ``L = 2 tr(G) / n^2 + 2 lam`` a bound on the curvature at the
    start: while b is small a longer one climbs, and leaves a b many times too large.

    Args:
      m: ``|M|`` of each layer, ``[...]``; where it or ``n`` is zero ``d`` stays 0.
    """
    trace, n2 = jnp.trace(g, axis1=-2, axis2=-1), jnp.sum(bbar * matmul(g, bbar), (-2, -1))
    lr = jnp.minimum(lr, n2 / jnp.maximum(2 * (trace + lam * n2), 1e-15))[..., None, None]

    def step(d: Array, _) -> tuple[Array, None]:
        b = bbar + d
        gb = matmul(g, b)
        n2 = jnp.sum(b * gb, (-2, -1))
        alive = (n2 > 0) & (m > 0)
        scale = jnp.where(alive, 1 / (jnp.where(alive, m, 1.0) * jnp.sqrt(jnp.where(alive, n2, 1.0))), 0.0)
        along = jnp.where(alive, jnp.sum(y * b, (-2, -1)) / jnp.where(alive, n2, 1.0), 0.0)
        grad = scale[..., None, None] * (along[..., None, None] * gb - y) + 2 * lam * d
        return d - lr * grad, None

    return jax.lax.scan(step, jnp.zeros_like(bbar), length=steps)[0]
