"""How the rounds and evaluations of a run are computed with as much of its images, or its memory, as each part needs.

A part of a run is a few rounds or some clients that are scored (``parts.py``). Where images are staged they stay where
they are: a part is given an array of those that it sees, and clients' lists of rows numbered anew as places in it; a
thread reads the next part's while this one computes. Draws look at positions in these lists, so the numbers are those
of a run that holds all images. Where memory, what clients keep, is staged it stays on the host: a part is given the
rows of the clients that take part in its rounds, and who they are, and what they keep then is written back.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array, ShapeDtypeStruct

from experiments.config import Config
from experiments.engine import kept, parts, programs
from experiments.engine.calls import Shown, make_calls
from experiments.engine.chunking import choose
from experiments.engine.evaluation import Scores, Serving, is_mapped, make_serving, scored_at_once, together
from experiments.engine.kept import Rows
from experiments.engine.reading import ahead, gathered
from experiments.results import summary
from experiments.setup import memory
from experiments.setup.local_training import make_optimizer
from experiments.setup.problem import Arrays, Problem, Seed
from fedlora_jax import clustering, rounds, training
from fedlora_jax.method import Method
from fedlora_jax.rounds import Info, Run


class Reading(NamedTuple):
    """What it costs to stage images; bytes and seconds."""

    of_round: int  # read for a round of all seeds
    of_scores: int  # for an evaluation, after local steps too, at most
    seconds: float  # to draw and read what a round sees
    held: int  # by the largest part and the one that is read meanwhile


class Staged:
    """Images stay where they are and are read as they are drawn, or memory stays on the host; else as ``Resident``.

    Args:
      config, problem, method: of the run.
      start: shapes of the run.
      hosted: whether its memory is on the host.

    Raises:
      ValueError: what one part draws would not fit into memory twice.
    """

    def __init__(self, config: Config, problem: Problem, method: Method, start: Run, hosted: bool = False):
        self._config, self._problem, self._method, self.hosted = config, problem, method, hosted
        self._rows_like, self._start = start.memory, start._replace(memory=()) if hosted else start
        row = memory.bytes_of(kept.like(start.memory))
        chunk, _ = choose(config, problem)
        serving = make_serving(config, problem, method, make_optimizer(config), chunk)
        self.sizes = parts.sizes(config, problem, method, row if hosted else 0)
        memory.refuse_more_than_there_is(
            2 * self.sizes.largest * parts.bytes_of_one(problem),
            f"{self.sizes.largest} images that are drawn together, and as many that are read meanwhile, would",
            "use fewer --local-steps or --clients-per-round, a smaller --batch or --chunk, or --seeds-at-once 1",
        )
        self._draws = parts.make_draws(config, problem, method, self.sizes, serving)
        self._calls = make_calls(config, problem, method, serving, self.sizes.rounds, hosted)
        self._mean = jax.jit(lambda clients, rows: serving.nobody(Seed(clients, (), ()), Run((), rows, np.int32(0))))  # type: ignore
        self._everyone = problem.everyone()
        whose = problem.clients
        rows = whose.population.rows, whose.test_rows, whose.test_counts
        self._rows, self._test_rows, self._test_counts = jax.device_get(rows)
        self._clients = jax.device_get(whose) if hosted else ()  # on the host too
        self._firsts = range(0, len(config.seeds), self.sizes.seeds)
        self._who = whose.all_scored()
        own = config.sharing * scored_at_once(self._who.shape[1], chunk, config.sharing)
        groups = np.asarray(together(self._who.shape[1], own))
        spans = [np.arange(i, i + self.sizes.clients) for i in range(0, groups.shape[1], self.sizes.clients)]
        self._scored = [(ids, places) for ids in groups for places in spans]
        count = len(problem.test[1])
        self._tests = [(i, min(count, i + self.sizes.tests)) for i in range(0, count, self.sizes.tests)]
        self._put, self._lend = (partial(f, devices=config.devices) for f in (programs.placed, programs.lent))
        shown = self._like(self.sizes.by_rounds)
        self.lowered = self._calls.train.lower(problem.base, shown, self._everyone, self._start, self._like_rows())

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
        ids, places = self._scored[0]
        rows = kept.like(self._rows_like, self.sizes.seeds, len(ids)) if self.hosted else trials.out_info
        own, sent = (*common, rows, ids, places), sent._replace(train=())
        of_clients = [self._calls.sent.lower(p.base, sent, *own), self._calls.tuned.lower(p.base, tuned, *own)]
        nobody = self._like_nobody()
        whole = [self._calls.whole.lower(p.base, self._like(0, n).test, *common, nobody) for n in self._lengths()]
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
        images = shown if p.staged else memory.bytes_of((p.train, p.test))
        return memory.bytes_of((p.base, self._everyone, self._start, self._like_rows())) + images

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

    def moving(self) -> tuple[int, float]:
        """Bytes of memory that a part of the rounds is given, of all seeds, and seconds to the device and back now."""
        rows = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self._like_rows().memory)
        begin = time.perf_counter()
        jax.device_get(self._put(rows))
        times = len(self._firsts)
        return memory.bytes_of(rows) * times, (time.perf_counter() - begin) * times

    def start(self, begin: Callable) -> Run:
        """A run before its first round, which ``begin`` would give of all clients on the device."""
        p = self._problem
        if not self.hosted:
            return begin(p.adapters, p.keys)
        none = lambda adapter, key: rounds.start(self._method, key, adapter, 0)
        run = programs.jit_on(self._config.devices)(jax.vmap(none))(p.adapters, p.keys)
        return run._replace(memory=kept.start(self._method, p.adapters, self._config.clients))

    def take(self, run: Run) -> Run:
        """A run from the host."""
        rows, own = (kept.writable(run.memory), run._replace(memory=())) if self.hosted else ((), run)
        own = self._put(own)
        return own._replace(memory=rows) if self.hosted else own

    def begin(self, done: int) -> None:
        self._ahead = ahead(self._parts(done))

    def block(self, run: Run) -> tuple[Run, Info]:
        of_seeds, own = [], self._on_device(run)
        for first in self._firsts:
            infos = []
            for _ in range(self._config.eval_every // self.sizes.rounds):
                shown, ids = next(self._ahead)
                rows, who = kept.taken(run.memory, first, ids, self.sizes.kept) if self.hosted else (Rows(), [])
                own, new, info = self._train(self._problem.base, shown, self._everyone, own, self._put(rows))
                infos.append(jax.device_get(info))  # waits until it is computed
                if self.hosted:
                    kept.put_back(run.memory, first, who, jax.device_get(new))
            of_seeds.append(_joined(infos, 1))
        return own._replace(memory=run.memory) if self.hosted else own, _joined(of_seeds, 0)

    def scores(self, run: Run, end: int) -> Scores:
        total, mapped = self._who.shape[1], is_mapped(self._config, self._problem)
        tune, last = end > self._config.rounds - summary.WINDOW, end == self._config.rounds
        personal, tuned, distances = [], [], []
        rows, run = run.memory, self._on_device(run)
        for first in self._firsts:
            of = self._memory(rows, first, self._trials(self._problem.base, next(self._ahead), self._everyone, run))
            found = [self._of_clients(next(self._ahead), run, of(ids), tune, ids, at) for ids, at in self._scored]
            sent, after, seen = jax.tree.map(lambda x: x[:, :total], _joined(found, 1))
            personal.append(sent)
            tuned.append(after)
            apart = jax.device_get(_apart(seen, len(sent))) if last and mapped else np.nan
            distances.append(np.broadcast_to(apart, (len(sent), total, total)).astype(np.float32))
        nobody = self._nobody(rows)
        correct = [self._of_tests(next(self._ahead), run, nobody) for _ in self._tests]
        return Scores(
            _joined(correct, 1), _joined(personal, 0), _joined(tuned, 0), _joined(distances, 0) if mapped else None
        )

    def _on_device(self, run: Run) -> Run:
        return run._replace(memory=()) if self.hosted else run

    def _memory(self, rows: Any, first: int, trials: Any) -> Callable[[np.ndarray], Any]:
        """What is given to score the clients at some places of those that are scored."""
        if not self.hosted:
            return lambda ids: trials
        strangers, n = jax.device_get(trials), self._config.scored[0]
        who = self._who[first : first + self.sizes.seeds, :n]
        return lambda ids: self._put(kept.served(rows, strangers, first, who, ids))

    def _nobody(self, rows: Any) -> Any:
        """The mean of all clients that train, computed on the CPU, for each seed; ``None`` where it need not be."""
        if not self.hosted:
            return None
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            of = lambda s: self._mean(*jax.tree.map(lambda x: x[s], (self._clients, rows)))
            means = [jax.device_get(of(s)) for s in range(len(self._who))]
        return self._put(jax.tree.map(lambda *xs: np.stack(xs), *means))

    def _of_clients(self, shown: Shown, run: Run, kept: Any, tune: bool, ids: np.ndarray, places: np.ndarray) -> Any:
        """Accuracies ``[s, C]`` as sent and after local steps (nan where not asked for), and their subspaces."""
        arguments = self._everyone, run, kept, ids, places
        sent, _ = jax.device_get(self._sent(self._problem.base, shown._replace(train=()), *arguments))
        if not tune:
            return sent, np.full_like(sent, np.nan), ()
        return sent, *jax.device_get(self._tuned(self._problem.base, shown, *arguments))

    def _of_tests(self, test: Any, run: Run, nobody: Any) -> np.ndarray:
        """Where the global model is right, ``[seeds, n]``."""
        return jax.device_get(self._whole[len(test[1])](self._problem.base, test, self._everyone, run, nobody))

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

    def _of_rounds(self, first: int, number: int) -> tuple[Shown, np.ndarray | None]:
        ids = self._draws.who(first, number) if self.hosted else None
        if not self._problem.staged:
            return self._all(first), ids
        return self._shown(first, self._draws.of_rounds(first, number), self.sizes.by_rounds), ids

    def _for_trials(self, first: int, draws: Callable) -> Shown:
        if not self._problem.staged:
            return self._all(first)
        return self._shown(first, draws()[0], self.sizes.by_trials)

    def _for_clients(self, first: int, draws: Callable, ids: np.ndarray, tune: bool) -> Shown:
        if not self._problem.staged:
            return self._all(first)
        own = slice(first, first + self.sizes.seeds)
        who = self._who[own][:, ids]
        counts = np.take_along_axis(self._test_counts[own], who, 1)
        tests = np.take_along_axis(self._test_rows[own], who[..., None], 1)
        tests = tests[np.arange(tests.shape[-1]) < counts[..., None]]
        return self._shown(first, draws()[1][:, ids], self.sizes.by_steps * tune, tests, self.sizes.by_clients)

    def _of_whole(self, rows: np.ndarray) -> Any:
        if not self._problem.staged:
            return self._problem.test[:2]
        return self._lend(gathered(self._problem.test[:2], rows, len(rows))[0])

    def _shown(self, first: int, train: Any, most: int, test: Any = (), most_test: int = 0) -> Shown:
        """Some seeds with the images that they see, padded to ``most``; none where that is 0."""
        own = slice(first, first + self.sizes.seeds)
        images, places = gathered(self._problem.train, train, most)
        tests, of_tests = gathered(self._problem.test[:2], test, most_test)
        shown = Shown(np.int32(first), places[self._rows[own]], of_tests[self._test_rows[own]], images, tests)
        return self._lend(shown)

    def _all(self, first: int) -> Shown:
        """Some seeds with all images, which are on the device."""
        own, p = slice(first, first + self.sizes.seeds), self._problem
        return self._put(Shown(np.int32(first), self._rows[own], self._test_rows[own], p.train, p.test[:2]))

    def _like_rows(self) -> Rows:
        """The shapes of what a part of the rounds is given of memory."""
        if not self.hosted:
            return Rows()
        s, c = self.sizes.seeds, self._config.cohort
        who = ShapeDtypeStruct((s, self.sizes.rounds, c), np.int32)
        return Rows(kept.like(self._rows_like, s, self.sizes.kept), who, who)

    def _like_nobody(self) -> Any:
        if not self.hosted:
            return None
        one = jax.tree.map(lambda x: x[0], self._clients), kept.like(self._rows_like, self._config.clients)
        mean = jax.eval_shape(self._mean, *one)
        return jax.tree.map(lambda x: ShapeDtypeStruct((len(self._who), *x.shape), x.dtype), mean)

    def _like(self, train: int, test: int = 0) -> Shown:
        """The shapes of ``_shown``."""
        if not self._problem.staged:
            train, test = (len(x) for x in (self._problem.train[1], self._problem.test[1]))
        of = lambda data, n: tuple(ShapeDtypeStruct((n, *x.shape[1:]), x.dtype) for x in data) if n else ()
        places = lambda rows: ShapeDtypeStruct((self.sizes.seeds, *rows.shape[1:]), np.int32)
        p, one = self._problem, ShapeDtypeStruct((), np.int32)
        return Shown(one, places(self._rows), places(self._test_rows), of(p.train, train), of(p.test[:2], test))


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


@partial(jax.jit, static_argnums=1)
def _apart(bases: Any, seeds: int) -> Array:
    """Distances ``[seeds, C, C]`` of clients' subspaces."""
    return training.map_clients(lambda own: clustering.distances(own, own), bases, seeds)


def _joined(trees: list[Any], axis: int) -> Any:
    return jax.tree.map(lambda *xs: np.concatenate(xs, axis), *trees)
