"""A pool of adapters that clients left behind, and who of them serves data that none of them has seen.

    retrieval    w_m = 1 / k  for the k largest cos(h, mu_m)      h, mu_m: mean features, from the mean of all mu_m
    likelihood   w_m = softmax_m mean_h log N(h; mu_m, v_m)        v_m: variances of the features of adapter m's owner

Retrieval is of *RAMoLE*, Zhao et al., 2024, arXiv 2406.16989: an adapter is known by the mean embedding of examples of
its owner, and outputs of those found are averaged, ``sum_m w_m a_m b_m``; its trained router is left out. Likelihoods
of a training-free Gaussian are of *HiLoRA*, Han et al., 2025, arXiv 2510.12266, as far as its summary says: they choose
adapters and how many of the rank-one components ``a_m[:, j] b_m[j]`` each of them gives (``rank``). Ours: features are
those of the frozen model, variances are drawn to that of all by ``SHRINK``, an adapter gives ``w_m rank`` components,
the longest first and the last in part, layer by layer; none is chosen token by token. What is trained in full is
averaged by w.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import lora, product
from fedlora_jax.checks import refuse_outside
from fedlora_jax.lora import Adapter, LoRA

SHRINK = 0.1  # how much of a variance is that of all owners' features


class Pool(NamedTuple):
    """adapters: [M, ...] models of clients. mean, variance: [M, d] of the features of each of these clients' data."""

    adapters: Adapter
    mean: Array
    variance: Array


Router = Callable[[Pool, Array, Array], Array]  # (pool, features [q, d], valid [q]) -> weights [M] that sum to one


def pooled(adapters: Adapter, features: Array, rows: Array, sizes: Array) -> Pool:
    """Adapters ``[M, ...]`` and what their owners' data are.

    Args:
      adapters: of clients.
      features: ``[n, d]`` of all examples, as the frozen model sees them.
      rows, sizes: ``[M, n_max]`` and ``[M]``, which examples are whose, as in ``Population``.
    """

    def of_one(rows: Array, size: Array) -> tuple[Array, Array]:
        there = (jnp.arange(len(rows)) < size)[:, None] / size
        mean = jnp.sum(there * features[rows], 0)
        return mean, jnp.sum(there * (features[rows] - mean) ** 2, 0)

    mean, variance = jax.vmap(of_one)(rows, sizes)
    whole = jnp.mean(variance + (mean - mean.mean(0)) ** 2, 0)
    return Pool(adapters, mean, (1 - SHRINK) * variance + SHRINK * whole + 1e-6)


def everyone(pool: Pool, features: Array, valid: Array) -> Array:
    """All alike."""
    return jnp.full(len(pool.mean), 1 / len(pool.mean))


def retrieval(count: int = 3) -> Router:
    """The ``count`` adapters whose owners' mean feature is nearest in direction, all alike; all where there are fewer.

    Raises:
      ValueError: a count below 1.
    """
    refuse_outside("[1, inf)", count=count)

    def route(pool: Pool, features: Array, valid: Array) -> Array:
        centre, some = pool.mean.mean(0), min(count, len(pool.mean))
        h, mu = _unit(_mean(features, valid) - centre), _unit(pool.mean - centre)
        found = jax.lax.top_k(mu @ h, some)[1]
        return jnp.zeros(len(mu)).at[found].set(1 / some)

    return route


def likelihood(pool: Pool, features: Array, valid: Array) -> Array:
    """By how likely each owner's Gaussian makes the features, of one example in the mean."""

    def of_one(mean: Array, variance: Array) -> Array:
        logs = jnp.sum((features - mean) ** 2 / variance + jnp.log(variance), -1)
        return -_mean(logs[:, None], valid)[0] / 2

    return jax.nn.softmax(jax.vmap(of_one)(pool.mean, pool.variance))


def served(adapters: Adapter, weights: Array, rank: int | None = None) -> Adapter:
    """One adapter made of ``adapters [M, ...]``, of rank M r.

    Args:
      adapters: of the pool.
      weights: ``[M]``, which sum to one.
      rank: how many rank-one components there are to be in all; ``None``: ``sum_m w_m a_m b_m``.
    """

    def mixed(x: LoRA) -> LoRA:
        if rank is None:
            return product.total(x, weights)
        size = jnp.linalg.norm(x.a, axis=-2) * jnp.linalg.norm(x.b, axis=-1)  # [M, ..., r]
        before = jnp.argsort(jnp.argsort(-size, -1), -1)
        given = rank * weights.reshape(-1, *(1,) * (size.ndim - 1))
        share = jnp.clip(given - before, 0, 1)
        return product.total(LoRA(x.a * share[..., None, :], x.b, x.scale), jnp.ones_like(weights))

    return lora.tree_map(mixed, adapters, full=lambda x: lora.mean(x, weights))


def _mean(x: Array, valid: Array) -> Array:
    return jnp.sum(x * valid[:, None], 0) / jnp.maximum(valid.sum(), 1)


def _unit(x: Array) -> Array:
    return x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-12)
