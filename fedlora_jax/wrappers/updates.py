"""Algebra of what clients send: what they changed, how large it is, who counts in it how much."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax.lora import Adapter
from fedlora_jax.method import Cohort, Dispatch, Method, per_client, shares


def present(cohort: Cohort) -> Array:
    """``[C]`` 1 for a client that takes part, 0 where the weight is zero."""
    return (cohort.weights > 0).astype(cohort.weights.dtype)


def control_weights(wrapper: str, weights: str, population: int) -> Callable[[Cohort], Array]:
    """``(cohort) -> [C]`` how much each client counts in what is kept of all clients of a population.

    Args:
      wrapper: which asks.
      weights: ``counts``: its part of the population's weight; ``uniform``: 1 of N. 0 for a client that is not there.
      population: N.

    Raises:
      ValueError: other weights.
    """
    if weights not in ("counts", "uniform"):
        raise ValueError(f"weights of {wrapper} must be 'counts' or 'uniform', got {weights!r}")
    if weights == "uniform":
        return lambda cohort: present(cohort) / population
    return lambda cohort: shares(cohort, population)


def where_moved(inner: Method, cohort: Cohort, sent: Dispatch, new: Adapter, old: Adapter) -> Adapter:
    """``new`` where any client that takes part may move an entry that it shares, ``old`` elsewhere; both ``[...]``."""
    mask = inner.aggregated(sent.mask) if inner.aggregated else sent.mask
    by_any = lambda m: ((m > 0) & (per_client(cohort.weights > 0, m) > 0)).any(0)
    return jax.tree.map(lambda m, x, y: jnp.where(by_any(m), x, y), mask, new, old)


def updates(sent: Dispatch, received: Adapter) -> Adapter:
    """What clients changed of what they share, ``[C, ...]``."""
    return change(sent.mask, sent.adapter, received)


def change(mask: Adapter, sent: Adapter, received: Adapter) -> Adapter:
    """What was changed of what is shared, of one client or of all."""
    return jax.tree.map(lambda x, y, m: (y - x) * m.astype(x.dtype), sent, received, mask)


def changed(mask: Adapter, sent: Adapter, received: Adapter, updates: Adapter) -> Adapter:
    """The uploads whose shared entries are those sent, changed by ``updates``; what is not shared stays."""
    return jax.tree.map(lambda x, y, m, d: jnp.where(m > 0, x + d, y), sent, received, mask, updates)


def square_norms(stacked: Adapter) -> Array:
    """``[C]`` squared norms over all arrays together."""
    return inner_products(stacked, stacked)


def inner_products(one: Adapter, other: Adapter) -> Array:
    """``[C]`` inner products of two trees ``[C, ...]`` over all arrays together."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return sum((jnp.sum(x * y, tuple(range(1, x.ndim))) for x, y in pairs), jnp.zeros(()))
