"""Trackers: what a run finds also goes to TensorBoard, Weights & Biases, MLflow or a CSV file.

``metrics.jsonl`` stays the source: a tracker is told of rows once they are on disk. It has a folder of its own,
``tracked/NAME``, in which ``told.jsonl`` says of which rows. A run that goes on tells it what it lacks, and nothing
twice; so one that is asked for later, of a finished run too, gets everything. A row is noted before it is told: where a
kill comes between, the tracker lacks it. What fails is said in one line, and ends nothing.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.results.folder import digest, file_name, read_json, say

FOLDER, TOLD, CSV = "tracked", "told.jsonl", "metrics.csv"
IDENTITY = ("method", "seed", "round")
NAMES = {"client_accuracies": "client_accuracy", "client_accuracies_tuned": "client_accuracy_tuned"}  # one of a list


class Value(NamedTuple):
    """One number of a row."""

    name: str  # of metrics.jsonl; of a list, of one entry
    of: str  # the domain or client that it is of; "" where it is of the row
    value: float


class Place(NamedTuple):
    """What one method finds on one seed: a run, as trackers call it."""

    folder: Path  # of the tracker
    run: str  # the name of the whole
    token: str  # the same when it goes on, and no other's
    method: str
    seed: int
    config: dict[str, Any]  # the options of the whole


class Series(NamedTuple):
    """Where its numbers go."""

    log: Callable[[int, list[Value]], None]  # a round and its numbers
    close: Callable[[], None]


def values(row: dict[str, Any]) -> Iterator[Value]:
    """The numbers of a row: its own, of each domain, and of each client where it has them."""
    for name, found in row.items():
        if name in IDENTITY:
            continue
        if isinstance(found, dict):
            yield from (Value(name, of, x) for of, x in found.items() if x is not None)
        elif name in NAMES:
            numbers = row.get("client_numbers", range(len(found)))
            yield from (Value(NAMES[name], f"{i}", x) for i, x in zip(numbers, found, strict=True) if x is not None)
        elif isinstance(found, int | float):
            yield Value(name, "", found)


def to_csv(place: Place) -> Series:
    """A line for each number: of all runs in one file, as pandas, R and pivot tables of spreadsheets read it."""
    path = place.folder / CSV
    if not path.exists():
        path.write_text(",".join([*IDENTITY, "measure", "of", "value"]) + "\n")

    def log(round: int, found: list[Value]) -> None:
        buffer = io.StringIO()
        lines = csv.writer(buffer, lineterminator="\n")
        lines.writerows([place.method, place.seed, round, *value] for value in found)
        _append(path, buffer.getvalue())

    return Series(log, lambda: None)


def to_tensorboard(place: Place) -> Series:
    """Event files, a folder for each run: ``tensorboard --logdir FOLDER``."""
    from tensorboardX import SummaryWriter  # type: ignore

    folder, suffix = place.folder / file_name(place.method) / f"seed{place.seed}", f".{uuid.uuid4().hex[:8]}"
    writer = SummaryWriter(str(folder), filename_suffix=suffix)  # its own names are alike within a second

    def log(round: int, found: list[Value]) -> None:
        for name, value in _few(found).items():
            writer.add_scalar(name, value, round)
        writer.flush()

    return Series(log, writer.close)


def to_wandb(place: Place) -> Series:
    """A run of Weights & Biases, grouped by the whole; offline, unless WANDB_MODE says otherwise."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb  # type: ignore

    options = {"silent": True, "console": "off", "disable_git": True, "disable_code": True, "x_disable_stats": True}
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "fedlora-jax"),
        group=place.run,
        name=f"{place.method}, seed {place.seed}",
        id=place.token,
        config={**place.config, "method": place.method, "seed": place.seed},
        dir=str(place.folder),
        mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore
        resume="allow",
        reinit="create_new",
        settings=wandb.Settings(**options),
    )
    return Series(lambda round, found: run.log(_few(found), step=round), run.finish)


def to_mlflow(place: Place) -> Series:
    """A run of MLflow, the whole its experiment; in a database of its own, unless MLFLOW_TRACKING_URI says where."""
    from mlflow.entities import Metric, Param  # type: ignore
    from mlflow.tracking import MlflowClient  # type: ignore

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    own = f"sqlite:///{place.folder.absolute() / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", own))
    there = client.get_experiment_by_name(place.run)
    experiment = there.experiment_id if there else client.create_experiment(place.run)
    before = client.search_runs([experiment], f"tags.token = '{place.token}'")
    if before:
        number = before[0].info.run_id
        client.update_run(number, "RUNNING")
    else:
        tags = {"token": place.token, "method": place.method, "seed": f"{place.seed}"}
        number = client.create_run(experiment, tags=tags, run_name=f"{place.method}, seed {place.seed}").info.run_id
        params = [Param(name, str(x)[:500]) for name, x in place.config.items()]
        for start in range(0, len(params), 100):  # MLflow takes no more at once
            client.log_batch(number, params=params[start : start + 100])

    def log(round: int, found: list[Value]) -> None:
        now = int(1000 * time.time())
        client.log_batch(number, [Metric(name, value, now, round) for name, value in _few(found).items()][:1000])

    return Series(log, lambda: client.set_terminated(number))


