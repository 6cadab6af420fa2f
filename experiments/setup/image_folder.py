"""Images in folders: ``FOLDER/CLASS/IMAGE`` or ``FOLDER/DOMAIN/CLASS/IMAGE``, with ``train`` and ``test`` (or ``val``,
where there is no ``test``; else it is left out) above that where the folder is split.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
SPLITS = {"train": 0, "training": 0, "test": 1, "val": 1, "valid": 1, "validation": 1}
DEEP = ("I", "F")  # Pillow's modes of more than 8 bits begin so; making RGB of them cuts off what is above 255


def read(source: str, side: int | None) -> dict[str, np.ndarray]:
    """The arrays of the contract (``data.py``). Classes and domains are in the order of their names.

    Args:
      source: the folder.
      side: every image is resized so that its shorter side has so many pixels, bicubic, and cut to its middle;
        ``None``: all must be of one size.

    Raises:
      ValueError: no images, folders of different depth, a file that is no image, or several sizes and no side.
    """
    root = Path(source)
    paths = sorted(p for p in _files(root) if p.suffix.lower() in SUFFIXES and _is_shown(p.relative_to(root)))
    if not paths:
        raise ValueError(f"{source} holds no images ({', '.join(SUFFIXES)}): expected FOLDER/CLASS/IMAGE")
    places = [path.relative_to(root).parts[:-1] for path in paths]
    tops = {place[0].lower() for place in places if place}
    is_split = tops <= SPLITS.keys() and all(places)
    if is_split and "test" in tops:
        kept = [i for i, place in enumerate(places) if not place[0].lower().startswith("val")]
        paths, places = [paths[i] for i in kept], [places[i] for i in kept]
    named = [place[1:] for place in places] if is_split else places
    depths = {len(place) for place in named}
    if depths not in ({1}, {2}):
        shallow, deep = (paths[[len(p) for p in named].index(f(depths))] for f in (min, max))
        raise ValueError(
            f"{source}: {shallow.relative_to(root)} and {deep.relative_to(root)} lie {min(depths)} and {max(depths)} "
            "folders deep: expected all of them in CLASS, or all in DOMAIN/CLASS"
        )
    classes, y = np.unique([place[-1] for place in named], return_inverse=True)
    arrays = {"x": _stacked(paths, root, side), "y": y, "classes": classes}
    if is_split:
        arrays["split"] = np.array([SPLITS[place[0].lower()] for place in places])
    if depths == {2}:
        arrays["domains"], arrays["domain"] = np.unique([place[0] for place in named], return_inverse=True)
    return arrays


def _files(root: Path) -> Iterator[Path]:
    """All files below, also behind links; not those of a link that leads back up, which would have no end."""
    for folder, folders, names in os.walk(root, followlinks=True):
        here = Path(folder).resolve()
        folders[:] = [name for name in folders if not here.is_relative_to(Path(folder, name).resolve())]
        yield from (Path(folder, name) for name in names)


def _is_shown(path: Path) -> bool:
    return not any(part.startswith((".", "__")) for part in path.parts)


def _stacked(paths: list[Path], root: Path, side: int | None) -> np.ndarray:
    first = _opened(paths[0], side)
    x = np.zeros((len(paths), *first.shape), np.uint8)
    for i, path in enumerate(paths):
        image = _opened(path, side)
        if image.shape != first.shape:
            (h, w), (height, width) = first.shape[:2], image.shape[:2]
            raise ValueError(
                f"{root}: {paths[0].relative_to(root)} has {h} x {w} pixels and {path.relative_to(root)} {height} x "
                f"{width}: use --image-size to make them alike"
            )
        x[i] = image
    return x


def _opened(path: Path, side: int | None) -> np.ndarray:
    """One image, uint8 ``[H, W, 3]``; what is transparent lies on white."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                if file.mode.startswith(DEEP):
                    raise ValueError(f"it has more than 8 bits a pixel (mode {file.mode}): convert it to 8")
                image = ImageOps.exif_transpose(file)  # reads it
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path} is no image that can be read: {error}") from None
    if side is not None and image.size != (side, side):
        scale = side / min(image.size)
        width, height = (max(side, round(scale * n)) for n in image.size)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    return np.asarray(image)
