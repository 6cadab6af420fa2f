"""One picture for each bench, in the style of a report's figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.bench.measure import Line
from experiments.results.style import DASHES, GREY, MARKERS, METHODS, dress, png


def draw(bench: str, lines: list[Line]) -> bytes:
    """The PNG of a bench's lines."""
    makers: dict[str, Callable[[list[Line]], Figure]] = {
        "scaling": _scaling,
        "memory": _memory,
        "profile": _profile,
        "server": _server,
        "compile": _compile,
    }
    return png(makers.get(bench, _rounds)(lines))


def _new(panels: int, height: float, title: str) -> tuple[Figure, list[Axes]]:
    figure = Figure((7.2, height), 150, layout="constrained")
    figure.suptitle(title, fontsize=12, weight="bold", x=0.015, ha="left")
    return figure, list(figure.subplots(panels, 1, squeeze=False)[:, 0])


def _rounds(lines: list[Line]) -> Figure:
    """Seconds of a round, a panel for each work; beside each bar its share of the machine's peak."""
    names = list(dict.fromkeys(line["work"] for line in lines))
    figure, grid = _new(len(names), 0.9 + 0.8 * len(names) + 0.3 * len(lines), "Seconds of one federated round")
    for axes, work in zip(grid, names, strict=True):
        own = [line for line in lines if line["work"] == work]
        seconds = [line["seconds_per_round"] or 0.0 for line in own]
        _bars(axes, [line["contender"] for line in own], {"": seconds}, f"{work}: seconds")
        for y, line in enumerate(own):
            axes.text(seconds[y], y, f"  {_said(line)}", va="center", fontsize=8, color=GREY)
        axes.set_xlim(0, 1.35 * max(seconds) or 1)
    return figure


def _said(line: Line) -> str:
    if line["seconds_per_round"] is None:
        return "did not run"
    share = line["peak_fraction"]
    return f"{line['seconds_per_round']:.3g} s" + ("" if share is None else f", {100 * share:.0f} % of peak")


def _scaling(lines: list[Line]) -> Figure:
    figure = Figure((7.2, 5.4), 150, layout="constrained")
    figure.suptitle("Seconds per client of one round", fontsize=12, weight="bold", x=0.015, ha="left")
    axis_names = list(dict.fromkeys(line["axis"] for line in lines))
    for i, axis in enumerate(axis_names):
        own = [line for line in lines if line["axis"] == axis]
        axes = dress(figure.add_subplot(2, -(-len(axis_names) // 2), i + 1), "", axis, "seconds per client")
        axes.plot([line[axis] for line in own], [line["seconds_per_client"] for line in own], "o-", color=METHODS[i])
        axes.set_ylim(0, 1.1 * max(line["seconds_per_client"] for line in own))
        _logarithmic(axes, [line[axis] for line in own])
    return figure


def _memory(lines: list[Line]) -> Figure:
    figure, (axes,) = _new(1, 4.0, "Memory against clients trained at once")
    dress(axes, "", "clients trained at once", "MiB")
    own = [line for line in lines if line["peak_memory_mb"] is not None]
    drawn = {"peak_memory_mb": "measured", "predicted_mb": "predicted", "idle_mb": "before the first round"}
    for i, (key, label) in enumerate(drawn.items()):
        values = [line[key] for line in own]
        axes.plot([line["chunk"] for line in own], values, MARKERS[i] + DASHES[i], color=METHODS[i], label=label)
    axes.set(ylim=(0, None))
    axes.legend(frameon=False, fontsize=9)
    return figure


def _profile(lines: list[Line]) -> Figure:
    parts, kinds = (list(dict.fromkeys(line[name] for line in lines)) for name in ("part", "kind"))
    found = {(line["part"], line["kind"]): line["seconds"] for line in lines}
    seconds = lines[0]["seconds_per_round"]
    figure, (axes,) = _new(1, 1.6 + 0.4 * len(parts), f"Where {seconds:.3g} s of a round of {lines[0]['work']} go")
    _bars(axes, parts, {kind: [found.get((part, kind), 0.0) for part in parts] for kind in kinds}, "seconds")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _server(lines: list[Line]) -> Figure:
    """Of the bare kernels; the lines beside a whole round are in ``bench.jsonl``."""
    own = [line for line in lines if line["share_of_round"] is None]
    figure, (axes,) = _new(1, 4.3, f"Seconds of the aggregation alone, {own[0]['work']}")
    dress(axes, "", "clients", "seconds")
    for i, name in enumerate(dict.fromkeys(line["method"] for line in own)):
        points = [(line["clients"], line["server_seconds"]) for line in own if line["method"] == name]
        style: dict[str, Any] = {"color": METHODS[i % 8], "marker": MARKERS[i % 8], "linestyle": DASHES[i // 8 % 4]}
        axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.set_yscale("log")
    _logarithmic(axes, [line["clients"] for line in own])
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _compile(lines: list[Line]) -> Figure:
    names = [line["method"] for line in lines]
    figure, (axes,) = _new(1, 1.6 + 0.4 * len(names), "Seconds until a method's round can run")
    stages = ("trace_seconds", "lower_seconds", "backend_seconds")
    _bars(axes, names, {stage.split("_")[0]: [line[stage] for line in lines] for stage in stages}, "seconds")
    cached = [line["cached_compile_seconds"] for line in lines]
    axes.plot(cached, range(len(names)), "k|", markersize=14, label="all, from a persistent cache")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _logarithmic(axes: Axes, values: list[int]) -> None:
    """A logarithmic axis that is labelled where something was measured."""
    axes.set_xscale("log")
    axes.set_xticks(sorted(set(values)), [f"{value}" for value in sorted(set(values))])
    axes.minorticks_off()


def _bars(axes: Axes, names: list[str], parts: dict[str, list[float]], x: str) -> None:
    """One bar for each name, of parts laid end to end."""
    dress(axes, "", x, "")
    left = np.zeros(len(names))
    for i, (label, values) in enumerate(parts.items()):
        axes.barh(range(len(names)), values, 0.7, left=left, color=METHODS[i], label=label)
        left = left + values
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
