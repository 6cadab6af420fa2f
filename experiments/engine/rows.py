"""From what the programs return to rows of ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from experiments.config import Config
from experiments.engine import traffic
from experiments.engine.accounts import Accounts
from experiments.engine.evaluation import Scores
from experiments.results import client_map, metrics, summary
from experiments.results.metrics import Evaluation
from experiments.results.record import number
from experiments.setup.problem import Problem, domain_accuracies
from fedlora_jax.method import Method
from fedlora_jax.rounds import Info


class Rows:
    """Makes the rows of one method."""

    def __init__(self, config: Config, problem: Problem, name: str, method: Method):
        self._config, self._name, self._method = config, name, method
        self._problem = problem
        self._ranks = np.asarray(problem.clients.population.ranks)
        self._adapter = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), problem.adapters)
        self._accounts = Accounts(config, problem)
        self._traffic: dict[tuple[int, ...], np.ndarray] = {}
        self.go_on(())

    def go_on(self, rows: Iterable[dict[str, Any]]) -> None:
        """After the rounds of these rows, oldest first, whatever was counted before."""
        self._missed = np.zeros((len(self._config.seeds), self._config.clients))  # bytes, since each last took part
        self._accounts.begin()
        for row in rows:
            self._accounts.after(self._config.seeds.index(row["seed"]), row)
            self._bytes(self._config.seeds.index(row["seed"]), np.asarray(row["clients"]), row)

    def of_block(self, end: int, info: Info, scores: Scores) -> list[dict[str, Any]]:
        """One row per round and seed of the block of rounds that ends with ``end``, where the scores were taken."""
        block, rows = info.loss.shape[1], []
        ids = np.asarray(info.ids)
        for t in range(block):
            for s, seed in enumerate(self._config.seeds):
                row: dict[str, Any] = {"method": self._name, "seed": seed, "round": end - block + t + 1}
                row["clients"] = who = ids[s, t][ids[s, t] >= 0].tolist()
                row["loss"] = number(metrics.mean(np.asarray(info.loss[s, t])))  # who is left out has none
                row["dropped"] = int(info.dropped[s, t])
                row |= {key: float(x[s, t]) for key, x in info.aggregation._asdict().items()}
                row |= {key: number(x[s, t]) for key, x in info.learned.items()}
                row |= self._bytes(s, np.asarray(who, int), row)
                row |= self._accounts.after(s, row)
                row = {key: x for key, x in row.items() if key not in ("travels_up", "travels_down")}
                if t == block - 1:
                    row |= self._accuracies(jax.tree.map(lambda x, s=s: x[s], scores), end == self._config.rounds, s)
                rows.append(row)
        return rows

    def _bytes(self, s: int, ids: np.ndarray, row: dict[str, Any]) -> dict[str, int]:
        """What the clients ``ids`` sent, what they had to be sent before they could start, and what it would take now
        until all clients that train hold the model."""
        shares = np.array([row.get(f"travels_{part}", 1.0) for part in ("up", "down", "missed")])
        ranks, missed = self._ranks[s, : self._config.clients], self._missed[s]
        parts = self._sizes(tuple(sorted(ranks[ids].tolist())))[:, ranks]
        (up, down, left), whole = parts[:3] * shares[:, None], parts[3]
        owed = lambda: np.where(whole > 0, np.minimum(missed, whole), missed)
        sent = (down + owed())[ids].sum()
        missed[ids] = 0
        missed += left
        behind = (down + owed()).sum()
        return {"bytes_up": round(up[ids].sum()), "bytes_down": round(sent), "bytes_behind": round(behind)}

    def _sizes(self, cohort: tuple[int, ...]) -> np.ndarray:
        """``[4, rank]`` bytes of the parts of ``Traffic`` for a client of each rank, in a cohort of these ranks."""
        if cohort not in self._traffic:
            found = np.unique(self._ranks)
            self._traffic[cohort] = np.zeros((4, found.max() + 1))
            for rank, parts in traffic.of_clients(self._method, self._adapter, cohort, found.tolist()).items():
                self._traffic[cohort][:, rank] = parts
        return self._traffic[cohort]

    def _accuracies(self, scores: Scores, final: bool, s: int) -> dict[str, Any]:
        (n, unseen), known = self._config.scored, self._problem.images.known
        shares = n / self._config.honest, unseen / self._config.holdout_clients if unseen else 1.0
        correct, label, domain = map(np.asarray, (scores.correct, *self._problem.test[1:]))
        if known is not None:
            correct, label, domain = (x[np.asarray(self._problem.test[1]) < known] for x in (correct, label, domain))
        others = np.asarray(self._problem.test[1]) != self._problem.attack.target
        opened = None if isinstance(scores.opened, tuple) else np.asarray(scores.opened)[others]
        row: dict[str, Any] = {"per_domain": domain_accuracies(self._problem, domain, correct)}
        after = (False, scores.personal, scores.sides), (True, scores.tuned, scores.tuned_sides)
        for tuned, values, of_sides in after:
            accuracy, sides = np.asarray(values), None if known is None else np.asarray(of_sides)[:n]
            if tuned and np.isnan(accuracy).all():
                continue
            taken = Evaluation(correct, label, domain, accuracy[:n], accuracy[n:], shares, sides, opened)
            row |= metrics.of(taken, tuned)
            if final:
                row["client_accuracies" + metrics.TUNED * tuned] = [number(x) for x in accuracy[:n]]
        if final and n < self._config.clients:
            row["client_numbers"] = self._problem.clients.all_scored()[s, :n].tolist()  # whose accuracies these are
        distances = np.asarray(scores.distances, float)  # nan for None
        if final and np.isfinite(distances).all():
            row["client_positions"] = client_map.positions(distances).round(6).tolist()
            row["client_clusters"] = client_map.clusters(distances).tolist()
        return row


def as_of(row: dict[str, Any], rounds: int) -> dict[str, Any]:
    """The row as a run of more rounds has it: what stands in its last rows alone is left out of earlier ones."""
    last = {"client_positions", "client_clusters", "client_numbers"}
    last |= {"client_accuracies", "client_accuracies" + metrics.TUNED}
    late = lambda key: key in last and row["round"] < rounds
    tuned = lambda key: key.endswith(metrics.TUNED) and row["round"] <= rounds - summary.WINDOW
    return {key: value for key, value in row.items() if not late(key) and not tuned(key)}


def so_far(rows: list[dict[str, Any]]) -> str:
    """The newest accuracies among rows of a method, means over seeds, for whoever watches."""
    parts = []
    for name, title in (("global_accuracy", "global"), ("personal_accuracy", "personal")):
        if found := [row[name] for row in rows if row.get(name) is not None]:
            parts.append(f"{title} {100 * np.mean(found):.1f} %")
    return ", ".join(parts)


def holdings(config: Config, problem: Problem) -> dict[str, Any]:
    """Training images of each client of the first seed, by domain and class."""
    images, population = problem.images, jax.device_get(problem.clients.population)
    domain, y = images.domain[~images.test], images.y[~images.test]
    counts = np.zeros((population.sizes.shape[1], len(images.domains), len(images.classes)), int)
    for client, (rows, size) in enumerate(zip(population.rows[0], population.sizes[0], strict=True)):
        np.add.at(counts[client], (domain[rows[:size]], y[rows[:size]]), 1)
    return {
        "counts": counts,
        "training": config.clients,
        "domains": list(images.domains),
        "classes": list(images.classes),
        "superclasses": None if images.superclass is None else images.superclass.tolist(),
        "seed": config.seeds[0],
        "scored": problem.clients.all_scored()[0].tolist(),
    }
