"""Two kinds of pictures that several figures are: lines over rounds, and groups of bars; a method each."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.results.style import Styles, legend, new, stroke
from experiments.results.summary import spread

Rows = list[dict[str, Any]]
Lines = dict[str, np.ndarray]  # of each method [4, points]: x, mean over seeds, ends of the interval


def over_rounds(styles: Styles, rows: Rows, key: str, scale: float = 1.0, least: float = 0.0) -> Lines:
    """One measure of each method that has it, at the rounds where every seed has it; intervals end at ``least``."""
    lines = {}
    for name in styles:
        by_round: dict[int, list[float | None]] = {}
        for row in rows:
            if row["method"] == name and key in row:
                by_round.setdefault(row["round"], []).append(row[key])
        points = [(r, spread(by_round[r])) for r in sorted(by_round)]
        table = [(r, s["mean"], *(s["ci95"] or (s["mean"], s["mean"]))) for r, s in points if s["mean"] is not None]
        if table:
            lines[name] = np.array(table, float).T * [[1], [scale], [scale], [scale]]
            lines[name][2:] = np.clip(lines[name][2:], least, np.inf if scale == 1 else scale)  # an accuracy has ends
    return lines


def along_rounds(figure: Figure, lines: Lines) -> Figure:
    """The axis of rounds: whole numbers, and nothing beside the only one that was evaluated."""
    (axes,), at = figure.axes, np.concatenate([line[0] for line in lines.values()])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if at.min() == at.max():
        axes.set_xlim(at[0] - 0.5, at[0] + 0.5)
    return figure


def draw_lines(styles: Styles, lines: Lines, title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """Means over seeds as lines, intervals as bands (of a single point, as whiskers)."""
    figure, axes = new(title, x, y)
    for name, (at, mean, low, high) in lines.items():
        axes.plot(at, mean, **stroke(styles, name, len(mean)), gid=f"m{list(styles).index(name)}")
        band = {"color": styles[name].colour, "alpha": 0.13, "linewidth": 0, "gid": f"m{list(styles).index(name)}"}
        axes.fill_between(at, low, high, **band)
        if len(at) == 1 and low < high:
            axes.errorbar(at, mean, [mean - low, high - mean], color=styles[name].colour, elinewidth=0.9, capsize=3)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, 0), min(high, 100))
    return legend(figure, styles, lines), axes


def draw_bars(styles: Styles, groups: list[tuple[str, dict[str, Any]]], title: str, x: str) -> Figure | None:
    """Groups of bars, one for each method, from summaries over seeds; below each other, so that many stay legible."""
    groups = [(label, own) for label, own in groups if any(s["mean"] is not None for s in own.values())]
    if not groups:
        return None
    figure, axes = new(title, x, "", 1.2 + len(groups) * (0.16 * len(styles) + 0.14))
    thick = 0.16 / (0.16 + 0.14 / len(styles)) / len(styles)
    for i, (name, style) in enumerate(styles.items()):
        for g, (_, own) in enumerate(groups):
            if own[name]["mean"] is None:
                continue
            y, mean = g + (i - (len(styles) - 1) / 2) * thick, 100 * own[name]["mean"]
            axes.barh(y, mean, 0.88 * thick, color=style.colour, hatch=style.hatch, edgecolor="white", linewidth=0)
            if own[name]["ci95"] is not None:
                low, high = np.clip(np.multiply(100, own[name]["ci95"]), 0, 100)
                axes.errorbar(mean, y, xerr=[[mean - low], [high - mean]], color="black", elinewidth=0.9, capsize=2)
    axes.set_yticks(range(len(groups)), [label for label, _ in groups], fontsize=9)
    axes.set(xlim=(0, min(axes.get_xlim()[1], 100)), ylim=(len(groups) - 0.5, -0.5))
    axes.grid(axis="y", visible=False)
    return legend(figure, styles, styles, bars=True)
