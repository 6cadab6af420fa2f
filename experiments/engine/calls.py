"""The programs of the parts of a run: a few rounds, trials, some clients that are scored, the global model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from experiments.config import Config
from experiments.engine import parts, programs
from experiments.engine.chunking import choose, map_runs
from experiments.engine.evaluation import Serving, is_mapped, nothing, subspaces
from experiments.engine.kept import Rows
from experiments.setup.local_training import make_optimizer
from experiments.setup.problem import Arrays, Problem, Seed
from fedlora_jax.method import Method
from fedlora_jax.rounds import Run


class Shown(NamedTuple):
    """What a program is given of images, and whose they are; of the seeds that it computes."""

    first: Any  # of these seeds, among all
    rows: Any  # [seeds, N + K, n_max] places in train of each client's training images; 0 of those that are not there
    test_rows: Any  # [seeds, N + K, m] the same of its test images
    train: Any = ()  # x [n, ...], y [n], always of one length; () where none are seen
    test: Any = ()

    def of(self, tree: Any) -> Any:
        """Of arrays with an axis of seeds, these."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, self.first, len(self.rows)), tree)

    def seeds(self, everyone: Seed) -> Seed:
        own: Seed = self.of(everyone)
        population = own.clients.population._replace(rows=self.rows)
        return own._replace(clients=own.clients._replace(population=population, test_rows=self.test_rows))


class Calls(NamedTuple):
    """Jitted functions; ``everyone`` and ``runs`` have an axis of all seeds, what comes out one of those shown.

    Where memory is on the host it is no part of ``runs``.
    """

    train: Any  # (base, shown, everyone, runs, rows) -> (runs, memory of rows, info [s, rounds, ...]); donates runs
    trials: Any  # (base, shown, everyone, runs) -> memory [s, E, ...], of Serving.onboard; or Serving.strangers
    sent: Any  # (base, shown, everyone, runs, memory, ids, places) -> (accuracy [s, C], ()), of Serving.part; memory is
    #   [s, E, ...], or from the host that of ids
    tuned: Any  # the same after local steps; and subspaces [s, C, ...], where a map is drawn
    whole: Any  # (base, (x, y), everyone, runs, nobody) -> [seeds, n], of all seeds; nobody: of Serving.nobody, or None


def make_calls(
    config: Config, problem: Problem, method: Method, serving: Serving, of_rounds: int, hosted: bool
) -> Calls:
    """The programs of the parts of a run; a part of its rounds has ``of_rounds`` of them."""
    chunk, at_once = choose(config, problem)
    several = dataclasses.replace(config, eval_every=of_rounds)
    make = programs.make_placed_block if hosted else programs.make_block
    block = make(several, problem, method, make_optimizer(config), chunk)
    mapped = is_mapped(config, problem)

    def train(base, shown: Shown, everyone: Seed, runs: Run, rows: Rows):
        def one(row, base, images):
            seed, run, own = row
            given = (run._replace(memory=own.memory), seed.key, own.ids, own.places) if hosted else (run, seed.key)
            return block(base, images, seed.clients.training(config.clients), *given)

        of_seeds = shown.seeds(everyone), shown.of(runs), rows
        new, info = map_runs(one, of_seeds, at_once, config, base, shown.train)
        kept, new = (new.memory, new._replace(memory=())) if hosted else ((), new)
        put = lambda x, own: jax.lax.dynamic_update_slice_in_dim(x, own, shown.first, 0)
        return jax.tree.map(put, runs, new), kept, info

    def trials(base, shown: Shown, everyone: Seed, runs: Run):
        find = serving.strangers if hosted else serving.onboard
        one = lambda row, arrays: find(arrays, *row)
        arrays = Arrays(base, shown.train, ())  # type: ignore[arg-type]
        return map_runs(one, (shown.seeds(everyone), shown.of(runs)), at_once, config, arrays)

    def score(steps: int, read: Callable, base, shown: Shown, everyone: Seed, runs: Run, memory, ids, places):
        arrays = Arrays(base, shown.train, shown.test)
        own = memory if hosted else jax.tree.map(lambda x: x[:, ids], memory)
        one = lambda row, arrays, ids, places: serving.part(arrays, *row, steps, read, ids, places)
        return map_runs(one, (shown.seeds(everyone), shown.of(runs), own), at_once, config, arrays, ids, places)

    def whole(base, test, everyone: Seed, runs: Run, nobody: Any):
        one = lambda row, arrays: serving.whole(arrays, *row)
        arrays = Arrays(base, (), test)  # type: ignore[arg-type]
        return map_runs(one, (everyone, runs, nobody), at_once, config, arrays)

    sent, tuned = (
        partial(score, 0, nothing),
        partial(score, parts.steps_of(config, problem), subspaces if mapped else nothing),
    )
    jit = programs.jit_on(config.devices)
    return Calls(jit(train, donate_argnums=3), *map(jit, (trials, sent, tuned, whole)))
