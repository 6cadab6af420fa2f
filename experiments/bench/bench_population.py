"""Seconds of a round against the size of the population, of which 64 clients take part: memory stays on the host.

Clients hold 8 to 48 images of one to three classes each, rows of a pool of 60,000 that lies on the device, and keep a
personal adapter (Ditto), which lies on the host (``rounds.make_host_step``). Populations take turns.
``device_mb`` is what the device holds between rounds; ``peak_memory_mb`` is of this process, all populations together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

from experiments.bench import machine, works
from experiments.bench.contenders import fedlora_jax as ours
from experiments.bench.measure import Line, interleaved, line
from experiments.bench.options import Options
from experiments.bench.works import Work
from experiments.engine.facts import describe
from fedlora_jax import rounds
from fedlora_jax.clients import Population
from fedlora_jax.method import Method

PARTICIPANTS, POOL, FEWEST, MOST = 64, 60_000, 8, 48


def run(options: Options) -> Iterator[Line]:
    work = works.find(options.work)
    p, method = ours.problem(work._replace(clients=1, steps=1)), ours.method(work, "ditto")
    round_fn = rounds.make_round(method, p.loss_fn, optax.sgd(work.lr), chunk=ours.chunk_of(work, p, options.chunk))
    cohort_step = ours.jit(rounds.make_cohort_step(round_fn, steps=work.steps, batch=work.batch, smallest=FEWEST))
    participants = min(PARTICIPANTS, *options.clients)
    step = rounds.make_host_step(cohort_step, participants=participants)
    images, labels = pool(work)
    data = jax.device_put((images, labels))
    calls = {n: rounds_of(step, method, p, data, crowd(n, labels, work)) for n in options.clients}
    for call in tqdm(calls.values(), desc="first rounds", dynamic_ncols=True):
        call()  # compiles, once for all populations
    seconds = interleaved(calls, tqdm(range(options.repeats), desc="turns", dynamic_ncols=True))
    row = jax.tree.leaves(rounds.start_on_host(method, jax.random.key(0), p.adapter, 1).memory)
    for n in options.clients:
        yield line(
            options.bench,
            work,
            "fedlora_jax",
            seconds_per_round=seconds[n].median,
            spread=seconds[n].spread,
            peak_memory_mb=machine.peak_memory_mb(),
            population=n,
            participants=participants,
            kept_on_host_mb=n * sum(x.nbytes for x in row) / 2**20,
            device_mb=sum(x.nbytes for x in jax.live_arrays()) / 2**20,
            **describe(),
        )


def rounds_of(step: Callable, method: Method, p: ours.Problem, data: Any, people: Population) -> Callable[[], Any]:
    """One round after the other, each when it is called."""
    run = rounds.start_on_host(method, jax.random.key(0), p.adapter, len(people.sizes))

    def one():
        nonlocal run
        run, info = step(p.base, data, people, run, jax.random.key(1))
        return jax.block_until_ready(info)

    return one


def pool(work: Work) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (POOL, work.side, work.side, 3), np.uint8)
    return images, np.sort(rng.integers(0, work.classes, POOL, np.int32))


def crowd(clients: int, labels: np.ndarray, work: Work) -> Population:
    """Clients with a few images of a few classes."""
    rng = np.random.default_rng(1)
    ends = np.searchsorted(labels, np.arange(work.classes + 1))  # the pool is sorted by class
    own = rng.integers(0, work.classes, (clients, 3))[np.arange(clients)[:, None], rng.integers(0, 3, (clients, MOST))]
    rows = rng.integers(ends[own], ends[own + 1])
    told = jax.tree.map(lambda x: np.repeat(np.asarray(x), clients, 0)[:, None], ours.told(work, 1))
    sizes = rng.integers(FEWEST, MOST + 1, clients)
    return Population(rows, sizes, np.full(clients, work.rank), told)  # type: ignore[arg-type]
