"""The compiled programs of a run: rounds, and evaluation, each for all seeds at once; or whole runs as one program."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from experiments.config import Config
from experiments.engine import hosts
from experiments.engine.chunking import choose, map_runs, mesh_of, mesh_of_clients
from experiments.engine.evaluation import Scores, make_scores
from experiments.setup.local_training import make_optimizer
from experiments.setup.memory import refuse_draws
from experiments.setup.problem import Arrays, Clients, Problem, Seed
from fedlora_jax import rounds
from fedlora_jax.clients import Population, Sampling
from fedlora_jax.lora import Adapter
from fedlora_jax.method import Cohort, Method, no_learning
from fedlora_jax.rounds import RoundFn, Run


class Point(NamedTuple):
    """Where whole runs of one program differ besides their seeds; arrays ``[P]`` of them, or one, traced."""

    lr: Array
    value: Array  # of whatever else is varied; 0 where nothing is


class Scoring(NamedTuple):
    """What is kept of a whole run: ``(arrays, seed, run, ...) -> anything``, for one seed at one point."""

    block: Callable  # (arrays, seed, run, info of the block, rounds done) after each block of rounds
    end: Callable = lambda arrays, seed, run: ()


class Programs(NamedTuple):
    """Jitted functions; leading axis of seeds on runs, clients and keys."""

    start: Callable  # (adapters, keys) -> runs
    train: Any  # (base, train, clients, runs, keys) -> (runs, info [seeds, rounds, ...]); donates runs
    evaluate: Any  # (base, train, test, clients, runs, keys, tune) -> Scores; tune: also after local steps?


def make(config: Config, problem: Problem, method: Method) -> Programs:
    chunk, seeds_at_once = choose(config, problem)
    optimizer = make_optimizer(config)
    block = make_block(config, problem, method, optimizer, chunk)
    scores = make_scores(config, problem, method, optimizer, chunk)

    def start(adapters: Adapter, keys: Array) -> Run:
        return jax.vmap(lambda adapter, key: rounds.start(method, key, adapter, config.clients))(adapters, keys)

    def train(base, train, clients: Clients, runs: Run, keys: Array):
        one = lambda row, *images: block(*images, row[0].training(config.clients), row[1], row[2])
        return map_runs(one, (clients, runs, keys), seeds_at_once, config, base, train)

    def evaluate(base, train, test, clients: Clients, runs: Run, keys: Array, tune: Array) -> Scores:
        one = lambda row, arrays, tune: scores(arrays, *row, tune)
        common = Arrays(base, train, test[:2]), tune
        return map_runs(one, (Seed(clients, problem.adapters, keys), runs), seeds_at_once, config, *common)

    jit = jit_on(config.devices)
    return Programs(jit(start), jit(train, donate_argnums=3), jit(evaluate))


def everywhere(devices: int) -> NamedSharding | None:
    """Clients or seeds are shared by devices inside; whatever goes in or comes out, every device has all of."""
    mesh = mesh_of(devices)
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def placed(tree: Any, devices: int) -> Any:
    """Arrays where ``jit_on`` expects them, once for all."""
    place = everywhere(devices)
    return jax.tree.map(jnp.asarray, tree) if place is None else hosts.placed(tree, place)


def lent(tree: Any, devices: int) -> Any:
    """``placed`` of arrays from the host that nobody writes to any more: a CPU that is one device computes on these."""
    return jax.device_put(tree) if everywhere(devices) is None else placed(tree, devices)


def placed_problem(problem: Problem, devices: int) -> Problem:
    """A problem all of whose arrays are there, but for images that are staged."""
    stays = () if problem.staged else (problem.train, problem.test)
    parts = problem.base, problem.clients, problem.adapters, problem.keys, stays
    base, clients, adapters, keys, images = placed(parts, devices)
    own = problem._replace(base=base, clients=clients, adapters=adapters, keys=keys)
    return own if problem.staged else own._replace(train=images[0], test=images[1])


def jit_on(devices: int) -> Callable:
    """``jax.jit`` of what so many devices compute."""
    place = everywhere(devices)
    return partial(jax.jit, **({} if place is None else {"in_shardings": place, "out_shardings": place}))


def make_runs(config: Config, problem: Problem, points: int, build: Callable[[Point], Method], scoring: Callable):
    """Whole runs of every seed at each of ``points`` points, as one function.

    Args:
      config: the options; ``lr`` and what else a point has are taken from there.
      problem: its seeds are the runs' (they need not be ``config.seeds``).
      points: how many.
      build: the method at one point, whose numbers are traced.
      scoring: ``(method, optimizer) -> Scoring``.

    Returns:
      ``runs(points [P], arrays, seeds [S]) -> (block [P, S, blocks, ...], end [P, S, ...])``, and its last two
      arguments.
    """
    chunk, at_once = choose(config, problem, points)
    seeds = problem.keys.shape[0]

    def one(row, arrays: Arrays, everyone: Seed):
        point, s = row
        seed: Seed = jax.tree.map(lambda x: x[s], everyone)
        method, optimizer = build(point), make_optimizer(config, point.lr)
        block = make_block(config, problem, method, optimizer, chunk)
        keep: Scoring = scoring(method, optimizer)

        def advance(run: Run, end: Array):
            run, info = block(arrays.base, arrays.train, seed.clients.training(config.clients), run, seed.key)
            return run, keep.block(arrays, seed, run, info, end)

        ends = jnp.arange(config.eval_every, config.rounds + 1, config.eval_every)
        run, blocks = jax.lax.scan(advance, rounds.start(method, seed.key, seed.adapter, config.clients), ends)
        return blocks, keep.end(arrays, seed, run)

    def runs(points: Point, arrays: Arrays, everyone: Seed):
        repeated = jax.tree.map(lambda x: jnp.repeat(x, seeds), points)
        rows = (repeated, jnp.tile(jnp.arange(seeds), len(points.lr)))
        out = map_runs(one, rows, at_once, config, arrays, everyone)
        return jax.tree.map(lambda x: x.reshape(-1, seeds, *x.shape[1:]), out)

    return runs, (problem.arrays(), problem.everyone())


def make_block(config: Config, problem: Problem, method: Method, optimizer: Any, chunk: int | None) -> Callable:
    """The rounds between two evaluations, sampling included: ``rounds.scan_rounds`` with a run's options.

    Raises:
      ValueError: the images that a cohort draws would not fit into memory.
    """
    own = round_of(config, problem, method, optimizer, chunk)
    step = rounds.make_step(own.round_fn, participants=config.cohort, **own.drawing)
    block = rounds.scan_rounds(step, config.eval_every)
    return lambda base, data, population, run, key: block(base, data, own.told(population), run, key)


def make_placed_block(config: Config, problem: Problem, method: Method, optimizer: Any, chunk: int | None) -> Callable:
    """``make_block`` for a run whose memory is of some clients: also of ``ids [R, C]``, who takes part in each of ``R``
    rounds, and ``places [R, C]`` in it."""
    own = round_of(config, problem, method, optimizer, chunk)
    step = rounds.make_placed_step(rounds.make_cohort_step(own.round_fn, **own.drawing))

    def block(base, data, population: Population, run: Run, key: Array, ids: Array, places: Array):
        one = lambda run, who: step(base, data, own.told(population), run, key, *who)
        return jax.lax.scan(one, run, (ids, places))

    return block


class Round(NamedTuple):
    """One round with a run's options, and how it is fed."""

    round_fn: RoundFn
    drawing: dict[str, Any]  # of who is in a cohort, and of its examples, of ``rounds.make_cohort_step``
    told: Callable  # (population) -> as much of it as the method may know


