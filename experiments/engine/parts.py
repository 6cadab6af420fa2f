"""A staged run in parts, each with what it draws: how large parts are, which images they see, who takes part.

What is drawn depends on keys, the number of the round and on how many images a client holds, not on what is in them. So
the library's own drawing of batches, given row numbers in place of images, tells beforehand what a part will see.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.config import Config
from experiments.engine import hosts
from experiments.engine.chunking import choose
from experiments.engine.evaluation import Serving, scored_at_once, together
from experiments.setup.problem import Clients, Problem
from experiments.setup.task import AT_ONCE
from fedlora_jax import rounds
from fedlora_jax.clients import Population
from fedlora_jax.method import Method
from fedlora_jax.rounds import Run

STAGE = 2**29  # bytes of images that a part sees at most, where it can be made so small


class Sizes(NamedTuple):
    """Of the parts of a run."""

    seeds: int  # computed at once
    rounds: int  # that one part computes
    clients: int  # that one part scores
    tests: int  # test images that the global model is scored on in one part
    kept: int  # clients whose rows of memory a part of the rounds is given, where memory is on the host; of each seed
    # Images that one part may see, of training and of test images:
    by_rounds: int
    by_trials: int
    by_steps: int
    by_clients: int

    @property
    def largest(self) -> int:
        """Images of the largest part."""
        return max(self.by_rounds, self.by_trials, self.by_steps + self.by_clients, self.tests)


def sizes(config: Config, problem: Problem, method: Method, row: int) -> Sizes:
    """As many rounds and clients as see no more than ``STAGE``: one round, and the clients scored at once, at least.

    ``row``: bytes of memory of one client, where that is on the host, or 0. Images that are resident count as none.
    """
    (chunk, seeds), total, unseen = choose(config, problem), sum(config.scored), config.scored[1]
    held = np.asarray(problem.clients.population.sizes)  # [S, N + K]
    seeds = len(held) if config.sharing_seeds > 1 else seeds  # those that devices share are computed together
    batches, widest = steps_of(config, problem) * config.batch, problem.clients.test_rows.shape[-1]
    n, n_test = len(problem.train[1]), len(problem.test[1])
    fits = STAGE // bytes_of_one(problem)
    most = lambda counts, bound: problem.staged * min(bound, max(counts.reshape(-1, seeds).sum(1)))  # of seeds at once

    def of_rounds(count: int) -> int:
        seen, training = batches + method.query, held[:, : config.clients]
        once = -np.sort(-np.minimum(training, seen), 1)[:, : config.cohort].sum(1)
        return most(np.minimum(count * once, np.minimum(training, count * seen).sum(1)), n)

    of_steps = lambda count: most(count * np.minimum(held.max(1), batches), n)
    of_clients = lambda count: problem.staged * min(n_test, seeds * count * widest)
    kept = lambda count: min(config.clients, count * config.cohort)
    own = scored_at_once(total, chunk, config.sharing)
    size = together(total, own * config.sharing).shape[1]
    many = [x for x in range(1, config.eval_every + 1) if config.eval_every % x == 0]
    among = [x for x in range(1, size + 1) if size % x == 0 and -(-x // config.sharing) % own == 0]
    each = max([x for x in many if of_rounds(x) <= fits and seeds * kept(x) * row <= STAGE], default=1)
    scored = max([x for x in among if of_steps(x) + of_clients(x) <= fits], default=min(among))
    tests = min(n_test, max(1, fits // AT_ONCE) * AT_ONCE) if problem.staged else n_test
    trials = of_steps(unseen) if method.onboard and unseen else 0
    seen = of_rounds(each), trials, of_steps(scored), of_clients(scored)
    return Sizes(seeds, each, scored, tests, kept(each) if row else 0, *seen)


def steps_of(config: Config, problem: Problem) -> int:
    """Local steps for which batches are drawn: those of the client that takes the most."""
    return problem.longest or config.local_steps


def bytes_of_one(problem: Problem) -> int:
    """Of an image, or of its tokens."""
    x = problem.train[0]
    return max(1, int(np.prod(x.shape[1:])) * np.dtype(x.dtype).itemsize)


class Draws(NamedTuple):
    """Rows of training images, of some seeds ``[s]``; computed on the CPU, whatever else is busy."""

    of_rounds: Callable  # (first of the seeds, rounds done) -> what the next part's rounds see
    who: Callable  # the same -> who takes part in them [s, R, C]
    of_scores: Callable  # (first of the seeds, rounds done) -> of trials [s, unseen, T, B], of local steps [s, E, T, B]


def make_draws(config: Config, problem: Problem, method: Method, sizes: Sizes, serving: Serving) -> Draws:
    """What the programs of a run draw, told by the functions with which they draw it."""
    cpu, n = jax.local_devices(backend="cpu")[0], len(problem.train[1])
    whose, keys = problem.clients, problem.keys
    # How many of its batches each client goes through is left out: they are drawn all the same.
    population = Population(whose.population.rows, whose.population.sizes, whose.population.ranks)
    of = lambda first, x: jax.device_put(x[first : first + sizes.seeds], cpu)
    bare = hosts.local((whose._replace(population=population), keys))
    some = {first: jax.tree.map(partial(of, first), bare) for first in range(0, len(keys), sizes.seeds)}

    # A round that computes nothing, and reports what it was given.
    seen = lambda base, state, cohort, key, round=None: (state, cohort.memory, (cohort.batches, cohort.queries))
    step = rounds.make_step(
        seen,  # type: ignore[arg-type]
        participants=config.cohort,
        steps=steps_of(config, problem),
        batch=config.batch,
        smallest=problem.smallest,
        query=method.query,
    )

    def of_rounds(clients: Clients, key: Array, number: Array) -> Any:
        run = Run((), (), number)
        own = clients.training(config.clients)
        return rounds.scan_rounds(step, sizes.rounds)({}, jnp.arange(n), own, run, key)[1]

    def who(clients: Clients, key: Array, number: Array) -> Array:
        one = lambda round: rounds.draw_ids(key, round, config.clients, config.cohort)
        return jax.lax.map(one, number + jnp.arange(sizes.rounds))

    def told(draw: Callable) -> Callable:
        many = jax.jit(lambda everyone, number: jax.lax.map(lambda row: draw(*row, number), everyone))
        return lambda first, done: jax.device_get(many(some[first], np.int32(done)))

    return Draws(told(of_rounds), told(who), told(serving.draws))
