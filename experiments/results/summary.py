"""``summary.json``: what a run ends with, from the rows of ``metrics.jsonl`` alone.

Schema 1. For each method and each measure ``{"last": S, "last5": S}`` with
``S = {"mean", "std", "ci95": [low, high] or null, "seeds": [...]}``: the last round, and the mean over the evaluated
rounds among the last five. Intervals are 95 % t-intervals over seeds; they know nothing of 0 and 1, where pictures cut
them. Where clients are drawn to be scored (``--eval-clients``, anew for each seed), those of what is of them are no
narrower than their drawing alone makes them, which is all there is for a single seed. There is no best round: picking
one on test data would be selection. (``--best-test-leaky`` adds ``best_test_leaky``, a spread of the global model's,
beside what published code reports so.) ``privacy`` is of methods that keep an account (``spent.py``), after their last
round. ``variance``, and ``draws_needed`` in ``paired``, are of ``variance.py``. ``failed`` says why others
have no result; their rows are in ``metrics.jsonl`` up to there.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np
from scipy import special  # scipy.stats takes a fifth of a command's start

from experiments.attack import has_trigger
from experiments.results import metrics, spent

WINDOW = 5
NUMBERS = ("no", "one", "two", "three", "four", "five")


def spread(values: Iterable[float | None], errors: Iterable[float | None] = ()) -> dict[str, Any]:
    """Mean, deviation and 95 % t-interval over seeds; ``None`` where a seed has no value.

    Args:
      values: of each seed.
      errors: their standard errors, where each is of a sample; the interval is then no narrower than these make it.
        Where all are 0, as of a sample of all there are, they say nothing.
    """
    seeds, errors = list(values), list(errors)
    known = np.array([v for v in seeds if v is not None], float)
    if len(known) < len(seeds) or not len(seeds):
        return {"mean": None, "std": None, "ci95": None, "seeds": seeds}
    mean, n = float(known.mean()), len(known)
    sampled = any(errors) and None not in errors
    halves = [metrics.NORMAL * float(np.linalg.norm(errors)) / n] if sampled else []  # type: ignore
    std = float(known.std(ddof=1)) if n > 1 else None
    if std is not None:
        halves.append(float(special.stdtrit(n - 1, 0.975)) * std / n**0.5)
    ci95 = [mean - max(halves), mean + max(halves)] if halves else None
    return {"mean": mean, "std": std, "ci95": ci95, "seeds": seeds}


def measures(also: Collection[str] = ()) -> list[str]:
    """What a summary has of both the last round and the mean of the last five, besides ``per_domain``."""
    return [*metrics.names(also), "bias", "bias_share"]


def columns(config: dict[str, Any] | None = None) -> dict[str, str]:
    """Titles of accuracies in the terminal's tables, by their names; of a run with these options."""
    return metrics.columns(metrics.TERMINAL, "+steps", also(config or {}))


def also(config: dict[str, Any]) -> tuple[str, ...]:
    """What else there is to be measured in a run with these options."""
    backdoor = has_trigger(config.get("attack"))
    return (metrics.NOVEL,) * bool(config.get("novel")) + (metrics.BACKDOOR,) * backdoor


def draws_clients(config: dict[str, Any]) -> bool:
    """Are fewer clients scored than there are, by a run with these options?"""
    most = config.get("eval_clients")
    return most is not None and most < max(config["clients"], config["holdout_clients"])


def averages(entry: dict[str, Any]) -> bool:
    """Is the server's model of this method meant to be the mean of its clients', so that a bias says something?"""
    return not entry["about"]["exact"].startswith("n/a")


def summarise(rows: list[dict[str, Any]], target: float) -> dict[str, Any]:
    """One method's entry, timings and descriptions left out."""
    seeds = sorted({row["seed"] for row in rows})
    by_seed = [sorted((r for r in rows if r["seed"] == seed), key=lambda r: r["round"]) for seed in seeds]
    there = {metric.only for metric in metrics.METRICS if any(metric.name in row for row in rows)}
    entry: dict[str, Any] = {name: _both(by_seed, *_readers(name)) for name in measures(there)}
    domains = by_seed[0][-1]["per_domain"]
    entry["per_domain"] = {d: _both(by_seed, lambda r, d=d: r["per_domain"][d] if "per_domain" in r else None)
                           for d in domains}  # fmt: skip
    reached = [next((r["round"] for r in own if r.get("global_accuracy", 0) >= target), None) for own in by_seed]
    entry["rounds_to_target"] = {"target": target, "mean": spread(reached)["mean"], "seeds": reached}
    for way in ("bytes_up", "bytes_down"):
        total = sum(row[way] for row in by_seed[0])
        entry[way] = {"per_client_round": round(total / sum(len(r["clients"]) for r in by_seed[0])), "total": total}
    entry["bytes_down"]["to_all"] = entry["bytes_down"]["total"] + by_seed[0][-1]["bytes_behind"]
    return entry | spent.of(rows)


