"""The population of clients, and drawing cohorts and batches from it inside a compiled program."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax.method import Cohort, Memory


class Population(NamedTuple):
    """All clients, stacked. Data stay in one array that everybody shares; a client is a list of its rows."""

    rows: Array  # [N, n_max] row numbers of each client's examples, padded at the end with any valid row
    sizes: Array  # [N] how many of them are the client's
    ranks: Array  # [N]
    signatures: Array  # [N, m]

    def cohort(self, ids: Array, memory: Memory, batches: Any = ()) -> Cohort:
        """The clients ``ids``, weighted by how many examples they hold."""
        return Cohort(
            ids=ids,
            weights=self.sizes[ids].astype(jnp.float32),
            ranks=self.ranks[ids],
            signatures=self.signatures[ids],
            memory=jax.tree.map(lambda x: x[ids], memory),
            batches=batches,
        )


def sample_ids(key: Array, clients: int, participants: int) -> Array:
    """``[participants]`` different clients, uniformly; all of them, in order, when everybody takes part."""
    if not 1 <= participants <= clients:
        raise ValueError(f"{participants} clients per round out of {clients}: choose 1 to {clients}")
    if participants == clients:
        return jnp.arange(clients)
    return jax.random.permutation(key, clients)[:participants]


def sample_batches(
    key: Array, data: Any, population: Population, ids: Array, steps: int, batch: int, smallest: int
) -> Any:
    """``[C, steps, batch, ...]`` examples: each client passes through its own data epoch by epoch, freshly shuffled.

    A client's draw depends on ``key`` and its id alone, not on who else takes part.
    """

    def one(id_: Array) -> Array:
        return sample_rows(
            jax.random.fold_in(key, id_), population.rows[id_], population.sizes[id_], steps, batch, smallest
        )

    rows = jax.vmap(one)(ids)
    return jax.tree.map(lambda x: x[rows], data)


def sample_rows(key: Array, rows: Array, size: Array, steps: int, batch: int, smallest: int) -> Array:
    """Row numbers ``[steps, batch]`` for one client (see ``sample_batches``)."""
    epochs = -(-steps * batch // smallest)
    scores = jax.random.uniform(key, (epochs, rows.shape[0]))
    order = jnp.argsort(jnp.where(jnp.arange(rows.shape[0]) < size, scores, jnp.inf), axis=1)  # padding comes last
    position = jnp.arange(steps * batch)
    return rows[order[position // size, position % size]].reshape(steps, batch)
