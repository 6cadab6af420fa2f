"""ADF-LoRA: *Alternating Low-Rank Aggregation for Decentralized Federated Fine-Tuning*, Wang et al., 2025, arXiv
2511.18291.

    all clients train b in one round and a in the next; both are mixed with the neighbours', every round

RoLoRA without a server. One factor at a time keeps a mean of factors exact where all hold the same other one, and in a
network they do not: mixing the factor at rest as well brings it together. Ours: the graphs and weights of ``gossip``,
and that b is first, as at b = 0 a has no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from fedlora_jax.method import About, Method
from fedlora_jax.methods.gossip import GossipState, Graph, gossip
from fedlora_jax.methods.rolora import one_factor

ABOUT = About(
    "ADF-LoRA",
    "Wang et al. 2025",
    "2511.18291",
    "b or a in turn, head",
    "a, b, head to neighbours",
    "n/a",
    tells="who it is",
)


class ADFLoRAState(NamedTuple):
    """clients: as of ``gossip``. round: rounds done."""

    clients: GossipState
    round: Array


def adf_lora(population: int, graph: Graph = "ring", degree: int = 4, seed: int = 0) -> Method:
    """ADF-LoRA.

    Args:
      population, graph, degree, seed: as for ``gossip``.

    Raises:
      ValueError: as ``gossip``.
    """
    inner = gossip(population, graph, degree=degree, seed=seed)

    def dispatch(base, state, cohort):
        sent = inner.dispatch(base, state.clients, cohort)
        return sent._replace(mask=one_factor(sent.mask, state.round))

    def aggregate(base, state, cohort, sent, received):
        return ADFLoRAState(inner.aggregate(base, state.clients, cohort, sent, received), state.round + 1)

    return inner._replace(
        init=lambda key, adapter: ADFLoRAState(inner.init(key, adapter), jnp.zeros((), jnp.int32)),
        dispatch=dispatch,
        aggregate=aggregate,
        report=lambda state: inner.report(state.clients),
    )
