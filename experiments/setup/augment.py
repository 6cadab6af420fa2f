"""Training images as they are varied in every local step, inside the compiled round; keys are those of the step.

A new way is one entry of ``WAYS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from experiments.setup import operations
from fedlora_jax.checks import refuse_outside

Batch = tuple[Array, Array]  # uint8 images [n, H, W, 3], labels [n] (mixed ones: shares of classes [n, classes])


class Way(NamedTuple):
    """``apply(key, batch, classes, *numbers) -> batch``; what its numbers are, and the interval of each."""

    apply: Callable[..., Batch]
    numbers: tuple[tuple[str, str], ...] = ()


def flip(key: Array, batch: Batch, classes: int) -> Batch:
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


def cutmix(key: Array, batch: Batch, classes: int, number: float) -> Batch:
    """A box of every image from another of the batch, and labels mixed by its area: a share of Beta(number, number) of
    the image, anywhere, what reaches out cut off (Yun et al., 2019, arXiv 1905.04899); one box for a batch."""
    x, y = batch
    of_share, of_place, of_order = jax.random.split(key, 3)
    sides = jnp.array(x.shape[1:3])
    half = jnp.sqrt(jax.random.beta(of_share, number, number)) * sides / 2
    middle, order = jax.random.uniform(of_place, (2,)) * sides, jax.random.permutation(of_order, len(x))
    first, last = (jnp.clip(jnp.round(end), 0, sides) for end in (middle - half, middle + half))
    row, column = (jnp.arange(n) for n in x.shape[1:3])
    inside = lambda at, i: (at >= first[i]) & (at < last[i])
    box = inside(row, 0)[:, None] & inside(column, 1)
    shares = jax.nn.one_hot(y, classes) if y.ndim == 1 else y
    part = box.mean()
    return jnp.where(box[..., None], x[order], x), (1 - part) * shares + part * shares[order]


def jitter(key: Array, batch: Batch, classes: int, number: float) -> Batch:
    """Brightness, contrast and saturation of every image times a factor from 1 - number (not below 0) to 1 + number
    each, in random order: torchvision's ColorJitter."""
    x, y = batch
    changes = (operations.brightness, operations.contrast, operations.colour)

    def one(key: Array, image: Array) -> Array:
        of_order, of_factors = jax.random.split(key)
        factors = jax.random.uniform(of_factors, (3,), minval=max(0, 1 - number), maxval=1 + number)
        for i in jax.random.permutation(of_order, 3):
            image = jax.lax.switch(i, changes, image, factors[i])
        return image

    return jax.vmap(one)(jax.random.split(key, len(x)), x), y


def hue(key: Array, batch: Batch, classes: int, number: float) -> Batch:
    """The colours of every image turned by up to that share of the colour circle, either way (torchvision's hue)."""
    x, y = batch
    return jax.vmap(operations.hue)(x, jax.random.uniform(key, (len(x),), minval=-number, maxval=number)), y


def randaugment(key: Array, batch: Batch, classes: int, count: float, strength: float) -> Batch:
    """So many operations on every image, drawn from 14, each at strength / 10 of its range and either way (Cubuk et
    al., 2020, arXiv 1909.13719)."""
    x, y = batch

    def one(key: Array, image: Array) -> Array:
        for own in jax.random.split(key, int(count)):
            of_which, of_sign = jax.random.split(own)
            which = jax.random.randint(of_which, (), 0, len(operations.RANDAUGMENT))
            image = operations.randaugmented(image, which, strength / 10, jax.random.rademacher(of_sign, ()))
        return image

    return jax.vmap(one)(jax.random.split(key, len(x)), x), y


WAYS = {
    "flip": Way(flip),
    "crop": Way(crop, (("PIXELS", "[1, 1000]"),)),
    "resized_crop": Way(resized_crop, (("SMALLEST", "(0, 1]"),)),
    "jitter": Way(jitter, (("STRENGTH", "(0, 1]"),)),
    "hue": Way(hue, (("SHARE", "(0, 0.5]"),)),
    "randaugment": Way(randaugment, (("COUNT", "[1, 14]"), ("STRENGTH", "(0, 10]"))),
    "mixup": Way(mixup, (("ALPHA", "(0, 1000]"),)),
    "cutmix": Way(cutmix, (("ALPHA", "(0, 1000]"),)),
}
WHOLE = ("PIXELS", "COUNT")  # numbers that are


def augmentation(texts: Sequence[str]) -> Callable[[Array, Batch, int], Batch]:
    """``(key, batch, classes) -> batch``, one way after another.

    Raises:
      ValueError: a text is none of ``WAYS``, or its number none that it takes.
    """
    ways = [_read(text) for text in texts]

    def vary(key: Array, batch: Batch, classes: int) -> Batch:
        for i, (way, numbers) in enumerate(ways):
            batch = way.apply(jax.random.fold_in(key, i), batch, classes, *numbers)
        return batch

    return vary


def as_bytes(x: Array) -> Array:
    return jnp.clip(jnp.round(x), 0, 255).astype(jnp.uint8)


def _read(text: str) -> tuple[Way, list[float]]:
    name, *given = text.split(":")
    way = WAYS.get(name)
    if way is None or len(given) != len(way.numbers):
        forms = ", ".join(":".join((name, *(what for what, _ in way.numbers))) for name, way in WAYS.items())
        raise ValueError(f"--augment must be of {forms}; got {text}")
    return way, [_number(text, own, *about) for own, about in zip(given, way.numbers, strict=True)]


def _number(text: str, given: str, what: str, inside: str) -> float:
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    refuse_outside(inside, **{f"--augment {text}: {what}": value})
    if what in WHOLE and value % 1:
        raise ValueError(f"--augment {text}: {what} must be a whole number")
    return value
