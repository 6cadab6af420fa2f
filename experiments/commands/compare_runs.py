"""``python -m experiments compare-runs A B``: finished runs side by side, and in which options they differ."""

from __future__ import annotations

from typing import Any

from experiments.options import check_fields
from experiments.requests import CompareRuns
from experiments.results import summary
from experiments.results.finished import Finished, load

MEASURE = "global_accuracy"
IDENTITY = ("data_hash", "weights_hash")  # of a record: what else tells runs apart


def table(options: CompareRuns) -> str:
    """Methods of all runs, each method's difference to the first run that has it, and the options that differ.

    Raises:
      ValueError: fewer than two, or one that is no finished run.
    """
    check_fields(options)
    if len(options.runs) < 2:
        raise ValueError(f"got one run, {', '.join(options.runs)}: expected two or more to compare")
    runs = [load(folder) for folder in options.runs]
    shown: dict[str, str] = {}
    for run in runs:
        shown |= summary.columns(run.config)
    rows, first = [["run", "method", *shown.values(), "global vs first", "paired"]], {}
    for run in runs:
        for name, entry in run.summary["methods"].items():
            own = [summary.percent(entry[key]["last5"]) if key in entry else "-" for key in shown]
            rows.append([run.name, name, *own, *against(first.setdefault(name, run), run, name)])
    header, *lines = summary.aligned(rows)
    under = "  ".join("-" * max(map(len, column)) for column in zip(*rows, strict=True))
    words = [
        "accuracies in %, mean over the last five rounds (or as many as there are) and 95 % interval over seeds;",
        "global vs first: difference to the first run that has the method, over the seeds of both; paired: those",
        "whose clients have the same images in both",
    ]
    failed = [f"{run.name}: {line}" for run in runs for line in summary.without_result(run.summary)]
    return "\n".join([header, under, *lines, "", *words, *failed, "", *differing(runs)])


def against(first: Finished, run: Finished, name: str) -> tuple[str, str]:
    """The difference of a method's global accuracy to that of another run, and of how many seeds it is paired."""
    if first is run:
        return "", ""
    values = [dict(zip(r.config["seeds"], _seeds(r, name), strict=True)) for r in (first, run)]
    dealt = [dict(zip(r.config["seeds"], r.record["partition_hash"], strict=True)) for r in (first, run)]
    both = [seed for seed in values[0] if seed in values[1]]
    if not both:
        return "-", "no seed is in both"
    alike = sum(dealt[0][seed] == dealt[1][seed] for seed in both)
    apart = [values[1][seed] - values[0][seed] for seed in both]
    return summary.percent(summary.spread(apart), signed=True), f"{alike} of {len(both)}"


def differing(runs: list[Finished]) -> list[str]:
    """A line for each option, and each hash, that is not the same in all of them."""
    facts: list[dict[str, Any]] = [{**run.config, **{key: run.record.get(key) for key in IDENTITY}} for run in runs]
    names = [name for name in dict.fromkeys(key for own in facts for key in own) if len(_texts(facts, name)) > 1]
    if not names:
        return ["all options are the same"]
    rows = [["differs", *(run.name for run in runs)]]
    rows += [[name.replace("_", "-"), *(_text(own.get(name)) for own in facts)] for name in names]
    return summary.aligned(rows)


def _seeds(run: Finished, name: str) -> list[float]:
    return run.summary["methods"][name][MEASURE]["last5"]["seeds"]


def _texts(facts: list[dict[str, Any]], name: str) -> set[str]:
    return {_text(own.get(name)) for own in facts}


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
