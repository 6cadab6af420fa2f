"""The parts of a run that are compiled alone and timed, so that a forecast need not compile what it forecasts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from experiments.config import Config
from experiments.engine import chunking, evaluation
from experiments.engine.reading import gathered
from experiments.setup.local_training import make_optimizer
from experiments.setup.problem import Problem
from experiments.setup.task import AT_ONCE
from fedlora_jax import training
from fedlora_jax.methods.fedit import fedit

REPEATS = 3
TIMED = 16  # times as many test images as are scored at once: no more of them are timed
STEPS = 5  # local steps timed in one call, as a client takes them: what a call allocates is no part of each


class Compiled(NamedTuple):
    """What programs took to compile."""

    seconds: float = 0.0
    letters: int = 0  # of their text


class Step(NamedTuple):
    """One local step of ``clients`` clients at once."""

    clients: int
    seconds: float
    flops: float
    work: int = 0  # bytes of temporaries
    compiled: Compiled = Compiled()


class Scoring(NamedTuple):
    """Seconds of one evaluation."""

    whole: float  # the global model on all test images
    own: float  # one client's model on its own ones, where as many are scored at once as in a run
    work: int = 0  # bytes of temporaries
    compiled: Compiled = Compiled()


class Timed(NamedTuple):
    """A function that was compiled and called."""

    seconds: float  # of one call, the best of a few
    work: int  # bytes of temporaries
    compiled: Compiled


def one_step(config: Config, problem: Problem, clock: Callable[[], float] = time.perf_counter) -> Step:
    """Time of a local step of as many clients as are trained at once: the best of a few calls; and its arithmetic."""
    clients, _ = chunking.choose(config, problem)
    adapter = jax.tree.map(lambda x: x[0], problem.adapters)
    mask = jax.tree.map(jnp.ones_like, adapter)

    def train(loss_fn, base, *one):
        local = training.make_local(fedit(), loss_fn, make_optimizer(config))
        train = lambda *one: local(base, *one, jax.random.key(0), 0)  # of the first round
        return train(*one) if clients == 1 else jax.vmap(train)(*one)

    def arguments(steps: int) -> tuple:
        rows = jnp.tile(jnp.arange(config.batch), (steps, 1))
        one = (adapter, mask, adapter, tuple(x[rows % len(x)] for x in problem.train))
        return problem.base, *(one if clients == 1 else jax.tree.map(lambda x: jnp.stack([x] * clients), one))

    steps = min(config.local_steps, STEPS)
    counted = jax.jit(partial(train, problem.counted_fn)).lower(*arguments(1)).cost_analysis() or {}
    timed = _timed(clock, partial(train, problem.loss_fn), *arguments(steps))
    return Step(clients, timed.seconds / steps, counted.get("flops", math.nan), timed.work, timed.compiled)


def one_scoring(config: Config, problem: Problem, clock: Callable[[], float] = time.perf_counter) -> Scoring:
    """Time of the two parts of an evaluation."""
    total, (chunk, _) = sum(config.scored), chunking.choose(config, problem)
    clients = evaluation.scored_at_once(total, chunk, config.sharing)
    adapter = jax.tree.map(lambda x: x[0], problem.adapters)
    several = jax.tree.map(lambda x: jnp.stack([x] * clients), adapter)
    rows, some = np.asarray(problem.clients.test_rows[0, :clients]), problem.test[:2]
    (x, y), count = some, len(some[1])
    if problem.staged:
        (x, y), places = gathered(some, rows, rows.size)
        rows = places[rows]
    some = tuple(a[: TIMED * AT_ONCE] for a in some)

    def own(base, x, y, adapters, rows):
        one = lambda row: problem.correct_fn(base, row[0], (x[row[1]], y[row[1]]))
        many = (adapters, rows)
        return jax.vmap(one)(many) if clients > 1 else one(jax.tree.map(lambda x: x[0], many))

    score = lambda base, adapter, *test: problem.correct_fn(base, adapter, test)
    of_all = _timed(clock, score, problem.base, adapter, *some)
    of_own = _timed(clock, own, problem.base, x, y, several, rows)
    whole = of_all.seconds * count / len(some[1])
    both = of_all.compiled, of_own.compiled
    compiled = Compiled(sum(x.seconds for x in both), sum(x.letters for x in both))
    return Scoring(whole, of_own.seconds / clients, max(of_all.work, of_own.work), compiled)


def _timed(clock: Callable[[], float], function: Any, *arguments: Any) -> Timed:
    lowered, took = jax.jit(function).lower(*arguments), []
    compiled, compiling = _compile(clock, lowered)
    jax.block_until_ready(compiled(*arguments))  # the first call also allocates
    for _ in range(REPEATS):
        begin = clock()
        jax.block_until_ready(compiled(*arguments))
        took.append(clock() - begin)
    held = compiled.memory_analysis()
    return Timed(min(took), 0 if held is None else held.temp_size_in_bytes, compiling)


def _compile(clock: Callable[[], float], lowered: Any) -> tuple[Any, Compiled]:
    """A program, and what it takes to compile it, also where it is in the cache of programs: that is not asked."""
    asked = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    _ask_the_cache(False)
    try:
        begin = clock()
        compiled = lowered.compile()
        return compiled, Compiled(clock() - begin, len(lowered.as_text()))
    finally:
        _ask_the_cache(asked)


def _ask_the_cache(whether: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", whether)
    compilation_cache.reset_cache()  # or it would go on as it began
