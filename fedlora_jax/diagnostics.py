"""What one aggregation did, measured in product space: the update, and how much of it averaging got wrong.

With ``M = sum_c p_c a_c b_c`` (the mean of the clients' products) a mean of factors misses

    E = M - abar bbar = sum_c p_c (a_c - abar)(b_c - bbar).

All norms are Frobenius norms over all adapted layers together, with the scale ``s`` in.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import product
from fedlora_jax.lora import LoRA, delta, flatten, is_lora
from fedlora_jax.method import Dispatch, mean, per_client


class Aggregation(NamedTuple):
    """Scalars of one round."""

    update: Array  # |mean of the clients' weight changes|: what an exact server would add
    bias: Array  # |new server weights - mean of the clients' weights|: 0 for exact methods
    factor_bias: Array  # |E|: what a mean of factors would have missed this round
    bias_share: Array  # bias / update


def measure(sent: Dispatch, received, weights: Array, after: Dispatch) -> Aggregation:
    """Compare the server's new model with the mean of the models that clients sent back.

    Clients that sent what is not finite are left out: a server that averaged them in none the less has a bias of nan.

    Args:
      sent: what the clients started from.
      received: their adapters after local training, ``[C, ...]``.
      weights: ``[C]``, summing to one.
      after: what the new state dispatches to one average client, ``[1, ...]``.
    """
    fine = finite(received) if jax.tree.leaves(received) else jnp.ones(weights.shape, bool)  # nothing is averaged
    weights = jnp.where(fine, weights, 0.0)
    weights = weights / jnp.maximum(weights.sum(), 1e-12)
    kept = lambda x, y: jnp.where(per_client(fine, x), y, x)
    received = jax.tree.map(kept, sent.adapter, received)
    old_base, new_base = flatten(sent.base), flatten(after.base)
    start, end, server = (flatten(x) for x in (sent.adapter, received, after.adapter))
    squares = []
    for name, x in end.items():
        if not is_lora(x):
            continue
        bias = _to_server(x, weights, LoRA(server[name].a[0], server[name].b[0], x.scale))
        if new_base[name] is old_base[name]:
            bias_norm = product.norm(bias)
        else:  # the method keeps a dense residual on its base, so a dense difference costs nothing new
            bias_norm = product.safe_sqrt(jnp.sum((new_base[name] - old_base[name] - delta(bias)) ** 2, (-2, -1)))
        update = product.total(product.difference(x, start[name]), weights)
        center = LoRA(mean(x.a, weights), mean(x.b, weights), x.scale)
        factor = product.total(LoRA(x.a - center.a, x.b - center.b, x.scale), weights)
        squares.append([jnp.sum(n**2) for n in (product.norm(update), bias_norm, product.norm(factor))])
    squares = squares or [[jnp.zeros(())] * 3]  # nothing is of a low rank
    update, bias, factor = (product.safe_sqrt(jnp.stack(column).sum()) for column in zip(*squares, strict=True))
    return jax.lax.stop_gradient(Aggregation(update, bias, factor, bias / jnp.maximum(update, 1e-30)))


def finite(stacked) -> Array:
    """``[C]`` whether every number of a row of the tree ``[C, ...]`` is finite."""
    return jnp.stack([jnp.isfinite(x).all(tuple(range(1, x.ndim))) for x in jax.tree.leaves(stacked)]).all(0)


def _to_server(x: LoRA, weights: Array, server: LoRA) -> LoRA:
    """``sum_c p_c a_c b_c - a b``, centred at the server's factors so that exact methods give exactly zero."""
    center = LoRA(mean(x.a, weights), mean(x.b, weights), x.scale)
    spread = product.total(LoRA(x.a - server.a, x.b - server.b, x.scale), weights)
    shift_a = LoRA(center.a - server.a, server.b, x.scale)
    shift_b = LoRA(server.a, center.b - server.b, x.scale)
    return product.plus(product.plus(spread, shift_a), shift_b)
