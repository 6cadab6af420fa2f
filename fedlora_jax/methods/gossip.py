"""Decentralised LoRA: no server; clients of a graph average with their neighbours.

    x_i <- sum_j m_ij x_j (after local steps)       m_ij = 1 / (1 + max(d_i, d_j)) for neighbours, m_ii the rest of 1

after Lian et al., *Can Decentralized Algorithms Outperform Centralized Algorithms?*, NeurIPS 2017, arXiv 1705.09056
(D-PSGD, with several local steps), and the weights of Metropolis and Hastings, as Xiao et al., 2005, use them: every
client counts alike, and they sum to one both ways whoever is there. Who is away neither sends nor mixes, d_i counts
neighbours that are there. In factor space x is ``(a, b)``, and each neighbourhood misses the covariance of its factors;
in product space (``space="products"``) x_i is ``T_r(sum_j m_ij a_j b_j)``, turned towards the client's own factors.

The state is every client's adapter, ``[N, ...]``, which a simulation has in one place and a network does not; nobody in
particular, and who never took part, is dispatched their mean. ``disagreement`` in the report is how far clients are
from it. Ours: LoRA, and all of it together.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedlora_jax import lora, product
from fedlora_jax.checks import refuse_outside
from fedlora_jax.lora import Adapter
from fedlora_jax.method import About, Dispatch, Method, Traffic, mean, per_client

ABOUT = About(
    "Gossip (D-PSGD)",
    "after Lian et al. NeurIPS 2017",
    "1705.09056",
    "a, b, head",
    "a, b, head to neighbours",
    "n/a",
    tells="who it is",
)

Graph = Literal["ring", "grid", "random", "full"]
Space = Literal["factors", "products"]


class GossipState(NamedTuple):
    """adapters: every client's, [N, ...]."""

    adapters: Adapter


def gossip(population: int, graph: Graph = "ring", space: Space = "factors", degree: int = 4, seed: int = 0) -> Method:
    """Decentralised LoRA.

    Args:
      population: number of clients N; ``Cohort.ids`` are below it.
      graph: who is whose neighbour: ``ring``; ``grid``, as near to a square as N allows, four neighbours at most;
        ``random``, a connected one in which everybody has ``degree`` (fewer where two coincide); ``full``.
      space: what is averaged, ``factors`` or ``products``.
      degree: of ``random``, even, from 2 to below N.
      seed: of ``random``.

    Raises:
      ValueError: fewer than two clients, or another graph, space or degree.
    """
    refuse_outside("[2, inf)", population=population, degree=degree)
    refuse_outside("[0, inf)", seed=seed)
    for what, value, known in (("graph", graph, get_args(Graph)), ("space", space, get_args(Space))):
        if value not in known:
            raise ValueError(f"{what} must be one of {', '.join(known)}, got {value!r}")
    edges = neighbours(graph, population, degree, seed)

    def init(key, adapter):
        return GossipState(jax.tree.map(lambda x: jnp.broadcast_to(x, (population, *x.shape)), adapter))

    def dispatch(base, state, cohort):
        known = (cohort.ids >= 0) & (cohort.ids < population)
        average = mean(state.adapters, jnp.full(population, 1 / population))
        own = lambda x, y: jnp.where(per_client(known, x) > 0, x[cohort.ids], y)
        mask = lora.rank_mask(average, cohort.ranks)
        rows = jax.tree.map(lambda x, y, m: own(x, y) * m, state.adapters, average, mask)
        return Dispatch(base, rows, mask, context=())

    def aggregate(base, state, cohort, sent, received):
        rows = jnp.where(cohort.weights > 0, cohort.ids, population)  # of nobody: it is dropped
        ends = jax.tree.map(lambda x, y: x.at[rows].set(y, mode="drop"), state.adapters, received)
        there = jnp.zeros(population).at[rows].set(1.0, mode="drop")
        new = mixed(ends, mixing(edges, there), space)
        return GossipState(lora.tree_map(product.continued, new, state.adapters))  # columns that nobody holds

    def traffic(own, cohort):
        return Traffic(up=own, down=[own] * round(edges.sum() / population))

    return Method(
        init,
        dispatch,
        aggregate,
        traffic=traffic,
        report=lambda state: {"disagreement": disagreement(state.adapters)},
        uploads="none",  # nobody averages over all of them
    )


def mixing(edges: Array | np.ndarray, there: Array) -> Array:
    """``[N, N]`` how much each client takes of each; symmetric, rows sum to one.

    Args:
      edges: ``[N, N]`` 1 for neighbours, symmetric, 0 on the diagonal.
      there: ``[N]`` 1 for a client that takes part.
    """
    between = jnp.asarray(edges) * there[:, None] * there
    degrees = between.sum(1)
    weights = between / (1 + jnp.maximum(degrees[:, None], degrees))
    return weights + jnp.diag(1 - weights.sum(1))


def mixed(adapters: Adapter, weights: Array, space: Space) -> Adapter:
    """Every client's mean ``[N, ...]`` of adapters ``[N, ...]`` by its row of ``weights [N, N]``."""
    average = lambda x: jnp.einsum("ij,j...->i...", weights.astype(x.dtype), x, precision="highest")
    if space == "factors":
        return jax.tree.map(average, adapters)

    def products(x):
        one = lambda row: product.truncate(product.total(x, row[0]), x.a.shape[-1], like=row[1])
        alone = jnp.diagonal(weights) == 1  # with factors of their own choosing
        return jax.tree.map(lambda y, z: jnp.where(per_client(alone, y) > 0, y, z), x, jax.lax.map(one, (weights, x)))

    return lora.tree_map(products, adapters, full=average)


def neighbours(graph: Graph, clients: int, degree: int = 4, seed: int = 0) -> np.ndarray:
    """``[N, N]`` 1 where two clients are neighbours in a graph of ``gossip``."""
    edges, places = np.zeros((clients, clients)), np.arange(clients)
    if graph == "full":
        return 1 - np.eye(clients)
    if graph == "ring":
        edges[places, (places + 1) % clients] = 1
    if graph == "grid":
        width = max(w for w in range(1, int(clients**0.5) + 1) if clients % w == 0)
        right, below = places[places % width < width - 1], places[: clients - width]
        edges[right, right + 1], edges[below, below + width] = 1, 1
    if graph == "random":
        if degree % 2 or not 2 <= degree < clients:
            raise ValueError(f"degree must be even, from 2 to below {clients} clients, got {degree}")
        rng = np.random.default_rng(seed)
        for _ in range(degree // 2):  # rings in random orders: connected, and nearly regular
            order = rng.permutation(clients)
            edges[order, np.roll(order, 1)] = 1
    edges = np.maximum(edges, edges.T)
    np.fill_diagonal(edges, 0)
    return edges


def disagreement(adapters: Adapter) -> Array:
    """``sqrt(sum_i |x_i - xbar|^2 / sum_i |x_i|^2)`` over all arrays; 0: all clients hold the same."""
    squares = lambda tree: sum((jnp.sum(x**2) for x in jax.tree.leaves(tree)), jnp.zeros(()))
    apart = jax.tree.map(lambda x: x - x.mean(0), adapters)
    return jnp.sqrt(squares(apart) / jnp.maximum(squares(adapters), 1e-30))
