"""The compiled programs of a run: rounds, and evaluation, each for all seeds at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from experiments.config import Config
from experiments.layout import layout, mesh_of
from experiments.problem import Clients, Problem, make_optimizer, own_accuracy
from fedlora_jax import lora, rounds
from fedlora_jax.clients import sample_batches
from fedlora_jax.lora import Adapter
from fedlora_jax.method import Method, average_client
from fedlora_jax.rounds import Run


class Scores(NamedTuple):
    """Accuracies after a block of rounds; clients are the training ones, then the unseen ones."""

    correct: Array  # [n_test] 1 where the global model is right
    personal: Array  # [N + K] each client's model, as dispatched, on the client's own test images; of unseen clients
    #   after the trial by which the method gets to know them, where it has one (Method.meet)
    tuned: Array  # [N + K] the same after local steps; nan where they were not asked for


class Programs(NamedTuple):
    """Jitted functions; leading axis of seeds on runs, clients and keys."""

    start: Callable  # (adapters, keys) -> runs
    train: Any  # (base, train, clients, runs, keys) -> (runs, info [seeds, rounds, ...]); donates runs
    evaluate: Callable  # (base, train, test, clients, runs, keys, tune) -> Scores; tune: also after local steps?


def make(config: Config, problem: Problem, method: Method) -> Programs:
    chunk, seeds_at_once = layout(config, problem)
    optimizer = make_optimizer(config)
    block = make_block(config, problem, method, optimizer, chunk)
    score = rounds.make_evaluate(method, problem.correct_fn, problem.loss_fn, optimizer)
    meet = rounds.make_meet(method, problem.loss_fn, optimizer)

    def start(adapters: Adapter, keys: Array) -> Run:
        return jax.vmap(lambda adapter, key: rounds.start(method, key, adapter, config.clients))(adapters, keys)

    def train(base, train, clients: Clients, runs: Run, keys: Array):
        one = lambda row: block(base, train, row[0].training(config.clients), row[1], row[2])
        return rounds.map_clients(one, (clients, runs, keys), seeds_at_once)

    def evaluate(base, train, test, clients: Clients, runs: Run, keys: Array, tune: Array) -> Scores:
        x, y, _ = test

        def one(row) -> Scores:
            clients, run, key = row
            key = jax.random.fold_in(jax.random.fold_in(key, run.round), 1)
            training = clients.training(config.clients).cohort(jnp.arange(config.clients), run.memory)
            whole = score(base, run.state, average_client(training), (x[None], y[None]), key).before[0]

            everybody = jnp.arange(config.clients + config.holdout_clients)
            fresh = rounds.start(method, key, jax.tree.map(lambda a: a[0], problem.adapters), config.holdout_clients)
            memory = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), run.memory, fresh.memory)
            if method.meet and config.holdout_clients:
                unseen = everybody[config.clients :]
                trial = sample_batches(
                    jax.random.fold_in(key, 1), train, clients.population, unseen, config.local_steps, config.batch,
                    problem.smallest,
                )  # fmt: skip
                told = meet(base, run.state, clients.population.cohort(unseen, memory, trial), key)
                memory = jax.tree.map(lambda a, b: a.at[unseen].set(b), memory, told)
            examples = (x[clients.test_rows], y[clients.test_rows])

            def tuned() -> Array:
                batches = sample_batches(
                    key, train, clients.population, everybody, config.local_steps, config.batch, problem.smallest
                )
                cohort = clients.population.cohort(everybody, memory, batches)
                return own_accuracy(score(base, run.state, cohort, examples, key).after, clients.test_counts)

            as_sent = score(base, run.state, clients.population.cohort(everybody, memory), examples, key).before
            personal = own_accuracy(as_sent, clients.test_counts)
            return Scores(whole, personal, jax.lax.cond(tune, tuned, lambda: jnp.full_like(personal, jnp.nan)))

        return rounds.map_clients(one, (clients, runs, keys), seeds_at_once)

    return Programs(jax.jit(start), jax.jit(train, donate_argnums=3), jax.jit(evaluate))


def make_block(config: Config, problem: Problem, method: Method, optimizer: Any, chunk: int | None) -> Callable:
    """The rounds between two evaluations, sampling included: ``rounds.scan_rounds`` with a run's options."""
    step = rounds.make_step(
        rounds.make_round(method, problem.loss_fn, optimizer, chunk=chunk, mesh=mesh_of(config)),
        participants=config.clients_per_round or config.clients,
        steps=config.local_steps,
        batch=config.batch,
        smallest=problem.smallest,
        query=method.query,
    )
    return rounds.scan_rounds(step, config.eval_every)


def traffic_bytes(method: Method, adapter: Adapter, ranks: tuple[int, ...]) -> tuple[int, int]:
    """Bytes that a cohort of clients with these ranks sends and receives in one round, all clients together."""
    shapes = {rank: jax.eval_shape(partial(lora.cut, rank=rank), adapter) for rank in set(ranks)}
    size = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    cohort = [shapes[rank] for rank in ranks]
    per_rank: dict[int, Any] = {rank: jax.eval_shape(method.traffic, own, cohort) for rank, own in shapes.items()}
    return sum(size(per_rank[r].up) for r in ranks), sum(size(per_rank[r].down) for r in ranks)
