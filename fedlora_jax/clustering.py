"""Clusters of clients, found from the subspaces that the rows of their low-rank factors ``b`` span.

Source: HiLoRA (arXiv 2603.02785), eq. 8 and its spectral clustering; the spectral clustering is that of Ng, Jordan &
Weiss, *On Spectral Clustering*, NIPS 2001. With ``Q`` an orthonormal basis of the row space of a client's ``b``

    d_ij = 1 - |Q_i^T Q_j|^2 / r, mean over layers        A_ij = exp(-d_ij^2 / (2 sigma^2)),  sigma = median d
    L = I - D^(-1/2) A D^(-1/2)        K = the largest gap between eigenvalues of L on [K_min, K_max]

Papers write the transpose: their B (out x r, its column space) is our ``b.T``. Everything is pure JAX of fixed shapes,
so it can run inside the program of a round: the number of clusters is an array, and so is who has a basis at all.

Ours: the mean of d over layers; the rotation before averages; clusters of one member are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax.decomposition import eigh, rotation
from fedlora_jax.keys import purpose
from fedlora_jax.product import matmul

_DEAD = 1e-3  # rows of b whose singular value is below this share of the largest span nothing
_FAR = 1e9


class Clusters(NamedTuple):
    """assignment: [N] integers. number: [] clusters in use. gap: [] the eigengap that chose it."""

    assignment: Array
    number: Array
    gap: Array


def bases(b: Array) -> Array:
    """Orthonormal bases ``[..., r, out]`` of the row spaces of ``b [..., r, out]``, one vector per row.

    Where the rank is below ``r`` the other rows are zero. From eigenvalues of Gram matrices, twice (the first pass
    alone would square the condition of ``b``): batched QR can hang on CPU.
    """
    b = b.astype(jnp.promote_types(b.dtype, jnp.float32))  # nobody decomposes matrices of 16 bits
    largest = jnp.linalg.norm(b, axis=(-2, -1), keepdims=True)
    q = b / jnp.where(largest > 0, largest, 1.0)
    for dead in (_DEAD, 0.5):  # after the first pass a row has norm 1 or 0
        s2, u = eigh(matmul(q, q.mT))  # ascending
        alive = s2 > dead**2 * jnp.maximum(s2[..., -1:], 1e-30)
        inverse = jnp.where(alive, jax.lax.rsqrt(jnp.where(alive, s2, 1.0)), 0.0)
        q = inverse[..., None] * matmul(u.mT, q)
    return q


def distances(x: Sequence[Array], y: Sequence[Array]) -> Array:
    """``d [N, M] = 1 - |Q_i^T Q_j|^2 / r``, from 0 (the same subspace) to 1 (orthogonal), mean over all layers.

    Args:
      x, y: orthonormal bases of ``N`` and of ``M`` clients, one array ``[N, ..., r, out]`` for each stack of layers.

    For unequal ranks ``r`` is their geometric mean (ours); a client without a basis is at distance 1 from all.
    """

    def stack(q: Array, p: Array) -> tuple[Array, int]:
        r, out = q.shape[-2:]
        wide = jnp.promote_types(q.dtype, jnp.float32)
        q, p = q.astype(wide), p.astype(wide)
        q, p = (jnp.moveaxis(z.reshape(z.shape[0], -1, r, out), 1, 0) for z in (q, p))  # [layers, N, r, out]

        def layer(total: Array, qp: tuple[Array, Array]) -> tuple[Array, None]:
            q, p = qp
            gram = matmul(q.reshape(-1, out), p.reshape(-1, out).T)
            squares = jnp.sum((gram**2).reshape(len(q), r, len(p), r), (1, 3))
            rank_q, rank_p = (jnp.sum(z**2, (-2, -1)) for z in (q, p))  # rows of norm 1 or 0
            rank = jnp.sqrt(rank_q[:, None] * rank_p)
            return total + squares / jnp.where(rank > 0, rank, 1.0), None

        return jax.lax.scan(layer, jnp.zeros((q.shape[1], p.shape[1]), q.dtype), (q, p))[0], len(q)

    sums, layers = zip(*map(stack, x, y), strict=True)
    return 1.0 - jnp.stack(sums).sum(0) / sum(layers)


def moving_average(old: Array, b: Array, lam: float, *, align: bool = True) -> Array:
    """``lam old + (1 - lam) R b / |b|``, where the rotation ``R`` brings ``b / |b|`` as near to ``old`` as it can.

    ``b`` is defined up to a rotation of its rows (and an SVD turns them as it likes), so that an average of raw ``b``
    cancels. Shapes ``[..., r, out]``; ``old = 0`` starts one.

    Args:
      align: without it ``R = 1``.
    """
    kept, wide = old.dtype, jnp.promote_types(b.dtype, jnp.float32)
    old, b = old.astype(wide), b.astype(wide)
    size = jnp.linalg.norm(b, axis=(-2, -1), keepdims=True)
    unit = b / jnp.where(size > 0, size, 1.0)
    if align:
        unit = matmul(rotation(matmul(old, unit.mT)), unit)  # R = X Y^T maximises <old, R unit>
    return (lam * old + (1.0 - lam) * unit).astype(kept)


def spectral(key: Array, d: Array, known: Array, k_min: int, k_max: int) -> Clusters:
    """Clusters of clients at distances ``d [N, N]``; K from the largest eigengap on ``[k_min, k_max]``.

    Args:
      key: of the starts of k-means.
      d: symmetric.
      known: ``[N]`` who has a basis. The others join the largest cluster (ours).
      k_min, k_max: at least 2: the gap after the first eigenvalue is the largest of all graphs that hang together.
        ``k_min = k_max = 1`` puts everybody into one cluster. Fewer where there are fewer clients.
    """
    if not (2 <= k_min <= k_max or k_min == k_max == 1):
        raise ValueError(f"clusters from {k_min} to {k_max}: expected 2 <= k_min <= k_max, or 1 and 1 for a single one")
    clients = d.shape[0]
    k_max = min(k_max, max(clients - 1, 1))
    if k_max < max(k_min, 2):
        return Clusters(jnp.zeros(clients, jnp.int32), jnp.ones((), jnp.int32), jnp.zeros((), d.dtype))
    values, vectors = eigh(laplacian(affinity(d, known), known))
    k, gap = eigengap(values, known.sum(), k_min, k_max)
    columns = vectors[:, :k_max] * (jnp.arange(k_max) < k)
    length = jnp.linalg.norm(columns, axis=1, keepdims=True)
    points = columns / jnp.where(length > 0, length, 1.0)
    labels = merge_single(kmeans(key, points, known, k, k_max), d, known, k_max)
    sizes = members(labels, known, k_max).sum(0)
    labels = jnp.where(known, labels, sizes.argmax()).astype(jnp.int32)
    return Clusters(labels, (sizes > 0).sum(), gap)


def affinity(d: Array, known: Array) -> Array:
    """``exp(-d^2 / (2 sigma^2))``, ``sigma`` the median distance of two different known clients; 0 for others."""
    pairs = known[:, None] & known
    apart = pairs & ~jnp.eye(len(d), dtype=bool)
    sigma = jnp.nanmedian(jnp.where(apart, d, jnp.nan))
    sigma = jnp.where(sigma > 0, sigma, 1.0)  # all the same, or nobody there
    return jnp.where(pairs, jnp.exp(-(d**2) / (2 * sigma**2)), 0.0)


def laplacian(a: Array, known: Array) -> Array:
    """``I - D^(-1/2) A D^(-1/2)`` of the known clients; 2 on the diagonal of the others, beyond all its eigenvalues."""
    degree = a.sum(1)
    inverse = jnp.where(known, jax.lax.rsqrt(jnp.where(known, degree, 1.0)), 0.0)
    return jnp.diag(jnp.where(known, 1.0, 2.0)) - inverse[:, None] * a * inverse


def eigengap(values: Array, clients: Array, k_min: int, k_max: int) -> tuple[Array, Array]:
    """``K`` with the largest ``values[K] - values[K - 1]`` (ascending), and that gap; 1 for less than ``k_min + 1``."""
    k = jnp.arange(k_min, k_max + 1)
    gaps = jnp.where(k < clients, values[k] - values[k - 1], -1.0)
    best = gaps.argmax()
    return jnp.where(gaps[best] < 0, 1, k[best]), gaps[best]


def kmeans(key: Array, points: Array, known: Array, k: Array, k_max: int, restarts: int = 16, steps: int = 30) -> Array:
    """Labels ``[N]`` below ``k`` of ``points [N, m]``: the best of ``restarts`` runs of Lloyd's algorithm.

    Starts are spread as in k-means++ (Arthur & Vassilvitskii 2007); only ``known [N]`` points count.
    """
    used = jnp.arange(k_max) < k
    weight = known.astype(points.dtype)

    def squares(centres: Array) -> Array:
        return jnp.sum((points[:, None] - centres) ** 2, -1)  # [N, k_max]

    def run(key: Array) -> tuple[Array, Array]:
        def spread(j: Array, centres: Array) -> Array:
            nearest = jnp.where(jnp.arange(k_max) < j, squares(centres), _FAR).min(1)
            chance = jnp.where(j == 0, weight, weight * nearest)
            chance = jnp.where(chance.sum() > 0, chance, weight)
            chosen = jax.random.categorical(jax.random.fold_in(key, j), jnp.log(chance))
            return centres.at[j].set(points[chosen])

        def step(_: Array, centres: Array) -> Array:
            own = jax.nn.one_hot(jnp.where(used, squares(centres), _FAR).argmin(1), k_max) * weight[:, None]
            count = own.sum(0)[:, None]
            return jnp.where(count > 0, matmul(own.T, points) / jnp.where(count > 0, count, 1.0), centres)

        centres = jax.lax.fori_loop(0, k_max, spread, jnp.zeros((k_max, points.shape[1]), points.dtype))
        left = jnp.where(used, squares(jax.lax.fori_loop(0, steps, step, centres)), _FAR)
        return jnp.sum(weight * left.min(1)), left.argmin(1)

    errors, labels = jax.vmap(run)(jax.random.split(purpose(key, "k-means"), restarts))
    return labels[errors.argmin()]


def merge_single(labels: Array, d: Array, known: Array, k_max: int) -> Array:
    """Members of clusters of one move to the cluster that is nearest on average, among those of more than one."""
    own = members(labels, known, k_max)
    sizes = own.sum(0)
    mean = matmul(d, own) / jnp.maximum(sizes, 1.0)  # [N, k_max]
    nearest = jnp.where(sizes > 1, mean, _FAR).argmin(1)
    return jnp.where(sizes[labels] > 1, labels, nearest)


def members(labels: Array, known: Array, k_max: int) -> Array:
    """``[N, k_max]`` 1 where a known client is in a cluster."""
    return jax.nn.one_hot(labels, k_max) * known[:, None]


def nearest(d: Array, labels: Array, known: Array, k_max: int) -> Array:
    """``[M]`` the cluster whose known members are nearest on average to each of ``M`` newcomers, ``d [M, N]``."""
    own = members(labels, known, k_max)
    sizes = own.sum(0)
    return jnp.where(sizes > 0, matmul(d, own) / jnp.maximum(sizes, 1.0), _FAR).argmin(1)
