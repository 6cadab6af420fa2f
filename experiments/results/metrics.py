"""The table of metrics: what is counted of an evaluation, where it stands, and what it means.

A metric is added here alone. It is then in ``metrics.jsonl`` and ``summary.json`` under its name (``_tuned`` behind it:
after local steps), and in the tables and pictures that it names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np

from experiments.results.record import number

TERMINAL, REPORT, BARS = "terminal", "report", "bars"  # its table, the report's, the report's picture of accuracies
EVERYWHERE = (TERMINAL, REPORT, BARS)
ERROR = "_error"  # behind the name: the standard error that the drawing of clients to be scored gives it
NOVEL, BACKDOOR = "novel", "backdoor"
NORMAL = 1.96  # standard errors to either side that hold 95 %
TUNED = "_tuned"  # behind the name: after the local steps of one round on the client's own training images


class Evaluation(NamedTuple):
    """What is known of one seed after a round; accuracies are nan of clients without test images."""

    correct: np.ndarray  # [n_test] 1 where the global model is right
    label: np.ndarray  # [n_test] class of each test image
    domain: np.ndarray  # [n_test] its domain
    training: np.ndarray  # [N] accuracy of each training client's model, as dispatched, on its own test images
    unseen: np.ndarray  # [K] the same of clients that never trained
    shares: tuple[float, float] = (1.0, 1.0)  # of all training and all unseen clients those that are among these
    sides: np.ndarray | None = None  # [N, 2] accuracy of each training client's model on all test images of classes
    #   that are trained on, and on those of novel ones, of which the arrays above have none; None: there are none
    opened: np.ndarray | None = None  # of the test images that are not of the class a backdoor aims at, 1 where the
    #   global model takes one with the trigger for it; None: there is no backdoor

    @property
    def also(self) -> tuple[str, ...]:
        """What else there is."""
        return (NOVEL,) * (self.sides is not None) + (BACKDOOR,) * (self.opened is not None)


class Metric(NamedTuple):
    """One number of an evaluation."""

    name: str
    of: Callable[[Evaluation], float]  # nan where it has no value
    title: str  # of columns and bars
    meaning: str  # that stands under tables
    shown: tuple[str, ...] = ()  # where it stands
    tuned: tuple[str, ...] | None = None  # where it stands after local steps; None: it is not taken then
    short: str = ""  # its title in the terminal, where that is another; it is explained there
    error: Callable[[Evaluation], float] | None = None  # of it, where it is of clients that were drawn
    only: str = ""  # where alone it is taken: where classes are NOVEL, or there is a BACKDOOR; "": everywhere


def mean_over(groups: np.ndarray, correct: np.ndarray) -> float:
    """Mean over groups of the share of right answers in each; every group counts alike."""
    return float(np.mean([float(np.mean(correct[groups == g])) for g in np.unique(groups)]))


def alike(groups: np.ndarray) -> np.ndarray:
    """Weights, adding up to 1, of which every group has as much: ``alike(groups) @ correct`` is ``mean_over``."""
    _, own, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return 1 / (len(counts) * counts[own])


def known(values: np.ndarray) -> np.ndarray:
    """Without nan: clients without test images have no accuracy."""
    return values[np.isfinite(values)]


def mean(values: np.ndarray) -> float:
    own = known(values)
    return float(own.mean()) if len(own) else math.nan


def error_of_mean(values: np.ndarray, share: float) -> float:
    """Standard error of ``mean``, of values drawn without replacement that are this share of all.

    Source: Cochran, Sampling Techniques, 3rd edition, 1977, section 2.6.
    """
    own = known(values)
    return math.sqrt((1 - share) / len(own)) * float(np.std(own, ddof=1)) if len(own) > 1 else math.nan


def lowest(values: np.ndarray, percent: float) -> float:
    """That percentile of clients (0: the worst), between two of them in proportion."""
    own = known(values)
    return float(np.percentile(own, percent)) if len(own) else math.nan


def worst_tenth(values: np.ndarray) -> float:
    """Mean over the lowest tenth of clients, at least one."""
    own = np.sort(known(values))
    return mean(own[: max(1, math.ceil(len(own) / 10))])


def error_of_worst_tenth(values: np.ndarray, share: float) -> float:
    """Standard error of ``worst_tenth``, to first order: it is ``q + mean(min(x - q, 0)) / a``, ``q`` the least value
    above the lowest ``a`` of all, and does not move with ``q``.

    Source: Brazauskas et al., J. Statistical Planning and Inference 138, 2008 (conditional tail expectation).
    """
    own = np.sort(known(values))
    count = max(1, math.ceil(len(own) / 10))
    below = np.minimum(own - own[count], 0) if len(own) > count else own
    return error_of_mean(below * len(own) / count, share)


def error_of_lowest(values: np.ndarray, percent: float, share: float) -> float:
    """Standard error of ``lowest``: of how many are below it, read off the values (Woodruff, J. American Statistical
    Association 47, 1952)."""
    own, p = known(values), percent / 100
    rank = NORMAL * math.sqrt((1 - share) * p * (1 - p) / len(own)) if len(own) > 1 else math.nan
    if math.isnan(rank):
        return rank
    low, high = np.quantile(own, np.clip([p - rank, p + rank], 0, 1))
    return float(high - low) / (2 * NORMAL)


def gap(values: np.ndarray) -> float:
    """The same over the highest tenth, less that."""
    return -worst_tenth(-values) - worst_tenth(values)


def side(evaluation: Evaluation, which: int) -> np.ndarray:
    """Of classes that are trained on (0), or of novel ones (1)."""
    return np.asarray(evaluation.sides)[:, which]


def deviation(values: np.ndarray) -> float:
    own = known(values)
    return float(np.std(own)) if len(own) else math.nan


def harmonic_mean(values: list[float]) -> float:
    """0 where one of them is."""
    return len(values) / sum(1 / x for x in values) if min(values) != 0 else 0.0


def three(evaluation: Evaluation) -> list[np.ndarray]:
    """``[N]`` each: personal accuracies, and those on classes that are trained on and on novel ones."""
    return [evaluation.training, side(evaluation, 0), side(evaluation, 1)]


def error_of_harmonic_mean(values: list[np.ndarray], share: float) -> float:
    """Standard error of the harmonic mean of means over the same clients, to first order (Cochran 1977, section 6.4).

    It moves with a mean ``m`` of k by ``h^2 / (k m^2)``, and clients' values vary together.
    """
    means = [mean(x) for x in values]
    h = harmonic_mean(means)
    slopes = [h**2 / (len(means) * m**2) if m else math.nan for m in means]
    return error_of_mean(sum(slope * x for slope, x in zip(slopes, values, strict=True)), share)  # type: ignore


METRICS = (
    Metric(
        "global_accuracy",
        lambda e: mean_over(e.domain, e.correct),
        "global",
        "the global model on all test images, mean over domains",
        EVERYWHERE,
    ),
    Metric(
        "pooled_accuracy", lambda e: float(e.correct.mean()), "pooled", "the global model on all test images, all alike"
    ),
    Metric(
        "balanced_accuracy",
        lambda e: mean_over(e.label, e.correct),
        "balanced",
        "the global model on all test images, mean over classes",
    ),
    Metric(
        "personal_std", lambda e: deviation(e.training), "deviation", "deviation of personal accuracies over clients"
    ),
    Metric(
        "personal_accuracy",
        lambda e: mean(e.training),
        "personal",
        "the model that each training client is sent, on that client's own test images, mean over clients",
        EVERYWHERE,
        tuned=EVERYWHERE,
        error=lambda e: error_of_mean(e.training, e.shares[0]),
    ),
    Metric(
        "worst10_accuracy",
        lambda e: worst_tenth(e.training),
        "mean of worst 10 %",
        "mean over the lowest tenth of clients, rounded up",
        EVERYWHERE,
        tuned=(BARS,),
        short="worst 10%",
        error=lambda e: error_of_worst_tenth(e.training, e.shares[0]),
    ),
    Metric(
        "p10_accuracy",
        lambda e: lowest(e.training, 10),
        "10th percentile",
        "the 10th percentile of clients, a tenth of whom are below it",
        EVERYWHERE,
        tuned=(BARS,),
        short="p10",
        error=lambda e: error_of_lowest(e.training, 10, e.shares[0]),
    ),
    Metric(
        "worst_accuracy",
        lambda e: lowest(e.training, 0),
        "worst client",
        "the client where it is lowest",
        (REPORT,),
        tuned=(),
    ),
    Metric(
        "gap",
        lambda e: gap(e.training),
        "top less worst 10 %",
        "mean over the highest tenth of clients less that over the lowest",
        (REPORT,),
        tuned=(),
    ),
    Metric(
        "unseen_accuracy",
        lambda e: mean(e.unseen),
        "unseen",
        "as personal, of clients that never train",
        EVERYWHERE,
        tuned=EVERYWHERE,
        error=lambda e: error_of_mean(e.unseen, e.shares[1]),
    ),
    Metric(
        "base_accuracy",
        lambda e: mean(side(e, 0)),
        "base",
        "the model that each training client is sent, on all test images of the classes that are trained on, mean over "
        "clients",
        EVERYWHERE,
        tuned=EVERYWHERE,
        error=lambda e: error_of_mean(side(e, 0), e.shares[0]),
        only=NOVEL,
    ),
    Metric(
        "novel_accuracy",
        lambda e: mean(side(e, 1)),
        "novel",
        "the same on all test images of the classes that nobody trains on, among these",
        EVERYWHERE,
        tuned=EVERYWHERE,
        error=lambda e: error_of_mean(side(e, 1), e.shares[0]),
        only=NOVEL,
    ),
    Metric(
        "harmonic_mean",
        lambda e: harmonic_mean([mean(x) for x in three(e)]),
        "harmonic mean",
        "of personal, base and novel",
        EVERYWHERE,
        tuned=EVERYWHERE,
        short="HM",
        error=lambda e: error_of_harmonic_mean(three(e), e.shares[0]),
        only=NOVEL,
    ),
    Metric(
        "backdoor_success",
        lambda e: float(np.mean(np.asarray(e.opened))),
        "backdoor success",
        "test images of other classes that the global model takes, with the trigger on them, for the one it aims at",
        (TERMINAL, REPORT),
        short="backdoor",
        only=BACKDOOR,
    ),
)


def taken(tuned: bool, also: Collection[str] = ()) -> list[Metric]:
    """The metrics that are taken as models are sent, or after local steps; ``also``: what else there is, as NOVEL."""
    return [metric for metric in METRICS if metric.only in ("", *also) and (not tuned or metric.tuned is not None)]


def error_name(name: str) -> str:
    """Where the error of a metric stands."""
    return name.removesuffix(TUNED) + ERROR + TUNED * name.endswith(TUNED)


def names(also: Collection[str] = ()) -> list[str]:
    """Of all metrics in rows and summaries: as sent, then after local steps."""
    return [metric.name for metric in taken(False, also)] + [metric.name + TUNED for metric in taken(True, also)]


def of(evaluation: Evaluation, tuned: bool = False) -> dict[str, float | None]:
    """Every metric of an evaluation by its name, ``None`` where it has no value; where not all clients were scored, the
    errors of what is of them too."""
    own = taken(tuned, evaluation.also)
    found = {metric.name + TUNED * tuned: number(metric.of(evaluation)) for metric in own}
    if min(evaluation.shares) < 1:
        errors = {metric.name: metric.error for metric in own if metric.error}
        found |= {name + ERROR + TUNED * tuned: number(error(evaluation)) for name, error in errors.items()}
    return found


def columns(place: str, after: str, also: Collection[str] = ()) -> dict[str, str]:
    """Titles and names of what stands in a place; ``after`` is the title of a metric ``{}`` after local steps."""
    found = {}
    for metric in taken(False, also):
        title = metric.short or metric.title if place == TERMINAL else metric.title
        if place in metric.shown:
            found[metric.name] = title
        if place in (metric.tuned or ()):
            found[metric.name + TUNED] = after.format(title)
    return found
