"""The main job: run methods side by side on the same seeds, clients and batches, and record what happened."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from experiments import progress
from experiments.commands import prelude
from experiments.config import Config
from experiments.engine import forecast, hosts, methods, programs
from experiments.engine.facts import uses
from experiments.engine.rows import holdings
from experiments.engine.trial import Failed, Trial
from experiments.options import RESULTS
from experiments.results import checkpoints, record, report, spent, summary, tracking, variance
from experiments.results.checkpoints import Checkpoints
from experiments.results.folder import CONFIG, Folder, digest, file_name, say, write_json
from experiments.setup.problem import Problem

GROWS = ("methods", "seeds", "rounds")  # what a run may have more of when it goes on
AT_ONCE = 4  # methods that compile at a time, each of which takes memory
PER_SEED = ("partition_hash", "local_steps", "malicious")  # of its record, what has an entry for each seed
T = TypeVar("T")


class Part(NamedTuple):
    """A method on the seeds that are computed together."""

    trial: Trial
    span: tuple[int, int]  # of these seeds, by their place in the list
    store: Checkpoints | None  # of the first of several processes
    whole: list[int]  # rounds done in its checkpoints that can be gone on from, newest first
    timings: dict[str, float] | None = None  # where any rounds were run
    halved: int | None = None  # clients at once, where the device had no memory for as many as were chosen

    @property
    def left(self) -> int:
        return (self.trial.config.rounds - max(self.whole, default=0)) * len(self.trial.config.seeds)


class Plan:
    """A run that has been checked: all programs are traced, nothing is compiled or written yet."""

    def __init__(self, command: str, config: Config):
        prelude.checked(config)
        self.command, self.config = command, config
        self.folder = prelude.opened(command, config, GROWS) if hosts.leads() else None
        before = self.folder if config.resume else None
        if before:
            self._refuse_stages_of_other_rounds(before)
        self.problem = prelude.built(config, may_stage=True)
        self.about = prelude.about(command, config, self.problem)
        if before:
            self._refuse_other_draws(before)
            self.about = prelude.going_on(before, self.about, PER_SEED)
        if not config.dry_run:
            self.problem = programs.placed_problem(self.problem, config.devices)
        self.trials = {name: self._traced(name) for name in config.methods}

    def _traced(self, name: str) -> Trial:
        try:
            return Trial(self.config, self.problem, name)
        except Exception as error:
            error.add_note(f"while {name} was traced")
            raise

    def forecast(self) -> None:
        """Print what the run would need."""
        print(forecast.table(self.config, self.problem, list(self.trials.values())))

    def execute(self) -> Path | None:
        """Run, write, print. Returns the report's path, of several processes in the first.

        Raises:
          MemoryError: it would need more memory than there is; nothing has been written.
        """
        if not self.config.resume:
            self._refuse_what_does_not_fit(self.trials.values())
        if self.folder is None:
            return self._follow()
        with self.folder as path:
            return self._execute(path)

    def _execute(self, folder: Path) -> Path:
        config, rows = self.config, record.Metrics(folder).read()
        parts = [part for trial in self.trials.values() for part in self._parts(trial, folder, rows)]
        hosts.agreed([[part.trial.name, part.span, part.whole] for part in parts])
        self._refuse_what_does_not_fit(part.trial for part in parts if part.left)
        write_json(folder / CONFIG, self.about)
        with (
            tracking.following(config.track, folder, self.about["config"], rows) as then,
            progress.bar(sum(part.left for part in parts), "round") as bar,
        ):
            metrics = record.Metrics(folder, then)
            parts, failed = _each(parts, partial(_run, metrics=metrics, bar=bar))
        found = {(row["method"], row["round"], row["seed"]): row for row in metrics.read()}
        order = [(name, r + 1, seed) for name in config.methods for r in range(config.rounds) for seed in config.seeds]
        there = [found[key] for key in order if key in found or key[0] not in failed]
        metrics.rewrite(there)  # seeds that came later stand among the others
        halved = {part.trial.name: {"halved_to_chunk": part.halved} for part in parts if part.halved}
        timings = {name: _timings(parts, name) | halved.get(name, {}) for name in self.trials if name not in failed}
        return self._finish(folder, metrics.read(), timings, failed)

    def _follow(self) -> None:
        """Compute what the first process writes."""
        told = hosts.agreed(None)
        parts = [Part(self.trials[name].of_seeds(*span), span, None, whole) for name, span, whole in told]
        self._refuse_what_does_not_fit(part.trial for part in parts if part.left)
        _each(parts, lambda part: part.trial.follow())

    def _parts(self, trial: Trial, folder: Path, rows: list[dict[str, Any]]) -> list[Part]:
        """A method by the seeds that began together, and how far they are; a line where something is damaged."""
        parts = []
        for span, store in stores(self.config, self.problem, folder, trial.name).items():
            own = trial.of_seeds(*span)
            whole, wrong = store.whole()
            complete = record.complete(rows, own.name, own.config.seeds)
            wrong += [f"rows after round {complete} are damaged or missing"] * (complete < max(whole, default=0))
            whole = [rounds for rounds in whole if rounds <= complete]
            if not (wrong or whole) and complete >= min(self.config.rounds_between_checkpoints(), self.config.rounds):
                wrong = ["its checkpoints are gone"]
            if wrong:
                then = f"goes on after round {whole[0]}" if whole else "begins anew"
                say(f"{own.name} {then}: {'; '.join(wrong[:3])}")
            parts.append(Part(own, span, store, whole))
        return parts

    def _refuse_stages_of_other_rounds(self, folder: Folder) -> None:
        def what(name: str) -> str:
            return "spends its epsilon over its rounds" if "epsilon=" in name else "divides its rounds into stages"

        before, now = folder.held("config"), self.config.rounds
        staged = [f"{name} {what(name)}" for name in before["methods"] if methods.asks(name, "rounds")]
        if self.config.schedule != "constant":
            staged.append(f"--schedule {self.config.schedule} knows the last round")
        if staged and before["rounds"] != now:
            raise ValueError(
                f"{staged[0]}, so that {now} rounds do not begin as {before['rounds']} do: use another --out, or the "
                "same --rounds"
            )

    def _refuse_other_draws(self, folder: Folder) -> None:
        """Batches are drawn from lists of images as long as the largest client of any seed."""
        was, now = folder.held("record").get("largest"), self.problem.record["largest"]
        before, fewest = len(folder.held("config")["seeds"]), self.problem.fewest
        more = before < len(self.config.seeds)
        told = [name for name in folder.held("config")["methods"] if methods.asks(name, "uses")]
        if told and uses(self.config, min(fewest)) != uses(self.config, min(fewest[:before])):
            raise ValueError(
                f"{told[0]} has noise for clients of {min(fewest[:before])} training images, and with these seeds the "
                f"smallest has {min(fewest)}: use another --out, or other seeds"
            )
        if was != now and more:
            raise ValueError(
                f"with these seeds the largest client has {now} training images, so far it has {was}: how batches are "
                "drawn depends on it, and every seed would begin anew: use another --out, or other seeds"
            )

    def _compiled(self, trials: Iterable[Trial]) -> list[Trial]:
        """All of them, several at once: compiling one keeps little more than a core busy."""
        trials = list(trials)
        with (
            ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool,
            progress.bar(len(trials), "method", "compiling", leave=False) as bar,
        ):
            for _ in pool.map(Trial.compile, trials):
                bar.update()
        return trials

    def _refuse_what_does_not_fit(self, trials: Iterable[Trial]) -> None:
        for trial in self._compiled(trials):
            if reason := forecast.too_large(trial.config, trial.problem, trial.name, forecast.need(trial)):
                raise MemoryError(reason)

    def _finish(
        self,
        folder: Path,
        rows: list[dict[str, Any]],
        timings: dict[str, dict[str, float | None]],
        failed: dict[str, str],
    ) -> Path:
        entries = {}
        for name in timings:
            of_it = [row for row in rows if row["method"] == name]
            entry = summary.summarise(of_it, self.config.target)
            if self.config.best_test_leaky:
                entry["best_test_leaky"] = summary.best_on_test(of_it)
            own = {"about": methods.about(name)._asdict(), "theta_size": self.trials[name].theta_size}
            entries[name] = {**own, **entry, **timings[name]}
        result = {
            "schema": 1,
            **self.about,
            **prelude.today(),
            "methods": entries,
            "paired": variance.with_draws(summary.paired(entries), self.config.dealt_by),
            "variance": variance.of_run(entries, self.config.dealt_by),
            "failed": failed,
        }
        write_json(folder / "summary.json", result)
        shown = [row for row in rows if row["method"] in entries]
        path = report.write(folder, result, shown, holdings(self.config, self.problem))
        print(
            f"\n{summary.table(result)}\n\n{summary.meaning(result['config'])}",
            *variance.lines(result),
            *spent.lines(result),
            *summary.without_result(result),
            sep="\n",
        )
        print(f"\nreport: {path}")
        return path


def _each(parts: Iterable[Part], do: Callable[[Part], T]) -> tuple[list[T], dict[str, str]]:
    """What is made of parts, and why there is nothing of some methods: the others go on.

    Raises:
      Failed: there is nothing of any.
    """
    parts, made, failed = list(parts), [], {}
    for part in parts:
        name = part.trial.name
        if name in failed:
            continue
        try:
            made.append(do(part))
        except Failed as error:
            failed[name] = str(error)
            if failed.keys() == {part.trial.name for part in parts}:
                raise
            say(f"{error}; the other methods go on")
    return made, failed


def _run(part: Part, metrics: record.Metrics, bar: progress.Bar) -> Part:
    """The rounds that are left of it; where a device runs out of memory from the newest checkpoint, with less at once.

    Results then agree to rounding, and not to the byte.
    """
    trial, whole, store, halved, end = part.trial, part.whole, part.store, None, bar.n + part.left
    assert store is not None
    while True:
        try:
            return part._replace(timings=trial.run(whole, store, metrics, bar), halved=halved)
        except Failed:
            bar.update(end - bar.n)  # its other rounds are passed over
            raise
        except jax.errors.JaxRuntimeError as error:
            trial = trial.halved(error)
            whole, halved = store.whole()[0], trial.config.chunk


def stores(config: Config, problem: Problem, folder: Path, method: str) -> dict[tuple[int, int], Checkpoints]:
    """The checkpoints of a method, by the seeds that began together: the first, and the one after the last."""
    default, deciding = Config(), config.deciding(RESULTS)
    deciding = {key: x for key, x in deciding.items() if key not in GROWS and x != getattr(default, key)}
    # of all that a checkpoint depends on besides its method, seeds and rounds; an option that is new changes nothing
    of_all = {key: None if key in PER_SEED else x for key, x in problem.record.items()}
    identity = digest(json.dumps([deciding, of_all], sort_keys=True).encode())
    path, found = folder / "checkpoints" / file_name(method), {}
    for start, stop in checkpoints.spans(path, len(config.seeds)):
        about = {"run": identity, "method": method, "seeds": config.seeds[start:stop]}
        found[start, stop] = Checkpoints(path / f"{start}-{stop}", about)
    return found


def _timings(parts: list[Part], name: str) -> dict[str, float | None]:
    """Of one method, whose seeds may have been computed in several parts."""
    own = [(part.timings, len(part.trial.config.seeds)) for part in parts if part.trial.name == name]
    known = [(timings, count) for timings, count in own if timings]
    if not known:
        return {"seconds_per_round": None, "compile_seconds": None}
    found, counts = zip(*known, strict=True)
    return {key: float(np.average([timings[key] for timings in found], weights=counts)) for key in found[0]}
