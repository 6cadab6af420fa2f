"""Reading the images that a part of a run sees, while the part before computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from experiments.setup import on_disk


def gathered(data: tuple[Any, Any], rows: Any, most: int) -> tuple[Any, np.ndarray]:
    """What lies at these rows of ``x, y``, once each, padded to ``most``, and at which place of it each of all rows is.

    ``()`` where ``most`` is 0. The place of what is not there is 0.
    """
    x, y = data
    places = np.zeros(len(y), np.int32)
    if not most:
        return (), places
    found = np.unique(np.concatenate([np.ravel(part) for part in jax.tree.leaves(rows)]))
    places[found] = np.arange(len(found))
    images, labels = on_disk.buffer((most, *x.shape[1:]), x.dtype), np.zeros(most, y.dtype)
    on_disk.read(x, found, images[: len(found)])
    labels[: len(found)] = y[found]
    return (images, labels), places


def ahead(makers: Iterable[Callable[[], Any]]) -> Iterator[Any]:
    """What each of them makes, in a thread, while the one before is used."""
    with ThreadPoolExecutor(1, "images") as pool:
        made = deque()
        for make in makers:
            made.append(pool.submit(make))
            if len(made) > 1:
                yield made.popleft().result()
        yield from (last.result() for last in made)
