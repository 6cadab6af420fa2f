"""Checkpoints of a run, each of which is whole, or seen not to be."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.results.folder import read_json, sealed, unsealed, write_atomically

MANIFEST = "manifest.json"


class Checkpoints:
    """The run of one method on some seeds, a folder for so many rounds done; the newest two are kept.

    Orbax writes beside and renames, but notices no flipped byte. What makes a folder a checkpoint is the manifest that
    is written last: a checksum of every file, how many rounds are done, and ``about``.

    Args:
      path: the folder of these folders.
      about: whose run it is; a checkpoint that says otherwise is none.
    """

    def __init__(self, path: Path, about: dict[str, Any]):
        self._path, self._about = path.absolute(), json.loads(json.dumps(about))

    def whole(self) -> tuple[list[int], list[str]]:
        """Rounds done of every checkpoint that is as it was written, newest first; and what is wrong with others."""
        found, wrong = [], []
        for rounds_done in self._steps():
            fault = self._fault(rounds_done)
            (wrong if fault else found).append(f"{self._path / str(rounds_done)} {fault}" if fault else rounds_done)
        return found, wrong

    def notes(self, rounds_done: int) -> Any:
        """What ``save`` was given to be kept beside the run."""
        return self._manifest(rounds_done)["notes"]  # type: ignore[index]

    def save(self, rounds_done: int, run: Any, notes: Any = None) -> None:
        """Write a checkpoint, arrays from wherever they are, then delete all but the newest two.

        Raises:
          OSError: it could not be written.
        """
        path = self._path / str(rounds_done)
        _remove(path)
        with _as_os_error(path), _quiet(), _late_writes_are_quiet():
            _orbax().save(path, args=ocp.args.StandardSave(_arrays(_names(run), jax.tree.leaves(run))))
        about = {**self._about, "rounds": rounds_done, "notes": notes, "named": True, "files": _sums(path)}
        write_atomically(path / MANIFEST, json.dumps(sealed(about)).encode())
        self.keep(self._steps()[:2])

    def restore(self, rounds_done: int, like: Any) -> Any:
        """A checkpoint, in the structure of ``like``, of NumPy arrays but for random keys."""
        leaves, structure = jax.tree.flatten(like)
        named = (self._manifest(rounds_done) or {}).get("named")
        names = _names(like) if named else [f"{i:04d}" for i in range(len(leaves))]  # as they once were
        with _quiet():
            room = ocp.args.StandardRestore(_room(names, leaves))
            arrays = _orbax().restore(self._path / str(rounds_done), args=room)
        keys = {name for name, x in zip(names, leaves, strict=True) if _is_key(x)}  # these are of jax again
        arrays = {name: jax.random.wrap_key_data(x) if name in keys else x for name, x in arrays.items()}
        kept = [arrays.get(name, old) for name, old in zip(names, leaves, strict=True)]
        return jax.tree.unflatten(structure, kept)

    def keep(self, rounds_done: list[int]) -> None:
        """Delete all other checkpoints, and what a kill has left of any."""
        if self._path.is_dir():
            for path in self._path.iterdir():
                if path.name not in map(str, rounds_done):
                    _remove(path)

    def _steps(self) -> list[int]:
        names = [path.name for path in self._path.iterdir()] if self._path.is_dir() else []
        return sorted((int(name) for name in names if re.fullmatch(r"[1-9]\d{0,17}", name)), reverse=True)

    def _manifest(self, rounds_done: int) -> dict[str, Any] | None:
        try:
            return unsealed(read_json((self._path / str(rounds_done) / MANIFEST).read_bytes()))
        except OSError:
            return None

    def _fault(self, rounds_done: int) -> str | None:
        manifest = self._manifest(rounds_done)
        if manifest is None:
            return "is not whole"
        if {**manifest, **self._about, "rounds": rounds_done} != manifest:
            return "is of another run"
        try:
            now = _sums(self._path / str(rounds_done))
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        changed = sorted(
            name for name in now.keys() | manifest["files"] if now.get(name) != manifest["files"].get(name)
        )
        return f"is damaged ({', '.join(changed[:2])})" if changed else None


def spans(folder: Path, count: int) -> list[tuple[int, int]]:
    """Which seeds of ``count`` run together: those that checkpoints in the folder are of, and all others in between.

    Seeds that come later are computed alone; a checkpoint holds those that began together.
    """
    found = [re.fullmatch(r"(\d+)-(\d+)", path.name) for path in folder.iterdir()] if folder.is_dir() else []
    out, end = [], 0
    for start, stop in sorted((int(m[1]), int(m[2])) for m in found if m):
        if end <= start < stop <= count:
            out += [(end, start)] * (end < start) + [(start, stop)]
            end = stop
    return out + [(end, count)] * (end < count)


@functools.cache
def _orbax() -> ocp.Checkpointer:
    """Without threads of its own that outlive a call; where several processes share a run, the first alone reads and
    writes. Not made before it is used: to be made it has jax look for its devices."""
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="first")
    return ocp.Checkpointer(ocp.StandardCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sums(path: Path) -> dict[str, str]:
    """A checksum of every file below ``path``, but for the manifest."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and p != path / MANIFEST)
    return {str(p.relative_to(path)): _sum(p) for p in files}


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs, with tracebacks, what it also raises."""
    log = logging.getLogger("absl")
    before, _ = log.level, log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


@contextlib.contextmanager
def _late_writes_are_quiet() -> Iterator[None]:
    """Where one array is refused, threads that write others find orbax's event loop closed: each prints a traceback.

    They end whenever they end: after a failure they are not heard for the rest of the process.
    """
    shown = sys.unraisablehook

    def unless_late(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            shown(unraisable)

    sys.unraisablehook = unless_late
    yield
    sys.unraisablehook = shown


@contextlib.contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """What the system refused reaches us as a ValueError whose text has the number of the error."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        number = re.search(r"os_error_code='(\d+)'", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _names(run: Any) -> list[str]:
    """Of a run's leaves, each as Python reaches it: ``.state.adapter['head']['kernel']``."""
    return [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(run)]


def _arrays(names: list[str], leaves: list[Any]) -> dict[str, Any]:
    """Leaves by name: no class of ours is needed to read a checkpoint.

    Orbax does not write arrays of size zero (the labels of a signature that says nothing of them): they are left out.
    """
    plain = lambda x: np.asarray(jax.random.key_data(x) if _is_key(x) else x)
    return {name: plain(x) for name, x in zip(names, leaves, strict=True) if x.size}


def _room(names: list[str], leaves: list[Any]) -> dict[str, np.ndarray]:
    """For what ``_arrays`` makes of such leaves."""
    plain = lambda x: jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x
    shapes = {name: plain(x) for name, x in zip(names, leaves, strict=True) if x.size}
    return {name: np.empty(x.shape, x.dtype) for name, x in shapes.items()}


def _is_key(x: Any) -> bool:
    return jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)
