"""A finished run's clients as a pool of adapters, and what its unseen clients are served with from it.

Every client that trained adapts the model that it is sent once more, by local steps on its own images, and leaves what
that makes of it in the pool. Unseen clients train nothing: a router (``fedlora_jax.pool``) says whose adapters serve
them, by what the frozen model sees in their training images, or in each test image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.commands import export, prelude
from experiments.engine.chunking import choose
from experiments.engine.evaluation import make_serving
from experiments.options import check_fields
from experiments.requests import Pool as Options
from experiments.results.folder import Folder, write_json
from experiments.results.summary import aligned, percent, spread
from experiments.setup import backbone as backbones
from experiments.setup.local_training import make_optimizer
from experiments.setup.on_disk import taken
from experiments.setup.problem import Seed, own_accuracy
from fedlora_jax import lora, pool
from fedlora_jax.lora import Adapter
from fedlora_jax.method import average_client

AT_ONCE = 16  # images that are looked at with an adapter each
ROUTERS: dict[str, Callable[[Options], pool.Router]] = {
    "everyone": lambda options: pool.everyone,
    "nearest": lambda options: pool.retrieval(1),
    "retrieval": lambda options: pool.retrieval(options.count),
    "likelihood": lambda options: pool.likelihood,
}
AS_SERVED, ADAPTED = "as the run serves them", "after steps of their own"


class Plan:
    """A run that was found whole, on the data and weights that it was computed with."""

    def __init__(self, options: Options):
        check_fields(options)
        command, config = export.recorded(Path(options.run))
        self.options, self.name = options, export.chosen(options.method, config)
        if not config.holdout_clients:
            raise ValueError(f"{options.run} has no unseen clients to serve: run it with --holdout-clients")
        prelude.checked(config)
        self.folder = Folder("pool", options.out)
        self.config, self.problem = dataclasses.replace(config, eval_clients=None), export.same_problem(command, config)
        if self.problem.staged:
            raise ValueError(f"the images of {options.run} are staged, and a pool is asked with all of them at once")
        self.steps = (
            (self.problem.longest or config.local_steps) if options.local_steps is None else options.local_steps
        )
        self.restored = [export.restored(self.config, self.problem, self.name, seed) for seed in config.seeds]

    def execute(self) -> None:
        """Print accuracies of unseen clients, and write them."""
        p, n = self.problem, self.config.clients
        seen = lambda rows: jnp.asarray(backbones.frozen_features(p.backbone, taken(p.images.x, np.flatnonzero(rows))))
        features = seen(~p.images.test), seen(p.images.test)
        with self.folder as folder:
            found = [self._of_seed(method, seed, run, features) for method, seed, run in self.restored]
            rows = {name: np.stack([own[name] for own in found]) for name in found[0]}  # [seeds, unseen]
            written = {name: x.tolist() for name, x in rows.items()}
            about = {"schema": 1, "options": dataclasses.asdict(self.options), "method": self.name, **prelude.today()}
            write_json(folder / "pool.json", {**about, "steps": self.steps, "pool": n, "unseen_accuracy": written})
            print(f"{self.name}: {n} adapters after {self.steps} local steps each; accuracy of unseen clients, %")
            table = [["", "mean", "worst client"]]
            for name, x in rows.items():
                table.append([name, percent(spread(x.mean(1).tolist())), percent(spread(x.min(1).tolist()))])
            print("\n".join(aligned(table)))
            print(f"\n{folder / 'pool.json'}")

    def _of_seed(self, method: Any, seed: Seed, run: Any, features: tuple[Array, Array]) -> dict[str, np.ndarray]:
        """Accuracies ``[unseen]`` of one seed by who serves."""
        p, n = self.problem, self.config.clients
        seed = seed._replace(clients=seed.clients._replace(scored=()))
        serving = make_serving(self.config, p, method, make_optimizer(self.config), choose(self.config, p)[0])
        keep = lambda base, model: model

        @jax.jit
        def left(arrays: Any, seed: Seed, run: Any) -> tuple[Array, Array, Adapter]:
            memory = serving.onboard(arrays, seed, run)
            before, _ = serving.score(arrays, seed, run, memory, 0)
            return before, *serving.score(arrays, seed, run, memory, self.steps, keep)

        before, after, models = left(p.arrays(), seed, run)
        export.of_receivers(["the pool's first client"], p.base, jax.tree.map(lambda x: x[:1], models))  # or refused
        population = seed.clients.population
        own = pool.pooled(jax.tree.map(lambda x: x[:n], models), features[0], population.rows[:n], population.sizes[:n])
        out = {AS_SERVED: before[n:]} | ({ADAPTED: after[n:]} if self.steps else {})
        nobody = average_client(seed.clients.training(n).cohort(jnp.arange(n), run.memory))
        base = jax.jit(lambda state: method.dispatch(p.base, state, nobody).base)(run.state)
        for name in self.options.router:
            rank = lora.max_rank(own.adapters) if name == "likelihood" else None
            score = jax.jit(self._scores(ROUTERS[name](self.options), rank))
            out[name] = score(base, own, seed.clients, features, p.train, p.test[:2])
        return {name: np.asarray(x, float) for name, x in out.items()}

    def _scores(self, route: pool.Router, rank: int | None) -> Callable[..., Array]:
        """``(base, pool, clients, features, train, test) -> accuracy [unseen]``."""
        p, n, m = self.problem, self.config.clients, self.config.holdout_clients

        def scores(base, own: pool.Pool, clients, features, train, test) -> Array:
            made = lambda h, valid: pool.served(own.adapters, route(own, h, valid), rank)

            def of_image(row: Array) -> Array:
                adapter = made(features[1][row][None], jnp.ones(1))
                return p.correct_fn(base, adapter, jax.tree.map(lambda x: x[row][None], test))[0]

            def of_client(i: Array) -> Array:
                rows, count = clients.test_rows[i], clients.test_counts[i]
                if self.options.by == "image":
                    correct = jax.lax.map(of_image, rows, batch_size=AT_ONCE)
                else:
                    whose, size = clients.population.rows[i], clients.population.sizes[i]
                    adapter = made(features[0][whose], (jnp.arange(len(whose)) < size).astype(jnp.float32))
                    correct = p.correct_fn(base, adapter, jax.tree.map(lambda x: x[rows], test))
                return own_accuracy(correct[None], count[None])[0]

            return jax.lax.map(of_client, n + jnp.arange(m))

        return scores
