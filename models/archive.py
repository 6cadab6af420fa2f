"""Arrays of ``.npz`` files that somebody else wrote: what a file claims is checked before memory is taken for it.

``np.load`` believes a header (ten bytes can ask for terabytes) and ends in a dozen kinds of exceptions on damaged
bytes. Here a file is read, or refused with one ``ValueError``.
"""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy

DEFLATED = 1032  # bytes that a deflated byte can stand for, at most (258 in 2 bits)
PACKED = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: DEFLATED}  # what NumPy writes
# What zipfile, zlib and numpy raise on damaged bytes.
DAMAGED = (
    ArithmeticError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


def members(path: str | Path) -> list[str]:
    """Names of the arrays in a ``.npz`` file, in its order; nothing is unpacked.

    Raises:
      ValueError: the file is missing, or damaged, or no such file.
    """
    with _opened(path) as archive:
        return [_name(info) for info in archive.infolist() if _name(info) != info.filename]


def read_npz(path: str | Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a ``.npz`` file that are asked for; the others are not touched.

    Args:
      path: the file.
      names: the arrays that are wanted (``None``: all). What the file does not have is left out of the result.

    Raises:
      ValueError: the file is missing, damaged, encrypted, pickled or not packed as NumPy packs; an array is there twice
        or has not the size that its header claims; all together are larger than the machine's memory.
    """
    with _opened(path) as archive:
        wanted = [i for i in archive.infolist() if _name(i) != i.filename and (names is None or _name(i) in names)]
        _check_sizes(wanted, os.path.getsize(path), _memory())
        for info in wanted:
            with archive.open(info) as stream:
                _check_header(_name(info), stream, info.file_size)
        return {_name(info): _array(archive, info) for info in wanted}


class Stored(NamedTuple):
    """Where the numbers of an array lie in a ``.npz`` file that has not packed them."""

    start: int  # byte of the file
    shape: tuple[int, ...]
    dtype: np.dtype


def stored(path: str | Path, name: str) -> Stored | None:
    """Where an array lies that ``np.savez`` wrote row by row; ``None``: it is packed, column by column, or not there.

    Raises:
      ValueError: as ``read_npz``, whatever its size.
    """
    with _opened(path) as archive:
        info = next((info for info in archive.infolist() if _name(info) == name != info.filename), None)
        if info is None or info.compress_type != zipfile.ZIP_STORED:
            return None
        _check_sizes([info], os.path.getsize(path), math.inf)
        with archive.open(info) as stream:  # checks the member's own header
            shape, by_columns, dtype = _check_header(name, stream, info.file_size)
            before = stream.tell()
        with open(path, "rb") as file:
            file.seek(info.header_offset + 26)  # of 30 bytes; the last are the lengths of a name and of an extra field
            lengths = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
        return None if by_columns else Stored(info.header_offset + 30 + lengths + before, shape, dtype)


@contextmanager
def _opened(path: str | Path) -> Iterator[zipfile.ZipFile]:
    if not os.path.isfile(path):
        raise ValueError(f"no file {path}: expected the path of a .npz file")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except DAMAGED as error:
        raise ValueError(
            f"{path} is damaged, truncated or no .npz file of plain arrays: {str(error) or type(error).__name__}; "
            "write it anew with np.savez or np.savez_compressed"
        ) from None


def _name(info: zipfile.ZipInfo) -> str:
    return info.filename.removesuffix(".npy")


def _check_sizes(infos: list[zipfile.ZipInfo], size: int, memory: float) -> None:
    """What the directory of the archive says of its members is possible in a file, and in memory, of so many bytes."""
    twice = [name for name, count in Counter(map(_name, infos)).items() if count > 1]
    if twice:
        raise ValueError(f"it holds {twice[0]!r} twice")
    for info in infos:
        name = _name(info)
        if info.flag_bits & 1:
            raise ValueError(f"{name!r} is encrypted")
        if info.compress_type not in PACKED:
            raise ValueError(
                f"{name!r} is packed by method {info.compress_type}, expected 0 (not at all) or 8 (deflate)"
            )
        if info.file_size > info.compress_size * PACKED[info.compress_type]:
            raise ValueError(f"{name!r} claims {info.file_size} bytes, more than {info.compress_size} packed ones hold")
    packed, unpacked = sum(info.compress_size for info in infos), sum(info.file_size for info in infos)
    if packed > size:
        raise ValueError(f"its arrays claim {packed} packed bytes of a file of {size}")
    if unpacked > memory:
        raise ValueError(
            f"its arrays would take {unpacked / 2**30:.1f} GiB, this machine has {memory / 2**30:.1f} (of images x as "
            "np.savez writes them, not packed, only those that are needed are read)"
        )


def _check_header(name: str, stream, size: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """The array of a member of ``size`` bytes is what its header says: shape, whether by columns, type."""
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{name!r} is in format {version}, expected (1, 0) or (2, 0)")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, by_columns, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError(f"{name!r} is pickled")
    if not dtype.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"{name!r} claims to be {dtype} {list(shape)}")
    claimed = math.prod(shape) * dtype.itemsize
    if claimed != size - stream.tell():
        raise ValueError(f"{name!r} claims {dtype} {list(shape)}, {claimed} bytes; it has {size - stream.tell()}")
    return shape, by_columns, dtype


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as stream:
        return npy.read_array(stream, allow_pickle=False)


def _memory() -> float:
    """Bytes of memory of this machine, or no bound where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return math.inf
