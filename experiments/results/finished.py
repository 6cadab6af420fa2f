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
      ValueError: there is no finished ``compare`` or ``run``.
    """
    path = Path(folder)
    found = [read_json((path / name).read_bytes()) if (path / name).is_file() else None for name in (CONFIG, SUMMARY)]
    config, summary = (x if isinstance(x, dict) else {} for x in found)
    if not {"config", "record"} <= config.keys() or not {"methods", "paired"} <= summary.keys():
        raise ValueError(f"{path} is no finished compare or run: expected a folder with {CONFIG} and {SUMMARY} of one")
    return Finished(str(path), config["config"], config["record"], summary, Metrics(path).read())
