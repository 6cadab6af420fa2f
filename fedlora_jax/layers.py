"""Clients that hold, or train, some layers of a stack only: how many each may have, which, and the masks of it.

The stack is what the adapter holds under ``blocks``: every leaf there has a leading axis of layers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import lora
from fedlora_jax.keys import purpose
from fedlora_jax.lora import Adapter

STACK = "blocks"


def shares(text: str) -> tuple[float, ...]:
    """``"1.0,0.75,0.5"`` as numbers: the shares of the layers that clients may have, each equally often."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < value <= 1 for value in values):
        raise ValueError(f"depths are shares of the layers above 0, at most 1, such as 1.0,0.75,0.5; got {text!r}")
    return values


def depth(adapter: Adapter) -> int:
    """The number of layers in the stack."""
    sizes = {x.a.shape[0] if x.a.ndim > 2 else 0 for x in lora.low_rank_leaves(adapter.get(STACK, {}))}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"clients of several depths need adapted kernels [layers, in, out] under {STACK!r}; the adapter has "
            f"{', '.join(lora.flatten(adapter))}: adapt a kernel of the stack"
        )
    return sizes.pop()


def budgets(shares: tuple[float, ...], deal: Array, ids: Array, depth: int) -> Array:
    """``[C]`` layers of each client, dealt at random; nobody in particular (id -1) has all of them.

    Dealt as in a trial with blocks: of clients ``0 .. n - 1``, ``n .. 2 n - 1``, ... (``n`` shares) each gets another
    share, in an order of their own. So every share occurs equally often, and none goes with what else numbers say of
    clients, such as their domain.

    Args:
      shares: of the layers.
      deal: key; it and a client's id decide for good, for clients that never trained as well.
      ids: ``[C]``.
      depth: layers there are.
    """
    counts = jnp.asarray([max(1, round(share * depth)) for share in shares])

    def one(id_: Array) -> Array:
        order = jax.random.permutation(jax.random.fold_in(deal, id_ // len(shares)), counts)
        return jnp.where(id_ < 0, depth, order[id_ % len(shares)])

    return jax.vmap(one)(ids)


def draw(key: Array, ids: Array, count: Array, log_odds: Array) -> Array:
    """``[C, layers]`` 0/1: ``count[c]`` layers each, drawn one after another with odds ``exp(log_odds) [layers]``.

    A client's draw depends on the key and its id alone. The largest of ``log_odds`` plus Gumbel noise are such a draw.
    """

    def one(id_: Array, count: Array) -> Array:
        own = jax.random.fold_in(purpose(key, "layers"), id_)
        score = log_odds + jax.random.gumbel(own, log_odds.shape)
        return (jnp.argsort(jnp.argsort(-score)) < count).astype(log_odds.dtype)

    return jax.vmap(one)(ids, count)


def only(mask: Adapter, held: Array) -> Adapter:
    """The mask ``[C, ...]`` with the layers of the stack that a client does not hold at zero, ``held [C, layers]``."""
    row = lambda m: m * held.reshape(*held.shape, *(1,) * (m.ndim - 2)).astype(m.dtype)
    return mask | {STACK: jax.tree.map(row, mask[STACK])}


def average_share(own: Adapter, shares: tuple[float, ...]) -> Adapter:
    """Arrays as large as what a client of average depth holds of its adapter: whatever layers those are."""
    layers = depth(own)
    mean = sum(max(1, round(share * layers)) for share in shares) / len(shares)
    part = lambda x: jnp.zeros(round(x.size * mean / layers), x.dtype)
    return own | {STACK: jax.tree.map(part, own[STACK])}