def round_of(config: Config, problem: Problem, method: Method, optimizer: Any, chunk: int | None) -> Round:
    """The round of ``make_block``, which raises what this does."""
    steps = problem.longest or config.local_steps
    refuse_draws(problem.train[0][0], config.cohort, steps, config.batch, method.query)
    refuse_too_few_steps(config, problem, method)
    round_fn = rounds.make_round(
        method,
        problem.loss_fn,
        optimizer,
        chunk=chunk,
        mesh=mesh_of_clients(config),
        judge_fn=problem.judge_fn,
        attack=problem.attack,
    )
    drawing: dict[str, Any] = {"steps": steps, "batch": config.batch, "smallest": problem.smallest}
    drawing |= {"query": method.query, "dropouts": config.dropouts, "stragglers": config.stragglers}
    drawing |= {"sampling": Sampling(config.clients, config.cohort, config.join_rate)}
    if method.learn is not no_learning:
        return Round(round_fn, drawing, lambda population: population)
    # Signatures of random parts are there lest a server learns its clients by heart. One that learns nothing from
    # them (FedLC counts with them) is told of all of a client's data.
    whole = lambda population: population._replace(signatures=jax.tree.map(lambda x: x[:, :1], population.signatures))
    return Round(round_fn, drawing, whole)


def refuse_too_few_steps(config: Config, problem: Problem, method: Method) -> None:
    """Show a method the batches of the client that takes the fewest steps, where their numbers are not all the same.

    Raises:
      ValueError: the method cannot do with so few.
    """
    if problem.longest is not None or config.stragglers:
        own = problem.clients.population.examples
        fewest = 1 if config.stragglers else -(-int(own.min()) // config.batch)
        method.pool(Cohort(jnp.zeros(1, int), jnp.ones(1), jnp.ones(1, int), (), batches=jnp.zeros((1, fewest, 1))))
