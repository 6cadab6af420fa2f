"""LoRA-FAIR: *Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement*, Bian et al., ICCV 2025,
arXiv 2411.14961, eq. 8.

    a = abar        b = bbar + d        d = argmin_d  S(M, abar (bbar + d)) + lam |d|^2        M = sum_c p_c a_c b_c

S pulls the product towards the mean of products, the penalty keeps b near the mean every client started from.
Factors and head travel, both ways; no state beyond the factors. Not published, hence our choice: the squared norm, one
cosine per layer (flattened), the start at d = 0 and plain gradient descent. Public code chooses otherwise, and the
paper's ablation corrects a: these are options.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import lora
from fedlora_jax.checks import refuse_outside
from fedlora_jax.decomposition import solve
from fedlora_jax.lora import LoRA
from fedlora_jax.method import About, Method, mean, revived
from fedlora_jax.methods.fedit import FedITState, fedit
from fedlora_jax.product import matmul, norm, safe_sqrt, total

ABOUT = About("LoRA-FAIR", "Bian et al. ICCV 2025", "2411.14961", "a, b, head", "a, b, head", "no (less bias)")


def lora_fair(
    lam: float | Array = 0.01,
    solver: Literal["cosine", "column_cosine", "ridge"] = "cosine",
    steps: int = 1000,
    lr: float = 0.01,
    squared: bool = True,
    start: Literal["zero", "xavier"] = "zero",
    on: Literal["b", "a", "both"] = "b",
) -> Method:
    """LoRA-FAIR.

    Args:
      lam: weight of ``|d|^2``; as it grows the method becomes FedIT.
      solver: ``cosine``, S = 1 - cos, minimised by ``steps`` of gradient descent at ``lr``; ``column_cosine``, the same
        with the mean of one cosine per input row (SpecTraL's; forms ``in x out``); ``ridge``, S = squared Frobenius
        distance, solved exactly.
      steps, lr: of the cosines only; ``lr`` is the longest step, see there.
      squared: ``lam |d|^2``; otherwise ``lam |d|``, the letter of eq. 8 (cosines only).
      start: of d, for the cosines. ``xavier``, random as in public code, the same draw every round. With ``lam`` 0.01
        the noise outlives the descent, and the result is worse than FedIT: an ablation.
      on: the factor that is corrected, the paper's ablation; ``both``: b, then a with the corrected b (ours).
    """
    refuse_outside("[0, inf)", lam=lam)
    refuse_outside("[0, 1000000]", steps=steps)
    refuse_outside("(0, inf)", lr=lr)
    if solver not in ("cosine", "column_cosine", "ridge"):
        raise ValueError(f"solver must be 'cosine', 'column_cosine' or 'ridge', got {solver!r}")
    if start not in ("zero", "xavier") or on not in ("b", "a", "both"):
        raise ValueError(f"start must be 'zero' or 'xavier', on 'b', 'a' or 'both'; got {start!r} and {on!r}")
    if solver == "ridge" and (not squared or start != "zero"):
        raise ValueError("ridge is solved exactly: it has no start, and only the squared penalty; use cosine")

    def correction(x: LoRA, p: Array, abar: Array, bbar: Array, rows: int) -> Array:
        """``d`` for the second factor. The input rows of the product are its axis ``rows``."""
        first = 0.0 if start == "zero" else xavier(bbar)
        if solver == "column_cosine":
            m = lora.delta(total(x, p))  # its scale does not matter
            return column_cosine(abar, bbar, m, lam, steps, lr, squared=squared, start=first, rows=rows)
        g = matmul(abar.mT, abar)  # G = abar^T abar  [.., r, r]
        p = p.astype(x.a.dtype)
        y = jnp.einsum("...ir,c,c...iq,c...qo->...ro", abar, p, x.a, x.b, precision="highest")  # Y = abar^T M
        if solver == "ridge":
            return ridge(g, y, bbar, lam)
        return cosine(g, y, bbar, norm(total(x, p)) / x.scale, lam, steps, lr, squared=squared, start=first)

    def aggregate(base, state, cohort, sent, received):
        p = cohort.weights

        def corrected(center: LoRA, x: LoRA) -> LoRA:
            abar, bbar = center.a, center.b
            if on != "a":
                bbar = bbar + correction(x, p, abar, bbar, -2)
            if on != "b":  # the same for the transposed product
                abar = abar + correction(LoRA(x.b.mT, x.a.mT, x.scale), p, bbar.mT, abar.mT, -1).mT
            return LoRA(abar, bbar, x.scale)

        means = revived(state.adapter, mean(received, p), cohort.ranks, p)
        return FedITState(lora.tree_map(corrected, means, received))

    return fedit()._replace(aggregate=aggregate)


def ridge(g: Array, y: Array, bbar: Array, lam: float | Array) -> Array:
    """``d = (G + lam I)^-1 (Y - G bbar)``, the minimiser of ``|M - abar (bbar + d)|^2 + lam |d|^2``."""
    wide = jnp.promote_types(g.dtype, jnp.float32)  # nobody solves equations in 16 bits
    g, right = g.astype(wide), (y - matmul(g, bbar)).astype(wide)
    identity = jnp.eye(g.shape[-1], dtype=wide)
    empty = jnp.diagonal(g, axis1=-2, axis2=-1) == 0  # a zero column: without lam any d does, and 0 is the smallest
    return solve(g + (lam + empty[..., None, :]) * identity, right).astype(bbar.dtype)


def cosine(
    g: Array,
    y: Array,
    bbar: Array,
    m: Array,
    lam: float | Array,
    steps: int,
    lr: float | Array,
    *,
    squared: bool = True,
    start: Array | float = 0.0,
) -> Array:
    """Descend ``1 - <Y, b'> / (m n) + lam |d|^2`` from ``start``, where ``b' = bbar + d``, ``n = sqrt(<b', G b'>)``.

    A step is ``lr``, and never more than ``1 / L`` with ``L = 2 tr(G) / n^2 + 2 lam`` a bound on the curvature at the
    start: while b is small a longer one climbs, and leaves a b many times too large.

    Args:
      m: ``|M|`` of each layer, ``[...]``; where it or ``n`` is zero ``d`` is moved by the penalty alone.
    """
    first = bbar + start
    trace, n2 = jnp.trace(g, axis1=-2, axis2=-1), jnp.sum(first * matmul(g, first), (-2, -1))
    longest = n2 / jnp.maximum(2 * (trace + lam * squared * n2), 1e-15)

    def gradient(d: Array) -> Array:
        b = bbar + d
        gb = matmul(g, b)
        n2 = jnp.sum(b * gb, (-2, -1))
        alive = (n2 > 0) & (m > 0)
        scale = jnp.where(alive, 1 / (jnp.where(alive, m, 1.0) * jnp.sqrt(jnp.where(alive, n2, 1.0))), 0.0)
        along = jnp.where(alive, jnp.sum(y * b, (-2, -1)) / jnp.where(alive, n2, 1.0), 0.0)
        return scale[..., None, None] * (along[..., None, None] * gb - y) + lam * _of_penalty(d, squared)

    return descend(gradient, jnp.zeros_like(bbar) + start, jnp.minimum(lr, longest), steps)


def column_cosine(
    abar: Array,
    bbar: Array,
    m: Array,
    lam: float | Array,
    steps: int,
    lr: float | Array,
    *,
    squared: bool = True,
    start: Array | float = 0.0,
    rows: int = -2,
) -> Array:
    """Descend ``1 - mean_i cos(M_i, (abar b')_i) + lam |d|^2`` from ``start``, one cosine for every input row ``i``.

    The step is bounded as in ``cosine``, by the mean curvature of the rows.

    Args:
      m: ``M`` dense, ``[.., n, o]``.
      rows: the axis of ``m`` that counts input rows: -2, or -1 where everything is transposed.
    """
    along = -3 - rows
    first = bbar + start
    n2 = jnp.sum(matmul(abar, first) ** 2, along)
    a2 = jnp.sum(abar**2, -1) if rows == -2 else jnp.sum(abar**2, (-2, -1))[..., None]
    curvature = jnp.mean(2 * a2 / jnp.maximum(n2, 1e-15), -1) + 2 * lam * squared

    def similarity(d: Array) -> Array:
        product = matmul(abar, bbar + d)
        sizes = safe_sqrt(jnp.sum(m**2, along)) * safe_sqrt(jnp.sum(product**2, along))
        cosines = jnp.where(sizes > 0, jnp.sum(m * product, along) / jnp.where(sizes > 0, sizes, 1.0), 0.0)
        return cosines.mean(-1).sum()  # layers do not touch one another

    gradient = lambda d: lam * _of_penalty(d, squared) - jax.grad(similarity)(d)
    return descend(gradient, jnp.zeros_like(bbar) + start, jnp.minimum(lr, 1 / jnp.maximum(curvature, 1e-15)), steps)


def descend(gradient: Callable[[Array], Array], d: Array, lr: Array, steps: int) -> Array:
    """``steps`` of gradient descent on every layer, ``lr [...]``."""
    return jax.lax.scan(lambda d, _: (d - lr[..., None, None] * gradient(d), None), d, length=steps)[0]


def xavier(b: Array) -> Array:
    """Uniform in +-sqrt(6 / (r + out))."""
    limit = (6 / sum(b.shape[-2:])) ** 0.5
    return jax.random.uniform(jax.random.key(0), b.shape, b.dtype, -limit, limit)


def _of_penalty(d: Array, squared: bool) -> Array:
    """The derivative of ``|d|^2``, or of ``|d|`` with 0 at 0."""
    if squared:
        return 2 * d
    size = safe_sqrt(jnp.sum(d**2, (-2, -1), keepdims=True))
    return jnp.where(size > 0, d / jnp.where(size > 0, size, 1.0), 0.0)
