"""One method of a comparison: its programs, and its rounds from wherever they were left off."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from experiments.config import Config
from experiments.engine import hosts, kept, methods, programs
from experiments.engine.chunking import choose, divisor
from experiments.engine.evaluation import Scores
from experiments.engine.facts import facts_of
from experiments.engine.programs import Programs
from experiments.engine.resident import Resident
from experiments.engine.rows import Rows, as_of, so_far
from experiments.engine.staging import Staged
from experiments.progress import Bar
from experiments.results import record
from experiments.results.checkpoints import Checkpoints
from experiments.results.folder import say
from experiments.setup import memory, problem
from experiments.setup.problem import Problem
from fedlora_jax.method import Method
from fedlora_jax.rounds import Info, Run
from fedlora_jax.wrappers import innermost


class Failed(FloatingPointError):
    """A method that has no result: numbers of it became infinite, or nothing of it moved."""


class Trial:
    """One method of a comparison, traced; on all seeds or on some of them."""

    def __init__(self, config: Config, problem: Problem, name: str):
        self.config, self.problem, self.name = config, problem, name
        self.leads = True  # are the first of all seeds among these?
        self.method: Method = methods.build(name, **facts_of(config, problem.signature, min(problem.fewest)))
        self.rows = Rows(config, problem, name, self.method)
        self.programs: Programs = programs.make(config, problem, self.method)
        run = jax.eval_shape(self.programs.start, problem.adapters, problem.keys)
        theta = jax.tree.leaves(getattr(innermost(run.state), "theta", ()))
        self.theta_size = sum(math.prod(x.shape[1:]) for x in theta)  # without the axis of seeds
        self.kept = run.memory  # shapes [S, N, ...]
        hosted = not config.scores_all_images and kept.is_staged(config.kept, memory.bytes_of(run.memory))
        self.course = (
            Staged(config, problem, self.method, run, hosted)
            if problem.staged or hosted
            else Resident(config, problem, self.programs, run)
        )
        self.compile_seconds: float | None = None

    def compile(self) -> None:
        """Compile the rounds and the evaluation, once."""
        if self.compile_seconds is None:
            self.compile_seconds = self.course.compile()

    def of_seeds(self, start: int, stop: int) -> Trial:
        """The same on some of the seeds alone, which changes none of their numbers."""
        if (start, stop) == (0, len(self.config.seeds)):
            return self
        config = dataclasses.replace(self.config, seeds=self.config.seeds[start:stop])
        part = Trial(config, problem.of_seeds(self.problem, start, stop), self.name)
        part.leads = start == 0
        return part

    def halved(self, error: Exception) -> Trial:
        """The same with half as many clients at once, for a device that had no memory for so many.

        Raises:
          MemoryError: nothing is left to halve.
          Exception: the ``error``, where it is another one, or of several processes.
        """
        chunk = choose(self.config, self.problem)[0]
        if "RESOURCE_EXHAUSTED" not in str(error) or jax.process_count() > 1:
            raise error
        if chunk == 1:
            raise MemoryError(
                f"{self.name}: the device has no memory for a single client: use a smaller --batch or model, or fewer "
                "--seeds-at-once"
            ) from error
        less = divisor(-(-self.config.cohort // self.config.sharing), chunk // 2)
        say(f"{self.name}: the device has no memory for {chunk} clients at once, it goes on with {less}")
        part = Trial(dataclasses.replace(self.config, chunk=less), self.problem, self.name)
        part.leads = self.leads
        return part

    def run(self, whole: list[int], store: Checkpoints, metrics: record.Metrics, bar: Bar) -> dict[str, float] | None:
        """Rounds after the newest checkpoint of ``whole``; rows and checkpoints as they come. Returns timings.

        Rows are cut only now, when it is known from where the run goes on.
        """
        config = self.config
        done, run = self._begun(whole, store)
        own = lambda row: row["method"] == self.name and row["seed"] in config.seeds
        kept = [row for row in metrics.read() if not own(row) or row["round"] <= done]
        metrics.rewrite([as_of(row, config.rounds) if own(row) else row for row in kept])
        store.keep([rounds for rounds in whole if rounds <= done])
        self.rows.go_on(row for row in kept if own(row))
        if run is None:
            return store.notes(done)
        seeds = [str(seed) for seed in config.seeds]
        shown = ",".join(seeds if len(seeds) <= 5 else [*seeds[:2], "...", seeds[-1]])
        bar.set_description(f"{self.name}, seed{'s' * (len(seeds) > 1)} {shown}")

        seconds = []
        for end, after, took, info, scores in self._blocks(done, run):
            seconds.append(took / (config.eval_every * len(config.seeds)))
            rows = self.rows.of_block(end, info, scores)
            metrics.append(rows)
            bar.set_postfix_str(f"round {end}, {so_far(rows)}")
            timings = {"seconds_per_round": float(np.median(seconds)), "compile_seconds": self.compile_seconds}
            if end == config.rounds and self.leads:
                record.keep_theta(metrics.folder, self.name, jax.device_get(innermost(after.state)))
            if end % config.rounds_between_checkpoints() == 0 or end == config.rounds:
                store.save(end, after, timings)
            bar.update(config.eval_every * len(config.seeds))
        return store.notes(config.rounds)

    def follow(self) -> None:
        """The same rounds where another process, the first, ``run``s them."""
        done, run = self._begun((), None)
        if run is not None:
            for _ in self._blocks(done, run):
                pass

    def _blocks(self, done: int, run: Run) -> Iterator[tuple[int, Run, float, Info, Scores]]:
        """The rounds after ``done``, one evaluation after another: rounds done, the run, seconds of its rounds, what
        they report and the scores, both on the host."""
        config = self.config
        self.compile()
        self.course.begin(done)
        for end in range(done + config.eval_every, config.rounds + 1, config.eval_every):
            begin = time.perf_counter()
            run, info = self.course.block(run)
            took = time.perf_counter() - begin
            check_moved(self.name, config.seeds, info, end, first=end == config.eval_every)
            yield end, run, took, jax.device_get(info), self.course.scores(run, end)

    def _begun(self, whole: Sequence[int], store: Checkpoints | None) -> tuple[int, Run | None]:
        """Rounds done and the run after them, as the first process finds them; ``None`` after the last round."""
        start = self.course.start(self.programs.start)
        done, run = 0, start
        if self.config.rounds in whole:
            done = self.config.rounds
        elif store is not None:
            done, run = self._restored(whole, store, start)
        done = hosts.agreed(done)
        if done == self.config.rounds:
            return done, None
        return done, start if done == 0 else self.course.take(hosts.agreed_arrays(run))

    def _restored(self, whole: Sequence[int], store: Checkpoints, start: Run) -> tuple[int, Run]:
        """Rounds done, and the run after them, from the newest checkpoint that can be read."""
        for done in whole:
            try:
                return done, store.restore(done, start)
            except Exception as error:  # whole, but written by another version of what reads it
                why = " ".join(str(error).split())[:200]
                say(f"{self.name}: its checkpoint after round {done} cannot be read ({why})")
        return 0, start


def check_moved(name: str, seeds: Sequence[int], info: Info, end: int, first: bool) -> None:
    """Of rounds up to ``end``, whether these are the first or not.

    Raises:
      Failed: the loss or what clients sent became infinite, or nothing moved, on any of the ``seeds``.
    """
    some = (np.asarray(info.ids) >= 0).any(-1)
    infinite = some & ~np.isfinite(info.loss).any(-1)  # one client may, if left out
    infinite |= ~np.isfinite(info.aggregation).all(0)
    still = ~(np.asarray(info.moved) > 0).any(-1)

    def where(failed: Any) -> str:  # [S, rounds]
        own = [str(seed) for seed, is_so in zip(seeds, failed.any(-1), strict=True) if is_so]
        return f"{name}, {'one seed' if len(own) == 1 else f'{len(own)} seeds'} of {len(seeds)} ({', '.join(own)})"

    if infinite.any():
        hint = " (or, as it is so from the first round on, look at what the model makes of an image)"
        raise Failed(
            f"{where(infinite)}: the loss, or what clients sent, became infinite by round {end}; try a smaller --lr"
            + hint * (first and not np.isfinite(np.asarray(info.loss)[:, 0]).any())
        )
    if still.any():
        raise Failed(f"{where(still)}: nothing that is trained moved by round {end}; is --lr too small?")
