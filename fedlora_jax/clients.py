"""The population of clients, and drawing cohorts and batches from it inside a compiled program."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from fedlora_jax.batches import Padded
from fedlora_jax.checks import refuse_outside
from fedlora_jax.keys import purpose
from fedlora_jax.method import Cohort, Memory


class Population(NamedTuple):
    """All clients, stacked. Data stay in one array that everybody shares; a client is a list of its rows."""

    rows: Array  # [N, n_max] row numbers of each client's examples, padded at the end with any valid row
    sizes: Array  # [N] how many of them are the client's
    ranks: Array  # [N]
    signatures: Any = ()  # a Signature [N, 1 + V, ...]: view 0 is of all of a client's data, the others of random parts
    weights: Any = ()  # [N] how much each client counts; (): by how many examples it holds
    shares: Any = ()  # [N] of ``members``: their parts of the weight of all clients they were taken from
    examples: Any = ()  # [N] how many examples each goes through in a round, in batches that are then Padded: E epochs
    #   are E n of them, K steps of B are K B; (): as many as the program's steps take
    malicious: Any = ()  # [N] 1 for a client that attacks (``fedlora_jax.attacks``), else 0; (): nobody does

    def members(self, ids: Array | np.ndarray) -> Population:
        """The clients ``ids`` alone, in that order."""
        return jax.tree.map(lambda x: x[ids], self._replace(shares=self._shares()))

    def cohort(
        self, ids: Array, memory: Memory, batches: Any = (), queries: Any = (), views: Array | int = 0
    ) -> Cohort:
        """The clients ``ids`` with their weights, each under one view of its signature."""
        return Cohort(
            ids=ids,
            weights=self._weights()[ids].astype(jnp.float32),
            ranks=self.ranks[ids],
            signatures=jax.tree.map(lambda x: x[ids, views], self.signatures),
            memory=jax.tree.map(lambda x: x[ids], memory),
            batches=batches,
            queries=queries,
            shares=self._shares()[ids],
            malicious=jax.tree.map(lambda x: x[ids], self.malicious),
        )

    def _weights(self) -> Array:
        return self.sizes if isinstance(self.weights, tuple) else self.weights

    def _shares(self) -> Array:
        if not isinstance(self.shares, tuple):
            return self.shares
        weights = self._weights()
        return weights.astype("float32") / weights.sum().astype("float32")


class Sampling(NamedTuple):
    """Who takes part in a round: each of ``clients`` joins with probability ``rate``, and of those ``most`` at most.

    Rate 1 is a sample of fixed size, without replacement; ``most`` = ``clients`` is Poisson sampling, or everybody.
    Programs have ``most`` places; where fewer join, the clients at the last ones do not take part (weight 0).
    """

    clients: int
    most: int
    rate: float = 1.0

    @property
    def expected(self) -> float:
        """How many take part, if ``most`` cuts none off."""
        return min(self.clients * self.rate, float(self.most))

    def joined(self, key: Array) -> Array:
        """``[most]`` whether there is somebody at each place; those at places are in random order (``sample_ids``)."""
        return jnp.arange(self.most) < jnp.sum(jax.random.uniform(key, (self.clients,)) < self.rate)


def padded(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Row numbers of every client ``[N, n_max]``, as ``Population`` wants them, from one array for each.

    Raises:
      ValueError: a client without examples; it could neither train nor be described.
    """
    empty = [i for i, part in enumerate(parts) if len(part) == 0]
    if empty:
        raise ValueError(f"client(s) {empty[:5]} of {len(parts)} have no examples: leave them out or split otherwise")
    widest = max(len(part) for part in parts)
    return np.stack([np.concatenate([part, np.full(widest - len(part), part[0])]) for part in parts]).astype(np.int32)


def sample_ids(key: Array, clients: int, participants: int) -> Array:
    """``[participants]`` different clients, uniformly; all of them, in order, when everybody takes part."""
    if not 1 <= participants <= clients:
        raise ValueError(f"{participants} clients per round out of {clients}: choose 1 to {clients}")
    if participants == clients:
        return jnp.arange(clients)
    return jax.random.permutation(key, clients)[:participants]


