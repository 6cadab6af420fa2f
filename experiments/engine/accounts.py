"""What each client has spent of its examples' privacy, of methods that bound and noise their gradients
(``fedlora_jax.wrappers.dp_sgd``)."""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.config import Config
from experiments.results.record import number
from experiments.setup.problem import Problem
from fedlora_jax.wrappers import dp_sgd


class Accounts:
    """An account of each client of each seed: of the rounds in which it took part."""

    def __init__(self, config: Config, problem: Problem):
        n, people = config.clients, problem.clients.population
        sizes = np.asarray(people.sizes)[:, :n]
        own = isinstance(people.examples, tuple)
        through = np.full_like(sizes, config.local_steps * config.batch) if own else np.asarray(people.examples)[:, :n]
        self._each = dp_sgd.uses(sizes, through, config.batch)  # [S, N] of an example in a round
        self.begin()

    def begin(self) -> None:
        """Before the first round."""
        self._uses = np.zeros_like(self._each)

    def after(self, s: int, row: dict[str, Any]) -> dict[str, Any]:
        """Of a round of the seed at ``s``, whose row says who took part: epsilon of the client that has spent most, and
        of the one in the middle; nothing where the method keeps no account."""
        if "example_noise" not in row:
            return {}
        who = np.asarray(row["clients"], int)
        self._uses[s, who] += self._each[s, who]
        counts = np.sort(self._uses[s])
        delta = float(f"{row['example_delta']:.6g}")  # as it was typed, not as float32 holds it
        spent = [number(dp_sgd.spent(row["example_noise"], int(counts[i]), delta)) for i in (-1, len(counts) // 2)]
        return {"example_epsilon": spent[0], "example_epsilon_median": spent[1]}
