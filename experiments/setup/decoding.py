"""Images of a source, decoded once: kept as bytes in a file that later runs read.

Where ``$XDG_CACHE_HOME`` (else ``~/.cache``) says, in ``fedlora-jax-images/KEY``: ``x`` (uint8, image after image), the
other arrays, columns of the source, and ``about.json`` with checksums of these. The key is made of what the source says
that its images are, so that a changed file makes another. Such a folder appears whole or not at all, whoever is killed,
and is made by one process while others wait for it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from PIL import Image, ImageOps, UnidentifiedImageError

from experiments import progress
from experiments.setup import columns, on_disk, resizing
from experiments.setup.caches import caches
from experiments.setup.columns import Columns
from experiments.setup.on_disk import summed
from experiments.setup.resizing import Resizing
from models import archive

FORMAT = 4  # of what is kept, and of how images are decoded: a change of either is another number
DEEP, SIXTEEN = ("I", "F"), "I;16"  # Pillow's modes of more than 8 bits begin so; those of 16, of which it is known
#   what is white: making RGB of them would cut off what is above 255
FOLDER = "fedlora-jax-images"  # below that of all caches
SHOWN = 3  # damaged images that are named
FILES = ("x", "rest.npz", "columns.npz")


class Listing(NamedTuple):
    """The images of a source that are still to be decoded.

    Attributes:
      name: of the source, for messages.
      identity: text that differs where images, their order or what is said of them do.
      names: what each image is called.
      encoded: ``(i) -> an image file``, its path or what is in it.
      arrays: ``() -> the arrays of the contract (``data.py``) but for x``, and columns of the source, whose names begin
        with ``columns.KEPT``; asked for once, when images are decoded.
    """

    name: str
    identity: str
    names: list[str]
    encoded: Callable[[int], Path | bytes]
    arrays: Callable[[], dict[str, np.ndarray]]


def decoded(listing: Listing, side: int | Resizing | None, skip: bool = False) -> dict[str, Any]:
    """The arrays of the contract, ``x`` on disk, and ``columns`` of the source.

    Args:
      listing: the images.
      side: every image is resized so that its shorter side has so many pixels, bicubic and antialiased, and cut to its
        middle (or as a ``Resizing`` says); ``None``: all must be of one size.
      skip: leave out images that cannot be read, and say how many; else they are refused.

    Raises:
      ValueError: images that cannot be read, or of several sizes and no side; there is no room to keep them.
    """
    key = hashlib.sha256(json.dumps([FORMAT, listing.identity, side, skip]).encode()).hexdigest()[:32]
    kept = caches() / FOLDER / key
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(kept.with_suffix(".lock")):  # let go of by the kernel, whatever ends its owner
            arrays = _whole(kept)
            if arrays is None:
                _make(kept, listing, side, skip)
                arrays = _whole(kept)
            elif count := json.loads((kept / "about.json").read_bytes())["left_out"]:
                _note(
                    f"{listing.name}: left out, {count} of {len(listing.names)} images cannot be used (named at first)"
                )
    except OSError as error:
        raise ValueError(
            f"cannot keep the decoded images of {listing.name} in {kept.parent}: {error.strerror}; set XDG_CACHE_HOME "
            "to a folder with room for them"
        ) from None
    if arrays is None:
        raise ValueError(f"{kept} changed while it was read: delete it and start again")
    return arrays


def _whole(kept: Path) -> dict[str, Any] | None:
    """What is kept, if it is what was written."""
    try:
        about = json.loads((kept / "about.json").read_bytes())
        digests = {name: summed(kept / name) for name in FILES}
        if about["sums"] != {name: digest.hexdigest() for name, digest in digests.items()}:
            return None
        with np.load(kept / "rest.npz") as file:
            rest = dict(file)
        read = lambda name: archive.read_npz(kept / "columns.npz", (columns.KEPT + name,))[columns.KEPT + name]
        own = {"columns": Columns(tuple(about["columns"]), read)}
        return {"x": on_disk.opened(kept / "x", tuple(about["shape"]), np.uint8, digests["x"]), **rest, **own}
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _make(kept: Path, listing: Listing, side: int | Resizing | None, skip: bool) -> None:
    """Decode into a folder beside, and give it its name when it is whole. Called by the owner of the lock alone."""
    part = kept.with_suffix(".part")
    for left in (part, kept):  # of a process that was killed; damaged
        shutil.rmtree(left, ignore_errors=True)
    part.mkdir()
    try:
        shape, good = _decode(part / "x", listing, side, skip)
        arrays, count = listing.arrays(), len(listing.names)
        arrays[columns.KEPT + columns.IMAGE] = np.array(listing.names)
        told = {name: x[good] for name, x in arrays.items() if name.startswith(columns.KEPT)}
        own = {name: x[good] if name in ("y", "domain", "split") else x for name, x in arrays.items()}
        own = {name: x for name, x in own.items() if not name.startswith(columns.KEPT)}
        for name, group in (("rest.npz", own), ("columns.npz", told)):
            with (part / name).open("wb") as file:
                np.savez(file, **group)  # type: ignore[arg-type]
        sums = {name: summed(part / name).hexdigest() for name in FILES}
        about = {"shape": shape, "source": listing.name, "left_out": count - len(good), "sums": sums}
        about["columns"] = sorted(name.removeprefix(columns.KEPT) for name in told)
        (part / "about.json").write_text(json.dumps(about, indent=1))
        for path in part.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        part.rename(kept)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _decode(path: Path, listing: Listing, side: int | Resizing | None, skip: bool) -> tuple[list[int], np.ndarray]:
    """Write all images that can be read; the shape of what was written, and which images they are.

    Raises:
      ValueError: see ``decoded``.
    """
    count, bad = len(listing.names), {}
    first, pixels = _first(listing, side)
    x = on_disk.made(path, (count, *pixels), np.uint8)

    def one(i: int) -> str:
        """What is wrong with an image; nothing, where it was written."""
        try:
            image = opened(listing.encoded(i), side)
        except ValueError as error:
            return str(error)
        if image.shape != pixels:
            (h, w), (height, width) = pixels[:2], image.shape[:2]
            raise ValueError(
                f"{listing.name}: {listing.names[first]} has {h} x {w} pixels and {listing.names[i]} {height} x "
                f"{width}: use --image-size to make them alike"
            )
        x[i] = image
        return ""

    for i, wrong in enumerate(_in_parallel(one, count, f"decoding {listing.name}")):
        if wrong:
            bad[i] = wrong
    if bad:
        some = "; ".join(f"{listing.names[i]} {wrong}" for i, wrong in list(bad.items())[:SHOWN])
        said = f"{len(bad)} of {count} images cannot be used ({some}{'; ...' * (len(bad) > SHOWN)})"
        if not skip or len(bad) == count:
            raise ValueError(f"{listing.name}: {said}: mend them, or leave them out with --skip-damaged")
        _note(f"{listing.name}: left out, {said}")
    good = np.setdiff1d(np.arange(count), list(bad))
    for place, i in enumerate(good):  # close the gaps, from the front
        if place != i:
            x[int(place)] = x[int(i)]
    os.truncate(path, len(good) * int(np.prod(pixels)))
    return [len(good), *pixels], good


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


def _in_parallel(one: Callable[[int], Any], count: int, what: str) -> Iterator[Any]:
    """``one(i)`` for all ``i``, in order; Pillow lets threads work side by side."""
    with (
        ThreadPoolExecutor() as pool,
        progress.bar(count, "image", what, leave=False, delay=1) as bar,
    ):
        for start in range(0, count, 1024):  # no more at once than an interrupt can wait for
            for result in pool.map(one, range(start, min(count, start + 1024))):
                bar.update()
                yield result


def _first(listing: Listing, side: int | Resizing | None) -> tuple[int, tuple[int, ...]]:
    """The shape of all images: as wished, or that of the first that can be read, and which that is."""
    if side is not None:
        return 0, (resizing.of(side).side,) * 2 + (3,)
    wrong = ""
    for i in range(len(listing.names)):
        try:
            return i, opened(listing.encoded(i), None).shape
        except ValueError as error:
            wrong = wrong or f"{listing.names[i]} {error}"
    raise ValueError(f"{listing.name} holds no image that can be read ({wrong})")


def opened(encoded: Path | bytes, side: int | Resizing | None) -> np.ndarray:
    """One image, uint8 ``[H, W, 3]``, as a viewer shows it; what is transparent lies on white.

    Raises:
      ValueError: it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as file:
                if file.mode.startswith(DEEP) and not file.mode.startswith(SIXTEEN):
                    raise ValueError(f"it has 32 bits a pixel (mode {file.mode}), of unknown range: convert it to 8")
                image = ImageOps.exif_transpose(file)  # reads it
            if image.mode.startswith(SIXTEEN):
                image = Image.fromarray(np.round(np.asarray(image).astype(np.float32) / 257).astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError("is no image that can be read") from None
    except MemoryError:
        raise
    except Exception as error:  # of damaged bytes Pillow's readers raise whatever they stumble over
        raise ValueError(f"cannot be read: {error}") from None
    return np.asarray(image if side is None else resizing.resized(image, side))
