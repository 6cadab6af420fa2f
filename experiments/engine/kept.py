"""What clients keep between rounds, on the host: a part of a run is given the rows of those it is about."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.setup import memory
from fedlora_jax.method import Method


class Rows(NamedTuple):
    """Whose memory a part of the rounds is given, of the seeds that it computes; ``()`` where that is on the device."""

    memory: Any = ()  # [s, M, ...] of those who take part in any of them, each once, filled up
    ids: Any = ()  # [s, R, C] who takes part in each
    places: Any = ()  # [s, R, C] where in memory


def is_staged(kept: str, size: int) -> bool:
    """Do rows of so many bytes stay on the host, and only those of a part go to the device?"""
    have = memory.available()
    return size > 0 and (kept == "staged" or (kept == "auto" and have is not None and size > memory.RESIDENT * have))


def start(method: Method, adapters: Any, clients: int) -> Any:
    """Rows ``[S, N, ...]`` of clients before the first round, in NumPy."""
    rows = jax.device_get(jax.jit(jax.vmap(method.init_client))(adapters))
    return jax.tree.map(lambda x: np.repeat(np.asarray(x)[:, None], clients, 1), rows)


def taken(kept: Any, first: int, ids: np.ndarray, most: int) -> tuple[Rows, list[np.ndarray]]:
    """Of all rows those of the clients ``ids [s, R, C]``, of the seeds from ``first`` on, at most so many of each.

    And who they are, for ``put_back``.
    """
    who = [np.unique(own) for own in ids]
    filled = [np.pad(own, (0, most - len(own)), mode="edge") for own in who]
    rows = jax.tree.map(lambda x: np.stack([x[first + s, own] for s, own in enumerate(filled)]), kept)
    return Rows(
        rows, ids, np.stack([np.searchsorted(*pair) for pair in zip(who, ids, strict=True)]).astype(np.int32)
    ), who


def put_back(kept: Any, first: int, who: list[np.ndarray], rows: Any) -> None:
    """Write what a part of the rounds left of ``taken`` over what was there."""
    for all_of_it, new in zip(*map(jax.tree.leaves, (kept, rows)), strict=True):
        for s, own in enumerate(who):
            all_of_it[first + s, own] = new[s, : len(own)]


def served(kept: Any, strangers: Any, first: int, who: np.ndarray, ids: np.ndarray) -> Any:
    """Rows ``[s, G, ...]`` of clients at the places ``ids [G]`` among those that are scored.

    ``who [s, n]`` are those of them that train, ``strangers [s, K, ...]`` the rows of the others, who come after.
    """
    trains = ids < who.shape[1]

    def rows(x: np.ndarray, unseen: np.ndarray) -> np.ndarray:
        out = np.empty((len(who), len(ids), *x.shape[2:]), x.dtype)
        for s, own in enumerate(who):
            out[s, trains], out[s, ~trains] = x[first + s, own[ids[trains]]], unseen[s, ids[~trains] - len(own)]
        return out

    return jax.tree.map(rows, kept, strangers)


def like(rows: Any, *axes: int) -> Any:
    """Shapes ``[*axes, ...]`` of rows that are ``[S, N, ...]``."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*axes, *x.shape[2:]), x.dtype), rows)


def writable(rows: Any) -> Any:
    """They themselves, or copies."""
    return jax.tree.map(lambda x: x if isinstance(x, np.ndarray) and x.flags.writeable else np.array(x), rows)
