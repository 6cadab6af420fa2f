"""How much of what differs between runs is the draw of clients, and how many draws a comparison would need.

A difference between methods is only as sure as the partitions it was seen on: where most of the variance is the draw of
the partition, more seeds of training on the same clients say little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

MEASURES = ("global_accuracy", "personal_accuracy")
LEVEL, POWER = 0.05, 0.8
MANY = 1000  # draws; nobody runs more
FEWEST = 4  # draws from which a number of them is guessed


def of_run(entries: dict[str, Any], partitions: Sequence[int]) -> dict[str, Any]:
    """``components`` of each of ``MEASURES``, mean of the last five rounds, where all have it for all seeds."""
    found = {}
    for measure in MEASURES:
        values = [entry[measure]["last5"]["seeds"] for entry in entries.values()]
        if len(values) > 1 and len(values[0]) > 1 and not any(None in own for own in values):
            found[measure] = components(np.array(values, float), np.asarray(partitions))
    return found


def with_draws(paired: dict[str, Any], partitions: Sequence[int]) -> dict[str, Any]:
    """Each paired difference, ``draws``, on how many partitions it was seen, and ``draws_needed`` to tell one as large.

    None where these are too many, or fewer than ``FEWEST`` to guess from.
    """
    groups, place = np.unique(partitions, return_inverse=True)
    found = {}
    for name, entry in paired.items():
        seeds, needed = entry["seeds"], None
        if len(groups) >= FEWEST and None not in seeds:
            needed = draws_needed([float(np.mean(np.array(seeds)[place == p])) for p in range(len(groups))])
        found[name] = entry | {"draws": len(groups), "draws_needed": needed}
    return found


def lines(summary: dict[str, Any]) -> list[str]:
    """What a report says of it, in words; nothing of a single method or seed."""
    said = []
    for measure, own in summary["variance"].items():
        parts = {
            "the draw of clients, alike for all methods": own["shared"],
            "the draw, differently for each method": own["method"],
            "training": own["training"],
        }
        known = [f"{100 * x:.0f} % {what}" for what, x in parts.items() if x is not None]
        alone = " (training is part of both: no two seeds share their clients)" * (own["training"] is None)
        if known:
            name = measure.split("_")[0]
            said.append(f"variance of {name} accuracy around each method's mean: {', '.join(known)}{alone}")
    compared = {name: entry for name, entry in summary["paired"].items() if None not in entry["seeds"]}
    if not said or not compared:
        return said
    draws = {entry["draws"] for entry in compared.values()}
    if draws == {1}:
        return [*said, "all seeds share their clients: what another draw of them would change is not known"]
    (seen,) = draws
    if seen < FEWEST:
        return [*said, f"{seen} draws of clients are too few to say how many would tell methods apart"]
    needed = [f"{name} {_needed(entry)}" for name, entry in compared.items()]
    first = next(iter(summary["methods"]))
    return [
        *said,
        f"draws of clients that would tell a difference in global accuracy as large as the one to {first} (t-test at "
        f"5 %, in four of five trials), guessed from {seen}, which may be several times too few or too many: "
        + ", ".join(needed),
    ]


def _needed(entry: dict[str, Any]) -> str:
    if not any(entry["seeds"]):
        return "none, there is no difference"
    return f"over {MANY}" if entry["draws_needed"] is None else str(entry["draws_needed"])


def components(values: np.ndarray, partitions: np.ndarray) -> dict[str, float | None]:
    """Shares of the variance that accuracies have around each method's mean.

    Methods ``m`` cross partitions ``p``, in which seeds ``s`` of training are nested: ``y_mps = mu_m + P_p + (MP)_mp +
    S_ps + (MS)_mps``, all but ``mu`` random. Components are found from mean squares (Searle, Casella and McCulloch,
    *Variance Components*, 1992); one below zero is zero.

    Args:
      values: accuracies ``[methods, seeds]``.
      partitions: ``[seeds]`` a number for each seed's partition.

    Returns:
      shares that add up to 1, or all None where nothing varies. ``shared``: of ``P``, which all methods have in common;
      ``method``: of ``MP``, by which partition another method is ahead; ``training``: of ``S`` and ``MS``. Where no two
      seeds have a partition in common, training is part of the two before it (``training`` is None); where all have,
      those are None.
    """
    methods, seeds = values.shape
    groups, place, counts = np.unique(partitions, return_inverse=True, return_counts=True)
    means = np.stack([values[:, place == p].mean(1) for p in range(len(groups))], 1)  # [methods, partitions]
    within = values - means[:, place]
    own, shared = values.mean(1, keepdims=True), means.mean(0)
    crossed = means - means.mean(0) - own + values.mean()
    free, nested = len(groups) - 1, seeds - len(groups)
    each = (seeds - (counts**2).sum() / seeds) / free if free else float(seeds)  # seeds of a partition, where unequal
    square = lambda total, freedom: total / freedom if freedom else 0.0
    of_all = within.mean(0)
    ms_seed = square(methods * (of_all**2).sum(), nested)
    ms_rest = square(((within - of_all) ** 2).sum(), nested * (methods - 1))
    ms_partition = square(methods * (counts * (shared - values.mean()) ** 2).sum(), free)
    ms_crossed = square((counts * crossed**2).sum(), free * (methods - 1))
    above = lambda x: max(float(x), 0.0)
    method = above((ms_crossed - ms_rest) / each)
    common = above((ms_partition - ms_seed - (ms_crossed - ms_rest)) / (methods * each))
    training = above((ms_seed - ms_rest) / methods) + above(ms_rest)
    total = method + common + training
    share = lambda x, known: x / total if known and total else None
    return {"shared": share(common, free), "method": share(method, free), "training": share(training, nested)}


def draws_needed(differences: Sequence[float]) -> int | None:
    """Pairs after which a two-sided t-test at 5 % finds a difference as large as the mean of these in four of five
    trials, if they vary as these do (Cohen, *Statistical Power Analysis*, 1988); None: over ``MANY``.
    """
    mean, deviation = np.mean(differences), np.std(differences, ddof=1)
    if deviation <= 1e-12 * max(abs(mean), 1e-300):
        return 2 if mean else None
    effect = abs(mean) / deviation
    if not effect:
        return None
    n = np.arange(2, MANY + 1)
    edge, shift = special.stdtrit(n - 1, 1 - LEVEL / 2), effect * np.sqrt(n)
    # far from the edge the other tail is nothing, and SciPy's noncentral t gives nan there
    power = np.where(shift > edge + 10, 1.0, 1 - special.nctdtr(n - 1, np.minimum(shift, edge + 10), edge))
    enough = np.flatnonzero(power >= POWER)
    return int(n[enough[0]]) if len(enough) else None
