"""What a source says of each image besides its class and domain: a writer, a hospital, its file. Read when asked for.

Columns of ``.npz`` files are their other arrays, those of TensorFlow Datasets and Hugging Face their features of one
number or text each; of every image that was decoded ``image`` is how it is called. ``--partition column:NAME`` makes a
client of each value: a natural partition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

PREFIX = "column:"
IMAGE = "image"  # what each decoded image is called
MISSING = ""  # a text that stands for none: such an image is nobody's
KEPT = "column/"  # begins the names of columns among the arrays of a source that is being decoded


class Columns(NamedTuple):
    """Columns of a source by name; ``read(name)`` gives one value for each of its images, in its order."""

    names: tuple[str, ...]
    read: Callable[[str], np.ndarray]


NONE = Columns((), lambda name: np.zeros(0))


def of(images: Any, name: str) -> np.ndarray:
    """The values ``[N]`` of a column, of the images that are used.

    Raises:
      ValueError: there is no such column, or it has not one number or text for each image.
    """
    if name not in images.columns.names:
        has = ", ".join(own for own in images.columns.names if own != IMAGE) or "no columns"
        raise ValueError(
            f"--partition {PREFIX}{name}: {images.name} has {has}: expected a column of one value an image"
        )
    values, rows = images.columns.read(name), np.arange(len(images.y)) if images.rows is None else images.rows
    if values.ndim != 1 or values.dtype.kind not in "iuUS" or len(values) <= rows.max():
        raise ValueError(
            f"--partition {PREFIX}{name}: {name} of {images.name} is {values.dtype} {list(values.shape)}, expected one "
            "whole number or text for each image"
        )
    return values[rows]


def natural(values: np.ndarray, clients: int, minimum: int, rng: np.random.Generator, text: str) -> tuple[list, list]:
    """Rows of as many clients, each all that has one of the ``values [n]``, drawn among those with enough; and which.

    What has no value (``MISSING``) is nobody's.

    Raises:
      ValueError: there are fewer such values.
    """
    names, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    enough = np.flatnonzero((counts >= minimum) & (names.astype(str) != MISSING))
    if len(enough) < clients:
        raise ValueError(
            f"--partition {text}: {len(enough)} of {len(names)} values have at least {minimum} training images, and "
            f"{clients} clients are asked for (--clients and --holdout-clients together): fewer of them, or a smaller "
            "--minimum"
        )
    chosen = rng.permutation(enough)[:clients]
    return [rng.permutation(np.flatnonzero(which == i)) for i in chosen], list(names[chosen])
