"""The embedded data: real handwritten digits in six image domains, 16 x 16 RGB, made in a second from scikit-learn.

``sklearn.datasets.load_digits`` ships 1797 scans of 8 x 8 (E. Alpaydin and C. Kaynak, *Optical Recognition of
Handwritten Digits*, UCI 1998, CC BY 4.0). Every one of them is drawn exactly once, in one domain and one split, so no
handwriting is seen both in training and in testing, or by two clients. The digit's index seeds its image.

``python -m experiments.setup.digits PATH.png`` draws ten images of each domain.
"""

from __future__ import annotations

import colorsys
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from scipy import ndimage
from sklearn.datasets import load_digits

SIDE = 16
CANVAS = 2 * SIDE  # domains draw at twice the resolution; images are its 2 x 2 means
TEST_SHARE = 0.4

Draw = Callable[[np.ndarray, Generator], np.ndarray]  # digit [8, 8] in 0..1 -> canvas [32, 32, 3] in 0..1


def digits() -> dict[str, np.ndarray]:
    """All images in the arrays of the ``.npz`` contract (``x, y, domain, split, classes, domains``).

    ``source`` ``[N]`` is the index in ``load_digits`` of the digit an image was drawn from.
    """
    bunch: Any = load_digits()
    scans, y = bunch.images / 16.0, bunch.target.astype(np.int32)
    domain, split = assign(y)
    draws = list(DOMAINS.values())
    x = [draws[d](scan, np.random.default_rng([i, d])) for i, (scan, d) in enumerate(zip(scans, domain, strict=True))]
    return {
        "x": reduced(np.stack(x)),
        "y": y,
        "domain": domain,
        "split": split,
        "source": np.arange(len(y), dtype=np.int32),
        "classes": np.array([str(i) for i in range(10)]),
        "domains": np.array(list(DOMAINS)),
    }


def reduced(canvas: np.ndarray) -> np.ndarray:
    """Images ``[..., 16, 16, 3]`` of canvases: means of 2 x 2, in bytes."""
    means = canvas.reshape(*canvas.shape[:-3], SIDE, 2, SIDE, 2, 3).mean((-4, -2))
    return np.round(255 * np.clip(means, 0, 1)).astype(np.uint8)


