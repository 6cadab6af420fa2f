"""The picture of a sweep, from its ``summary.json``; drawn as ``style.py`` says."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.results.budget_figures import line
from experiments.results.style import dress, legend, styles_of
from experiments.results.summary import window

PANELS = {"global_accuracy": "global model", "personal_accuracy": "clients that train, as sent"}


def draw(result: dict[str, Any]) -> Figure:
    """Accuracy against the value that is varied, a line for each method and learning rate; or against the latter."""
    option, entries = result["option"], result["entries"]
    several = option is not None and len({e["lr"] for e in entries}) > 1
    lines: dict[str, list[dict[str, Any]]] = {}
    for e in entries:
        lines.setdefault(f"{e['method']}, lr {e['lr']:g}" if several else e["method"], []).append(e)
    named = lambda e: e["about"] | ({"name": f"{e['about']['name']}, lr {e['lr']:g}"} if several else {})
    styles = styles_of({"methods": {key: {"about": named(own[0])} for key, own in lines.items()}})
    figure = Figure((7.2, 4.3), 150, layout="constrained")
    what = option or "local learning rate"
    figure.suptitle(f"Accuracy against {what}", fontsize=12, weight="bold", x=0.015, ha="left")
    values = sorted({_value(e, option) for e in entries})
    places = _places(values)
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), PANELS.items(), strict=True):
        dress(axes, "", what, f"accuracy, {window(result['config'])} (%)" if key == "global_accuracy" else "")
        axes.set_title(title, loc="left", fontsize=10)
        for name, own in lines.items():
            known = sorted((e for e in own if not e["diverged"]), key=lambda e: _value(e, option))
            if known:
                line(axes, styles, name, [places[_value(e, option)] for e in known], [e[key]["last5"] for e in known])
        _ticks(axes, places)
    return legend(figure, styles, styles)


def _value(entry: dict[str, Any], option: str | None) -> float:
    return entry["value"] if option else entry["lr"]


def _places(values: list[float]) -> dict[float, float]:
    """Where each value is drawn: a 0 has a place below the smallest of values that span a logarithmic axis."""
    above = [v for v in values if v > 0]
    if values[0] == 0 and _logarithmic(above):
        return {v: v or above[0] ** 2 / above[1] for v in values}
    return dict(zip(values, values, strict=True))


def _logarithmic(values: list[float]) -> bool:
    return len(values) > 1 and values[0] > 0 and values[-1] >= 4 * values[0]


def _ticks(axes: Axes, places: dict[float, float]) -> None:
    if _logarithmic(list(places.values())):
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    if len(places) <= 8:
        axes.set_xticks(list(places.values()), [f"{v:g}" for v in places])
