"""How the rounds and evaluations of a run are computed: with all images on the device, or with those that are drawn.

Staged, images stay where they are. A part of a run, a few rounds or some clients that are scored (``parts.py``), is
given an array of those that it sees, and clients' lists of rows numbered anew as places in it; a thread reads the next
part's while this one computes. Draws look at positions in these lists, so the numbers are those of a run that holds all
images.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array, ShapeDtypeStruct

from experiments.config import Config
from experiments.engine import parts, programs
from experiments.engine.chunking import choose
from experiments.engine.evaluation import (
    Scores,
    Serving,
    is_mapped,
    make_serving,
    nothing,
    scored_at_once,
    subspaces,
    together,
)
from experiments.results import summary
from experiments.setup import memory, on_disk
from experiments.setup.local_training import make_optimizer
from experiments.setup.problem import Arrays, Problem, Seed
from fedlora_jax import clustering, training
from fedlora_jax.method import Method
from fedlora_jax.rounds import Info, Run


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
    """Jitted functions; ``everyone`` and ``runs`` have an axis of all seeds, what comes out one of those shown."""

    train: Any  # (base, shown, everyone, runs) -> (runs, info [s, rounds, ...]); donates runs
    trials: Any  # (base, shown, everyone, runs) -> memory [s, E, ...], of Serving.onboard
    sent: Any  # (base, shown, everyone, runs, memory, ids, places) -> (accuracy [s, C], ()), of Serving.part
    tuned: Any  # the same after local steps; and subspaces [s, C, ...], where a map is drawn
    whole: Any  # (base, (x, y), everyone, runs) -> [seeds, n], of all seeds


def make_calls(config: Config, problem: Problem, method: Method, serving: Serving, of_rounds: int) -> Calls:
    """The programs of the parts of a run; a part of its rounds has ``of_rounds`` of them."""
    chunk, at_once = choose(config, problem)
    several = dataclasses.replace(config, eval_every=of_rounds)
    block = programs.make_block(several, problem, method, make_optimizer(config), chunk)
    mapped = is_mapped(config, problem)

    def train(base, shown: Shown, everyone: Seed, runs: Run):
        one = lambda row: block(base, shown.train, row[0].clients.training(config.clients), row[1], row[0].key)
        new, info = training.map_clients(one, (shown.seeds(everyone), shown.of(runs)), at_once)
        put = lambda x, own: jax.lax.dynamic_update_slice_in_dim(x, own, shown.first, 0)
        return jax.tree.map(put, runs, new), info

    def trials(base, shown: Shown, everyone: Seed, runs: Run):
        one = lambda row: serving.onboard(Arrays(base, shown.train, ()), *row)  # type: ignore[arg-type]
        return training.map_clients(one, (shown.seeds(everyone), shown.of(runs)), at_once)

    def score(steps: int, read: Callable, base, shown: Shown, everyone: Seed, runs: Run, memory, ids, places):
        arrays = Arrays(base, shown.train, shown.test)
        one = lambda row: serving.part(arrays, *row, steps, read, ids, places)
        return training.map_clients(one, (shown.seeds(everyone), shown.of(runs), memory), at_once)

    def whole(base, test, everyone: Seed, runs: Run):
        one = lambda row: serving.whole(Arrays(base, (), test), *row)  # type: ignore[arg-type]
        return training.map_clients(one, (everyone, runs), at_once)

    sent, tuned = (
        partial(score, 0, nothing),
        partial(score, parts.steps_of(config, problem), subspaces if mapped else nothing),
    )
    jit = programs.jit_on(config.devices)
    return Calls(jit(train, donate_argnums=3), *map(jit, (trials, sent, tuned, whole)))


class Reading(NamedTuple):
    """What it costs to stage images; bytes and seconds."""

    of_round: int  # read for a round of all seeds
    of_scores: int  # for an evaluation, after local steps too, at most
    seconds: float  # to draw and read what a round sees
    held: int  # by the largest part and the one that is read meanwhile


class Staged:
    """Images stay where they are, and are read as they are drawn; otherwise as ``Resident``.

    Raises:
      ValueError: what one part draws would not fit into memory twice.
    """

    def __init__(self, config: Config, problem: Problem, method: Method, start: Run):
        self._config, self._problem, self._start = config, problem, start
        chunk, _ = choose(config, problem)
        serving = make_serving(config, problem, method, make_optimizer(config), chunk)
        self.sizes = parts.sizes(config, problem, method)
        memory.refuse_more_than_there_is(
            2 * self.sizes.largest * parts.bytes_of_one(problem),
            f"{self.sizes.largest} images that are drawn together, and as many that are read meanwhile, would",
            "use fewer --local-steps or --clients-per-round, a smaller --batch or --chunk, or --seeds-at-once 1",
        )
        self._draws = parts.make_draws(config, problem, method, self.sizes, serving)
        self._calls = make_calls(config, problem, method, serving, self.sizes.rounds)
        self._everyone = problem.everyone()
        whose = problem.clients
        rows = whose.population.rows, whose.test_rows, whose.test_counts
        self._rows, self._test_rows, self._test_counts = jax.device_get(rows)
        self._firsts = range(0, len(config.seeds), self.sizes.seeds)
        self._who = whose.all_scored()
        own = config.sharing * scored_at_once(self._who.shape[1], chunk, config.sharing)
        groups = np.asarray(together(self._who.shape[1], own))
        spans = [np.arange(i, i + self.sizes.clients) for i in range(0, groups.shape[1], self.sizes.clients)]
        self._scored = [(ids, places) for ids in groups for places in spans]
        count = len(problem.test[1])
        self._tests = [(i, min(count, i + self.sizes.tests)) for i in range(0, count, self.sizes.tests)]
        self._put = lambda x: programs.placed(x, config.devices)
        self.lowered = self._calls.train.lower(problem.base, self._like(self.sizes.by_rounds), self._everyone, start)

    def compile(self) -> float:
        begin = time.perf_counter()
        self._train = self.lowered.compile()
        took = time.perf_counter() - begin
        self._trials, self._sent, self._tuned, *whole = (program.compile() for program in self.lowered_scores())
        self._whole = dict(zip(self._lengths(), whole, strict=True))
        return took

    def lowered_scores(self) -> list[Any]:
        """The programs of an evaluation."""
        p, common = self._problem, (self._everyone, self._start)
        trials = self._calls.trials.lower(p.base, self._like(self.sizes.by_trials), *common)
        sent, tuned = self._like(0, self.sizes.by_clients), self._like(self.sizes.by_steps, self.sizes.by_clients)
        own = *common, trials.out_info, *self._scored[0]
        of_clients = [self._calls.sent.lower(p.base, sent, *own), self._calls.tuned.lower(p.base, tuned, *own)]
        whole = [self._calls.whole.lower(p.base, self._like(0, n).test, *common) for n in self._lengths()]
        return [trials, *of_clients, *whole]

    def _lengths(self) -> list[int]:
        """Test images of a part that scores the global model: of the last one perhaps fewer."""
        return sorted({stop - start for start, stop in self._tests})

    @property
    def compiled(self) -> tuple[Any, ...]:
        return self._train, self._trials, self._sent, self._tuned, *self._whole.values()

    @property
    def held(self) -> int:
        p, shown = self._problem, 2 * self.sizes.largest * parts.bytes_of_one(self._problem)  # one is read meanwhile
        return memory.bytes_of((p.base, self._everyone, self._start)) + shown

    def reading(self) -> Reading:
        """What it costs to stage images, from a part of the rounds that is read now."""
        self._of_rounds(0, 0)  # compiles what draws
        begin = time.perf_counter()
        rows = self._draws.of_rounds(0, self.sizes.rounds)
        gathered(self._problem.train, rows, self.sizes.by_rounds)
        took, each = time.perf_counter() - begin, parts.bytes_of_one(self._problem)
        seen = len(np.unique(np.concatenate([np.ravel(part) for part in jax.tree.leaves(rows)])))
        times = len(self._firsts) / self.sizes.rounds
        tests = len(self._problem.test[1]) + int(self._test_counts.sum())
        tuned = (self.sizes.by_trials + self.sizes.by_steps * len(self._scored)) * len(self._firsts)
        return Reading(round(seen * each * times), (tests + tuned) * each, took * times, 2 * self.sizes.largest * each)

    def begin(self, done: int) -> None:
        self._ahead = ahead(self._parts(done))

    def block(self, run: Run) -> tuple[Run, Info]:
        of_seeds = []
        for _ in self._firsts:
            infos = []
            for _ in range(self._config.eval_every // self.sizes.rounds):
                run, info = self._train(self._problem.base, next(self._ahead), self._everyone, run)
                infos.append(jax.device_get(info))  # waits until it is computed
            of_seeds.append(_joined(infos, 1))
        return run, _joined(of_seeds, 0)

    def scores(self, run: Run, end: int) -> Scores:
        total, mapped = self._who.shape[1], is_mapped(self._config, self._problem)
        tune, last = end > self._config.rounds - summary.WINDOW, end == self._config.rounds
        personal, tuned, distances = [], [], []
        for _ in self._firsts:
            kept = self._trials(self._problem.base, next(self._ahead), self._everyone, run)
            found = [self._of_clients(next(self._ahead), run, kept, tune, *own) for own in self._scored]
            sent, after, seen = jax.tree.map(lambda x: x[:, :total], _joined(found, 1))
            personal.append(sent)
            tuned.append(after)
            apart = jax.device_get(_apart(seen, len(sent))) if last and mapped else np.nan
            distances.append(np.broadcast_to(apart, (len(sent), total, total)).astype(np.float32))
        correct = [self._of_tests(next(self._ahead), run) for _ in self._tests]
        return Scores(
            _joined(correct, 1), _joined(personal, 0), _joined(tuned, 0), _joined(distances, 0) if mapped else None
        )

    def _of_clients(self, shown: Shown, run: Run, kept: Any, tune: bool, ids: np.ndarray, places: np.ndarray) -> Any:
        """Accuracies ``[s, C]`` as sent and after local steps (nan where not asked for), and their subspaces."""
        arguments = self._everyone, run, kept, ids, places
        sent, _ = jax.device_get(self._sent(self._problem.base, shown._replace(train=()), *arguments))
        if not tune:
            return sent, np.full_like(sent, np.nan), ()
        return sent, *jax.device_get(self._tuned(self._problem.base, shown, *arguments))

    def _of_tests(self, test: Any, run: Run) -> np.ndarray:
        """Where the global model is right, ``[seeds, n]``."""
        return jax.device_get(self._whole[len(test[1])](self._problem.base, test, self._everyone, run))

    def _parts(self, done: int) -> Iterator[Callable[[], Any]]:
        """What makes the images of each part, in the order in which ``block`` and ``scores`` take them."""
        every, s = self._config.eval_every, self.sizes
        for end in range(done + every, self._config.rounds + 1, every):
            tune = end > self._config.rounds - summary.WINDOW
            for first in self._firsts:
                for number in range(end - every, end, s.rounds):
                    yield partial(self._of_rounds, first, number)
            for first in self._firsts:
                draws = functools.cache(partial(self._draws.of_scores, first, end))
                yield partial(self._for_trials, first, draws)
                for ids, places in self._scored:
                    yield partial(self._for_clients, first, draws, ids[places], tune)
            for start, stop in self._tests:
                yield partial(self._of_whole, np.arange(start, stop))

    def _of_rounds(self, first: int, number: int) -> Shown:
        return self._shown(first, self._draws.of_rounds(first, number), self.sizes.by_rounds)

    def _for_trials(self, first: int, draws: Callable) -> Shown:
        return self._shown(first, draws()[0], self.sizes.by_trials)

    def _for_clients(self, first: int, draws: Callable, ids: np.ndarray, tune: bool) -> Shown:
        own = slice(first, first + self.sizes.seeds)
        who = self._who[own][:, ids]
        counts = np.take_along_axis(self._test_counts[own], who, 1)
        tests = np.take_along_axis(self._test_rows[own], who[..., None], 1)
        tests = tests[np.arange(tests.shape[-1]) < counts[..., None]]
        return self._shown(first, draws()[1][:, ids], self.sizes.by_steps * tune, tests, self.sizes.by_clients)

    def _of_whole(self, rows: np.ndarray) -> Any:
        return self._put(gathered(self._problem.test[:2], rows, len(rows))[0])

    def _shown(self, first: int, train: Any, most: int, test: Any = (), most_test: int = 0) -> Shown:
        """Some seeds with the images that they see, padded to ``most``; none where that is 0."""
        own = slice(first, first + self.sizes.seeds)
        images, places = gathered(self._problem.train, train, most)
        tests, of_tests = gathered(self._problem.test[:2], test, most_test)
        shown = Shown(np.int32(first), places[self._rows[own]], of_tests[self._test_rows[own]], images, tests)
        return self._put(shown)

    def _like(self, train: int, test: int = 0) -> Shown:
        """The shapes of ``_shown``."""
        of = lambda data, n: tuple(ShapeDtypeStruct((n, *x.shape[1:]), x.dtype) for x in data) if n else ()
        places = lambda rows: ShapeDtypeStruct((self.sizes.seeds, *rows.shape[1:]), np.int32)
        p, one = self._problem, ShapeDtypeStruct((), np.int32)
        return Shown(one, places(self._rows), places(self._test_rows), of(p.train, train), of(p.test[:2], test))


def gathered(data: tuple[Any, Any], rows: Any, most: int) -> tuple[Any, np.ndarray]:
    """What lies at these rows of ``x, y``, once each, padded to ``most``, and at which place of it each of all rows is.

    ``()`` where ``most`` is 0. The place of what is not there is 0.
    """
    x, y = data
    places = np.zeros(len(y), np.int32)
    if not most:
        return (), places
    found = np.unique(np.concatenate([np.ravel(part) for part in jax.tree.leaves(rows)]))
    places[found] = np.arange(len(found))
    images, labels = on_disk.buffer((most, *x.shape[1:]), x.dtype), np.zeros(most, y.dtype)
    on_disk.read(x, found, images[: len(found)])
    labels[: len(found)] = y[found]
    return (images, labels), places


def arrays_of_trials(problem: Problem, serving: Serving, seed: Seed, run: Run) -> tuple[Arrays, Seed]:
    """What ``Serving.onboard`` reads, for one seed, with no other images where these are staged."""
    if not problem.staged:
        return problem.arrays(), seed
    population = seed.clients.population
    bare = seed.clients._replace(population=population._replace(signatures=(), weights=(), examples=()))
    rows = jax.device_get(jax.jit(serving.draws)(bare, seed.key, run.round)[0])
    train, places = gathered(problem.train, rows, max(1, rows.size))
    population = population._replace(rows=places[np.asarray(population.rows)])
    return Arrays(problem.base, train, ()), seed._replace(clients=seed.clients._replace(population=population))  # type: ignore


def ahead(makers: Iterable[Callable[[], Any]]) -> Iterator[Any]:
    """What each of them makes, in a thread, while the one before is used."""
    with ThreadPoolExecutor(1, "images") as pool:
        made = deque()
        for make in makers:
            made.append(pool.submit(make))
            if len(made) > 1:
                yield made.popleft().result()
        yield from (last.result() for last in made)


@partial(jax.jit, static_argnums=1)
def _apart(bases: Any, seeds: int) -> Array:
    """Distances ``[seeds, C, C]`` of clients' subspaces."""
    return training.map_clients(lambda own: clustering.distances(own, own), bases, seeds)


def _joined(trees: list[Any], axis: int) -> Any:
    return jax.tree.map(lambda *xs: np.concatenate(xs, axis), *trees)
