"""FedRA: *A Random Allocation Strategy for Federated Tuning to Unleash the Power of Heterogeneous Clients*, Su, Li &
Xue, ECCV 2024, arXiv 2311.11227.

    client c:  draws L_c of the L blocks each round and trains in the shallower network made of them
    server:    every block is the plain mean over the clients that hold it, and stays where nobody does

A block that is not held is skipped exactly, ``h + gate (block(h) - h)`` with gate 0; the arithmetic of it is not saved
here. Held blocks and the head travel, both ways. Clients count alike, whatever their data, as in the public code. With
clients of several ranks the same holds for columns: ours.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import keys, layers
from fedlora_jax.lora import Adapter
from fedlora_jax.method import About, Method, Traffic, broadcast, mean_of_holders, uniform

ABOUT = About(
    "FedRA",
    "Su et al. ECCV 2024",
    "2311.11227",
    "a, b of held blocks; head",
    "held blocks, head",
    "no",
    "depth",
    "which blocks it holds",
)


class FedRAState(NamedTuple):
    """adapter: as FedIT's. key: of the draws of blocks. deal: key that gives every client its depth."""

    adapter: Adapter
    key: Array
    deal: Array


def fedra(depths: str = "1.0,0.75,0.5") -> Method:
    """FedRA.

    Needs a model that reads ``blocks/gate [depth]`` from the ``lora`` collection, as ``models.vit`` does, and adapted
    kernels under ``blocks``. A client is evaluated with the blocks of the next draw; nobody in particular has all.

    Args:
      depths: shares of the blocks, dealt to clients at random and for good, each to equally many (``layers.budgets``).
    """
    shares = layers.shares(depths)

    def init(key, adapter):
        layers.depth(adapter)
        return FedRAState(adapter, key, keys.purpose(key, "depth"))

    def dispatch(base, state, cohort):
        depth = layers.depth(state.adapter)
        count = layers.budgets(shares, state.deal, cohort.ids, depth)
        held = layers.draw(state.key, cohort.ids, count, jnp.zeros(depth))
        sent = broadcast(base, state.adapter, cohort)
        return sent._replace(mask=layers.only(sent.mask, held), context=held)

    def aggregate(base, state, cohort, sent, received):
        new = mean_of_holders(state.adapter, received, sent.mask, uniform(cohort))
        return FedRAState(new, jax.random.split(state.key)[0], state.deal)

    def traffic(own, cohort):
        held = layers.average_share(own, shares)
        return Traffic(up=held, down=held)

    return Method(init, dispatch, aggregate, model=gated, traffic=traffic)


def gated(adapter: Adapter, held: Array) -> Adapter:
    """The model of one client: the adapter, and a switch for every block."""
    return adapter | {layers.STACK: adapter[layers.STACK] | {"gate": held}}