def best_on_test(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The global model's best round on the test images, of each seed: not a result, as it is chosen on them."""
    seeds = sorted({row["seed"] for row in rows})
    return spread(max(r["global_accuracy"] for r in rows if r["seed"] == s and "global_accuracy" in r) for s in seeds)


def paired(entries: dict[str, Any], measure: str = "global_accuracy") -> dict[str, Any]:
    """Differences to the first method, seed by seed (the same clients, starts and batches), last five rounds."""
    baseline, *others = entries
    reference = entries[baseline][measure]["last5"]["seeds"]
    differences = {}
    for name in others:
        own = entries[name][measure]["last5"]["seeds"]
        result = spread([x - y if None not in (x, y) else None for x, y in zip(own, reference, strict=True)])
        differences[name] = {"baseline": baseline, "metric": measure, **result}
    return differences


def _readers(name: str) -> tuple[Callable, Callable]:
    """What read a measure, and its error where it has one, from a row."""
    return (lambda row: row.get(name)), (lambda row: row.get(metrics.error_name(name)))


def _both(by_seed: list[list[dict[str, Any]]], read: Callable, error: Callable = lambda row: None) -> dict[str, Any]:
    end = by_seed[0][-1]["round"]
    of_rounds = lambda read: [[read(r) for r in own if r["round"] > end - WINDOW] for own in by_seed]
    values, errors = map(of_rounds, (read, error))
    ends = ([read(own[-1]) for own in by_seed], [error(own[-1]) for own in by_seed])
    # The same clients are scored in all rounds, so that their errors do not average out.
    return {"last": spread(*ends), "last5": spread(map(_mean, values), map(_mean, errors))}


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def window(config: dict[str, Any]) -> str:
    """Over which rounds means are taken: the evaluated ones among the last five, in words."""
    every, end = config["eval_every"], config["rounds"]
    rounds = [r for r in range(every, end + 1, every) if r > end - WINDOW]
    if len(rounds) == 1:
        return "the last round"
    if every == 1:
        return f"the last {NUMBERS[len(rounds)]} rounds"
    return f"rounds {', '.join(map(str, rounds[:-1]))} and {rounds[-1]}"


def meaning(config: dict[str, Any]) -> str:
    """What stands under a table of the terminal."""
    seeds = len(config["seeds"])
    shown = [m for m in metrics.taken(False, also(config)) if m.short and metrics.TERMINAL in m.shown]
    shared = len(set(config.get("partition_seed") or range(seeds)))
    among = f"over {counted(seeds, 'seed')}" + " and the clients scored" * draws_clients(config)
    if shared < seeds:
        among += f" that share {counted(shared, 'draw')} of clients (another draw may change more)"
    taken = f"accuracies in %, mean over {window(config)} and 95 % interval {among};\n"
    words = [
        "+steps: after one round of local steps",
        *(f"{m.short}: {m.meaning}" for m in shown),
        "bias: share of the mean update that the server got wrong (- where no mean is meant)",
    ]
    return taken + textwrap.fill("; ".join(words), 104)


def table(summary: dict[str, Any]) -> str:
    """The terminal's table: means over ``window`` and half-width of the 95 % interval, in per cent."""
    shown = columns(summary["config"])
    header = ["method", *shown.values(), "vs first", "bias", "KiB up", "s/round"]
    rows = [header]
    for name, entry in summary["methods"].items():
        difference = summary["paired"].get(name)
        seconds = entry["seconds_per_round"]
        rows.append(
            [
                name,
                *(percent(entry[key]["last5"]) for key in shown),
                percent(difference, signed=True) if difference else "",
                _share(entry["bias_share"]["last5"]["mean"] if averages(entry) else None),
                f"{entry['bytes_up']['per_client_round'] / 1024:.1f}",
                "-" if seconds is None else f"{seconds:.3f}",
            ]
        )
    title, *lines = aligned(rows)
    return "\n".join([title, "  ".join("-" * max(map(len, column)) for column in zip(*rows, strict=True)), *lines])


def without_result(summary: dict[str, Any]) -> list[str]:
    """A line for each method that came to no end."""
    return [f"no result: {why}" for why in summary.get("failed", {}).values()]


def counted(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'s' * (number != 1)}"


def aligned(rows: list[list[str]]) -> list[str]:
    """A line for each row, columns as wide as what is in them, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    pad = lambda row: [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
    return ["  ".join(pad(row)) for row in rows]


def percent(value: dict[str, Any], signed: bool = False) -> str:
    if value["mean"] is None:
        return "-"
    mean = f"{100 * value['mean']:{'+' if signed else ''}.1f}"
    return mean if value["ci95"] is None else f"{mean} ±{50 * (value['ci95'][1] - value['ci95'][0]):.1f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"
