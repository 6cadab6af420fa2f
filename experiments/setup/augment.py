"""Training images as they are varied in every local step, inside the compiled round; keys are those of the step.

A new way is one entry of ``WAYS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax.checks import refuse_outside

Batch = tuple[Array, Array]  # uint8 images [n, H, W, 3], labels [n] (mixed ones: shares of classes [n, classes])


class Way(NamedTuple):
    """``apply(key, batch, classes, number) -> batch``; what the number is, if it has one, and in which interval."""

    apply: Callable[[Array, Batch, int, float], Batch]
    number: str = ""
    inside: str = ""


def flip(key: Array, batch: Batch, classes: int, number: float) -> Batch:
    """Every image mirrored, left to right, with probability 1/2."""
    x, y = batch
    return jnp.where(jax.random.bernoulli(key, 0.5, (len(x), 1, 1, 1)), x[:, :, ::-1], x), y


def crop(key: Array, batch: Batch, classes: int, number: float) -> Batch:
    """Every image moved by up to so many pixels each way; black comes in (He et al., 2016, section 4.2)."""
    (x, y), pad = batch, int(number)
    wide = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    at = jax.random.randint(key, (len(x), 2), 0, 2 * pad + 1)
    window = lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), image_shape)
    image_shape = x.shape[1:]
    return jax.vmap(window)(wide, at), y


def boxes(key: Array, n: int, smallest: float) -> Array:
    """``[n, 4]``: top, left, height and width of a part of each image, of sides 1.

    Its share of the area is uniform from ``smallest`` to 1, its aspect ratio log-uniform from 3/4 to 4/3; what would
    reach out of the image ends there (Szegedy et al., 2015, arXiv 1409.4842, section 6).
    """
    area, ratio, top, left = jax.random.uniform(key, (4, n))
    area = smallest + (1 - smallest) * area
    ratio = jnp.exp((2 * ratio - 1) * math.log(4 / 3))
    height, width = (jnp.minimum(jnp.sqrt(x), 1) for x in (area / ratio, area * ratio))
    return jnp.stack([top * (1 - height), left * (1 - width), height, width], -1)


def resized_crop(key: Array, batch: Batch, classes: int, number: float) -> Batch:
    """A part of every image (``boxes``), at the size of the whole; linear, antialiased."""
    x, y = batch
    sides = jnp.array(x.shape[1:3])

    def one(image: Array, box: Array) -> Array:
        scale = 1 / box[2:]
        moved = jax.image.scale_and_translate(
            image.astype(jnp.float32), image.shape, (0, 1), scale, -box[:2] * scale * sides, "linear"
        )
        return as_bytes(moved)

    return jax.vmap(one)(x, boxes(key, len(x), number)), y


def mixup(key: Array, batch: Batch, classes: int, number: float) -> Batch:
    """Images and labels mixed with those of another of the batch, by one share from Beta(number, number) (Zhang et al.,
    2018, arXiv 1710.09412)."""
    x, y = batch
    of_share, of_order = jax.random.split(key)
    share, order = jax.random.beta(of_share, number, number), jax.random.permutation(of_order, len(x))
    shares = jax.nn.one_hot(y, classes) if y.ndim == 1 else y
    mixed = lambda a: share * a + (1 - share) * a[order]
    return as_bytes(mixed(x.astype(jnp.float32))), mixed(shares)


WAYS = {
    "flip": Way(flip),
    "crop": Way(crop, "PIXELS", "[1, 1000]"),
    "resized_crop": Way(resized_crop, "SMALLEST", "(0, 1]"),
    "mixup": Way(mixup, "ALPHA", "(0, 1000]"),
}


def augmentation(texts: Sequence[str]) -> Callable[[Array, Batch, int], Batch]:
    """``(key, batch, classes) -> batch``, one way after another.

    Raises:
      ValueError: a text is none of ``WAYS``, or its number none that it takes.
    """
    ways = [partial(_read(text), number=_number(text)) for text in texts]

    def vary(key: Array, batch: Batch, classes: int) -> Batch:
        for i, way in enumerate(ways):
            batch = way(jax.random.fold_in(key, i), batch, classes)
        return batch

    return vary


def as_bytes(x: Array) -> Array:
    return jnp.clip(jnp.round(x), 0, 255).astype(jnp.uint8)


def _read(text: str) -> Callable:
    name, colon, _ = text.partition(":")
    way = WAYS.get(name)
    if way is None or bool(colon) != bool(way.number):
        forms = ", ".join(name + (f":{way.number}" if way.number else "") for name, way in WAYS.items())
        raise ValueError(f"--augment must be of {forms}; got {text}")
    return way.apply


def _number(text: str) -> float:
    name, _, number = text.partition(":")
    if not WAYS[name].number:
        return 0.0
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    refuse_outside(WAYS[name].inside, **{f"--augment {name}": value})
    if WAYS[name].number == "PIXELS" and value % 1:
        raise ValueError(f"--augment {text}: expected a whole number of pixels")
    return value
