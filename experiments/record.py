"""The output folder: what is in it, and how it is written so that a kill at any moment loses no finished round.

    config.json     what was run: options, hashes of data, weights and partition, versions
    metrics.jsonl   one row per method, seed and round; no timings, so that a resumed run gives the same bytes
    summary.json    per method: last round and mean of the last five, with intervals over seeds (``summary.py``)
    *.theta.npz     what a method has learned besides its adapter (state.theta), of the first seed
    checkpoints/    one orbax folder per method; older ones are deleted
    *.png, report.html

Rows are on disk before the checkpoint that covers them; a resumed run drops the rows after its checkpoint.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from models import archive


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside ``path``, then rename: a reader sees the old file or the new one, never half of one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def check_folder(folder: Path, resume: bool, file: str = "config.json") -> None:
    """Refuse a folder that cannot be written, holds something else, or has nothing to resume (no ``file``)."""
    if resume:
        if not (folder / file).is_file():
            raise ValueError(f"nothing to resume in {folder}: it has no {file}")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: use --resume to go on with it, or another --out")
    parent = folder
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(
            f"cannot write to {folder}: {parent} is {'not writable' if parent.is_dir() else 'not a folder'}"
        )


def check_same(folder: Path, part: str, values: dict[str, Any], file: str = "config.json") -> None:
    """Refuse to resume a run whose ``config`` or ``record`` (what ``part`` names) differs."""
    try:
        before = json.loads((folder / file).read_text())[part]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot resume: {folder / file} is not readable: {error}") from None
    changed = [
        f"{key} was {_short(before.get(key))}, is {_short(value)}"
        for key, value in json.loads(json.dumps(values)).items()
        if before.get(key) != value
    ]
    if changed:
        raise ValueError(f"{folder} belongs to another configuration: {'; '.join(changed[:4])}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Metrics:
    """``metrics.jsonl``, append-only while a run goes on."""

    def __init__(self, folder: Path):
        self._path = folder / "metrics.jsonl"

    def keep(self, rounds_done: dict[str, int]) -> None:
        """Drop rows that no checkpoint covers (and a last line cut short by a kill)."""
        rows = [row for row in self.read() if row["round"] <= rounds_done.get(row["method"], 0)]
        write_atomically(self._path, b"".join(_line(row) for row in rows))

    def append(self, rows: list[dict[str, Any]]) -> None:
        with self._path.open("ab") as file:
            file.write(b"".join(_line(row) for row in rows))
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        lines = self._path.read_bytes().split(b"\n")
        return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is incomplete


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, allow_nan=False) + "\n").encode()


class Checkpoints:
    """The run of one method, by rounds done. Orbax writes beside and renames; the latest two are kept."""

    def __init__(self, folder: Path, method: str):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._folder, self._method = folder, method
        self._manager = ocp.CheckpointManager((folder / "checkpoints" / method).absolute(), options=options)

    def latest(self) -> int:
        """Rounds done in the newest checkpoint; 0 without one."""
        return self._manager.latest_step() or 0

    def save(self, rounds_done: int, run: Any) -> None:
        self._manager.save(rounds_done, args=ocp.args.StandardSave(_arrays(run)))  # type: ignore[call-arg]
        self._manager.wait_until_finished()

    def restore(self, like: Any) -> Any:
        """The newest checkpoint, in the structure of ``like``."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _arrays(like))
        arrays = self._manager.restore(self.latest(), args=ocp.args.StandardRestore(abstract))  # type: ignore[call-arg]
        leaves, structure = jax.tree.flatten(like)
        arrays = {name: jax.random.wrap_key_data(x) if _is_key(leaves[int(name)]) else x for name, x in arrays.items()}
        return jax.tree.unflatten(structure, [arrays.get(_name(i), old) for i, old in enumerate(leaves)])

    def keep_theta(self, state: Any) -> None:
        """Write the first seed's ``state.theta``, where the method has one, for ``--theta`` of later runs."""
        if hasattr(state, "theta"):
            write_theta(self._folder, self._method, jax.tree.map(lambda x: x[0], state.theta))

    def close(self) -> None:
        self._manager.close()


def write_theta(folder: Path, method: str, theta: Any) -> Path:
    """What a method has learned, as ``METHOD.theta.npz``."""
    buffer, path = io.BytesIO(), folder / f"{method.replace(':', '_')}.theta.npz"
    leaves = jax.tree_util.tree_leaves_with_path(theta)
    arrays: dict[str, Any] = {jax.tree_util.keystr(name): np.asarray(x) for name, x in leaves}
    np.savez(buffer, **arrays)
    write_atomically(path, buffer.getvalue())
    return path


def _arrays(run: Any) -> dict[str, Any]:
    """A run's leaves under numbers: no class of ours is needed to read a checkpoint.

    Orbax does not write arrays of size zero (the labels of a signature that says nothing of them): they are left out.
    """
    plain = lambda x: jax.random.key_data(x) if _is_key(x) else x
    return {_name(i): plain(x) for i, x in enumerate(jax.tree.leaves(run)) if x.size}


def _name(i: int) -> str:
    return f"{i:04d}"


def _is_key(x: Any) -> bool:
    return jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)


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
