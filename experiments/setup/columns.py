"""What a source says of each image besides its class and domain: a writer, a hospital, its file. Read when asked for.

Columns of ``.npz`` files are their other arrays, those of TensorFlow Datasets and Hugging Face their features of one
number or text each; of every image that was decoded ``image`` is how it is called. ``--partition column:NAME`` makes a
client of each value: a natural partition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fedlora_jax import partition

PREFIX = "column:"
IMAGE = "image"  # what each decoded image is called
MISSING = ""  # a text that stands for none: such an image is nobody's
KEPT = "column/"  # begins the names of columns among the arrays of a source that is being decoded


class Columns(NamedTuple):
    """Columns of a source by name; ``read(name)`` gives one value for each of its images, in its order."""

    names: tuple[str, ...]
    read: Callable[[str], np.ndarray]


NONE = Columns((), lambda name: np.zeros(0))


def of(images: Any, name: str, asked: str = "") -> np.ndarray:
    """The values ``[N]`` of a column, of the images that are used. asked: which option asks, where not --partition.

    Raises:
      ValueError: there is no such column, or it has not one number or text for each image.
    """
    asked = asked or f"--partition {PREFIX}{name}"
    if name not in images.columns.names:
        has = ", ".join(own for own in images.columns.names if own != IMAGE) or "no columns"
        raise ValueError(f"{asked}: {images.name} has {has}: expected a column {name} of one value an image")
    values, rows = images.columns.read(name), np.arange(len(images.y)) if images.rows is None else images.rows
    if values.ndim != 1 or values.dtype.kind not in "iuUS" or len(values) <= rows.max():
        raise ValueError(
            f"{asked}: {name} of {images.name} is {values.dtype} {list(values.shape)}, expected one "
            "whole number or text for each image"
        )
    return values[rows]


def of_same(
    names: list, values: np.ndarray, parts: list, train: np.ndarray, test: np.ndarray, rng: np.random.Generator
):
    """Rows of each client's test images, and what is to be said of them.

    They are those of its own value. Of a client that has none they are, of each of its classes, a share of those that
    are no other client's; where nobody has any (as where writers are divided into training and testing), of all.

    Args:
      names: the value of each client.
      values: ``[n]`` of the test images.
      parts: rows of each client's training images.
      train, test: ``[n]`` a number per training and per test image that says what must be alike (its class).
    """
    own = [np.flatnonzero(values == name) for name in names]
    without = [i for i, rows in enumerate(own) if not len(rows)]
    if not without:
        return own, ""
    free = np.flatnonzero(~np.isin(values, names))
    for i, rows in zip(
        without, partition.matching_tests([parts[i] for i in without], train, test[free], rng), strict=True
    ):
        own[i] = free[rows]
    who, count = f"{len(without)} of {len(own)} clients have", sum(len(own[i]) for i in without)
    left = sum(not len(own[i]) for i in without)
    none = f"; {left} of them find none and are not scored on their own" * bool(left)
    return own, f"{who} no test images of their own: {count} of their classes that are nobody's are dealt to them{none}"


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
