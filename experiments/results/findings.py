"""What a comparison found, in sentences: who leads in what, by how much, and whether chance would do as well."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import special

from experiments.results import metrics
from experiments.results.summary import also, counted, paired

LEVEL = 0.05
OF = ("global_accuracy", "personal_accuracy", "worst10_accuracy", "unseen_accuracy", "harmonic_mean")


def lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Of each measure that the run has, its title and a sentence."""
    titles = metrics.columns(metrics.REPORT, "{}", also(summary["config"]))
    found = [(titles[key], sentence(summary["methods"], key)) for key in OF if key in titles]
    return [(title, text) for title, text in found if text]


def sentence(entries: dict[str, Any], measure: str) -> str:
    """Who leads in a measure, and by how much over the first method; over the next one, where the first leads.

    The leader is chosen among the others after the fact: its p counts for as many comparisons (Bonferroni).
    """
    means = {name: entry[measure]["last5"]["mean"] for name, entry in entries.items()}
    if None in means.values():
        return ""
    first, ranked = next(iter(means)), sorted(means, key=lambda name: -means[name])
    leader, title = ranked[0], lambda name: entries[name]["about"]["name"]
    if len(means) == 1:
        return f"{title(leader)} has {100 * means[leader]:.1f} %."
    other = ranked[1] if leader == first else first
    difference = paired({name: entries[name] for name in (other, leader)}, measure)[leader]
    if not any(difference["seeds"]):
        return f"{title(leader)} and {title(other)} have the same {100 * means[leader]:.1f} % on every seed."
    text = f"{title(leader)} leads with {100 * means[leader]:.1f} %, {100 * difference['mean']:.1f} points over "
    text += title(other) + f", the {'next' if leader == first else 'first'}"
    return f"{text}: {_told_apart(difference['seeds'], len(means) - 1)}."


def _told_apart(differences: list[float], comparisons: int) -> str:
    """Whether that many pairs tell a difference from none."""
    if len(differences) == 1:
        return "one seed, which says nothing of chance"
    p = probability(differences, comparisons)
    shown = "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
    among = f", for {comparisons} comparisons" * (comparisons > 1)
    told = f"{shown}, paired t-test over {counted(len(differences), 'seed')}{among}"
    return f"{'significant' if p < LEVEL else 'not told apart'} ({told})"


def probability(differences: list[float], comparisons: int = 1) -> float:
    """Two-sided p of a mean of 0 (Student 1908), times how many comparisons it was picked from (Dunn 1961), at most 1;
    0 where all differences are the same."""
    x = np.asarray(differences, float)
    deviation = x.std(ddof=1)
    if deviation <= 1e-12 * abs(x.mean()):
        return 0.0
    t = abs(x.mean()) / (deviation / np.sqrt(len(x)))
    return min(1.0, comparisons * 2 * float(special.stdtr(len(x) - 1, -t)))