def sample_views(key: Array, population: Population, ids: Array) -> Array:
    """``[C]`` which view of its signature each client shows: a random part of its data, where there are parts.

    A generator that never sees the same signature twice cannot learn clients by heart.
    """
    arrays = jax.tree.leaves(population.signatures)
    parts = arrays[0].shape[1] - 1 if arrays else 0
    if parts == 0:
        return jnp.zeros_like(ids)
    one = lambda id_: jax.random.randint(jax.random.fold_in(jax.random.fold_in(key, id_), 1), (), 1, 1 + parts)
    return jax.vmap(one)(ids)


def sample_answers(key: Array, ids: Array, dropouts: float) -> Array:
    """``[C]`` whether each client answers, who does not with the probability ``dropouts``.

    Raises:
      ValueError: no probability.
    """
    refuse_outside("[0, 1)", dropouts=dropouts)
    one = lambda id_: jax.random.uniform(purpose(jax.random.fold_in(key, id_), "answers"))
    return jax.vmap(one)(ids) >= dropouts


def sample_stops(key: Array, ids: Array, stragglers: float, examples: Array, batch: int) -> Array:
    """``[C]`` how many of ``examples [C]`` each client goes through that may stop before its last local step.

    It does with the probability ``stragglers``, after 1 to T - 1 of its T steps, which are equally likely; who has one
    step takes it.

    Raises:
      ValueError: no probability.
    """
    refuse_outside("[0, 1]", stragglers=stragglers)
    one = lambda id_: jax.random.uniform(purpose(jax.random.fold_in(key, id_), "stops"), (2,))
    stops, when = jax.vmap(one)(ids).T
    steps = -(-examples // batch)
    early = batch * (1 + (when * (steps - 1)).astype(examples.dtype))
    return jnp.where(stops < stragglers, jnp.minimum(early, examples), examples)


def sample_batches(
    key: Array, data: Any, population: Population, ids: Array, steps: int, batch: int, smallest: int
) -> Any:
    """``[C, steps, batch, ...]`` examples: each client passes through its own data epoch by epoch, freshly shuffled.

    A client's draw depends on ``key`` and its id alone, not on who else takes part. ``smallest`` is the number of
    examples of the smallest client. Where the population says how many ``examples`` each goes through, what is beyond
    them only fills up its batches (``batches.Padded``).

    Raises:
      ValueError: a client is smaller (where sizes are not traced).
    """
    return sample_held_out(key, data, population, ids, steps, batch, smallest, 0)[0]


def sample_held_out(
    key: Array, data: Any, population: Population, ids: Array, steps: int, batch: int, smallest: int, query: int
) -> tuple[Any, Any]:
    """``sample_batches``, and ``[C, query, ...]`` examples that are in none of these batches.

    A client sets at most a quarter of its examples apart, at least one, others in every draw; a client with fewer than
    ``query`` of them repeats them.
    """
    return sample_members(key, data, population.members(ids), ids, steps, batch, smallest, query)


def sample_rounds(
    key: Array, data: Any, population: Population, ids: Array, steps: int, batch: int, smallest: int, query: int
) -> tuple[Any, Any]:
    """``sample_held_out`` for several rounds: what a client keeps apart is in no batch of any of them.

    Args:
      ids: ``[R, C]`` who takes part in each round; the other arguments are ``sample_held_out``'s, per round.

    Returns:
      batches ``[R, C, steps, batch, ...]``, in which a client that takes part again goes on with its epoch, and
      ``[C, query, ...]`` examples of the last round's clients.
    """
    if not isinstance(population.examples, tuple):
        raise ValueError("several rounds are drawn at once where all clients take the same steps: leave out examples")
    rounds = ids.shape[0]
    numbers = jnp.arange(jax.tree.leaves(data)[0].shape[0])
    # A client's draw depends on the key and its id alone: in every round it sets the same examples apart, and draws
    # the batches of all rounds from the rest.
    draw = lambda ids: sample_held_out(key, numbers, population, ids, rounds * steps, batch, smallest, query)
    batches, held_out = jax.vmap(draw)(ids)
    own = jax.vmap(lambda t, rows: jax.lax.dynamic_slice_in_dim(rows, t * steps, steps, 1))(jnp.arange(rounds), batches)
    examples = lambda rows: jax.tree.map(lambda x: x[rows], data)
    return examples(own), examples(held_out[-1]) if query else ()


def sample_members(
    key: Array, data: Any, members: Population, ids: Array, steps: int, batch: int, smallest: int, query: int
) -> tuple[Any, Any]:
    """``sample_held_out`` for the clients ``ids [C]``, of whom ``members`` holds one row each."""
    if query and smallest < 2:
        raise ValueError("a client with one example has none to keep apart: raise the minimum to 2, or query to 0")
    if not isinstance(members.sizes, Tracer) and len(ids) and (least := int(members.sizes.min())) < smallest:
        raise ValueError(f"smallest is {smallest}, and the smallest of these clients has {least}: give its size")

    def one(id_: Array, rows: Array, size: Array) -> tuple[Array, Array]:
        own = jax.random.fold_in(key, id_)
        if not query:
            return sample_rows(own, rows, size, steps, batch), jnp.zeros(0, rows.dtype)
        held_out = lambda n: jnp.maximum(1, jnp.minimum(query, n // 4))
        rows = rows[_shuffled(jax.random.fold_in(own, 1), rows.shape[0], size)]
        held = held_out(size)
        kept = jnp.maximum(size - held, 1)
        queries = rows[size - held + jnp.arange(query) % held]
        return sample_rows(own, rows, kept, steps, batch), queries

    batches, queries = jax.vmap(one)(ids, members.rows, members.sizes)
    examples = lambda rows: jax.tree.map(lambda x: x[rows], data)
    drawn = (
        examples(batches) if isinstance(members.examples, tuple) else _filled_up(examples(batches), batches, members)
    )
    return drawn, examples(queries) if query else ()


def _filled_up(drawn: Any, rows: Array, members: Population) -> Padded:
    """Batches of ``rows [C, T, B]`` of which the first ``members.examples`` count.

    Raises:
      ValueError: they are more than there are, or none (where that is not traced).
    """
    clients, steps, batch = rows.shape
    if not isinstance(members.examples, Tracer) and clients:
        least, most = int(members.examples.min()), int(members.examples.max())
        if least < 1 or most > steps * batch:
            raise ValueError(
                f"clients go through {least} to {most} examples in a round: expected 1 to {steps * batch}, which "
                f"is what {steps} steps of {batch} make"
            )
    present = jnp.arange(steps * batch) < jnp.asarray(members.examples)[:, None]
    return Padded(drawn, present.reshape(clients, steps, batch))


def sample_rows(key: Array, rows: Array, size: Array, steps: int, batch: int) -> Array:
    """Row numbers ``[steps, batch]`` for one client (see ``sample_batches``).

    What it takes grows with ``steps * batch + len(rows)``, whatever the size.
    """
    drawn, width = steps * batch, rows.shape[0]
    position = jnp.arange(drawn + width)  # to the end of the last epoch begun
    epoch, item = position // size, position % size
    _, _, item = jax.lax.sort((epoch, _scores(key, epoch * width + item), item), num_keys=2)
    return rows[item[:drawn]].reshape(steps, batch)


def _scores(key: Array, numbers: Array) -> Array:
    """A random integer for each number ``[n]``; of the key and that number alone, so that no table has to be drawn.

    They order what they are for as ``jax.random.uniform(key, [more than n])[numbers]`` does.
    """
    children = jax.vmap(partial(jax.random.fold_in, key))(numbers.astype(jnp.uint32))
    words = jnp.moveaxis(jax.random.key_data(children), -1, 0)
    return reduce(jnp.bitwise_xor, words) >> 9


def _shuffled(key: Array, width: int, size: Array) -> Array:
    """``[width]``: a permutation of the first ``size`` numbers, the others after them."""
    return jnp.argsort(jnp.where(jnp.arange(width) < size, jax.random.uniform(key, (width,)), jnp.inf))
