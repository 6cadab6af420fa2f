"""The main job: run methods side by side on the same seeds, clients and batches, and record what happened."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import platform
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from experiments import forecast, layout, methods, problem, programs, record, report, summary
from experiments.config import Config, check
from experiments.layout import mesh_of
from experiments.problem import Problem
from experiments.programs import Programs
from experiments.rows import Rows, holdings
from fedlora_jax import rounds
from fedlora_jax.lora import Adapter
from fedlora_jax.method import Method
from fedlora_jax.rounds import Info, Run
from fedlora_jax.signatures import Signature
from fedlora_jax.wrappers import innermost


class Plan:
    """A run that has been checked: all programs are traced, nothing is compiled or written yet."""

    def __init__(self, command: str, config: Config):
        check(config)
        for name in config.methods:
            methods.check(name)  # a misspelt name is refused before data are loaded
        mesh_of(config.devices)  # refuses more devices than there are
        self.command, self.config = command, config
        self.folder = Path(config.out or f"runs/{command}-{datetime.datetime.now():%Y%m%d-%H%M%S}")
        record.check_folder(self.folder, config.resume)
        if config.resume:
            record.check_same(self.folder, "config", config.identity())
        self.problem = problem.build(config, partial(acceptable, config))
        if config.resume:
            record.check_same(self.folder, "record", self.problem.record)
        self.about = {
            "command": command,
            "config": config.identity(),
            "record": self.problem.record,
            **describe(),
        }
        self.trials = {name: Trial(config, self.problem, name) for name in config.methods}

    def forecast(self) -> None:
        """Print what the run would need."""
        print(forecast.table(self.config, self.problem, self._compiled(self.trials)))

    def execute(self) -> Path:
        """Run, write, print. Returns the report's path.

        Raises:
          MemoryError: it would need more memory than there is; nothing has been written.
        """
        config = self.config
        if not config.resume:
            self._refuse_what_does_not_fit(self.trials)
            self.folder.mkdir(parents=True, exist_ok=True)
            record.write_json(self.folder / "config.json", self.about)
        stores = {name: record.Checkpoints(self.folder, name) for name in self.trials}
        done = {name: store.latest() for name, store in stores.items()}
        self._refuse_what_does_not_fit([name for name in self.trials if done[name] < config.rounds])
        metrics = record.Metrics(self.folder)
        metrics.keep(done)
        left = sum(config.rounds - rounds for rounds in done.values())
        timings = {}
        with tqdm(total=left * len(config.seeds), unit="round", smoothing=0.1, dynamic_ncols=True) as bar:
            for name, trial in self.trials.items():
                timings[name] = trial.run(done[name], stores[name], metrics, bar)
                stores[name].close()
        return self._finish(metrics.read(), timings)

    def _compiled(self, names: Iterable[str]) -> list[Trial]:
        for name in tqdm(names, desc="compiling", unit="method", leave=False, dynamic_ncols=True):
            self.trials[name].compile()
        return [self.trials[name] for name in names]

    def _refuse_what_does_not_fit(self, names: Iterable[str]) -> None:
        for trial in self._compiled(names):
            if reason := forecast.too_large(self.config, self.problem, trial.name, trial.need()):
                raise MemoryError(reason)

    def _finish(self, rows: list[dict[str, Any]], timings: dict[str, dict[str, float | None]]) -> Path:
        entries = {}
        for name in self.trials:
            entry = summary.summarise([row for row in rows if row["method"] == name], self.config.target)
            own = {"about": methods.about(name)._asdict(), "theta_size": self.trials[name].theta_size}
            entries[name] = {**own, **entry, **timings[name]}
        result = {
            "schema": 1,
            **self.about,
            "date": f"{datetime.date.today()}",
            "methods": entries,
            "paired": summary.paired(entries),
        }
        record.write_json(self.folder / "summary.json", result)
        path = report.write(self.folder, result, rows, holdings(self.config, self.problem))
        print(f"\n{summary.table(result)}\n\n{summary.meaning(result['config'])}")
        print(f"\nreport: {path}")
        return path


def describe() -> dict[str, Any]:
    """With what a run is computed."""
    return {
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()}), {platform.machine()}",
    }


def facts_of(config: Config, signature: Signature) -> dict[str, Any]:
    """What a method can ask to be given of a run."""
    return {
        "participants": config.clients_per_round or config.clients,
        "signature": signature,
        "population": config.clients,
        "rounds": config.rounds,
        "theta": record.read_arrays(config.theta),
        "local_lr": config.lr,
    }


def acceptable(config: Config, signature: Signature, adapter: Adapter) -> None:
    """Refuse options that a method does not take, and what it has learned where that does not fit."""
    for name in config.methods:
        method = methods.build(name, **facts_of(config, signature))
        if method.query and config.minimum < 2:
            raise ValueError(f"{name} keeps examples of every client apart: --minimum must be at least 2, got 1")
        if "+scaffold" in name and config.optimizer != "sgd":
            raise ValueError(f"{name} needs local steps of plain SGD: --optimizer must be sgd, got {config.optimizer}")
        start = lambda key, adapter, method=method: rounds.start(method, key, adapter, config.clients)
        run = jax.eval_shape(start, jax.eval_shape(jax.random.key, 0), adapter)
        layout.refuse_more_than_there_is(
            len(config.seeds) * layout.bytes_of(run),
            f"what {name} keeps of {config.clients} clients and {len(config.seeds)} seeds would",
            "use fewer of them, or smaller options of the method",
        )


class Trial:
    """One method of a comparison."""

    def __init__(self, config: Config, problem: Problem, name: str):
        self.config, self.problem, self.name = config, problem, name
        self.method: Method = methods.build(name, **facts_of(config, problem.signature))
        self.rows = Rows(config, problem, name, self.method)
        self.programs: Programs = programs.make(config, problem, self.method)
        run = jax.eval_shape(self.programs.start, problem.adapters, problem.keys)
        theta = jax.tree.leaves(getattr(innermost(run.state), "theta", ()))
        self.theta_size = sum(math.prod(x.shape[1:]) for x in theta)  # without the axis of seeds
        # Tracing finds every mistake of shapes and options, before anything compiles.
        self.start = run
        self.lowered = self.programs.train.lower(problem.base, problem.train, problem.clients, run, problem.keys)

    def compile(self) -> None:
        """Compile the rounds and the evaluation, once."""
        if hasattr(self, "train"):
            return
        p, begin = self.problem, time.perf_counter()
        self.train = self.lowered.compile()
        self.compile_seconds = time.perf_counter() - begin
        arguments = (p.base, p.train, p.test, p.clients, self.start, p.keys, np.bool_(True))
        self.evaluate = self.programs.evaluate.lower(*arguments).compile()

    def need(self) -> forecast.Need | None:
        """Memory of the run; ``None`` where XLA does not tell."""
        p = self.problem
        held = (p.base, p.train, p.test, p.clients, p.adapters, p.keys, self.start)
        return forecast.need(held, [self.train, self.evaluate])

    def run(self, done: int, store: record.Checkpoints, metrics: record.Metrics, bar: tqdm) -> dict[str, float | None]:
        """Rounds after ``done``; rows and checkpoints as they come. Returns timings."""
        config, p = self.config, self.problem
        if done == config.rounds:
            return {"seconds_per_round": None, "compile_seconds": None}
        self.compile()
        bar.set_description(self.name)

        run: Run = self.programs.start(p.adapters, p.keys)
        if done:
            run = store.restore(run)
        seconds = []
        for end in range(done + config.eval_every, config.rounds + 1, config.eval_every):
            begin = time.perf_counter()
            run, info = jax.block_until_ready(self.train(p.base, p.train, p.clients, run, p.keys))
            seconds.append((time.perf_counter() - begin) / (config.eval_every * len(config.seeds)))
            self._check_moved(info, end)
            tune = np.bool_(end > config.rounds - summary.WINDOW)
            scores = jax.device_get(self.evaluate(p.base, p.train, p.test, p.clients, run, p.keys, tune))
            metrics.append(self.rows.of_block(end, jax.device_get(info), scores))
            if end % config.rounds_between_checkpoints() == 0 or end == config.rounds:
                store.save(end, run)
            bar.update(config.eval_every * len(config.seeds))
        store.keep_theta(innermost(run.state))
        return {"seconds_per_round": float(np.median(seconds)), "compile_seconds": self.compile_seconds}

    def _check_moved(self, info: Info, end: int) -> None:
        failed = ~np.isfinite(info.aggregation.bias) | ~np.isfinite(info.loss).any(-1)  # one client may, if left out
        if failed.any():
            raise FloatingPointError(f"{self.name}: the loss became infinite by round {end}; try a smaller --lr")
        if not (np.asarray(info.moved) > 0).any(-1).all():
            raise FloatingPointError(f"{self.name}: nothing that is trained moved by round {end}; is --lr too small?")
