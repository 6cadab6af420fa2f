"""Clients in a plane: from the distances of their models' subspaces to positions, clusters and a picture."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments.results.style import MARKERS, TITLE, Styles, below, colours, plain
from fedlora_jax import clustering

MOST = 9  # clusters that a picture can still tell distances
CLIENTS = 500  # for which a map is drawn at most: it takes the square of their number, and eigenvectors the cube


def is_drawn(clients: int) -> bool:
    return clients <= CLIENTS


def positions(distances: np.ndarray) -> np.ndarray:
    """``[N, 2]`` points whose distances are as near to ``distances [N, N]`` as a plane allows: classical scaling.

    Source: Torgerson, *Multidimensional scaling: I*, Psychometrika 1952.
    """
    square = np.asarray(distances, np.float64) ** 2
    centred = square - square.mean(0) - square.mean(1)[:, None] + square.mean()
    values, vectors = np.linalg.eigh(-centred / 2)  # ascending
    points = (vectors * np.sqrt(np.maximum(values, 0)))[:, :-3:-1]
    return np.pad(points, ((0, 0), (0, 2 - points.shape[1])))  # one client alone has no second direction


def clusters(distances: np.ndarray) -> np.ndarray:
    """``[N]`` what spectral clustering makes of the distances, as HiLoRA does; the largest cluster is 0."""
    labels = np.asarray(_spectral(jnp.asarray(distances, jnp.float32)))
    found, sizes = np.unique(labels, return_counts=True)
    order = found[np.argsort(-sizes, kind="stable")]
    return np.argmax(labels[:, None] == order, axis=1)


@jax.jit
def _spectral(distances: Array) -> Array:
    everybody = jnp.ones(len(distances), bool)
    return clustering.spectral(jax.random.key(0), distances, everybody, 2, MOST).assignment


def picture(styles: Styles, rows: list[dict[str, Any]], holdings: dict[str, Any]) -> Figure | None:
    """Every client of the first seed as a point, the nearer the more alike their models' subspaces after local steps.

    The colour says what most of its images are (a domain, where there are several; a class or a superclass, where
    there are not), the shape its cluster; clients that never train are hollow.
    """
    last = {row["method"]: row for row in rows if row["seed"] == holdings["seed"] and "client_positions" in row}
    shown = [name for name in styles if name in last]
    counts = np.asarray(holdings["counts"])  # [clients, domains, classes]
    if not shown or not counts.sum():
        return None
    kinds, names = _kinds(counts, holdings)
    own = colours(len(names))
    across = min(3, len(shown))
    down = -(-len(shown) // across)
    figure = Figure((7.2, 1.3 + 2.3 * down), 150, layout="constrained")
    figure.suptitle("Clients by the subspaces of their models", **TITLE, x=0.015, ha="left")
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, name in zip(grid.flat, shown, strict=False):
        axes.set_title(styles[name].label, loc="left", fontsize=9)
        axes.set(xticks=[], yticks=[])
        axes.margins(0.1)
        axes.spines[:].set_color("#dddddd")
        places, groups = last[name]["client_positions"], last[name]["client_clusters"]
        for i, (x, y), cluster in zip(holdings["scored"], places, groups, strict=True):
            face = own[kinds[i]] if i < holdings["training"] else "none"
            axes.scatter(x, y, 26, facecolor=face, edgecolor=own[kinds[i]], marker=MARKERS[cluster % len(MARKERS)])
    present = sorted(set(kinds.tolist()))
    return below(figure, [Patch(color=own[j], label=plain(names[j])) for j in present])


def _kinds(counts: np.ndarray, holdings: dict[str, Any]) -> tuple[np.ndarray, list[str]]:
    """What most images of each client are, ``[clients]``, and what the kinds are called."""
    if counts.shape[1] > 1:
        return counts.sum(2).argmax(1), holdings["domains"]
    by_class, above = counts.sum(1), holdings.get("superclasses")
    if above is None:
        return by_class.argmax(1), holdings["classes"]
    groups = np.eye(max(above) + 1, dtype=int)[above]  # [classes, superclasses]
    first = [holdings["classes"][above.index(j)] for j in range(groups.shape[1])]
    return (by_class @ groups).argmax(1), [f"{name} ..." for name in first]
