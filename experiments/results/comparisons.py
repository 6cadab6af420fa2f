"""Figures that set methods against each other: paired differences, what accuracy costs, what servers have learned."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.results import metrics
from experiments.results.charts import Rows, over_rounds
from experiments.results.metrics import ERROR, TUNED
from experiments.results.style import GREY, TITLE, Styles, dress, legend, new, plain, stroke
from experiments.results.summary import also, measures, paired, window

PANELS = 9  # at most
EVERY = ("loss", "update", "factor_bias")  # what all rows have besides measures


def differences(styles: Styles, summary: dict[str, Any]) -> Figure | None:
    """Differences to the first method, paired by seed, with 95 % t-intervals: a forest plot; single seeds are faint."""
    entries, others = summary["methods"], list(styles)[1:]
    shown = metrics.columns(metrics.BARS, "{},\nlocal steps", also(summary["config"]))
    groups = [(title, paired(entries, key)) for key, title in shown.items()]
    groups = [(title, own) for title, own in groups if any(own[name]["mean"] is not None for name in others)]
    if not others or not groups:
        return None
    title = f"Differences to {plain(styles[next(iter(styles))].label, 36)}, paired by seed"
    figure, axes = new(
        title,
        f"percentage points, mean of {window(summary['config'])}",
        "",
        1.3 + len(groups) * (0.14 * len(others) + 0.16),
    )
    axes.axvline(0, color=GREY, linewidth=0.9)
    for g, (_, own) in enumerate(groups):
        for i, name in enumerate(others):
            if own[name]["mean"] is not None:
                _whisker(axes, styles, name, own[name], g + (i - (len(others) - 1) / 2) * 0.8 / len(others))
    axes.set_yticks(range(len(groups)), [label for label, _ in groups], fontsize=9)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    return legend(figure, styles, others)


def _whisker(axes: Axes, styles: Styles, name: str, difference: dict[str, Any], y: float) -> None:
    """A mean, its interval, and the seeds."""
    look, mean, seeds = styles[name], 100 * difference["mean"], 100 * np.array(difference["seeds"], float)
    if len(seeds) > 1:
        axes.scatter(seeds, np.full(len(seeds), y), 7, color=look.colour, alpha=0.35, linewidths=0)
    if difference["ci95"] is not None:
        low, high = 100 * np.array(difference["ci95"])
        axes.plot([low, high], [y, y], color=look.colour, linewidth=1.6, solid_capstyle="butt")
    axes.plot([mean], [y], color=look.colour, marker=look.marker, markersize=5, linestyle="")


def cost(styles: Styles, summary: dict[str, Any]) -> Figure | None:
    """Accuracies against traffic and, where they were timed, seconds; what nothing betters is joined by steps.

    Circles are global, filled symbols personal accuracies, mean over seeds.
    """
    entries, config = summary["methods"], summary["config"]
    traffic = {m: (e["bytes_up"]["total"] + e["bytes_down"]["total"]) / 2**20 for m, e in entries.items()}
    seconds = {m: config["rounds"] * e["seconds_per_round"] for m, e in entries.items() if e.get("seconds_per_round")}
    panels = {"sent and received, all clients (MiB)": traffic, "training, without compiling (s)": seconds}
    panels = {title: own for title, own in panels.items() if len(own) > 1 and len(set(own.values())) > 1}
    if not panels:
        return None
    figure = Figure((7.2, 4.0), 150, layout="constrained")
    figure.suptitle(f"What accuracy costs, mean of {window(config)}", **TITLE, x=0.015, ha="left")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, own) in zip(grid, panels.items(), strict=True):
        dress(axes, "", title, "accuracy (%)" if axes is grid[0] else "")
        for key, filled in (("global_accuracy", False), ("personal_accuracy", True)):
            points = {m: (x, 100 * entries[m][key]["last5"]["mean"]) for m, x in own.items()
                      if entries[m][key]["last5"]["mean"] is not None}  # fmt: skip
            for name, (x, y) in points.items():
                colour = styles[name].colour
                face = colour if filled else "none"
                axes.scatter(x, y, 34, marker=styles[name].marker, facecolor=face, edgecolor=colour)
            if points:
                ends = front(list(points.values()))
                axes.step(*zip(*ends, strict=True), where="post", color=GREY, linewidth=0.8, linestyle=(0, (2, 3)))
        if 0 < 6 * min(own.values()) < max(own.values()):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return legend(figure, styles, styles)


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points (cost, accuracy) those that no other is as cheap as and better, or cheaper and as good, cheapest
    first."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1])):
        if not found or y > found[-1][1]:
            found.append((x, y))
    return found


def learned(styles: Styles, rows: Rows) -> Figure | None:
    """What methods report of what their servers have learned, as gates and rates: a panel for each number."""
    known = {*measures((metrics.NOVEL, metrics.BACKDOOR)), *EVERY}
    own = lambda name, x: isinstance(x, float) and name not in known and not name.endswith((ERROR, ERROR + TUNED))
    names = sorted({name for row in rows for name, x in row.items() if own(name, x)})[:PANELS]
    if not names:
        return None
    down = -(-len(names) // 3)
    figure, drawn = Figure((7.2, 1.2 + 2.1 * down), 150, layout="constrained"), set()
    figure.suptitle("What servers have learned", **TITLE, x=0.015, ha="left")
    grid = figure.subplots(down, min(3, len(names)), squeeze=False).flatten()
    for axes, name in zip(grid, names, strict=False):
        dress(axes, "", "round", "")
        axes.set_title(plain(name, 30), loc="left", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        for method, (at, mean, low, high) in over_rounds(styles, rows, name, least=-np.inf).items():
            axes.plot(at, mean, **stroke(styles, method, len(mean)))
            axes.fill_between(at, low, high, color=styles[method].colour, alpha=0.13, linewidth=0)
            drawn.add(method)
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    return legend(figure, styles, [name for name in styles if name in drawn])
