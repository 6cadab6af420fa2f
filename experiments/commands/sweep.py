"""Accuracy against hyper-parameters: learning rates, and one option of the methods, for every seed in one program.

The values are arguments of a compiled program, not constants: a method is built inside it around a traced number, and
all values and seeds are one axis of it, mapped or vmapped as ``engine/chunking.py`` finds best. What each point
reports is what a ``run`` with these options reports (``summary.py``), on test images unless ``--validation`` sets
images apart to choose by.

    summary.json    schema 1; ``entries``: of each method, learning rate and value the measures of ``summary.py``, the
                    options of a run that is the same, and the seeds whose loss became infinite (then no measures)
    sweep.png       accuracy against the value (or the learning rate, where no option is varied)
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import progress
from experiments.commands import prelude
from experiments.config import Config
from experiments.engine import evaluation, methods, programs
from experiments.engine.chunking import choose
from experiments.engine.evaluation import Scores
from experiments.engine.facts import NOBODY_YET, acceptable, facts_of
from experiments.engine.methods import Varied
from experiments.engine.programs import Point, Scoring
from experiments.engine.rows import Rows
from experiments.options import MANY
from experiments.results import summary, sweep_figures
from experiments.results.folder import Folder, write_atomically, write_json
from experiments.results.style import png
from experiments.setup import problem
from experiments.setup.problem import Arrays, Seed
from fedlora_jax.checks import refuse_outside
from fedlora_jax.method import Method
from fedlora_jax.rounds import Info, Run


class Axis(NamedTuple):
    """The option that is varied, and its values; no name: learning rates alone are."""

    name: str | None
    values: tuple[float, ...]


class Plan:
    """A sweep that has been checked: all programs are traced, nothing is compiled or written yet."""

    def __init__(self, config: Config):
        prelude.checked(config)
        self.axis = axis_of(config.vary)
        if len(config.lrs) * len(self.axis.values) > MANY:
            raise ValueError(f"--lrs and --vary make {len(config.lrs) * len(self.axis.values)} points: at most {MANY}")
        self.varied = {name: methods.find(name, self.axis.name) if self.axis.name else None for name in config.methods}
        self.config = config
        self.folder = Folder("sweep", config.out)
        self.problem = problem.build(config, self._acceptable)
        about = prelude.about("sweep", config, self.problem)
        self.about: dict[str, Any] = about | {"option": self.axis.name} | prelude.today()
        self.grid = list(itertools.product(config.lrs, self.axis.values))
        self.lowered = {name: self._lower(name) for name in config.methods}

    def spec(self, name: str, value: float) -> str:
        """The method at one value, as ``run`` would be given it."""
        option = self.varied[name]
        return name if option is None else methods.with_option(name, option, value)

    def execute(self) -> Path:
        with self.folder as folder:
            return self._execute(folder)

    def _execute(self, folder: Path) -> Path:
        entries, took = [], {}
        what = summary.counted(len(self.grid), "point"), summary.counted(len(self.config.seeds), "seed")
        with progress.bar(len(self.grid) * len(self.config.methods), "point") as bar:
            for name, (lowered, arguments) in self.lowered.items():
                bar.set_description(f"{name}: compiling")
                begin = time.perf_counter()
                compiled = lowered.compile()
                compile_seconds = time.perf_counter() - begin
                bar.set_description(f"{name}: {', '.join(what)}")
                begin = time.perf_counter()
                (info, scores), _ = jax.device_get(compiled(*arguments))
                took[name] = {"compile_seconds": compile_seconds, "seconds": time.perf_counter() - begin}
                entries += self._entries(name, info, scores)
                _write(folder, {"schema": 1, **self.about, "took": took, "entries": entries})
                bar.update(len(self.grid))
        print(f"\n{table(entries, self.axis.name, self.about['config'])}\n\n{summary.meaning(self.about['config'])}")
        print(f"\n{folder / 'summary.json'}")
        return folder

    def _acceptable(self, signature: Any, adapter: Any) -> None:
        """Refuse values that a method refuses, and options that it cannot take as a traced number."""
        for name in self.config.methods:
            for lr, value in itertools.product(self.config.lrs, self.axis.values):
                acceptable(
                    dataclasses.replace(self.config, methods=(self.spec(name, value),), lr=lr), signature, adapter
                )
            build = self._builder(name, signature, NOBODY_YET)
            start = lambda point, key, adapter, build=build: build(point).init(key, adapter)
            point = Point(jnp.float32, jnp.float32)
            shapes = jax.tree.map(lambda kind: jax.ShapeDtypeStruct((), kind), point)
            self._traced(name, jax.eval_shape, start, shapes, jax.eval_shape(jax.random.key, 0), adapter)

    def _builder(self, name: str, signature: Any, smallest: int) -> Callable[[Point], Method]:
        option, facts = self.varied[name], facts_of(self.config, signature, smallest)

        def build(point: Point) -> Method:
            varied: dict[Varied, Any] = {} if option is None else {option: point.value}
            return methods.build(name, varied, **facts | {"local_lr": point.lr})

        return build

    def _lower(self, name: str) -> tuple[Any, tuple]:
        config, p = self.config, self.problem
        lrs, values = zip(*self.grid, strict=True)
        chunk, _ = choose(config, p, len(self.grid))

        def scoring(method: Method, optimizer: Any) -> Scoring:
            score = evaluation.make_scores(config, p, method, optimizer, chunk)

            def block(arrays: Arrays, seed: Seed, run: Run, info: Info, end: jax.Array) -> tuple[Info, Scores]:
                scores = score(arrays, seed, run, end > config.rounds - summary.WINDOW)
                return info, scores._replace(distances=None)  # a sweep draws no map of clients

            return Scoring(block)

        build = self._builder(name, p.signature, min(p.fewest))
        runs, arguments = programs.make_runs(config, p, len(self.grid), build, scoring)
        arguments = (Point(jnp.array(lrs, jnp.float32), jnp.array(values, jnp.float32)), *arguments)
        return self._traced(name, jax.jit(runs).lower, *arguments), arguments

    def _traced(self, name: str, trace: Callable, *arguments: Any) -> Any:
        try:
            return trace(*arguments)
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
            what = self.axis.name or "lr"
            raise ValueError(
                f"{what} decides how {name} computes, so its values need programs of their own: "
                "compare them as methods of a compare"
            ) from error

    def _entries(self, name: str, info: Info, scores: Scores) -> list[dict[str, Any]]:
        """Of each point, of info ``[P, S, blocks, rounds, ...]`` and scores ``[P, S, blocks, ...]``."""
        config, about = self.config, methods.about(name)._asdict()
        facts = facts_of(config, self.problem.signature, min(self.problem.fewest))
        method = methods.build(self.spec(name, self.axis.values[0]), **facts)
        rows = Rows(config, self.problem, name, method)
        entries = []
        for i, (lr, value) in enumerate(self.grid):
            own = jax.tree.map(lambda x, i=i: x[i], (info, scores))
            entry = {"method": name, "about": about, "lr": lr, "value": value if self.axis.name else None,
                     "run": f"--method {self.spec(name, value)} --lr {lr:g}"}  # fmt: skip
            rows.go_on(())  # every point is a run of its own
            some = np.isfinite(own[0].loss).any(-1) & (own[0].dropped < own[0].loss.shape[-1])  # not all were left out
            lost = ~(np.isfinite(own[0].aggregation.bias) & some).all((1, 2))
            entry["diverged"] = [seed for seed, gone in zip(config.seeds, lost, strict=True) if gone]
            if not lost.any():
                found = []
                for b, end in enumerate(range(config.eval_every, config.rounds + 1, config.eval_every)):
                    found += rows.of_block(end, *jax.tree.map(lambda x, b=b: x[:, b], own))
                entry |= summary.summarise(found, config.target)
            entries.append(entry)
        return entries


def _write(folder: Path, result: dict[str, Any]) -> None:
    write_json(folder / "summary.json", result)
    write_atomically(folder / "sweep.png", png(sweep_figures.draw(result)))


def axis_of(vary: str | None) -> Axis:
    """The option and the values of ``[NAME:]OPTION=VALUE,VALUE,...``."""
    if vary is None:
        return Axis(None, (0.0,))
    name, equals, text = vary.partition("=")
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    for value in values:
        refuse_outside("(-inf, inf)", **{f"--vary {name}": value})
    if not name or not equals or not values or len(set(values)) < len(values):
        raise ValueError(f"--vary needs an option and different finite numbers, as in mu=0,0.01,0.1; got {vary!r}")
    return Axis(name, values)


def table(entries: list[dict[str, Any]], option: str | None, config: dict[str, Any] | None = None) -> str:
    """The terminal's: means over ``summary.window`` and half-width of the 95 % interval, in per cent."""
    shown = summary.columns(config)
    header = ["method", "lr", *([option] if option else []), *shown.values()]
    rows = [[*header, "bias"]]
    for e in entries:
        cells = [e["method"], f"{e['lr']:g}", *([f"{e['value']:g}"] if option else [])]
        if e["diverged"]:
            rows.append([*cells, "diverged", *[""] * len(shown)])
            continue
        bias = e["bias_share"]["last5"]["mean"]
        rows.append([*cells, *(summary.percent(e[key]["last5"]) for key in shown), f"{100 * bias:.1f}%"])
    return "\n".join(summary.aligned(rows))
