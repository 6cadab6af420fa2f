"""Meta-training: what a method has learned (its ``theta``) by differentiating a loss through whole federated rounds.

    theta <- theta - Adam( clip( grad_theta L(run after K rounds) ) )        run <- one round with the new theta

``clip`` shortens a gradient to a norm of 1 (``meta_optimizer``). ``L`` is the loss of the models that the server would
send after ``K`` further rounds, local steps, aggregation and generation included, on images that all of those rounds
keep apart (``meta.outcome``; memory is that of one round). This needs clients' data in one place, so it is for
simulation (the first of ``--seeds`` alone); what it finds is served by any run (``--theta``, ``mode=frozen``).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import Array

from experiments import progress
from experiments.commands import prelude
from experiments.config import Config
from experiments.engine import methods, programs
from experiments.engine.chunking import choose
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
    """A federation, and what is being learned beside it."""

    run: Run
    moments: Any  # Adam's


class Plan:
    """Meta-training that has been checked: nothing is compiled or written yet."""

    def __init__(self, config: Config):
        prelude.checked(config)
        if len(config.methods) != 1:
            raise ValueError(f"meta trains one method, got --methods {','.join(config.methods)}")
        (self.name,) = config.methods
        if config.minimum < 2:
            raise ValueError("meta keeps examples of every client apart: --minimum must be at least 2, got 1")
        config = dataclasses.replace(config, seeds=config.seeds[:1])
        self.config = config
        self.folder = Folder("meta", config.out)
        self.problem = prelude.built(config)
        self.method = methods.build(self.name, **facts_of(config, self.problem.signature, min(self.problem.fewest)))
        p = self.problem
        self.seed: Seed = jax.tree.map(lambda x: x[0], p.everyone())
        state = jax.eval_shape(self.method.init, self.seed.key, self.seed.adapter)
        if not hasattr(state, "theta"):
            raise ValueError(f"{self.name} has no theta to meta-train: hyperlora:mode=frozen has")
        if self.method.learn is not no_learning:
            raise ValueError(f"{self.name} learns in its rounds already: meta-train hyperlora:mode=frozen")

    def execute(self) -> Path:
        with self.folder as folder:
            return self._execute(folder)

    def _execute(self, folder: Path) -> Path:
        config, seed = self.config, self.seed
        step, start = make(config, self.problem, self.method)
        learning, losses = jax.jit(start)(seed), []
        many = jax.jit(
            lambda learning, seed: jax.lax.scan(lambda x, _: step(x, seed), learning, length=config.eval_every)
        )
        with progress.bar(config.rounds, "step") as bar:
            for _ in range(config.rounds // config.eval_every):
                learning, seen = many(learning, seed)
                if not np.isfinite(seen).all():
                    raise FloatingPointError(f"{self.name}: the loss became infinite; try a smaller --meta-lr or --lr")
                losses += np.asarray(seen, float).tolist()
                bar.set_postfix_str(f"loss {losses[-1]:.3f}")
                bar.update(config.eval_every)
        path = record.write_theta(folder, self.name, learning.run.state.theta)
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
    """``step(learning, seed) -> (learning, loss)``, and ``start(seed) -> learning``."""
    optimizer, tx = make_optimizer(config), meta_optimizer(config.meta_lr)
    chunk, _ = choose(config, p)
    after_rounds = meta.outcome(method, p.loss_fn, optimizer, chunk=chunk, judge_fn=p.judge_fn)
    advance = programs.make_block(config, p, method, optimizer, chunk)

    def start(seed: Seed) -> Learning:
        run = rounds.start(method, seed.key, seed.adapter, config.clients)
        return Learning(run, tx.init(run.state.theta))

    def step(learning: Learning, seed: Seed) -> tuple[Learning, Array]:
        run, key = learning.run, jax.random.fold_in(purpose(seed.key, "meta-training"), learning.run.round)
        (cohorts, examples), ahead_key = ahead(config, p, seed, run, key), purpose(key, "rounds ahead")
        loss = lambda theta: after_rounds(
            p.base, run.state._replace(theta=theta), cohorts, examples, ahead_key, run.round
        )[0]
        value, gradient = jax.value_and_grad(loss)(run.state.theta)
        updates, moments = tx.update(gradient, learning.moments)
        theta: Any = optax.apply_updates(run.state.theta, updates)
        run = run._replace(state=run.state._replace(theta=theta))
        run, _ = advance(p.base, p.train, seed.clients.training(config.clients), run, seed.key)
        return Learning(run, moments), value

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
