"""Algebra in product space: sums of low-rank products, kept factored.

A sum ``sum_c p_c a_c b_c`` of C products of rank r is itself a ``LoRA`` of rank ``C r`` (``total``). Inner products,
norms and cosines come from r x r Gram matrices and truncation from a core of the stacked factors; no function here
forms ``in x out`` unless that is the smaller of the two.

Every matrix statement is per layer: leading axes of ``a`` and ``b`` are batch axes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax.decomposition import Split, matmul, truncated, within_rank
from fedlora_jax.lora import LoRA


def total(stacked: LoRA, weights: Array) -> LoRA:
    """``sum_c weights_c a_c b_c`` as one wide product: ``a [..., in, C r]``, ``b [..., C r, out]``.

    Args:
      stacked: ``a [C, ..., in, r]``, ``b [C, ..., r, out]``.
      weights: ``[C]``, or ``[C, ...]`` where layers weigh clients differently. They go into ``a`` whole: their square
        root has no derivative at zero.
    """
    weights = weights.astype(stacked.a.dtype)
    weights = weights.reshape(*weights.shape, *(1,) * (stacked.a.ndim - weights.ndim))
    a = jnp.moveaxis(weights * stacked.a, 0, -2)  # [..., in, C, r]
    b = jnp.moveaxis(stacked.b, 0, -3)  # [..., C, r, out]
    return LoRA(a.reshape(*a.shape[:-2], -1), b.reshape(*b.shape[:-3], -1, b.shape[-1]), stacked.scale)


def plus(x: LoRA, y: LoRA, sign: float = 1.0) -> LoRA:
    """``x + sign * y`` as a product whose rank is the sum of both."""
    return LoRA(jnp.concatenate([x.a, sign * y.a], -1), jnp.concatenate([x.b, y.b], -2), _common_scale(x, y))


def difference(x: LoRA, y: LoRA) -> LoRA:
    """``x - y`` for two products of equal rank, as ``(a - a') b + a' (b - b')``: no cancellation when they are near."""
    a = jnp.concatenate([x.a - y.a, y.a], -1)
    b = jnp.concatenate([x.b, x.b - y.b], -2)
    return LoRA(a, b, _common_scale(x, y))


def inner(x: LoRA, y: LoRA) -> Array:
    """Frobenius inner product ``<x, y> = <a^T a', b b'^T>`` of each layer, ``[...]``."""
    _common_scale(x, y)
    gram_a, gram_b = matmul(x.a.mT, y.a), matmul(x.b, y.b.mT)
    return x.scale * y.scale * jnp.sum(gram_a * gram_b, (-2, -1))


def norm(x: LoRA) -> Array:
    """Frobenius norm of each layer, ``[...]``; zero with a zero gradient where the product is zero."""
    n_in, rank, n_out = *x.a.shape[-2:], x.b.shape[-1]
    if rank * (n_in + n_out) > n_in * n_out:  # a product this wide is smaller when formed
        square = x.scale**2 * jnp.sum(matmul(x.a, x.b) ** 2, (-2, -1))
    else:
        square = inner(x, x)
    return safe_sqrt(square)


def cosine(x: LoRA, y: LoRA) -> Array:
    """Cosine of each layer, ``[...]``, however small they are; 0 where one of them is zero."""
    x, y = near_one(x), near_one(y)
    size = norm(x) * norm(y)
    return jnp.where(size > 0, inner(x, y) / jnp.where(size > 0, size, 1.0), 0.0)


def near_one(x: LoRA) -> LoRA:
    """The same direction in every layer, with factors whose largest entries are from 1/2 to 1 (or zero).

    They are multiplied by powers of two, which rounds nothing.
    """

    def one(factor: Array) -> Array:
        largest = jax.lax.stop_gradient(jnp.abs(factor).max((-2, -1), keepdims=True))
        return factor * jnp.ldexp(jnp.ones_like(largest), jnp.clip(-jnp.frexp(largest)[1], -126, 126))

    return LoRA(one(x.a), one(x.b), x.scale)


def participation(x: LoRA, eps: float = 1e-15) -> Array:
    """Participation ratio ``(sum S^2)^2 / sum S^4`` of each layer: a smooth effective rank, 0 at zero."""
    x = near_one(x)
    k = matmul(matmul(x.a.mT, x.a), matmul(x.b, x.b.mT))
    k /= jnp.maximum(jnp.trace(k, axis1=-2, axis2=-1), eps)[..., None, None]  # fourth powers would underflow
    return jnp.trace(k, axis1=-2, axis2=-1) ** 2 / jnp.maximum(jnp.sum(k * k.mT, (-2, -1)), eps)


def safe_sqrt(x: Array) -> Array:
    """Square root whose value and derivative are 0 at (and below) zero; NaN stays NaN."""
    positive = jnp.logical_not(x <= 0)
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def truncate(
    x: LoRA, rank: int, *, split: Split = "balanced", like: LoRA | None = None, spare: int | None = None
) -> LoRA:
    """Best approximation of ``x`` by a product of ``rank`` (the truncated SVD ``U S V^T``), as factors.

    Args:
      x: a product, usually wide (``total``).
      rank: at most ``min(in, out)``.
      split: ``left`` ``(U, S V^T)``, ``right`` ``(U S, V^T)`` or ``balanced`` ``(U sqrt(S), sqrt(S) V^T)``.
      like: a product of the same rank. Factors are defined up to a rotation; with ``like`` they are rotated as near to
        its factors as possible (orthogonal Procrustes), so that they move continuously from round to round, and
        directions in which the truncation is zero continue with ``like``'s ``a`` and can be trained. Without it
        column ``i`` belongs to the i-th singular value, so the first ``k`` columns are the truncation to rank ``k``.
      spare: ``None``, an exact decomposition. A number: subspace iteration (Halko, Martinsson & Tropp 2011, arXiv
        0909.4061, alg. 4.4) for the first ``rank + spare`` triplets only, for products as wide as the layer itself.
        Always a projection of ``x``, near the best one where singular values fall; derivatives take what lies beyond
        these triplets for zero.

    The derivative uses only the gaps between kept and dropped singular values: it is finite where ``x = 0``, where
    clients coincide and where singular values repeat. Directions at a gap below 1e-6 of the largest singular value are
    left out. Where ``x = 0`` no derivative exists: the balanced one is zero, the others are finite and depend on the
    bases. Without ``like`` the derivative is that of the product; the factors' own rotation is not followed.
    """
    n_in, n_out = x.a.shape[-2], x.b.shape[-1]
    if not 1 <= rank <= min(n_in, n_out):
        raise ValueError(f"cannot truncate [{n_in}, {n_out}] to rank {rank}: choose 1 to {min(n_in, n_out)}")
    if like is not None and (_common_scale(x, like), like.a.shape[-1]) != (x.scale, rank):
        raise ValueError(f"like has rank {like.a.shape[-1]}, the truncation has rank {rank}: they must agree")
    a, b = _at_least(x.a, rank, -1), _at_least(x.b, rank, -2)
    few = None if spare is None or rank + spare >= min(n_in, n_out, a.shape[-1]) else rank + spare
    one_layer = partial(truncated, rank, split, few)
    for _ in range(a.ndim - 2):
        one_layer = jax.vmap(one_layer)
    reference = None if like is None else (like.a, like.b)
    wide = jnp.promote_types(a.dtype, jnp.float32)  # nobody decomposes matrices of 16 bits
    factors, reference = jax.tree.map(lambda f: f.astype(wide), ((a, b), reference))
    a, b = one_layer(factors, reference)
    return LoRA(a.astype(x.a.dtype), b.astype(x.a.dtype), x.scale)


def within(x: LoRA, rank: Array, split: Split = "balanced") -> LoRA:
    """``truncate`` to a rank that is traced: what a client of a smaller rank is to be sent.

    The first columns of factors are that only if they are in the order of singular values; those of a product turned
    towards another one (``like``) are not.

    Args:
      x: a product of rank ``r``.
      rank: ``[]`` integer from 1 to ``r``.
      split: as for ``truncate``.

    Returns:
      Factors as wide as those of ``x``, zero beyond ``rank``. Where ``x`` is zero its ``a`` goes on.
      The derivative is that of the product, as that of ``truncate``.
    """
    wide = jnp.promote_types(x.a.dtype, jnp.float32)
    kept = (jnp.arange(x.a.shape[-1]) < rank).astype(wide)
    one_layer: Callable = partial(within_rank, split)
    for _ in range(x.a.ndim - 2):
        one_layer = jax.vmap(one_layer, (0, 0, None))
    a, b = one_layer(x.a.astype(wide), x.b.astype(wide), kept)
    new = continued(LoRA(a.astype(x.a.dtype), b.astype(x.b.dtype), x.scale), x)
    return LoRA(new.a * kept.astype(x.a.dtype), new.b, new.scale)


def continued(new: LoRA, old: LoRA) -> LoRA:
    """``new``, whose columns that are zero in both factors continue with the ``a`` of ``old``: else they never move."""
    dead = ~new.b.any(-1)[..., None, :]
    return LoRA(jnp.where(dead, old.a, new.a), new.b, new.scale)


def best(w: Array, rank: int, scale: float = 1.0) -> LoRA:
    """``T_rank(w)`` of dense matrices ``[..., in, out]`` as factors ``(U, S V^T / scale)``.

    Layers of more than 256 rows and columns are taken by subspace iteration: 24 of 768 x 768 in a second instead of a
    minute and a half.
    """
    n_out = w.shape[-1]
    identity = jnp.broadcast_to(jnp.eye(n_out, dtype=w.dtype), (*w.shape[:-2], n_out, n_out))
    spare = None if min(w.shape[-2:]) <= 256 else max(8, rank)
    return truncate(LoRA(w / scale, identity, scale), rank, split="left", spare=spare)


def _common_scale(x: LoRA, y: LoRA) -> float:
    if x.scale != y.scale:
        raise ValueError(f"products of scale {x.scale} and {y.scale} cannot be combined: use one scale for all clients")
    return x.scale


def _at_least(x: Array, size: int, axis: int) -> Array:
    missing = size - x.shape[axis]
    if missing <= 0:
        return x
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, missing)
    return jnp.pad(x, pad)
