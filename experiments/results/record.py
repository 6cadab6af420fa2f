"""The rows of a run and what its methods have learned. All that is in a folder of ``compare`` or ``run``:

    config.json     what was run: options, hashes of data, weights and partition, versions
    metrics.jsonl   one row per method, seed and round, each with a checksum of its own; no timings, so that a resumed
                    run gives the same bytes
    summary.json    per method: last round and mean of the last five, with intervals over seeds (``summary.py``)
    *.theta.npz     what a method has learned besides its adapter (state.theta), of the first seed
    checkpoints/    METHOD/SEEDS/ROUNDS, seeds by their place in the list (``checkpoints.py``); older ones are deleted
    tracked/        what trackers were told of it, for whoever looks there (``tracking.py``)
    *.png, report.html

Rows are on disk before the checkpoint that covers them. A resumed run reads the newest checkpoint that is whole and has
all its rows, and only then drops the rows after it.
"""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.results.folder import file_name, read_json, sealed, unsealed, write_atomically
from models import archive


class Metrics:
    """``metrics.jsonl``, append-only while a method runs."""

    def __init__(self, folder: Path, then: Callable[[list[dict[str, Any]]], None] = lambda rows: None):
        self.folder, self._path = folder, folder / "metrics.jsonl"
        self._then = then  # who else is told of rows once they are on disk

    def append(self, rows: list[dict[str, Any]]) -> None:
        with self._path.open("ab") as file:
            file.write(b"".join(map(_line, rows)))
            file.flush()
            os.fsync(file.fileno())
        self._then(rows)

    def read(self) -> list[dict[str, Any]]:
        """The rows that are as they were written; none where two of one method, seed and round contradict."""
        lines = self._path.read_bytes().split(b"\n") if self._path.exists() else []
        found: dict[tuple, dict[bytes, dict[str, Any]]] = {}
        for line in lines:  # what follows the last newline was cut short by a kill
            row = unsealed(read_json(line))
            if row is not None and row.keys() >= {"method", "seed", "round"}:
                found.setdefault((row["method"], row["seed"], row["round"]), {})[line] = row
        return [row for same in found.values() if len(same) == 1 for row in same.values()]

    def rewrite(self, rows: list[dict[str, Any]]) -> None:
        """Put these in place of what is there, where they differ."""
        content = b"".join(map(_line, rows))
        if not self._path.exists() or self._path.read_bytes() != content:
            write_atomically(self._path, content)


def complete(rows: Iterable[dict[str, Any]], method: str, seeds: Sequence[int]) -> int:
    """Rounds from the first on that have the rows of a method on all these seeds."""
    there = {(row["seed"], row["round"]) for row in rows if row["method"] == method}
    return next(r for r in itertools.count() if not all((seed, r + 1) in there for seed in seeds))


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(sealed(row), allow_nan=False) + "\n").encode()


def keep_theta(folder: Path, method: str, state: Any) -> None:
    """Write the first seed's ``state.theta``, where the method has one, for ``--theta`` of later runs."""
    if hasattr(state, "theta"):
        write_theta(folder, method, jax.tree.map(lambda x: x[0], state.theta))


def write_theta(folder: Path, method: str, theta: Any) -> Path:
    """What a method has learned, as ``METHOD.theta.npz``."""
    buffer, path = io.BytesIO(), folder / f"{file_name(method).replace(':', '_')}.theta.npz"
    leaves = jax.tree_util.tree_leaves_with_path(theta)
    arrays: dict[str, Any] = {jax.tree_util.keystr(name): np.asarray(x) for name, x in leaves}
    np.savez(buffer, **arrays)
    write_atomically(path, buffer.getvalue())
    return path


def read_arrays(path: str | None) -> dict[str, np.ndarray] | None:
    """What a method has learned, of a ``METHOD.theta.npz``; ``None`` for no path.

    Raises:
      ValueError: no such file, or it holds something else than finite real numbers.
    """
    if path is None:
        return None
    try:
        arrays = archive.read_npz(path)
    except ValueError as error:
        raise ValueError(f"cannot read what a method learned: {error}") from None
    for name, x in arrays.items():
        if x.dtype.kind != "f" or not np.isfinite(x).all():
            raise ValueError(f"{path} is nothing that a method learned: {name!r} is {x.dtype}, expected finite floats")
    return arrays


def number(x: Any) -> float | None:
    """A JSON number; ``None`` for what is not a number."""
    return float(x) if np.isfinite(x) else None
