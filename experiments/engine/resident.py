"""A run whose images are all on the device, arguments of its two programs from the first round to the last."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.config import Config
from experiments.engine.evaluation import Scores
from experiments.engine.programs import Programs, placed
from experiments.results import summary
from experiments.setup import memory
from experiments.setup.problem import Problem
from fedlora_jax.rounds import Info, Run


class Resident:
    """All images are on the device."""

    def __init__(self, config: Config, problem: Problem, made: Programs, start: Run):
        self._config, self._problem, self._made, self._start = config, problem, made, start
        # Tracing finds every mistake of shapes and options, before anything compiles.
        self.lowered = made.train.lower(problem.base, problem.train, problem.clients, start, problem.keys)

    def compile(self) -> float:
        """Everything, once; seconds that the rounds took."""
        begin = time.perf_counter()
        self._train = self.lowered.compile()
        took = time.perf_counter() - begin
        (evaluate,) = self.lowered_scores()
        self._evaluate = evaluate.compile()
        return took

    def lowered_scores(self) -> list[Any]:
        """The programs of an evaluation."""
        p = self._problem
        return [self._made.evaluate.lower(p.base, p.train, p.test, p.clients, self._start, p.keys, np.bool_(True))]

    @property
    def compiled(self) -> tuple[Any, ...]:
        return self._train, self._evaluate

    @property
    def held(self) -> int:
        """Bytes of arrays that stay on the device."""
        p = self._problem
        return memory.bytes_of((p.base, p.train, p.test, p.clients, p.adapters, p.keys, self._start))

    def start(self, begin: Callable) -> Run:
        """A run before its first round, as ``begin`` gives it."""
        return begin(self._problem.adapters, self._problem.keys)

    def take(self, run: Run) -> Run:
        """A run from the host."""
        return placed(run, self._config.devices)

    def begin(self, done: int) -> None:
        """After so many rounds."""

    def block(self, run: Run) -> tuple[Run, Info]:
        """The rounds up to the next evaluation."""
        p = self._problem
        return jax.block_until_ready(self._train(p.base, p.train, p.clients, run, p.keys))

    def scores(self, run: Run, end: int) -> Scores:
        """After ``end`` rounds; on the host."""
        p, tune = self._problem, np.bool_(end > self._config.rounds - summary.WINDOW)
        return jax.device_get(self._evaluate(p.base, p.train, p.test, p.clients, run, p.keys, tune))
