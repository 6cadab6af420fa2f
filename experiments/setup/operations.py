"""What is done to one image, uint8 ``[H, W, 3]``: colours and places, as Pillow does them.

Colours agree with it to one grey level; turned and sheared, less than one pixel in a hundred may differ.

The names are those of RandAugment's operations (Cubuk et al., 2020, arXiv 1909.13719), which are Pillow's; factors of
brightness, contrast and saturation mean what they mean in torchvision. Everything can be traced and vmapped.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def blended(other: Array, image: Array, factor: Array | float) -> Array:
    """``other + factor (image - other)``, cut off at 0 and 255 and down to whole numbers."""
    other = other.astype(jnp.float32)
    return jnp.clip(other + factor * (image.astype(jnp.float32) - other), 0, 255).astype(jnp.uint8)


def grey(image: Array) -> Array:
    """``[H, W, 1]``, by the weights of ITU-R 601."""
    weights = jnp.array([19595, 38470, 7471])
    return ((image.astype(jnp.int32) * weights).sum(-1, keepdims=True) + 0x8000) >> 16


def brightness(image: Array, factor: Array | float) -> Array:
    """0: black; 1: as it is."""
    return blended(jnp.zeros_like(image), image, factor)


def contrast(image: Array, factor: Array | float) -> Array:
    """0: its mean grey; 1: as it is."""
    mean = jnp.floor(grey(image).astype(jnp.float32).mean() + 0.5)
    return blended(jnp.full_like(image, mean), image, factor)


def colour(image: Array, factor: Array | float) -> Array:
    """0: grey; 1: as it is. Torchvision's saturation."""
    return blended(jnp.broadcast_to(grey(image), image.shape), image, factor)


def sharpness(image: Array, factor: Array | float) -> Array:
    """0: smoothed by a window of 3 x 3, but for the edges; 1: as it is."""
    x = image.astype(jnp.float32)
    rows, columns = image.shape[0] - 2, image.shape[1] - 2
    around = sum(x[i : i + rows, j : j + columns] for i in range(3) for j in range(3))
    inner = jnp.floor((around + 4 * x[1:-1, 1:-1]) / 13 + 0.5).astype(jnp.uint8)
    return blended(image.at[1:-1, 1:-1].set(inner), image, factor)


def hue(image: Array, turn: Array | float) -> Array:
    """The colour circle turned by that share of it; value and saturation stay (Smith, 1978)."""
    x = image.astype(jnp.float32) / 255
    most, least = x.max(-1), x.min(-1)
    wide = jnp.where(most > least, most - least, 1)
    r, g, b = ((most - x[..., i]) / wide for i in range(3))
    place = jnp.where(
        x[..., 0] == most, b - g, jnp.where(x[..., 1] == most, 2 + r - b, 4 + g - r)
    )  # in sixths of the circle
    place = jnp.where(most > least, (place / 6 + turn) % 1, 0) * 6
    sixth = jnp.floor(place)
    rest, s = place - sixth, jnp.where(most > 0, (most - least) / jnp.where(most > 0, most, 1), 0)
    p, q, t = most * (1 - s), most * (1 - s * rest), most * (1 - s * (1 - rest))
    choices = [(most, t, p), (q, most, p), (p, most, t), (p, q, most), (t, p, most), (most, p, q)]
    of = sixth.astype(jnp.int32) % 6
    turned = jnp.stack([jnp.choose(of, [c[i] for c in choices], mode="clip") for i in range(3)], -1)
    return jnp.round(255 * turned).astype(jnp.uint8)


def autocontrast(image: Array) -> Array:
    """Each channel stretched from 0 to 255."""
    x = image.astype(jnp.float32)
    least, most = x.min((0, 1)), x.max((0, 1))
    scale = 255 / jnp.where(most > least, most - least, 1)
    stretched = jnp.clip(jnp.floor(x * scale - least * scale + 1e-3), 0, 255)  # 1e-3: rounding of what is whole
    return jnp.where(most > least, stretched, x).astype(jnp.uint8)