def assign(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Domain and split (0 train, 1 test) of every digit, the same shares of each class in each."""
    rng = np.random.default_rng(0)
    domain, split = np.zeros(len(y), np.int32), np.zeros(len(y), np.int32)
    for label in np.unique(y):
        members = rng.permutation(np.flatnonzero(y == label))
        for d, part in enumerate(np.array_split(members, len(DOMAINS))):
            domain[part] = d
            split[part[: round(TEST_SHARE * len(part))]] = 1
    return domain, split


def ink(digit: np.ndarray, rng: Generator, turn: tuple[float, float] = (-3, 3)) -> np.ndarray:
    """A dark pen on paper of a warm white."""
    paper = np.array([0.96, 0.93, 0.85]) * rng.uniform(0.92, 1.0) + _grain(rng, 0.02)
    pen = np.array([[0.08, 0.10, 0.40], [0.10, 0.10, 0.12], [0.32, 0.10, 0.08]])[rng.integers(3)]
    return _paint(paper, pen, _crisp(_pose(digit, rng, turn)))


def two_colours(digit: np.ndarray, rng: Generator, hue: float) -> np.ndarray:
    """Paper of a hue and a pen of the opposite one, as light as it: only colour tells the shape."""
    paper = np.broadcast_to(_hue(hue, 0.75, 0.75), (CANVAS, CANVAS, 3)) + _grain(rng, 0.02)
    return _paint(paper, _hue(hue + 0.5, 0.75, 0.75), _crisp(_pose(digit, rng)))


def chalk(digit: np.ndarray, rng: Generator) -> np.ndarray:
    """Pale broken strokes on a dark board with wiped streaks."""
    wiped = ndimage.gaussian_filter(rng.normal(size=(CANVAS, CANVAS)), (1, 6))
    board = np.array([[0.13, 0.28, 0.22], [0.17, 0.19, 0.22]])[rng.integers(2)] + 0.3 * wiped[..., None]
    dust = ndimage.gaussian_filter(rng.random((CANVAS, CANVAS)), 0.8)
    broken = np.clip(0.75 + 3 * (dust - 0.5), 0.3, 1)
    stick = np.array([[0.95, 0.95, 0.92], [0.95, 0.88, 0.55], [0.95, 0.70, 0.72]])[rng.integers(3)]
    return _paint(board, stick, 0.9 * broken * _crisp(_pose(digit, rng)))


def outline(digit: np.ndarray, rng: Generator) -> np.ndarray:
    """Only the contour, in a felt pen on white; the body of the stroke stays empty."""
    body = _pose(digit, rng, height=(14, 14.5))
    contour = np.exp(-(((body - 0.4) / 0.23) ** 2))
    return _paint(np.full((CANVAS, CANVAS, 3), 0.97), _hue(rng.random(), 0.9, 0.35), contour)


def poster(digit: np.ndarray, rng: Generator) -> np.ndarray:
    """Two saturated inks of about the same lightness, one printed out of register, so that colour tells the shape."""
    hue = rng.choice([0.02, 0.14, 0.4, 0.62, 0.8])
    ground = np.broadcast_to(_hue(hue, 0.65, 0.75), (CANVAS, CANVAS, 3)) + _grain(rng, 0.02)
    body = _crisp(_pose(digit, rng))
    ghost = ndimage.shift(body, rng.uniform(-3, 3, 2), order=1)
    ground = _paint(ground, _hue(hue + 0.5, 0.5, 0.8), 0.4 * ghost)
    return _paint(ground, _hue(hue + rng.choice([0.35, 0.65]), 0.75, 0.7), body)


def photo(digit: np.ndarray, rng: Generator) -> np.ndarray:
    """A house number photographed in poor light: shadow, bars across the wall, blur and sensor noise."""
    row, column = np.mgrid[-1 : 1 : CANVAS * 1j, -1 : 1 : CANVAS * 1j]
    wall = np.broadcast_to(_hue(rng.random(), 0.35, rng.uniform(0.35, 0.6)), (CANVAS, CANVAS, 3))
    for _ in range(2):
        angle, offset = rng.uniform(0, np.pi), rng.uniform(0.5, 1.0) * rng.choice([-1, 1])
        bar = np.abs(np.cos(angle) * row + np.sin(angle) * column - offset) < rng.uniform(0.06, 0.16)
        wall = _paint(wall, rng.random(3), 0.8 * bar)
    sign = -1.0 if wall.mean() > 0.5 else 1.0
    scene = _paint(wall, np.clip(wall.mean() + sign * np.array([0.46, 0.44, 0.38]), 0, 1), _crisp(_pose(digit, rng)))
    angle = rng.uniform(0, 2 * np.pi)
    scene = scene * (0.85 + 0.3 * (np.cos(angle) * row + np.sin(angle) * column))[..., None]
    return ndimage.gaussian_filter(scene, (1.0, 1.0, 0)) + rng.normal(0, 0.06, scene.shape)


def blueprint(digit: np.ndarray, rng: Generator) -> np.ndarray:
    """White lines on blue squared paper, the sheet lying askew."""
    sheet = np.broadcast_to(np.array([0.10, 0.25, 0.60]), (CANVAS, CANVAS, 3)) + _grain(rng, 0.02)
    lines = np.zeros((CANVAS, CANVAS))
    lines[rng.integers(8) :: 8] = 1
    lines[:, rng.integers(8) :: 8] = 1
    sheet = _paint(sheet, np.array([0.55, 0.70, 0.95]), 0.6 * lines)
    return _paint(sheet, np.array([0.92, 0.95, 1.0]), _crisp(_pose(digit, rng, turn=(47, 53))))


DOMAINS: dict[str, Draw] = {d.__name__: d for d in (ink, chalk, outline, poster, photo, blueprint)}


def picture(path: str | Path) -> None:
    """Write a PNG: a row for each domain, one training image of each class."""
    from matplotlib.figure import Figure

    data = digits()
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.subplots(len(DOMAINS), 10)
    for d, name in enumerate(data["domains"]):
        for label in range(10):
            rows = np.flatnonzero((data["domain"] == d) & (data["y"] == label) & (data["split"] == 0))
            axis = axes[d, label]
            axis.imshow(data["x"][rows[0]], interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        axes[d, 0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=120)


def _pose(
    digit: np.ndarray, rng: Generator, turn: tuple[float, float] = (-3, 3), height: tuple[float, float] = (14, 15)
) -> np.ndarray:
    """The scan on a canvas, ``[32, 32]`` in 0..1: turned clockwise by degrees, ``height`` pixels of the final image."""
    angle, zoom = np.deg2rad(rng.uniform(*turn)), 8 / (CANVAS / SIDE * rng.uniform(*height))
    back = zoom * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = (CANVAS - 1) / 2 + rng.uniform(-0.5, 0.5, 2)
    offset: Any = 3.5 - back @ centre
    body = ndimage.affine_transform(digit, back, offset, (CANVAS, CANVAS), order=3, mode="grid-constant")
    return np.clip(body, 0, 1)


def _crisp(body: np.ndarray) -> np.ndarray:
    """The soft edges of an enlarged scan, steepened."""
    return np.clip(1.8 * (body - 0.5) + 0.6, 0, 1)


def _paint(ground: np.ndarray, colour: np.ndarray, cover: np.ndarray) -> np.ndarray:
    return ground + cover[..., None] * (colour - ground)


def _grain(rng: Generator, sigma: float) -> np.ndarray:
    return rng.normal(0, sigma, (CANVAS, CANVAS, 1))


def _hue(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value))


if __name__ == "__main__":
    picture(sys.argv[1] if len(sys.argv) > 1 else "docs/digits.png")
