"""The truncated decomposition of one layer's product, from its factors, and how it follows them (its derivatives)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_batching import sequential_vmap

Split = Literal["left", "right", "balanced"]

_DEAD = 1e-6  # singular values below this share of the largest count as zero
_SWEEPS = 4  # of the subspace iteration
matmul = partial(jnp.matmul, precision="highest")  # accelerators would otherwise round float32 factors to TF32


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


@sequential_vmap
def _solve(g: Array, y: Array) -> Array:
    return jnp.linalg.solve(g, y)


# LAPACK of a batch waits, in a thread of XLA's CPU pool, for parts that other threads of the pool are to compute: where
# as many batches are begun at once as there are threads, all wait for ever (jaxlib 0.10.2). Hence one after another.


def eigh(x: Array) -> tuple[Array, Array]:
    """Eigenvalues ``[..., n]``, ascending, and eigenvectors ``[..., n, n]`` of symmetric ``x [..., n, n]``."""
    flat = x.reshape(-1, *x.shape[-2:])
    values, vectors = jax.vmap(_followed_eigh)(flat)
    return values.reshape(x.shape[:-1]), vectors.reshape(x.shape)


@jax.custom_jvp
def _followed_eigh(x: Array) -> tuple[Array, Array]:
    return _eigh(x)


@_followed_eigh.defjvp
def _eigh_jvp(primals: tuple, tangents: tuple):
    """``V^T dX V`` has the moves of eigenvalues on its diagonal; vectors of equal ones do not turn into each other."""
    (x,), (dx,) = primals, tangents
    w, v = _followed_eigh(x)
    k, gap = matmul(v.T, matmul(dx, v)), w - w[:, None]
    apart = jnp.abs(gap) > _DEAD * jnp.abs(w).max()
    return (w, v), (jnp.diagonal(k), matmul(v, jnp.where(apart, k / jnp.where(apart, gap, 1.0), 0.0)))


def rotation(overlap: Array) -> Array:
    """The orthogonal ``R [..., n, n]`` that maximises ``trace(R^T overlap)`` of ``overlap [..., n, n]``."""
    return jax.vmap(_followed_rotation)(overlap.reshape(-1, *overlap.shape[-2:])).reshape(overlap.shape)


@jax.custom_jvp
def _followed_rotation(overlap: Array) -> Array:
    return _rotation(overlap)


@_followed_rotation.defjvp
def _rotation_jvp(primals: tuple, tangents: tuple):
    r = _followed_rotation(*primals)
    p, n = (matmul(r.T, x) for x in (*primals, *tangents))
    return r, matmul(r, _antisymmetric(p, n))


def solve(g: Array, y: Array) -> Array:
    """``g^-1 y [..., n, m]`` of symmetric ``g [..., n, n]`` and ``y [..., n, m]`` of the same leading axes."""

    def one(g: Array, y: Array) -> Array:  # a derivative is another solution, which is found in the same way
        product_with, solution = lambda x: matmul(g, x), lambda _, y: _solve(g, y)
        return jax.lax.custom_linear_solve(product_with, y, solution, symmetric=True)

    return jax.vmap(one)(*(x.reshape(-1, *x.shape[-2:]) for x in (g, y))).reshape(y.shape)


def _inverse(x: Array, largest: Array, tolerance: float = _DEAD) -> Array:
    """``1 / x``, and 0 where ``x`` is at most ``tolerance * largest``."""
    alive = x > tolerance * largest
    return jnp.where(alive, 1.0 / jnp.where(alive, x, 1.0), 0.0)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def truncated(rank: int, split: Split, few: int | None, factors: tuple, reference: tuple | None) -> tuple[Array, Array]:
    """``(a, b)`` of the truncation to ``rank`` of one layer's ``factors (a, b)``; as ``product.truncate``.

    Args:
      few: leading triplets to compute, by subspace iteration; ``None``: all, exactly.
      reference: the factors that the new ones are rotated towards; ``None``: none.
    """
    u, s, v = _leading(few)(*factors)
    a, b = _split(split, u[:, :rank], s[:rank], v[:, :rank])
    if reference is None:
        return a, b
    rotation, dead = _gauge(split, s[:rank], a, b, reference)
    return matmul(a, rotation) + matmul(reference[0], dead), matmul(rotation.T, b)


@truncated.defjvp
def _truncated_jvp(rank: int, split: Split, few: int | None, primals: tuple, tangents: tuple):
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
def within_rank(split: Split, a: Array, b: Array, kept: Array) -> tuple[Array, Array]:
    """The truncation to the first of the triplets, ``kept [r]`` 1 and then 0; as ``product.within``."""
    a, b = _split(split, *_svd(a, b))
    return a * kept, kept[:, None] * b


@within_rank.defjvp
def _within_rank_jvp(split: Split, primals: tuple, tangents: tuple):
    """As ``_truncated_jvp``, with masks for slices: what is dropped is among the triplets of ``x``."""
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
    return _antisymmetric(p, n)


def _antisymmetric(p: Array, n: Array) -> Array:
    """``W`` with ``W P + P W = N - N^T``."""
    w, basis = _eigh((p + p.T) / 2)
    inverse = _inverse(w[:, None] + w, jnp.abs(w).max())
    return matmul(basis, matmul(matmul(basis.T, matmul(n - n.T, basis)) * inverse, basis.T))
