"""Finished runs, read from Python: ``load("runs/all").rows`` is what ``pandas.DataFrame`` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from experiments.results.folder import CONFIG, read_json
from experiments.results.record import Metrics

SUMMARY = "summary.json"


class Finished(NamedTuple):
    """A finished ``compare`` or ``run``."""

    name: str
    config: dict[str, Any]  # the options that decide results
    record: dict[str, Any]  # hashes of data, weights and partitions, adapted kernels, and more
    summary: dict[str, Any]  # see summary.py
    rows: list[dict[str, Any]]  # of metrics.jsonl: one for each method, seed and round; of metrics.py


def load(folder: str | Path) -> Finished:
    """What a finished run has written.

    Raises:
      ValueError: there is no finished ``compare`` or ``run``, or it has begun again, or rows are damaged.
    """
    path = Path(folder)
    began, summary = (_object(path / name) for name in (CONFIG, SUMMARY))
    if not {"config", "record", "methods", "paired"} <= summary.keys() or not summary["methods"]:
        raise ValueError(f"{path} is no finished compare or run: expected a folder with the {SUMMARY} of one")
    if any(began.get(part) != summary[part] for part in ("config", "record")):
        raise ValueError(f"{path} has been gone on with and is not finished: let it end with --resume")
    rows, config = Metrics(path).read(), summary["config"]
    if len(rows) != (count := len(summary["methods"]) * len(config["seeds"]) * config["rounds"]):
        raise ValueError(f"{path} has {len(rows)} whole rows of {count}: --resume computes what is damaged again")
    return Finished(str(folder), config, summary["record"], summary, rows)


def _object(file: Path) -> dict[str, Any]:
    """What a file of JSON holds; nothing, where it is none."""
    found = read_json(file.read_bytes()) if file.is_file() else None
    return found if isinstance(found, dict) else {}
