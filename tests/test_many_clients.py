"""What clients keep can stay in host memory: the same numbers, and a device that holds one cohort whatever there is."""

import functools
import gc

import jax
import numpy as np
import pytest
from helpers import ADAPTER, BASE, KEY, METHODS, OPTIMIZER, assert_near, examples, jit, loss_fn, population

from fedlora_jax import rounds
from fedlora_jax.clients import Population

MANY, PARTICIPANTS = 10_000, 64
SAMPLING = {"steps": 2, "batch": 3, "smallest": 3}


def crowd(clients: int) -> Population:
    """Clients of a few rows each, in NumPy."""
    rng = np.random.default_rng(clients)
    few = jax.device_get(population())
    return Population(
        rng.integers(0, 28, (clients, 5)),
        rng.integers(3, 6, clients),
        np.full(clients, 2),
        jax.tree.map(lambda x: rng.normal(size=(clients, *x.shape[1:])), few.signatures),
    )


@functools.cache
def round_of(name: str):
    return rounds.make_round(METHODS[name](), loss_fn, OPTIMIZER)


@functools.cache
def cohort_step(name: str):
    return jit(rounds.make_cohort_step(round_of(name), **SAMPLING))


@pytest.mark.long
def test_memory_on_the_host_gives_the_same_numbers():
    method, data, clients = METHODS["ditto"](), examples(count=28), crowd(7)
    inside = jit(rounds.make_step(round_of("ditto"), participants=4, **SAMPLING))
    outside = rounds.make_host_step(cohort_step("ditto"), participants=4)
    run, hosted = (start(method, KEY, ADAPTER, 7) for start in (rounds.start, rounds.start_on_host))
    assert_near(hosted, run, 0)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(hosted.memory))
    for _ in range(3):
        run, info = inside(BASE, data, jax.device_put(clients), run, KEY)
        hosted, same = outside(BASE, data, clients, hosted, KEY)
        np.testing.assert_array_equal(same.ids, info.ids)
    assert_near((hosted, same), (run, info), 1e-6)


@pytest.mark.long
def test_a_device_holds_one_cohort_of_ten_thousand_clients():
    method, data, name = METHODS["ditto"](), examples(count=28), "ditto"
    outside = rounds.make_host_step(cohort_step(name), participants=PARTICIPANTS)
    held, compiled = [], []
    for clients in (100, 100, MANY):  # the first leaves constants behind
        before = _on_device()
        run, people = rounds.start_on_host(method, KEY, ADAPTER, clients), crowd(clients)
        never = jax.tree.map(np.copy, run.memory)
        seen = set()
        for _ in range(2):
            run, info = outside(BASE, data, people, run, KEY)
            seen |= set(np.asarray(info.ids).tolist())
        held.append(_on_device() - before)
        compiled.append(cohort_step(name)._cache_size())
        differs = lambda x, y: np.abs(x - y).reshape(len(x), -1).max(1) > 0
        moved = np.any(jax.tree.leaves(jax.tree.map(differs, run.memory, never)), 0)
        assert set(np.flatnonzero(moved).tolist()) == seen
        del run, info
    assert held[1] == held[2]
    assert compiled[1] == compiled[2]  # one program for any number of clients: its memory is the same


def _on_device() -> int:
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())
