"""Clients whose training failed are left out of their round. Ours; every production server has some such rule.

A client that sends a number that is not finite, or beyond ``LARGEST`` (of its loss too), counts as if it had sent what
it was sent, with weight zero; the others share its weight. Whoever has weight zero (it never answered, say) keeps the
memory it had, and its meta-gradients count as zero. Where nobody is left the server's state stays as it was, with all
that wrappers keep (unless ``Method.always``). What is finite and wrong is for wrappers: ``clip``, ``krum`` and the
like. Of pooled data (upper bounds) nobody's part can be told apart: one that fails makes the round fail, and the state
stays.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax.lora import Adapter
from fedlora_jax.method import Cohort, Memory, State, per_client

LARGEST = 1e9  # the square of a product of two such factors is 1e36; float32 ends at 3.4e38


class Arrived(NamedTuple):
    """What a server goes on with, ``[C, ...]``."""

    cohort: Cohort  # with weights of the same sum, 0 of who is left out, whose losses are 0
    received: Adapter
    memory: Memory
    meta_gradients: Any
    dropped: Array  # [] how many clients have no weight


def without_failed(cohort: Cohort, sent: Adapter, received: Adapter, memory: Memory, meta_gradients: Any) -> Arrived:
    """What clients sent, without those that failed; to the bit what they sent where none did.

    Args:
      cohort: with the memory that clients had, and the losses that they report.
      sent, received: adapters ``[C, ...]`` before and after local training.
      memory: ``[C, ...]`` after it.
      meta_gradients: ``[C, ...]``.
    """
    fine = _usable((received, meta_gradients, cohort.losses), cohort.weights)
    kept = lambda old, new: jax.tree.map(lambda x, y: jnp.where(per_client(fine, x) > 0, y, x), old, new)
    left = cohort.weights * fine
    scaled = left * (cohort.weights.sum() / jnp.where(left.sum() > 0, left.sum(), 1.0))
    losses = kept(jax.tree.map(jnp.zeros_like, cohort.losses), cohort.losses)
    return Arrived(
        cohort=cohort._replace(weights=jnp.where(fine.all(), cohort.weights, scaled), losses=losses),
        received=kept(sent, received),
        memory=kept(cohort.memory, memory),
        meta_gradients=kept(jax.tree.map(jnp.zeros_like, meta_gradients), meta_gradients),
        dropped=jnp.sum(~fine).astype(jnp.int32),
    )


def _usable(stacked: Any, weights: Array) -> Array:
    """``[C]`` whether a client counts, and of its row of the tree no number is nan or beyond ``LARGEST``."""
    rows = [(jnp.abs(x) <= LARGEST).all(tuple(range(1, x.ndim))) for x in jax.tree.leaves(stacked)]
    return jnp.stack([weights > 0, *rows]).all(0)


def if_any(weights: Array, new: State, old: State) -> State:
    """The new state, or the old one where nobody's weight ``[C]`` is above zero."""
    return jax.tree.map(lambda x, y: jnp.where((weights > 0).any(), x, y), new, old)
