"""How an image of any shape becomes a square one: what of it is kept, and with which filter.

``crop`` keeps the shape of what is in it: the shorter side is resized, and the middle is cut out; ``crop:0.875`` cuts
out that share of the resized side (timm's ``crop_pct``; 224 of 256). ``squash`` resizes both sides, whatever the shape.
Filters are Pillow's, which are antialiased, and ``bicubic_aliased``: what PyTorch makes of a tensor with
``antialias=False``, four pixels to each new one however many there are (a trap of published code).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from fedlora_jax.checks import refuse_outside

ALIASED = "bicubic_aliased"
FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    ALIASED: None,
}


class Resizing(NamedTuple):
    """To ``side`` pixels each way; ``share`` of the resized image is cut out of its middle."""

    side: int
    share: float = 1.0
    squash: bool = False
    filter: str = "bicubic"


def of(size: int | Resizing) -> Resizing:
    """A side alone: the shape kept, bicubic."""
    return Resizing(size) if isinstance(size, int) else size


def read(resize: str, resample: str, side: int) -> Resizing:
    """What the options say.

    Raises:
      ValueError: they say what is not known.
    """
    way, colon, number = resize.partition(":")
    try:
        share = float(number) if colon else 1.0
    except ValueError:
        share = math.nan
    if way not in ("crop", "squash") or math.isnan(share):
        raise ValueError(f"--resize must be crop, crop:SHARE, squash or squash:SHARE, got {resize}")
    refuse_outside("(0, 1]", **{f"--resize {way}": share})
    if resample not in FILTERS:
        raise ValueError(f"--resample must be {', '.join(FILTERS)}; got {resample}")
    return Resizing(side, share, way == "squash", resample)


def resized(image: Image.Image, size: int | Resizing) -> Image.Image:
    """The image, ``side x side``; as it is, where it has that size and nothing is cut off.

    The longer side is rounded; where it is said how to resize, down, as torchvision, timm and transformers do.
    """
    to = of(size)
    if image.size == (to.side, to.side) and to.share == 1:
        return image
    first = math.floor(to.side / to.share + 1e-6)
    if to.squash:
        return _middle(_filtered(image, first, first, to.filter), to.side, to.side)
    long = 4 * min(image.size)  # of what is much longer than wide only the middle is looked at
    image = _middle(image, min(image.width, long), min(image.height, long))
    short = min(image.size)
    scaled = (lambda n: round(first / short * n)) if isinstance(size, int) else (lambda n: first * n // short)
    width, height = (max(first, scaled(n)) for n in image.size)
    return _middle(_filtered(image, width, height, to.filter), to.side, to.side)


def _filtered(image: Image.Image, width: int, height: int, name: str) -> Image.Image:
    if name != ALIASED:
        return image.resize((width, height), FILTERS[name])
    x = np.asarray(image, np.float32)
    x = np.tensordot(_taps(x.shape[0], height), x, 1)
    x = np.tensordot(_taps(x.shape[1], width), x, (1, 1)).swapaxes(0, 1)
    return Image.fromarray(np.clip(np.round(x), 0, 255).astype(np.uint8))


def _taps(old: int, new: int) -> np.ndarray:
    """``[new, old]`` weights of PyTorch's cubic interpolation (Keys, 1981, a = -0.75); edges are repeated."""
    a, place = -0.75, (np.arange(new) + 0.5) * old / new - 0.5
    first, weights = np.floor(place).astype(int), np.zeros((new, old), np.float32)
    for tap in range(-1, 3):
        d = np.abs(place - first - tap)
        near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
        np.add.at(weights, (np.arange(new), np.clip(first + tap, 0, old - 1)), np.where(d <= 1, near, far))
    return weights


def _middle(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
