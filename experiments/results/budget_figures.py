"""The pictures of a budget experiment, from ``budget.json``; drawn as ``style.py`` says."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.results.budget_claims import GROUPS
from experiments.results.style import Styles, dress, legend, stroke, styles_of


def draw(result: dict[str, Any]) -> dict[str, Figure]:
    """All pictures by the name of their file."""
    abouts = {e["method"]: {"about": e["about"]} for e in result["entries"]}
    styles = styles_of({"methods": abouts})
    return {"budget": budget(styles, result), "steps": steps(styles, result), "cost": cost(styles, result)}


def budget(styles: Styles, result: dict[str, Any]) -> Figure:
    """Accuracy against the local steps of a round, each model used as validation says."""
    figure, panels = _panels("Accuracy for a budget of local steps", "local steps per round", result)
    for axes, group in panels:
        for name in styles:
            own = sorted((e for e in result["entries"] if e["method"] == name), key=lambda e: e["steps"])
            line(axes, styles, name, [e["steps"] for e in own], [e[group][str(e["tau"])] for e in own])
        _log(axes, sorted({e["steps"] for e in result["entries"]}))
    return legend(figure, styles, styles)


def steps(styles: Styles, result: dict[str, Any]) -> Figure:
    """Accuracy against the steps a client takes before it uses a model, of the second-largest budget that was run."""
    budgets = sorted({e["steps"] for e in result["entries"]})
    at = budgets[-2] if len(budgets) > 1 else budgets[0]
    title = f"From signature alone to ten steps (trained with {at} per round)"
    figure, panels = _panels(title, "local steps before use", result)
    for axes, group in panels:
        for name in styles:
            for e in (e for e in result["entries"] if e["method"] == name and e["steps"] == at):
                line(axes, styles, name, [0.5 if t == 0 else t for t in result["taus"]],
                      [e[group][str(t)] for t in result["taus"]])  # fmt: skip
        _log(axes, [0.5, *(t for t in result["taus"] if t)], ["0", *(str(t) for t in result["taus"] if t)])
    return legend(figure, styles, styles)


def cost(styles: Styles, result: dict[str, Any]) -> Figure:
    """Accuracy as sent against all that a client has computed until then, meta-training included."""
    figure = Figure((7.2, 4.3), 150, layout="constrained")
    x = "forward and backward passes per client so far\n(a line for each number of local steps per round)"
    axes = dress(figure.subplots(), "What accuracy costs, meta-training charged", x, "as sent, clients that train (%)")
    for name in styles:
        for e in (e for e in result["entries"] if e["method"] == name):
            mean = 100 * np.mean(e["personal_by_round"], 0)
            drawn = stroke(styles, name, len(mean)) | {"linewidth": 1.1, "marker": None}
            axes.plot(e["passes"] * np.array(e["rounds"]), mean, **drawn)
            axes.annotate(str(e["steps"]), (e["passes"] * e["rounds"][-1], mean[-1]), fontsize=7,
                          xytext=(2, 0),
                          color=styles[name].colour, textcoords="offset points", va="center")  # fmt: skip
    axes.set_xscale("log")
    return legend(figure, styles, styles)


def _panels(title: str, x: str, result: dict[str, Any]) -> tuple[Figure, list[tuple[Axes, str]]]:
    figure = Figure((7.2, 4.3), 150, layout="constrained")
    figure.suptitle(title, fontsize=12, weight="bold", x=0.015, ha="left")
    grid = figure.subplots(1, 2, sharey=True)
    for axes, name in zip(grid, GROUPS.values(), strict=True):
        dress(axes, "", x, "own test images, accuracy (%)" if axes is grid[0] else "")
        axes.set_title(name, loc="left", fontsize=10)
    return figure, list(zip(grid, GROUPS, strict=True))


def line(axes: Axes, styles: Styles, name: str, x: list[float], values: list[dict[str, Any]]) -> None:
    """Means, and intervals where there are any, cut at 0 and 100 %."""
    mean = [100 * v["mean"] for v in values]
    axes.plot(x, mean, **stroke(styles, name, len(x)))
    if all(v["ci95"] for v in values):
        low, high = zip(*(np.clip(np.multiply(100, v["ci95"]), 0, 100) for v in values), strict=True)
        axes.fill_between(x, low, high, color=styles[name].colour, alpha=0.1, linewidth=0)


def _log(axes: Axes, ticks: list[float], labels: list[str] | None = None) -> None:
    axes.set_xscale("log")
    axes.set_xticks(ticks, labels or [str(t) for t in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
