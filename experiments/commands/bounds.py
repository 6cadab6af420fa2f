"""Between which bounds every method lies: zero-shot and a linear probe below, local-only beside, centralised above.

What is trained sees what a federation sees: the images of the clients that train, not those of unseen ones. Where
clients are the values of a column and images have another, ``group`` (a domain, a way of naming), one more bound is
centralised training for each group alone, by an oracle that knows the group of every client.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.linear_model import LogisticRegression

from experiments import progress
from experiments.config import Config, check
from experiments.results import metrics, summary
from experiments.setup import columns, local_training, problem
from experiments.setup.backbone import frozen_features
from experiments.setup.local_training import make_optimizer
from experiments.setup.memory import refuse_draws
from experiments.setup.problem import Clients, Problem, own_accuracy
from fedlora_jax import rounds
from fedlora_jax.clients import Population, padded, sample_batches
from fedlora_jax.methods.fedit import FedITState, fedit

_CENTRAL_BATCH = 64


class Plan:
    """The same data, clients, adapters and seeds as ``compare``, without a federation."""

    def __init__(self, config: Config):
        check(config)
        local_training.check(config)
        self.config, self.problem = config, problem.build(config)
        self.steps, cohort = config.rounds * (self.problem.longest or config.local_steps), config.cohort
        each, together = (config.clients, self.steps), (1, self.steps * cohort)
        for clients, alone in (each, together):
            refuse_draws(self.problem.train[0][0], clients, alone, config.batch)

    def execute(self) -> dict[str, Any]:
        config, p = self.config, self.problem
        score = rounds.make_evaluate(fedit(), p.correct_fn, p.loss_fn, make_optimizer(config))
        steps, work = self.steps, p.clients.population.examples
        each = config.batch * steps if p.longest is None else config.rounds * float(work[:, : config.clients].mean())
        images = int(each * config.cohort)
        central_steps = max(1, images // _CENTRAL_BATCH)
        local = jax.jit(lambda *row: _local(score, p, config, steps, *row))
        held = pooled(p, config.clients)
        central = jax.jit(lambda *row: _central(score, p, config, central_steps, int(held.sizes.min()), *row))
        groups = grouped(p, config.clients) if config.partition.startswith(columns.PREFIX) else None
        fewest = groups.smallest if groups else 0
        alone = jax.jit(lambda *row: _central(score, p, config, central_steps, fewest, *row)[1])
        features = frozen_features(p.backbone, p.images.x)
        results: dict[str, list[float]] = {"zero_shot": [], "linear_probe": [], "local_only": [], "centralised": []}
        for s in progress.following(range(len(config.seeds)), "seed"):
            seed = jax.tree.map(lambda x, s=s: x[s], (p.clients, p.adapters, p.keys))
            own = jax.tree.map(lambda x, s=s: x[s : s + 1], held)
            frozen, tuned = central(own, *seed[1:])
            results["zero_shot"].append(_domain_mean(p, frozen))
            results["linear_probe"].append(_domain_mean(p, _probe(p, features, own.rows[0, : int(own.sizes[0])])))
            results["centralised"].append(_domain_mean(p, tuned))
            if groups:
                right = groups.right(s, lambda own, seed=seed: alone(own, *seed[1:]))
                results.setdefault("by_group", []).append(_domain_mean(p, right))
            results["local_only"].append(float(np.nanmean(local(*seed))))
        entries = {name: summary.spread(values) for name, values in results.items()}
        self._print(entries, steps, central_steps)
        return entries

    def _print(self, entries: dict[str, Any], steps: int, central_steps: int) -> None:
        pooled, together = (
            "training clients' images pooled",
            f"{summary.counted(central_steps, 'step')} of {_CENTRAL_BATCH}",
        )
        what = {
            "zero_shot": "the frozen model, all test images",
            "linear_probe": f"logistic regression on frozen features of {pooled}, all test images",
            "local_only": f"each client alone, {'up to ' * (self.problem.longest is not None)}"
            f"{summary.counted(steps, 'step')} of {self.config.batch}, own test images",
            "by_group": f"{pooled} by group, {together} for each, its test images",
            "centralised": f"{pooled}, {together}, all test images",
        }
        print()
        for name, entry in entries.items():
            print(f"{name:<13} {summary.percent(entry):>10}  {what[name]}")
        print(f"\naccuracies in %, mean and 95 % interval over {summary.counted(len(self.config.seeds), 'seed')}")


def _local(score, p: Problem, config: Config, steps: int, clients: Clients, adapter, key):
    """Accuracy of every training client on its own test images after training alone, ``[N]``."""
    population, ids = clients.training(config.clients), jnp.arange(config.clients)
    if p.longest is not None:
        population = population._replace(examples=config.rounds * population.examples)
    batches = sample_batches(key, p.train, population, ids, steps, config.batch, p.smallest)
    rows = clients.test_rows[: config.clients]
    cohort = population.cohort(ids, (), batches)
    correct = score(p.base, FedITState(adapter), cohort, (p.test[0][rows], p.test[1][rows]), key).after
    return own_accuracy(correct, clients.test_counts[: config.clients])


def pooled(p: Problem, training: int) -> Population:
    """Of each seed a client that holds all that its training clients hold; no signatures."""
    population = jax.device_get(p.clients.population)
    parts = [
        np.sort(np.concatenate([row[:size] for row, size in zip(rows[:training], sizes[:training], strict=True)]))
        for rows, sizes in zip(population.rows, population.sizes, strict=True)
    ]
    return Population(padded(parts), np.array([len(part) for part in parts]), population.ranks.max(1))  # type: ignore


class Groups(NamedTuple):
    """Who is of which group, as an oracle knows it. held: of each seed and group a client that holds all that the
    group's training clients hold, ``[S, G, ...]``. tests: the group of each test image, ``[n_test]``."""

    held: Population
    tests: np.ndarray

    @property
    def smallest(self) -> int:
        return int(self.held.sizes.min())

    def right(self, s: int, tuned: Callable[[Population], Any]) -> np.ndarray:
        """Which test images the models of their own groups get right, ``[n_test]``, where ``tuned`` says it of one."""
        one = lambda g: jax.tree.map(lambda x: x[s, g][None], self.held)
        each = np.stack([tuned(one(g)) for g in range(self.held.sizes.shape[1])])
        return each[self.tests, np.arange(len(self.tests))]


