"""Meta-training: what a method has learned (its ``theta``) by differentiating a loss through whole federated rounds.

    theta <- theta - Adam( clip( mean_s grad_theta L(run_s after K rounds) ) )     run_s <- one round with the new theta

``clip`` shortens a gradient to a norm of 1 (``meta_optimizer``). ``L`` is the loss of the models that the server would
send after ``K`` further rounds, local steps, aggregation and generation included, on images that all of those rounds
keep apart (``meta.outcome``; memory is that of one round). ``s`` are the federations of ``--seeds``; with ``--episode
R`` each begins anew after R rounds, with other draws, and they take turns, so that after the first R every meta-step is
of early and of late rounds alike. This needs clients' data in one place, so it is for simulation; what it finds is
served by any run (``--theta``, ``mode=frozen``).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments import progress
from experiments.commands import prelude
from experiments.config import Config
from experiments.engine import methods, programs
from experiments.engine.chunking import choose, map_runs
from experiments.engine.facts import facts_of
from experiments.results import record
from experiments.results.folder import Folder, write_json
from experiments.results.summary import counted
from experiments.setup.local_training import make_optimizer
from experiments.setup.problem import Problem, Seed
from fedlora_jax import meta, rounds
from fedlora_jax.clients import sample_ids, sample_rounds, sample_views
from fedlora_jax.keys import purpose
from fedlora_jax.method import Cohort, Method, no_learning
from fedlora_jax.rounds import Run

LONGEST = 1.0  # norm of a gradient that Adam sees, as where HyperLoRA learns in its rounds


class Learning(NamedTuple):
    """Federations, and what is being learned beside them."""

    runs: Run  # [S, ...], of the seeds; in place of the theta of their states counts the one below
    theta: Any
    moments: Any  # Adam's
    taken: Array  # meta-steps


class Plan:
    """Meta-training that has been checked: nothing is compiled or written yet."""

    def __init__(self, config: Config):
        prelude.checked(config)
        if len(config.methods) != 1:
            raise ValueError(f"meta trains one method, got --methods {','.join(config.methods)}")
        (self.name,) = config.methods
        if config.minimum < 2:
            raise ValueError("meta keeps examples of every client apart: --minimum must be at least 2, got 1")
        self.config = config
        self.folder = Folder("meta", config.out)
        self.problem = prelude.built(config)
        self.method = methods.build(self.name, **facts_of(config, self.problem.signature, min(self.problem.fewest)))
        first = jax.tree.map(lambda x: x[0], self.problem.everyone())
        state = jax.eval_shape(self.method.init, first.key, first.adapter)
        if not hasattr(state, "theta"):
            raise ValueError(f"{self.name} has no theta to meta-train: hyperlora:mode=frozen has")
        if self.method.learn is not no_learning:
            raise ValueError(f"{self.name} learns in its rounds already: meta-train hyperlora:mode=frozen")

    def execute(self) -> Path:
        with self.folder as folder:
            return self._execute(folder)

    def _execute(self, folder: Path) -> Path:
        config, seeds = self.config, self.problem.everyone()
        step, start = make(config, self.problem, self.method)
        learning, losses = jax.jit(start)(seeds), []
        many = jax.jit(
            lambda learning, seeds: jax.lax.scan(lambda x, _: step(x, seeds), learning, length=config.eval_every)
        )
        with progress.bar(config.rounds, "step") as bar:
            for _ in range(config.rounds // config.eval_every):
                learning, seen = many(learning, seeds)
                if not np.isfinite(seen).all():
                    raise FloatingPointError(f"{self.name}: the loss became infinite; try a smaller --meta-lr or --lr")
                losses += np.asarray(seen, float).tolist()
                bar.set_postfix_str(f"loss {losses[-1]:.3f}")
                bar.update(config.eval_every)
        path = record.write_theta(folder, self.name, learning.theta)
        about = prelude.about("meta", config, self.problem)
        write_json(folder / "meta.json", {"schema": 1, **about, "loss": losses})
        width = max(1, len(losses) // 5)
        print(f"\nloss after {counted(config.unroll, 'round')}, mean over meta-steps:")
        for i in range(0, len(losses), width):
            part = losses[i : i + width]
            print(f"  {i + 1:>4} to {i + len(part):>4}  {np.mean(part):.4f}")
        print(f"\n{path}")
        return path


def meta_optimizer(lr: float) -> optax.GradientTransformation:
    """Adam on gradients of a norm of at most ``LONGEST``.

    Where a client's local steps are unstable (its loss curved by more than 2 / lr) the derivative through them grows
    with each, and one meta-gradient can be longer than all before it by orders of magnitude. Adam alone goes its way
    for ten steps and then hardly moves: its second moments need a thousand to forget.
    """
    return optax.chain(optax.clip_by_global_norm(LONGEST), optax.adam(lr))


def make(config: Config, p: Problem, method: Method):
    """``step(learning, seeds [S]) -> (learning, mean loss)``, and ``start(seeds) -> learning``."""
    optimizer, tx = make_optimizer(config), meta_optimizer(config.meta_lr)
    chunk, at_once = choose(config, p)
    after_rounds = meta.outcome(method, p.loss_fn, optimizer, chunk=chunk, judge_fn=p.judge_fn)
    advance = programs.make_block(dataclasses.replace(config, eval_every=1), p, method, optimizer, chunk)
    count, episode = p.keys.shape[0], config.episode or config.rounds
    turns = np.arange(count) * (config.episode or 0) // count  # as if they had begun one after another

    def begun(seeds: Seed) -> Run:
        return jax.vmap(lambda seed: rounds.start(method, seed.key, seed.adapter, config.clients))(seeds)

    def start(seeds: Seed) -> Learning:
        runs = begun(seeds)
        theta = jax.tree.map(lambda x: x[0], runs.state.theta)
        return Learning(runs, theta, tx.init(theta), jnp.zeros((), jnp.int32))

    def gradient(row: tuple[Seed, Run], theta: Any) -> tuple[Array, Any]:
        seed, run = row
        key = jax.random.fold_in(purpose(seed.key, "meta-training"), run.round)
        (cohorts, examples), ahead_key = ahead(config, p, seed, run, key), purpose(key, "rounds ahead")
        loss = lambda theta: after_rounds(
            p.base, run.state._replace(theta=theta), cohorts, examples, ahead_key, run.round
        )[0]
        return jax.value_and_grad(loss)(theta)

    def one_round(row: tuple[Seed, Run], theta: Any) -> Run:
        seed, run = row
        run = run._replace(state=run.state._replace(theta=theta))
        return advance(p.base, p.train, seed.clients.training(config.clients), run, seed.key)[0]

    def step(learning: Learning, seeds: Seed) -> tuple[Learning, Array]:
        at = learning.taken + turns
        seeds = seeds._replace(key=jax.vmap(jax.random.fold_in)(seeds.key, at // episode))
        anew = lambda x, y: jnp.where((at % episode == 0).reshape(-1, *[1] * (x.ndim - 1)), x, y)
        runs = jax.tree.map(anew, begun(seeds), learning.runs)
        losses, gradients = map_runs(gradient, (seeds, runs), at_once, config, learning.theta)
        mean = jax.tree.map(lambda x: x.mean(0), gradients)
        updates, moments = tx.update(mean, learning.moments)
        theta: Any = optax.apply_updates(learning.theta, updates)
        runs = map_runs(one_round, (seeds, runs), at_once, config, theta)
        return Learning(runs, theta, moments, learning.taken + 1), losses.mean()

    return step, start


def ahead(config: Config, p: Problem, seed: Seed, run: Run, key: Array) -> tuple[Cohort, Any]:
    """The cohorts of the rounds to come ``[unroll, C, ...]``, and images of the last one's clients that none uses."""
    population, participants = seed.clients.training(config.clients), config.cohort
    keys, images = jax.random.split(purpose(key, "cohorts"), config.unroll), purpose(key, "images")
    ids = jax.vmap(lambda key: sample_ids(key, config.clients, participants))(keys)
    views = jax.vmap(lambda key, ids: sample_views(key, population, ids))(keys, ids)
    batches, examples = sample_rounds(
        images, p.train, population, ids, config.local_steps, config.batch, p.smallest, config.batch
    )
    cohort = lambda ids, batches, views: population.cohort(ids, run.memory, batches, views=views)
    return jax.vmap(cohort)(ids, batches, views), examples
