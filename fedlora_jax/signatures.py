"""A client's signature: a short description of its data, seen through the frozen backbone.

The design is ours (HyperLoRA, arXiv 2606.06154, names a compact distribution signature and does not publish it):

    z_c = [ P std(mu_c) ; P std(log sigma_c) ; sqrt(label histogram) ; log(1 + n_c) / 10 ]

``mu_c`` and ``sigma_c`` are the mean and deviation of the client's features, ``P`` a fixed Gaussian projection, and
``std`` standardises over training clients with sums only, so that it could be computed under secure aggregation.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Moments(NamedTuple):
    """What one client computes."""

    mean: Array  # [..., d]
    log_deviation: Array  # [..., d]
    histogram: Array  # [..., classes] shares
    size: Array  # [...]


class Standard(NamedTuple):
    """Mean and deviation over training clients of the two feature moments, ``[2, d]`` each."""

    mean: Array
    deviation: Array


def moments(features: Array, labels: Array, valid: Array, classes: int) -> Moments:
    """Moments of one client's features ``[n, d]`` over the examples where ``valid [n]``."""
    weight = valid.astype(features.dtype)[:, None] / jnp.maximum(valid.sum(), 1)
    mean = jnp.sum(weight * features, 0)
    deviation = jnp.sqrt(jnp.sum(weight * (features - mean) ** 2, 0) + 1e-6)
    histogram = jnp.sum(weight * jax.nn.one_hot(labels, classes), 0)
    return Moments(mean, jnp.log(deviation), histogram, valid.sum())


def standard(clients: Moments) -> Standard:
    """Statistics over training clients; reuse them unchanged for clients never seen."""
    pair = jnp.stack([clients.mean, clients.log_deviation])  # [2, N, d]
    return Standard(pair.mean(1), pair.std(1) + 1e-6)


def signatures(clients: Moments, stats: Standard, size: int = 64) -> Array:
    """Signatures ``[N, 2 * size + classes + 1]`` of clients' moments ``[N, ...]``."""
    pair = jnp.stack([clients.mean, clients.log_deviation], 1)  # [N, 2, d]
    scaled = (pair - stats.mean) / stats.deviation
    projection = jax.random.normal(jax.random.key(0), (pair.shape[-1], size)) / jnp.sqrt(pair.shape[-1])
    shape = (scaled @ projection).reshape(pair.shape[0], -1)
    amount = jnp.log1p(clients.size.astype(shape.dtype))[:, None] / 10
    return jnp.concatenate([shape, jnp.sqrt(clients.histogram), amount], -1)
