"""Arrays that stay in a file: of those too large for memory only what is asked for is read.

Read, not mapped: pages of a map that have been looked at count as memory of the process until the kernel wants them.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

PART = 2**24  # bytes read at once


class File:
    """A file that stays open as long as somebody holds this."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class OnDisk:
    """Equal arrays, one after another in a file: ``[n, ...]``, or some of them in any order.

    An index (of the first axis a number, a slice, numbers or a mask) reads what it says of the first axis. The file is
    held open, so that it may be deleted, and threads may read at once.

    Args:
      file: that they are in; opened for writing too where that is done.
      name: of what is in it, for messages.
      shape: of all.
      dtype: of each number.
      rows: which of them; ``None``: all.
      digest: of ``hashlib``, of all that is in the file, where somebody has read it whole.
      start: byte of the file at which the first begins.
    """

    def __init__(
        self,
        file: File,
        name: str,
        shape: tuple[int, ...],
        dtype: Any,
        rows: np.ndarray | None = None,
        digest: Any = None,
        start: int = 0,
    ):
        self._file, self.name, self.dtype, self._rows, self.digest = file, name, np.dtype(dtype), rows, digest
        self.shape = (shape[0] if rows is None else len(rows), *shape[1:])
        self._of_all, self._start = shape, start
        self._each = int(np.prod(shape[1:], dtype=np.int64)) * self.dtype.itemsize  # bytes

    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: int(np.prod(self.shape, dtype=np.int64)))
    nbytes = property(lambda self: self.size * self.dtype.itemsize)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        first, *rest = index if isinstance(index, tuple) else (index,)
        rows = np.arange(len(self))[first]
        out = np.empty((np.size(rows), *self.shape[1:]), self.dtype)
        self.read(np.ravel(rows), out)
        return out.reshape(*np.shape(rows), *self.shape[1:])[(*[slice(None)] * np.ndim(rows), *rest)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(self.dtype if dtype is None else dtype, copy=False)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def of(self, rows: np.ndarray) -> OnDisk:
        """Some of them alone; nothing is read."""
        own = np.arange(len(self))[rows] if self._rows is None else self._rows[rows]
        return OnDisk(self._file, self.name, self._of_all, self.dtype, own, start=self._start)

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Into ``out [len(rows), ...]``; rows that lie beside one another are read together.

        Raises:
          OSError: they cannot be, or the file has become shorter.
        """
        places = np.asarray(rows, np.int64) if self._rows is None else self._rows[rows]
        into = _bytes(out)
        starts = np.flatnonzero(np.diff(places, prepend=-2) != 1)
        for begin, end in zip(starts, [*starts[1:], len(places)], strict=True):
            self._fill(into[begin * self._each : end * self._each], self._start + int(places[begin]) * self._each)

    def __setitem__(self, index: slice | int, values: np.ndarray) -> None:
        """Write one, or neighbours, of a file made for that."""
        start = index if isinstance(index, int) else index.start
        left, at = _bytes(np.ascontiguousarray(values)), self._start + start * self._each
        while len(left):
            done = os.pwrite(self._file.descriptor, left, at)
            left, at = left[done:], at + done

    def _fill(self, into: memoryview, at: int) -> None:
        while len(into):
            try:
                part = os.pread(self._file.descriptor, min(PART, len(into)), at)
            except OSError as error:
                raise _lost(self.name, error.strerror or "unknown error") from None
            if not part:
                raise _lost(self.name, f"they end after {at:,} bytes")
            into[: len(part)] = part
            into, at = into[len(part) :], at + len(part)


def _bytes(x: Any) -> memoryview:
    return memoryview(x.reshape(-1).view(np.uint8))


def _lost(name: str, why: str) -> OSError:
    # Without a number: it is no matter of the folder that is being written.
    return OSError(f"cannot read the images in {name} any more: {why}; what has been computed is kept, so start again, "
                   "with --resume, when they are there")  # fmt: skip


def opened(path: Path, shape: tuple[int, ...], dtype: Any, digest: Any = None, start: int = 0) -> OnDisk:
    """What is in a file, from a byte on."""
    return OnDisk(File(os.open(path, os.O_RDONLY)), str(path), shape, dtype, digest=digest, start=start)


def made(path: Path, shape: tuple[int, ...], dtype: Any) -> OnDisk:
    """Zeros in a new file, with room for all of them.

    Raises:
      OSError: there is none.
    """
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    file = File(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666))
    if hasattr(os, "posix_fallocate") and size:  # no room is found out before hours of work
        os.posix_fallocate(file.descriptor, 0, size)
    os.ftruncate(file.descriptor, size)
    return OnDisk(file, str(path), shape, dtype)


def scratch(folder: Path, shape: tuple[int, ...], dtype: Any) -> OnDisk:
    """Zeros in a file without a name, which is gone with this process, whatever ends it.

    Raises:
      ValueError: there is no room for it in the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, path = tempfile.mkstemp(dir=folder)
        os.close(descriptor)
        try:
            return made(Path(path), shape, dtype)
        finally:
            os.unlink(path)
    except OSError as error:
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize / 2**30
        raise ValueError(
            f"cannot keep {size:,.1f} GiB of what the frozen blocks make of images in {folder}: {error.strerror}; set "
            "XDG_CACHE_HOME to a folder with room for them, or use --prefix anew"
        ) from None


def taken(x: np.ndarray | OnDisk, rows: np.ndarray) -> np.ndarray | OnDisk:
    """Some of the first axis; of what is on disk nothing is read."""
    return x.of(rows) if isinstance(x, OnDisk) else x[rows]


def read(x: np.ndarray | OnDisk, rows: np.ndarray, out: np.ndarray) -> None:
    """Some of the first axis, into ``out``."""
    if isinstance(x, OnDisk):
        x.read(rows, out)
    else:
        np.take(x, rows, 0, out=out)


def buffer(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeros that take memory only where they are written, give it back when they are let go of, and that a CPU need not
    copy (jax takes arrays over that begin at a multiple of 64 bytes)."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    return np.frombuffer(mmap.mmap(-1, max(1, size)), np.uint8)[:size].view(dtype).reshape(shape)


def summed(path: Path) -> Any:
    """SHA-256 of all of a file, as a digest that can go on."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(PART):
            digest.update(part)
    return digest
