"""Batches that are not full: an epoch ends in a part of one, and clients may take unequal numbers of local steps.

One program serves all clients, so that everybody's batches have the shape of the longest: what fills them up is marked,
and a step of which nothing is there is not taken.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Padded(NamedTuple):
    """Batches and which of their examples count; in ``Cohort.batches`` in place of examples alone.

    A loss is given one of them, and means what is there: ``batch.mean(losses of batch.examples)``.
    """

    examples: Any  # [..., B, ...]
    present: Array  # [..., B] True for an example that counts; for none of a step that is not taken

    def mean(self, values: Array) -> Array:
        """The mean of ``values [B]`` over the examples that are there; 0 where there are none."""
        return jnp.where(self.present, values, 0).sum() / jnp.maximum(self.present.sum(), 1)


def steps_taken(batches: Any, axis: int = 0) -> Any:
    """How many of the local steps that lie along ``axis`` are taken: an integer, or ``[...]`` of padded batches.

    At least 1, so that it can be divided by.
    """
    if not isinstance(batches, Padded):
        return jax.tree.leaves(batches)[0].shape[axis]
    return jnp.maximum(batches.present.any(-1).sum(axis), 1)


def mean_over_steps(batches: Any, values: Array) -> Array:
    """The mean of ``values [T]`` over the steps that are taken; they are 0 where one is not."""
    return values.sum() / steps_taken(batches) if isinstance(batches, Padded) else values.mean()


def pooled(batches: Any) -> Any:
    """The batches ``[1, C T, B, ...]`` of all clients as one's, step by step over all of them, from ``[C, T, B, ...]``.

    Of padded batches those examples that are there come first, so that the last batch alone is not full.
    """

    def mixed(x: Array) -> Array:
        clients, steps, batch = x.shape[:3]
        return jnp.moveaxis(x, 0, 2).reshape(1, steps * clients, batch, *x.shape[3:])

    own = jax.tree.map(mixed, batches)
    if not isinstance(own, Padded):
        return own
    shape = own.present.shape
    order = jnp.argsort(~own.present.ravel(), stable=True)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:])[order].reshape(*shape, *x.shape[3:]), own)