def equalize(image: Array) -> Array:
    """Each channel's values spread so that all are about as frequent."""

    def channel(x: Array) -> Array:
        counts = jnp.zeros(256, jnp.int32).at[x].add(1)
        step = (x.size - counts[x.max()]) // 255
        before = jnp.cumsum(counts) - counts
        table = jnp.clip((step // 2 + before) // jnp.maximum(step, 1), 0, 255)
        return jnp.where(step > 0, table[x], x).astype(jnp.uint8)

    return jnp.stack([channel(image[..., i]) for i in range(3)], -1)


def solarize(image: Array, threshold: Array | float) -> Array:
    """What is not below the threshold is inverted."""
    return jnp.where(image < threshold, image, 255 - image)


def posterize(image: Array, bits: Array | int) -> Array:
    """The highest bits of each value alone."""
    low = 8 - jnp.asarray(bits, jnp.uint8)
    return (image >> low) << low


def affine(image: Array, matrix: Array) -> Array:
    """At ``(x, y)``, in pixels from the upper left corner, the pixel at ``(a x + b y + c, d x + e y + f)``; black where
    there is none. ``matrix``: the six numbers."""
    height, width = image.shape[:2]
    y, x = (axis + 0.5 for axis in jnp.mgrid[:height, :width])
    a, b, c, d, e, f = matrix
    u, v = (jnp.floor(place).astype(jnp.int32) for place in (a * x + b * y + c, d * x + e * y + f))
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    moved = image[jnp.clip(v, 0, height - 1), jnp.clip(u, 0, width - 1)]
    return jnp.where(inside[..., None], moved, 0).astype(jnp.uint8)


def turned(degrees: Array | float, height: int, width: int) -> Array:
    """The matrix that turns an image about its middle, against the clock."""
    angle = jnp.deg2rad(degrees)
    sin, cos, x, y = jnp.sin(angle), jnp.cos(angle), width / 2, height / 2
    return jnp.stack([cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y])


NOWHERE = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)  # the matrix that leaves an image where it is
MOVES = 6  # the first of ``RANDAUGMENT`` are of places
RANDAUGMENT = (
    *("identity", "rotate", "shear_x", "shear_y", "translate_x", "translate_y"),
    *("autocontrast", "equalize", "solarize", "posterize", "colour", "contrast", "brightness", "sharpness"),
)


def randaugmented(image: Array, which: Array | int, strength: Array | float, sign: Array | float) -> Array:
    """Operation ``which`` of ``RANDAUGMENT``.

    Args:
      image: uint8 ``[H, W, 3]``.
      strength: from 0 to 1, which is 30 degrees, a shear of 0.3, 150/331 of a side, a threshold of 0, 4 bits, and a
        factor of 0.1 or 1.9.
      sign: 1 or -1: the way that it goes, where there are two.
    """
    height, width = image.shape[:2]
    m, far = strength * sign, 150 / 331 * strength * sign
    matrices = jnp.stack(
        [
            jnp.array(NOWHERE),
            turned(30 * m, height, width),
            jnp.array(NOWHERE).at[1].set(0.3 * m),
            jnp.array(NOWHERE).at[3].set(0.3 * m),
            jnp.array(NOWHERE).at[2].set(jnp.trunc(far * width)),
            jnp.array(NOWHERE).at[5].set(jnp.trunc(far * height)),
        ]
    )
    moved = affine(image, matrices[jnp.where(which < MOVES, which, 0)])
    of_colour = [
        lambda x: x,
        autocontrast,
        equalize,
        lambda x: solarize(x, 255 * (1 - strength)),
        lambda x: posterize(x, 8 - jnp.round(4 * strength).astype(jnp.uint8)),
        lambda x: colour(x, 1 + 0.9 * m),
        lambda x: contrast(x, 1 + 0.9 * m),
        lambda x: brightness(x, 1 + 0.9 * m),
        lambda x: sharpness(x, 1 + 0.9 * m),
    ]
    return jax.lax.switch(jnp.maximum(which - MOVES + 1, 0), of_colour, moved)
