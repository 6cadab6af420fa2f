"""How much local work a method needs: accuracy against the number of local steps, learning rates chosen fairly.

For every method and every budget ``E`` (local steps of a round):

1. on a part of the training images set apart, and on other seeds, the learning rate of the grid is chosen, and whether
   clients use a model as it is sent or after ``E`` more steps on their own images: whatever serves all clients best;
2. with these, fresh runs on all training images are scored on the test images: training clients and clients never
   seen, after 0, 1, 2, 5 and 10 local steps, served as in ``compare``.

What is charged: ``passes`` per client and round, one for the forward and backward computation of one batch: ``E`` for
the local steps, one for each gradient on examples kept apart, and what differentiating through local steps adds
(``exact``: a further backward pass of each step, and with several steps its computation anew).

Every method at every budget is on disk as soon as it is known: ``--resume`` goes on, with the same methods or more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments import progress
from experiments.commands import prelude
from experiments.config import Config
from experiments.engine import evaluation, methods, programs
from experiments.engine.chunking import choose
from experiments.engine.facts import facts_of
from experiments.engine.programs import Point, Scoring
from experiments.results import budget_claims, budget_figures, metrics, summary
from experiments.results.folder import CONFIG, read_json, say, sealed, unsealed, write_atomically, write_json
from experiments.results.style import png
from experiments.setup.problem import Arrays, Problem, Seed
from fedlora_jax.method import Method
from fedlora_jax.rounds import Run

TAUS = (0, 1, 2, 5, 10)
FILE = "budget.json"
SHARE = 0.25  # of the training images: what learning rates are chosen on


class Outcome(NamedTuple):
    """One method under one budget, for every seed."""

    clients: Array  # [seeds, taus, E] accuracy of each client that is scored after tau local steps
    personal: Array  # [seeds, blocks] mean over training clients, as sent, after each block of rounds
    overall: Array  # [seeds, blocks] accuracy of the global model, mean over domains as in compare


class Plan:
    """A budget experiment that has been checked: nothing is compiled or written yet."""

    def __init__(self, config: Config):
        prelude.checked(config)
        if config.clients < 2 or config.holdout_clients < 1:
            raise ValueError(
                f"a budget experiment learns from several clients and serves others: got --clients {config.clients} "
                f"and --holdout-clients {config.holdout_clients}, expected at least 2 and 1"
            )
        self.config = config
        self.folder = prelude.opened("budget", config, free=("methods", "budgets"))
        validation = dataclasses.replace(config, validation=SHARE, seeds=config.tuning_seeds)
        self.problems = {"test": prelude.built(config)}
        self.problems["validation"] = prelude.built(validation, self.problems["test"].backbone)
        self.about = prelude.about("budget", config, self.problems["test"]) | prelude.today()
        if config.resume:
            self.about = prelude.going_on(self.folder, self.about)
        facts = facts_of(config, self.problems["test"].signature, min(self.problems["test"].fewest))
        self.built = {name: methods.build(name, **facts) for name in config.methods}
        for name, method in self.built.items():
            if "dp_sgd" in method.stack:
                raise ValueError(f"{name} counts one number of local steps, and budget tries several: use compare")
            if "scaffold" in method.stack:
                raise ValueError(f"{name} is built for one local learning rate, and budget tries several: use compare")

    def execute(self) -> Path:
        with self.folder as folder:
            return self._execute(folder)

    def _execute(self, folder: Path) -> Path:
        entries = held_in(folder / FILE)
        write_json(folder / CONFIG, self.about)
        done = {(e["method"], e["steps"]) for e in entries}
        cells = [(name, steps) for name in self.config.methods for steps in self.config.budgets]
        left = [cell for cell in cells if cell not in done]
        with progress.bar(sum(steps for _, steps in left), "step") as bar:
            for name, steps in left:
                bar.set_description(f"{name}, {steps} local steps")
                entries.append(self._entry(name, steps))
                self._write(folder, entries)
                bar.update(steps)
        self._write(folder, entries)  # where nothing was left to compute, too: claims and pictures are of this code
        print(f"\n{budget_claims.table(self._result(entries))}\n\n{folder / FILE}")
        return folder

    def _entry(self, name: str, steps: int) -> dict[str, Any]:
        config, method = dataclasses.replace(self.config, local_steps=steps), self.built[name]
        scores: dict[tuple[float, int], float] = {}
        served = (0, steps)
        run = program(config, self.problems["validation"], method, len(config.lrs), served)
        for rate, clients in zip(config.lrs, np.asarray(run(config.lrs).clients), strict=True):
            scores |= {(rate, t): float(np.nanmean(clients[:, i])) for i, t in enumerate(served)}
        lr, tau = max(scores, key=scores.__getitem__)
        result = program(config, self.problems["test"], method, 1, TAUS)((lr,))
        result = jax.tree.map(lambda x: np.asarray(x[0]), result)
        return {"method": name, "about": methods.about(name)._asdict(), "steps": steps, "lr": lr, "tau": tau,
                "validation": [{"lr": r, "tau": t, "accuracy": a} for (r, t), a in scores.items()],
                "passes": method.meta_gradient.passes(steps), **_numbers(config, result)}  # fmt: skip

    def _result(self, entries: list[dict[str, Any]]) -> dict[str, Any]:
        held = {
            "methods": list(dict.fromkeys(e["method"] for e in entries)),
            "budgets": sorted({e["steps"] for e in entries}),
        }  # more than was asked for, after --resume
        about = self.about | {"config": self.about["config"] | held}
        return {"schema": 1, **about, "taus": TAUS, "entries": entries, "claims": budget_claims.claims(entries)}

    def _write(self, folder: Path, entries: list[dict[str, Any]]) -> None:
        result = self._result(entries)
        write_json(folder / FILE, result | {"entries": [sealed(e) for e in entries]})
        for name, figure in budget_figures.draw(result).items():
            write_atomically(folder / f"{name}.png", png(figure))


def held_in(path: Path) -> list[dict[str, Any]]:
    """The entries that are as they were written; a line where others are not."""
    content = read_json(path.read_bytes()) if path.exists() else {"entries": []}
    there = content.get("entries") if isinstance(content, dict) else None
    whole = [entry for e in there if (entry := unsealed(e))] if isinstance(there, list) else []
    if not isinstance(there, list) or len(whole) < len(there):
        say(f"{path} is damaged: what is not whole in it is computed again")
    return whole


def program(
    config: Config, p: Problem, method: Method, points: int, taus: tuple[int, ...]
) -> Callable[[tuple[float, ...]], Outcome]:
    """All rounds of all seeds and their scores after ``taus`` local steps, one jitted function of ``points`` learning
    rates: ``[P, ...]``."""
    (n, _), (chunk, _) = config.scored, choose(config, p, points)
    weights = jnp.asarray(metrics.alike(np.asarray(p.test[2])), jnp.float32)

    def scoring(method: Method, optimizer: Any) -> Scoring:
        serving = evaluation.make_serving(config, p, method, optimizer, chunk)

        def block(arrays: Arrays, seed: Seed, run: Run, info, end) -> tuple[Array, Array]:
            as_sent, _ = serving.score(arrays, seed, run, serving.onboard(arrays, seed, run), 0)
            return jnp.nanmean(as_sent[:n]), weights @ serving.whole(arrays, seed, run)

        def end(arrays: Arrays, seed: Seed, run: Run) -> Array:
            memory = serving.onboard(arrays, seed, run)
            return jnp.stack([serving.score(arrays, seed, run, memory, steps)[0] for steps in taus])

        return Scoring(block, end)

    runs, arguments = programs.make_runs(config, p, points, lambda point: method, scoring)
    run = jax.jit(runs)

    def at(lrs: tuple[float, ...]) -> Outcome:
        blocks, end = run(Point(jnp.asarray(lrs), jnp.zeros(points)), *arguments)
        return Outcome(end, *blocks)

    return at


def _numbers(config: Config, x: Outcome) -> dict[str, Any]:
    n, _ = config.scored
    curve = lambda clients: {str(t): summary.spread(_known(clients[:, i])) for i, t in enumerate(TAUS)}
    return {
        "training_clients": curve(x.clients[:, :, :n]),
        "unseen_clients": curve(x.clients[:, :, n:]),
        "rounds": list(range(config.eval_every, config.rounds + 1, config.eval_every)),
        "personal_by_round": np.asarray(x.personal, float).tolist(),
        "global_by_round": np.asarray(x.overall, float).tolist(),
        "global": summary.spread(np.asarray(x.overall[:, -1], float).tolist()),
    }


def _known(accuracies: np.ndarray) -> list[float]:
    """Mean over the clients that have test images, of every seed."""
    return [float(np.nanmean(row)) for row in accuracies]
