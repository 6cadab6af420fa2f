"""Algebra in product space: sums of low-rank products, kept factored.

A sum ``sum_c p_c a_c b_c`` of C products of rank r is itself a ``LoRA`` of rank ``C r`` (``total``). Inner products,
norms and cosines come from r x r Gram matrices and truncation from a core of the stacked factors; no function here
forms ``in x out`` unless that is the smaller of the two.

Every matrix statement is per layer: leading axes of ``a`` and ``b`` are batch axes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import sequential_vmap

from fedlora_jax.lora import LoRA

Split = Literal["left", "right", "balanced"]

_DEAD = 1e-6  # singular values below this share of the largest count as zero
_SWEEPS = 4  # of the subspace iteration
matmul = partial(jnp.matmul, precision="highest")  # accelerators would otherwise round float32 factors to TF32


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
    one_layer = partial(_truncate, rank, split, few)
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
    one_layer: Callable = partial(_within, split)
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


@sequential_vmap
def _svd(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """All triplets ``U [in, k], S [k], V [out, k]`` of ``a @ b`` from its factors, ``k = min(q, in, out)``.

    Mapped one layer after another even under ``vmap``: batched QR whose results feed batched products can hang for
    ever on CPU (jaxlib 0.10.2), and LAPACK takes a batch one matrix at a time anyway.
    """
    with jax.default_matmul_precision("highest"):
        left, core_left = (jnp.eye(a.shape[0], dtype=a.dtype), a) if a.shape[0] <= a.shape[1] else jnp.linalg.qr(a)
        right, core_right = (
            (jnp.eye(b.shape[1], dtype=b.dtype), b.T) if b.shape[1] <= b.shape[0] else jnp.linalg.qr(b.T)
        )
        u, s, vt = jnp.linalg.svd(core_left @ core_right.T, full_matrices=False)
        return left @ u, s, right @ vt.T


@cache
def _leading(few: int | None) -> Callable[[Array, Array], tuple[Array, Array, Array]]:
    """``_svd``, or the same for the first ``few`` triplets by subspace iteration."""
    if few is None:
        return _svd

    @sequential_vmap
    def leading(a: Array, b: Array) -> tuple[Array, Array, Array]:
        with jax.default_matmul_precision("highest"):
            q = a @ (b @ jax.random.normal(jax.random.key(0), (b.shape[1], few), a.dtype))
            for _ in range(_SWEEPS):
                q = jnp.linalg.qr(q)[0]
                q = jnp.linalg.qr(((q.T @ a) @ b).T)[0]
                q = a @ (b @ q)
            q = jnp.linalg.qr(q)[0]
            u, s, vt = jnp.linalg.svd((q.T @ a) @ b, full_matrices=False)
            return q @ u, s, vt.T

    return leading


@sequential_vmap
def _rotation(overlap: Array) -> Array:
    """The orthogonal ``R`` that maximises ``trace(R^T overlap)``."""
    x, _, yt = jnp.linalg.svd(overlap)
    return matmul(x, yt)


@sequential_vmap
def _eigh(x: Array) -> tuple[Array, Array]:
    return tuple(jnp.linalg.eigh(x))  # type: ignore[return-value]


def _inverse(x: Array, largest: Array, tolerance: float = _DEAD) -> Array:
    """``1 / x``, and 0 where ``x`` is at most ``tolerance * largest``."""
    alive = x > tolerance * largest
    return jnp.where(alive, 1.0 / jnp.where(alive, x, 1.0), 0.0)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _truncate(rank: int, split: Split, few: int | None, factors: tuple, reference: tuple | None) -> tuple[Array, Array]:
    u, s, v = _leading(few)(*factors)
    a, b = _split(split, u[:, :rank], s[:rank], v[:, :rank])
    if reference is None:
        return a, b
    rotation, dead = _gauge(split, s[:rank], a, b, reference)
    return matmul(a, rotation) + matmul(reference[0], dead), matmul(rotation.T, b)


@_truncate.defjvp
def _truncate_jvp(rank: int, split: Split, few: int | None, primals: tuple, tangents: tuple):
    """``(dM, d reference) -> (da, db)``, exact for the product and, with a reference, for the factors."""
    ((a_in, b_in), reference), ((da_in, db_in), d_reference) = primals, tangents
    u_all, s_all, v_all = _leading(few)(a_in, b_in)
    u, s, v = u_all[:, :rank], s_all[:rank], v_all[:, :rank]
    u_drop, s_drop, v_drop = u_all[:, rank:], s_all[rank:], v_all[:, rank:]

    # dM seen from the kept singular vectors; dM itself is never formed.
    left = matmul(matmul(u.T, da_in), b_in) + matmul(matmul(u.T, a_in), db_in)  # U^T dM  [r, out]
    right = matmul(da_in, matmul(b_in, v)) + matmul(a_in, matmul(db_in, v))  # dM V    [in, r]
    k = matmul(left, v)
    e, f = matmul(left, v_drop), matmul(u_drop.T, right)
    gap = _inverse(s[:, None] - s_drop, s[0]) * _inverse(s[:, None] + s_drop, s[0])
    x = s_drop * (s[:, None] * f.T + s_drop * e) * gap
    y = s_drop * (s[:, None] * e + s_drop * f.T) * gap
    e_out = left - matmul(k, v.T) + matmul(x, v_drop.T)
    f_out = right - matmul(u, k) + matmul(u_drop, y.T)

    a, b = _split(split, u, s, v)
    da, db = _split_tangents(split, u, s, v, k, e_out, f_out)
    if reference is None:
        return (a, b), (da, db)
    rotation, dead = _gauge(split, s, a, b, reference)
    a, b = matmul(a, rotation), matmul(rotation.T, b)
    da, db = matmul(da, rotation), matmul(rotation.T, db)
    turn = _turn((a, b), (da, db), reference, d_reference)
    d_dead = matmul(dead, turn) - matmul(turn, dead)
    da, db = da + matmul(a, turn), db - matmul(turn, b)
    da = da + matmul(d_reference[0], dead) + matmul(reference[0], d_dead)
    return (a + matmul(reference[0], dead), b), (da, db)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _within(split: Split, a: Array, b: Array, kept: Array) -> tuple[Array, Array]:
    a, b = _split(split, *_svd(a, b))
    return a * kept, kept[:, None] * b


@_within.defjvp
def _within_jvp(split: Split, primals: tuple, tangents: tuple):
    """As ``_truncate_jvp``, with masks for slices: what is dropped is among the triplets of ``x``."""
    (a_in, b_in, kept), (da_in, db_in, _) = primals, tangents
    u, s, v = _svd(a_in, b_in)
    left = matmul(matmul(u.T, da_in), b_in) + matmul(matmul(u.T, a_in), db_in)
    right = matmul(da_in, matmul(b_in, v)) + matmul(a_in, matmul(db_in, v))
    every = matmul(left, v)
    k = every * kept * kept[:, None]
    across = kept[:, None] * (1 - kept)  # from a kept to a dropped one
    gap = across * _inverse(s[:, None] - s, s[0]) * _inverse(s[:, None] + s, s[0])
    x = s * (s[:, None] * every.T + s * every) * gap
    y = s * (s[:, None] * every + s * every.T) * gap
    e_out = kept[:, None] * left - matmul(k, v.T) + matmul(x, v.T)
    f_out = kept * right - matmul(u, k) + matmul(u, y.T)
    a, b = _split(split, u, s, v)
    da, db = _split_tangents(split, u, s * kept, v, k, e_out, f_out)
    return (a * kept, kept[:, None] * b), (da, db)


def _split(split: Split, u: Array, s: Array, v: Array) -> tuple[Array, Array]:
    match split:
        case "left":
            return u, s[:, None] * v.T
        case "right":
            return u * s, v.T
        case "balanced":
            root = jnp.where(_is_dead(s), 0.0, jnp.sqrt(s))
            return u * root, root[:, None] * v.T
    raise ValueError(f"split must be 'left', 'right' or 'balanced', got {split!r}")


def _split_tangents(split: Split, u, s, v, k, e_out, f_out) -> tuple[Array, Array]:
    inverse = _inverse(s, s[0])
    match split:
        case "left":
            return f_out * inverse, matmul(k, v.T) + e_out
        case "right":
            return matmul(u, k) + f_out, inverse[:, None] * e_out
    inverse_root = jnp.sqrt(inverse)
    inverse_sum = _inverse(s[:, None] + s, s[0])
    p = (k * s + k.T * s[:, None]) * inverse_sum / 2
    p = jnp.where(_is_dead(s)[:, None], k, p)  # a step into a dead direction of U is a's alone, q has b's
    q = p - (k - k.T) * s * inverse_sum
    da = (matmul(u, p) + f_out) * inverse_root
    db = inverse_root[:, None] * (matmul(q.T, v.T) + e_out)
    return da, db


def _is_dead(s: Array) -> Array:
    return s <= _DEAD * s[0]


def _gauge(split: Split, s: Array, a: Array, b: Array, reference: tuple[Array, Array]) -> tuple[Array, Array]:
    """Rotation towards the reference, and the projector on the directions dead after it.

    Only the balanced split has dead directions (a zero column of ``a`` and a zero row of ``b``). They take over the
    reference's ``a``; their rows of ``b`` are zero, so the product does not change.
    """
    ref_a, ref_b = reference
    rotation = _rotation(matmul(a.T, ref_a) + matmul(b, ref_b.T))
    dead = jnp.where(_is_dead(s) & (split == "balanced"), 1.0, 0.0).astype(a.dtype)
    return rotation, matmul(rotation.T * dead, rotation)


def _turn(factors, d_factors, reference, d_reference) -> Array:
    """How the Procrustes rotation ``R`` follows, ``dR = R W``: solve ``W P + P W = N - N^T``, ``W`` antisymmetric."""
    (a, b), (da, db), (ref_a, ref_b), (dref_a, dref_b) = factors, d_factors, reference, d_reference
    p = matmul(a.T, ref_a) + matmul(b, ref_b.T)
    n = matmul(da.T, ref_a) + matmul(db, ref_b.T) + matmul(a.T, dref_a) + matmul(b, dref_b.T)
    w, basis = _eigh((p + p.T) / 2)
    inverse = _inverse(w[:, None] + w, jnp.abs(w).max())
    return matmul(basis, matmul(matmul(basis.T, matmul(n - n.T, basis)) * inverse, basis.T))
