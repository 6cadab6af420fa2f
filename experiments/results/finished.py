"""Finished runs, read from Python: ``load("runs/all").to_pandas()`` is a table of their numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from experiments.results import tracking
from experiments.results.folder import CONFIG, read_json
from experiments.results.record import Metrics

SUMMARY = "summary.json"


class Finished(NamedTuple):
    """A finished ``compare`` or ``run``."""

    name: str
    config: dict[str, Any]  # the options that decide results
    record: dict[str, Any]  # hashes of data, weights and partitions, adapted kernels, and more
    summary: dict[str, Any]  # see summary.py
    rows: list[dict[str, Any]]  # of metrics.jsonl: one for each method that has a result, seed and round; of metrics.py

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame``: a row for each number of each method, seed and round, what it is ``of`` (a domain, a
        client) beside it."""
        import pandas  # type: ignore

        keys = tracking.IDENTITY
        found = [(*(row[key] for key in keys), *value) for row in self.rows for value in tracking.values(row)]
        return pandas.DataFrame(found, columns=[*keys, "measure", "of", "value"])  # type: ignore

    def to_xarray(self) -> Any:
        """An ``xarray.Dataset``: each measure by method, seed and round, of domains and clients by these as well; nan
        where it was not taken. (``.sel({"method": "fedit"})``: its own ``method`` is another thing.)"""
        import xarray  # type: ignore

        arrays = {}
        for measure, table in self.to_pandas().groupby("measure"):
            own = ["client"] if measure in tracking.NAMES.values() else ["domain"] * bool(table["of"].any())
            table = table.rename(columns={"of": own[0] if own else "of"})
            arrays[measure] = table.set_index([*tracking.IDENTITY, *own])["value"].to_xarray()
        return xarray.Dataset(arrays)


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
    config, rows = summary["config"], [row for row in Metrics(path).read() if row["method"] in summary["methods"]]
    if len(rows) != (count := len(summary["methods"]) * len(config["seeds"]) * config["rounds"]):
        raise ValueError(f"{path} has {len(rows)} whole rows of {count}: --resume computes what is damaged again")
    return Finished(str(folder), config, summary["record"], summary, rows)


def _object(file: Path) -> dict[str, Any]:
    """What a file of JSON holds; nothing, where it is none."""
    found = read_json(file.read_bytes()) if file.is_file() else None
    return found if isinstance(found, dict) else {}
