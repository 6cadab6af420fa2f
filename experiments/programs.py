"""The compiled programs of a run: rounds, and evaluation, each for all seeds at once; or whole runs as one program."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from experiments import client_map
from experiments.config import Config
from experiments.layout import bytes_of, divisor, layout, mesh_of, refuse_draws
from experiments.problem import Clients, Problem, make_optimizer, own_accuracy
from fedlora_jax import clustering, lora, rounds
from fedlora_jax.clients import sample_batches
from fedlora_jax.keys import purpose
from fedlora_jax.lora import Adapter
from fedlora_jax.method import Method, Traffic, average_client, no_learning
from fedlora_jax.rounds import Run

GROUP = 256  # clients that hold a model at a time when they are scored


class Scores(NamedTuple):
    """Accuracies after a block of rounds; clients are the training ones, then the unseen ones."""

    correct: Array  # [n_test] 1 where the global model is right
    personal: Array  # [N + K] each client's model, as dispatched, on the client's own test images; of unseen clients
    #   after the trial by which the method gets to know them, where it has one (Method.onboard)
    tuned: Array  # [N + K] the same after local steps; nan where they were not asked for
    distances: Array | None  # [N + K, N + K] distances of their subspaces after the last round and local steps; or nan;
    #   None where there are too many for a map


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


class Serving(NamedTuple):
    """How clients are served the models of a run, the training ones, then the unseen ones; of one seed."""

    whole: Callable  # (arrays, seed, run) -> [n_test] 1 where the global model is right
    onboard: (
        Callable  # (arrays, seed, run) -> memory [N + K, ...], of unseen clients after the trial by which the method
    )
    #   gets to know them, where it has one (Method.onboard)
    score: Callable  # (arrays, seed, run, memory, steps, read) -> (accuracy [N + K] of each client's model on its own
    #   test images after so many local steps, read(model) [N + K, ...])


def make_serving(config: Config, problem: Problem, method: Method, optimizer: Any, chunk: int) -> Serving:
    """The one way in which models are served and scored: in every run, whatever it then reports.

    Clients are scored in chunks of at most ``chunk``, as they are trained. Of many clients no more than ``GROUP`` hold
    a model at a time; images are looked up where they are used.
    """
    total, n = config.clients + config.holdout_clients, config.clients
    many, own_chunk = total > GROUP, scored_at_once(total, chunk)
    score_one = rounds.make_evaluate(method, problem.correct_fn)
    key_of = lambda seed, run: partial(purpose, purpose(jax.random.fold_in(seed.key, run.round), "evaluation"))

    def drawn(arrays: Arrays, clients: Clients, ids: Array, key: Array, steps: int) -> Array:
        """Rows of the training images of so many local steps, ``[C, steps, batch]``."""
        rows = jnp.arange(arrays.train[1].shape[0])
        return sample_batches(key, rows, clients.population, ids, steps, config.batch, problem.smallest)

    def loss_of(arrays: Arrays) -> Callable:
        images = lambda rows: jax.tree.map(lambda x: x[rows], arrays.train)
        return lambda base, adapter, rows, key: problem.loss_fn(base, adapter, images(rows), key)

    def whole(arrays: Arrays, seed: Seed, run: Run) -> Array:
        (x, y), training = arrays.test, seed.clients.training(n).cohort(jnp.arange(n), run.memory)
        one, key = average_client(training), key_of(seed, run)("nothing")
        return score_one(arrays.base, run.state, one, (x[None], y[None]), key).before[0]

    def onboard(arrays: Arrays, seed: Seed, run: Run) -> Any:
        key, population = key_of(seed, run), seed.clients.population
        fresh = rounds.start(method, key("newcomers"), seed.adapter, config.holdout_clients)
        memory = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), run.memory, fresh.memory)
        if method.onboard is None or not config.holdout_clients:
            return memory
        unseen = jnp.arange(n, total)
        trial = drawn(arrays, seed.clients, unseen, key("batches of trials"), config.local_steps)
        introduce = rounds.make_onboard(
            method, loss_of(arrays), optimizer, chunk=divisor(config.holdout_clients, chunk)
        )
        cohort = population.cohort(unseen, memory, trial)
        told = introduce(arrays.base, run.state, cohort, key("trials"), run.round)
        return jax.tree.map(lambda a, b: a.at[unseen].set(b), memory, told)

    def score(arrays: Arrays, seed: Seed, run: Run, memory: Any, steps: int, read: Callable = lambda model: ()):
        (x, y), key, clients = arrays.test, key_of(seed, run), seed.clients
        metric = lambda base, model, rows: (problem.correct_fn(base, model, (x[rows], y[rows])), read(model))
        evaluate = rounds.make_evaluate(method, metric, loss_of(arrays), optimizer, chunk=own_chunk)

        def group(ids: Array):
            batches = drawn(arrays, clients, ids, key("batches"), steps) if steps else ()
            cohort = clients.population.cohort(ids, memory, batches)
            scores = evaluate(arrays.base, run.state, cohort, clients.test_rows[ids], key("steps"), run.round)
            correct, seen = scores.after if steps else scores.before
            return own_accuracy(correct, clients.test_counts[ids]), seen

        if not many:
            return group(jnp.arange(total))
        size = GROUP // own_chunk * own_chunk
        ids = jnp.minimum(jnp.arange(-(-total // size) * size), total - 1).reshape(-1, size)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:total], jax.lax.map(group, ids))

    return Serving(whole, onboard, score)


def scored_at_once(total: int, chunk: int) -> int:
    """Clients whose models are computed side by side when ``total`` of them are scored."""
    return min(chunk, GROUP) if total > GROUP else divisor(total, chunk)


def make_scores(config: Config, problem: Problem, method: Method, optimizer: Any, chunk: int) -> Callable:
    """``(arrays, seed, run, tune) -> Scores`` of one seed; tune: also after local steps?"""
    total = config.clients + config.holdout_clients
    serving = make_serving(config, problem, method, optimizer, chunk)
    mapped = client_map.is_drawn(total)

    def scores(arrays: Arrays, seed: Seed, run: Run, tune: Array) -> Scores:
        memory = serving.onboard(arrays, seed, run)

        def tuned() -> tuple[Array, Array | None]:
            read = subspaces if mapped else lambda model: ()
            accuracy, q = serving.score(arrays, seed, run, memory, config.local_steps, read)
            if not mapped:
                return accuracy, None
            nowhere = jnp.full((total, total), jnp.nan)
            last = run.round == config.rounds
            return accuracy, jax.lax.cond(last, lambda: clustering.distances(q, q), lambda: nowhere)

        personal, _ = serving.score(arrays, seed, run, memory, 0)
        nothing = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(tuned))
        return Scores(serving.whole(arrays, seed, run), personal, *jax.lax.cond(tune, tuned, lambda: nothing))

    return scores


def subspaces(model: Adapter) -> list[Array]:
    """Orthonormal bases ``[..., r, out]`` of what the rows of ``b`` span in one model, for each adapted kernel."""
    return [clustering.bases(x.b) for x in lora.low_rank_leaves(model)]


def make_block(config: Config, problem: Problem, method: Method, optimizer: Any, chunk: int | None) -> Callable:
    """The rounds between two evaluations, sampling included: ``rounds.scan_rounds`` with a run's options.

    Raises:
      ValueError: the images that a cohort draws would not fit into memory.
    """
    cohort = config.clients_per_round or config.clients
    refuse_draws(problem.train[0][0], cohort, config.local_steps, config.batch, method.query)
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
    """Bytes that clients with these ranks send and receive in a round, all together, if they take part in every one."""
    sizes = traffic(method, adapter, ranks, set(ranks))
    return sum(sizes[rank].up for rank in ranks), sum(sizes[rank].down + sizes[rank].missed for rank in ranks)


def traffic(method: Method, adapter: Adapter, ranks: tuple[int, ...], own: Iterable[int]) -> dict[int, Traffic]:
    """``Method.traffic`` in bytes, of a client of each of the ranks ``own``, in a cohort of clients with ``ranks``."""
    shapes = {rank: jax.eval_shape(partial(lora.first_columns, rank=rank), adapter) for rank in {*own, *ranks}}
    told = lambda own, held: method.traffic(own, [held[rank] for rank in ranks])  # one adapter for all of a rank
    return {rank: Traffic(*map(bytes_of, jax.eval_shape(told, shapes[rank], shapes))) for rank in own}
