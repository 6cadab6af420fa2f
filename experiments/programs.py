"""The compiled programs of a run: rounds, and evaluation, each for all seeds at once; or whole runs as one program."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from experiments.config import Config
from experiments.layout import divisor, layout, mesh_of
from experiments.problem import Clients, Problem, make_optimizer, own_accuracy
from fedlora_jax import clustering, lora, rounds
from fedlora_jax.clients import sample_batches
from fedlora_jax.lora import Adapter
from fedlora_jax.method import Method, average_client, no_learning
from fedlora_jax.rounds import Run


class Scores(NamedTuple):
    """Accuracies after a block of rounds; clients are the training ones, then the unseen ones."""

    correct: Array  # [n_test] 1 where the global model is right
    personal: Array  # [N + K] each client's model, as dispatched, on the client's own test images; of unseen clients
    #   after the trial by which the method gets to know them, where it has one (Method.meet)
    tuned: Array  # [N + K] the same after local steps; nan where they were not asked for
    apart: Array | None  # [N + K, N + K] distances of their subspaces after the last round and local steps; or nan


class Arrays(NamedTuple):
    """What the programs read; arguments, so that no image becomes a constant of a program."""

    base: Any
    train: tuple[Array, Array]
    test: tuple[Array, Array]


class Seed(NamedTuple):
    """What a run of one seed starts from (in ``make_runs`` first with a leading axis of seeds)."""

    clients: Clients
    adapter: Adapter
    key: Array


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
    chunk, seeds_at_once = layout(config, problem)
    optimizer = make_optimizer(config)
    block = make_block(config, problem, method, optimizer, chunk)
    scores = make_scores(config, problem, method, optimizer, chunk)

    def start(adapters: Adapter, keys: Array) -> Run:
        return jax.vmap(lambda adapter, key: rounds.start(method, key, adapter, config.clients))(adapters, keys)

    def train(base, train, clients: Clients, runs: Run, keys: Array):
        one = lambda row: block(base, train, row[0].training(config.clients), row[1], row[2])
        return rounds.map_clients(one, (clients, runs, keys), seeds_at_once)

    def evaluate(base, train, test, clients: Clients, runs: Run, keys: Array, tune: Array) -> Scores:
        one = lambda row: scores(Arrays(base, train, test[:2]), *row, tune)
        return rounds.map_clients(one, (Seed(clients, problem.adapters, keys), runs), seeds_at_once)

    # Only clients in training are shared by devices; whatever goes in or comes out, every device has all of.
    mesh = mesh_of(config.devices)
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    jit = partial(jax.jit, **({} if mesh is None else {"in_shardings": everywhere, "out_shardings": everywhere}))
    return Programs(jit(start), jit(train, donate_argnums=3), jit(evaluate))


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
    chunk, at_once = layout(config, problem, points)
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
        out = rounds.map_clients(lambda row: one(row, arrays, everyone), rows, at_once)
        return jax.tree.map(lambda x: x.reshape(-1, seeds, *x.shape[1:]), out)

    arrays = Arrays(problem.base, problem.train, problem.test[:2])
    return runs, (arrays, Seed(problem.clients, problem.adapters, problem.keys))


def make_scores(config: Config, problem: Problem, method: Method, optimizer: Any, chunk: int) -> Callable:
    """``(arrays, seed, run, tune) -> Scores`` of one seed; tune: also after local steps?

    Clients are scored in chunks of at most ``chunk``, as they are trained.
    """
    total = config.clients + config.holdout_clients
    score_one = rounds.make_evaluate(method, problem.correct_fn)
    seen = lambda base, model, examples: (problem.correct_fn(base, model, examples), subspaces(model))
    score = rounds.make_evaluate(method, seen, problem.loss_fn, optimizer, chunk=divisor(total, chunk))
    meet = rounds.make_meet(method, problem.loss_fn, optimizer)
    drawn = lambda train, clients, ids, key: sample_batches(
        key, train, clients.population, ids, config.local_steps, config.batch, problem.smallest
    )

    def scores(arrays: Arrays, seed: Seed, run: Run, tune: Array) -> Scores:
        base, (x, y), clients = arrays.base, arrays.test, seed.clients
        key = jax.random.fold_in(jax.random.fold_in(seed.key, run.round), 1)
        training = clients.training(config.clients).cohort(jnp.arange(config.clients), run.memory)
        whole = score_one(base, run.state, average_client(training), (x[None], y[None]), key).before[0]

        everybody = jnp.arange(total)
        fresh = rounds.start(method, key, seed.adapter, config.holdout_clients)
        memory = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), run.memory, fresh.memory)
        if method.meet and config.holdout_clients:
            unseen = everybody[config.clients :]
            trial = drawn(arrays.train, clients, unseen, jax.random.fold_in(key, 1))
            told = meet(base, run.state, clients.population.cohort(unseen, memory, trial), key)
            memory = jax.tree.map(lambda a, b: a.at[unseen].set(b), memory, told)
        examples = (x[clients.test_rows], y[clients.test_rows])

        def tuned() -> tuple[Array, Array]:
            cohort = clients.population.cohort(everybody, memory, drawn(arrays.train, clients, everybody, key))
            correct, q = score(base, run.state, cohort, examples, key).after
            nowhere = jnp.full((total, total), jnp.nan)
            apart = jax.lax.cond(run.round == config.rounds, lambda: clustering.distances(q, q), lambda: nowhere)
            return own_accuracy(correct, clients.test_counts), apart

        as_sent, _ = score(base, run.state, clients.population.cohort(everybody, memory), examples, key).before
        personal = own_accuracy(as_sent, clients.test_counts)
        nothing = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(tuned))
        return Scores(whole, personal, *jax.lax.cond(tune, tuned, lambda: nothing))

    return scores


def subspaces(model: Adapter) -> list[Array]:
    """Orthonormal bases ``[..., r, out]`` of what the rows of ``b`` span in one model, for each adapted kernel."""
    return [clustering.bases(x.b) for x in lora.low_rank_leaves(model)]


def make_block(config: Config, problem: Problem, method: Method, optimizer: Any, chunk: int | None) -> Callable:
    """The rounds between two evaluations, sampling included: ``rounds.scan_rounds`` with a run's options."""
    step = rounds.make_step(
        rounds.make_round(method, problem.loss_fn, optimizer, chunk=chunk, mesh=mesh_of(config.devices)),
        participants=config.clients_per_round or config.clients,
        steps=config.local_steps,
        batch=config.batch,
        smallest=problem.smallest,
        query=method.query,
    )
    block = rounds.scan_rounds(step, config.eval_every)
    if method.learn is not no_learning:
        return block
    # Signatures of random parts are there lest a server learns its clients by heart. One that learns nothing from
    # them (FedLC counts with them) is told of all of a client's data.
    whole = lambda population: population._replace(signatures=jax.tree.map(lambda x: x[:, :1], population.signatures))
    return lambda base, data, population, run, key: block(base, data, whole(population), run, key)


def traffic_bytes(method: Method, adapter: Adapter, ranks: tuple[int, ...]) -> tuple[int, int]:
    """Bytes that a cohort of clients with these ranks sends and receives in one round, all clients together."""
    shapes = {rank: jax.eval_shape(partial(lora.cut, rank=rank), adapter) for rank in set(ranks)}
    size = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    cohort = [shapes[rank] for rank in ranks]
    per_rank: dict[int, Any] = {rank: jax.eval_shape(method.traffic, own, cohort) for rank, own in shapes.items()}
    return sum(size(per_rank[r].up) for r in ranks), sum(size(per_rank[r].down) for r in ranks)
