"""``digits:KIND``: hundreds of clients made of the embedded digits, who differ in more than their labels.

    digits:domain     one of six image domains each, classes alike
    digits:rotation   an angle each, anywhere on the circle, classes alike
    digits:hue        a hue of the paper each, and of the pen across the circle of colours from it, classes alike
    digits:contrast   a contrast each, from a negative (-1) through nothing to see (0) to a print (1), classes alike
    digits:blur       a blur each, from none to three pixels of the canvas, classes alike
    digits:concept    one of four ways to name the same images each (three pairs of classes are swapped), classes alike
    digits:mixed      one of six image domains each, shares of classes from Dirichlet(0.5)

Every client has images drawn for it alone, from scans that it shares with others: training images from scans for
training, test images from others. So clients are many and each knows little, as where amortisation could pay, but
handwriting is not its own. Columns: ``client``, ``group`` (domain, way of naming, or which eighth of the circle or
range: what an oracle would know) and ``source`` (the scan). ``--partition column:client`` makes them the clients of a
run.

``python -m experiments.setup.digit_clients PATH.png`` draws some of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from scipy import ndimage
from sklearn.datasets import load_digits

from experiments.setup.columns import Columns
from experiments.setup.digits import DOMAINS, Draw, assign, ink, reduced, two_colours

PREFIX = "digits:"
CLIENTS, TRAIN, TEST = 300, 30, 20  # clients, and images of each
CLASSES, EIGHTHS, NAMINGS = 10, 8, 4
BLUR = 3.0  # deviation of the widest, in pixels of the canvas


class Client(NamedTuple):
    """How one client sees digits."""

    group: int
    draw: Draw
    names: np.ndarray  # [10] what it calls each of them
    shares: np.ndarray | None = None  # [10] of its classes; None: all alike


def _domain(number: int, rng: Generator) -> Client:
    group = number % len(DOMAINS)
    return Client(group, list(DOMAINS.values())[group], np.arange(CLASSES))


def _rotation(number: int, rng: Generator) -> Client:
    angle = rng.uniform(0, 360)
    return Client(int(angle * EIGHTHS / 360), partial(ink, turn=(angle - 3, angle + 3)), np.arange(CLASSES))


def _hue(number: int, rng: Generator) -> Client:
    turn = rng.uniform()
    return Client(int(turn * EIGHTHS), partial(two_colours, hue=turn), np.arange(CLASSES))


def _contrast(number: int, rng: Generator) -> Client:
    contrast = rng.uniform(-1, 1)
    draw = lambda digit, rng: 0.5 + contrast * (ink(digit, rng) - 0.5)
    return Client(int((1 + contrast) / 2 * EIGHTHS), draw, np.arange(CLASSES))


def _blur(number: int, rng: Generator) -> Client:
    width = rng.uniform()
    draw = lambda digit, rng: ndimage.gaussian_filter(ink(digit, rng), (BLUR * width, BLUR * width, 0))
    return Client(int(width * EIGHTHS), draw, np.arange(CLASSES))


def _concept(number: int, rng: Generator) -> Client:
    group, names = number % NAMINGS, np.arange(CLASSES)
    if group:
        pairs = np.random.default_rng(group).permutation(CLASSES)[:6].reshape(3, 2)
        names[pairs] = pairs[:, ::-1]
    return Client(group, ink, names)


def _mixed(number: int, rng: Generator) -> Client:
    return _domain(number, rng)._replace(shares=rng.dirichlet(np.full(CLASSES, 0.5)))


KINDS: dict[str, Callable[[int, Generator], Client]] = {
    "domain": _domain,
    "rotation": _rotation,
    "hue": _hue,
    "contrast": _contrast,
    "blur": _blur,
    "concept": _concept,
    "mixed": _mixed,
}


def read(source: str, clients: int = CLIENTS) -> dict[str, Any]:
    """The arrays of the ``.npz`` contract, and columns.

    Raises:
      ValueError: there is no such kind.
    """
    kind = source.removeprefix(PREFIX)
    if kind not in KINDS:
        raise ValueError(f"no digits {kind!r}: expected {', '.join(PREFIX + name for name in KINDS)}, or digits")
    bunch: Any = load_digits()
    scans, labels = bunch.images / 16.0, bunch.target
    split = assign(labels)[1]
    rows: list[tuple[int, ...]] = []  # label, split, client, group, scan
    x = np.empty((clients * (TRAIN + TEST), 16, 16, 3), np.uint8)
    for number in range(clients):
        rng = np.random.default_rng([number, 22])
        own = KINDS[kind](number, rng)
        for part, count in enumerate((TRAIN, TEST)):
            for digit in _drawn(own, count, rng):
                scan = rng.choice(np.flatnonzero((labels == digit) & (split == part)))
                x[len(rows)] = reduced(own.draw(scans[scan], rng))
                rows.append((int(own.names[digit]), part, number, own.group, int(scan)))
    y, parts, *others = np.array(rows, np.int32).T
    columns: dict[str, np.ndarray] = dict(zip(("client", "group", "source"), others, strict=True))
    return {
        "x": x,
        "y": y,
        "split": parts,
        "classes": np.array([str(i) for i in range(CLASSES)]),
        "columns": Columns(tuple(columns), columns.__getitem__),
    }


def _drawn(own: Client, count: int, rng: Generator) -> np.ndarray:
    """Which digits, ``[count]``."""
    if own.shares is not None:
        return rng.choice(CLASSES, count, p=own.shares)
    return rng.permutation(np.resize(rng.permutation(CLASSES), count))


def picture(path: str | Path) -> None:
    """Write a PNG: for each kind a row of images of one digit, each of another client, with what it calls it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.2), layout="constrained")
    axes = figure.subplots(len(KINDS), 12)
    for row, kind in zip(axes, KINDS, strict=True):
        data = read(PREFIX + kind, clients=24)
        scans, client = data["columns"].read("source"), data["columns"].read("client")
        four = load_digits(return_X_y=True)[1][scans] == 4
        firsts = [rows[0] for c in range(24) if len(rows := np.flatnonzero(four & (client == c)))]
        for axis, i in zip(row, firsts, strict=False):
            axis.imshow(data["x"][i], interpolation="nearest")
            axis.set_title(f"“{data['y'][i]}”", fontsize=8, pad=2)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(kind, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    picture(sys.argv[1] if len(sys.argv) > 1 else "docs/digit_clients.png")