OPEN: dict[str, tuple[Callable[[Place], Series], tuple[str, ...]]] = {  # and the modules that each needs
    "csv": (to_csv, ()),
    "tensorboard": (to_tensorboard, ("tensorboardX",)),
    "wandb": (to_wandb, ("wandb",)),
    "mlflow": (to_mlflow, ("mlflow", "sqlalchemy", "alembic")),
}


def check(names: Sequence[str]) -> None:
    """Refuse trackers whose packages are not installed.

    Raises:
      ValueError: which, and what to install.
    """
    for name in names:
        if lacks := [module for module in OPEN[name][1] if importlib.util.find_spec(module) is None]:
            raise ValueError(f"--track {name} needs {', '.join(lacks)}: pip install 'fedlora-jax[track]'")


@contextlib.contextmanager
def following(
    names: Sequence[str], folder: Path, config: dict[str, Any], rows: list[dict[str, Any]]
) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """Tell trackers of the rows there are, and of those that are given to what is returned.

    Args:
      names: of trackers, of ``OPEN``.
      folder: of the run.
      config: its options.
      rows: of metrics.jsonl.
    """
    trackers = [Tracker(name, folder, config) for name in names]

    def tell(rows: list[dict[str, Any]]) -> None:
        for tracker in trackers:
            tracker.tell(rows)

    tell(rows)
    try:
        yield tell
    finally:
        for tracker in trackers:
            tracker.close()


class Tracker:
    """One of them, until it fails: the runs of one method at a time are open."""

    def __init__(self, name: str, folder: Path, config: dict[str, Any]):
        self._name, self._run, self._config, self._path = name, folder.name, config, folder / FOLDER / name
        self._open: dict[tuple[str, int], Series] = {}
        self._told: set[tuple] = set()
        self._failed = False
        with self._saying():
            self._path.mkdir(parents=True, exist_ok=True)
            self._token = self._begun()

    def tell(self, rows: list[dict[str, Any]]) -> None:
        """Those of these rows that it has not been told of."""
        with self._saying():
            if self._failed:
                return
            new = [row for row in rows if _key(row) not in self._told]
            _append(self._path / TOLD, "".join(json.dumps(_key(row)) + "\n" for row in new))
            self._told |= {_key(row) for row in new}
            for row in new:
                self._series(row["method"], row["seed"]).log(row["round"], list(values(row)))

    def close(self) -> None:
        with self._saying():
            if not self._failed:
                self._close()

    def _series(self, method: str, seed: int) -> Series:
        if any(other != method for other, _ in self._open):
            self._close()
        if (method, seed) not in self._open:
            token = digest(f"{self._token} {method} {seed}".encode())
            place = Place(self._path, self._run, token, method, seed, self._config)
            self._open[method, seed] = OPEN[self._name][0](place)
        return self._open[method, seed]

    def _close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def _begun(self) -> str:
        """What tells this run from all others; from the first line of what it has been told, or new."""
        path = self._path / TOLD
        lines = [read_json(line) for line in path.read_bytes().split(b"\n")] if path.exists() else []
        self._told = {tuple(line) for line in lines if isinstance(line, list)}
        token = next((line["token"] for line in lines if isinstance(line, dict) and "token" in line), None)
        if token is None:
            token = uuid.uuid4().hex
            _append(path, json.dumps({"token": token}) + "\n")
        return token

    @contextlib.contextmanager
    def _saying(self) -> Iterator[None]:
        """Whatever a tracker's library raises is said once, and it is not asked again."""
        try:
            yield
        except Exception as error:
            self._failed = True
            why = " ".join(str(error).split())[:200] or type(error).__name__
            say(f"--track {self._name} ends here ({why}); metrics.jsonl has all rows")


def _key(row: dict[str, Any]) -> tuple:
    return tuple(row[name] for name in IDENTITY)


def _few(found: Iterable[Value]) -> dict[str, float]:
    """Without those of single clients, by names that every tracker takes."""
    return {_plain(f"{x.name}/{x.of}" if x.of else x.name): x.value for x in found if x.name not in NAMES.values()}


def _plain(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)


def _append(path: Path, text: str) -> None:
    """After whole lines: one that a kill has cut short is ended first."""
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end and text:
            file.seek(end - 1)
            text = text if file.read(1) == b"\n" else "\n" + text
        file.write(text.encode())