def grouped(p: Problem, training: int) -> Groups | None:
    """By the column ``group``; None where there is none, or as many as clients, clients are of several, or nobody of a
    group trains."""
    if "group" not in p.images.columns.names:
        return None
    names, value = np.unique(columns.of(p.images, "group"), return_inverse=True)
    of_image, population, none = value[~p.images.test], jax.device_get(p.clients.population), np.zeros(0, int)
    parts = [
        np.concatenate([none, *(row[:n] for row, n in zip(rows, sizes, strict=True) if of_image[row[0]] == g)])
        for rows, sizes in zip(population.rows[:, :training], population.sizes[:, :training], strict=True)
        for g in range(len(names))
    ]
    sizes, mixed = np.array([len(part) for part in parts]), [len(np.unique(of_image[part])) > 1 for part in parts]
    if len(names) >= training or not sizes.all() or any(mixed):
        return None
    shape = len(population.rows), len(names)
    held = Population(padded(parts).reshape(*shape, -1), sizes.reshape(shape), np.full(shape, population.ranks.max()))  # type: ignore
    return Groups(held, value[p.images.test])


def _central(score, p: Problem, config: Config, steps: int, smallest: int, everybody: Population, adapter, key):
    """Which test images one client that holds everything gets right, before and after training, ``[n_test]``."""
    one = jnp.zeros(1, int)
    batches = sample_batches(key, p.train, everybody, one, steps, _CENTRAL_BATCH, smallest)
    cohort = everybody.cohort(one, (), batches)
    scores = score(p.base, FedITState(adapter), cohort, (p.test[0][None], p.test[1][None]), key)
    return scores.before[0], scores.after[0]


def _probe(p: Problem, features: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Which test images are right, by the training images ``rows``."""
    train, test = features[~p.images.test][rows], features[p.images.test]
    scale = train.std(0) + 1e-6
    model = LogisticRegression(max_iter=2000).fit(train / scale, np.asarray(p.train[1])[rows])
    return model.predict(test / scale) == np.asarray(p.test[1])


def _domain_mean(p: Problem, correct) -> float:
    return metrics.mean_over(np.asarray(p.test[2]), np.asarray(correct, float))
