"""The figures of a report.

Each function returns a ``Figure``, or ``None`` where the run has no data for it. Lines and bars are means over seeds,
bands and whiskers 95 % t-intervals (none with one seed), cut at 0 and 100 %; accuracies are in per cent.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments.results import client_map, comparisons, metrics
from experiments.results.charts import Rows, along_rounds, draw_bars, draw_lines, over_rounds
from experiments.results.style import (
    FAINT,
    GREY,
    TITLE,
    Styles,
    below,
    colours,
    dress,
    legend,
    new,
    note,
    plain,
    stroke,
    styles_of,
)
from experiments.results.summary import also, averages, window

ROUNDING = 1e-4  # a bias share below this is float32 rounding


def draw(summary: dict[str, Any], rows: Rows, holdings: dict[str, Any]) -> dict[str, Figure]:
    """All figures for which there are data, by the name of their file."""
    styles = styles_of(summary)
    figures = {
        "curves": curves(styles, rows, summary["config"].get("target")),
        "differences": comparisons.differences(styles, summary),
        "accuracies": accuracies(styles, summary),
        "domains": domains(styles, summary),
        "clients": clients(styles, rows),
        "cost": comparisons.cost(styles, summary),
        "traffic": traffic(styles, rows),
        "bias": bias({name: x for name, x in styles.items() if averages(summary["methods"][name])}, rows),
        "learned": comparisons.learned(styles, rows),
        "map": client_map.picture(styles, rows, holdings),
        "holdings": held(holdings),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def curves(styles: Styles, rows: Rows, target: float | None = None) -> Figure | None:
    """Global accuracy against round."""
    if not (lines := over_rounds(styles, rows, "global_accuracy", 100)):
        return None
    figure, axes = draw_lines(styles, lines, "Global accuracy after each round", "round", "global accuracy (%)")
    if target is not None and axes.get_ylim()[1] > 100 * target:
        axes.axhline(100 * target, color=GREY, linewidth=0.9, linestyle=(0, (2, 3)), zorder=1)
        note(axes, f"target {100 * target:g} %", 0.01, 100 * target, ha="left", va="bottom")
    return along_rounds(figure, lines)


def traffic(styles: Styles, rows: Rows) -> Figure | None:
    """Global accuracy against all that the clients of one seed have sent and received until then."""
    if not (lines := over_rounds(styles, rows, "global_accuracy", 100)):
        return None
    for name, line in lines.items():
        line[0] = _moved(rows, name)[line[0].astype(int) - 1]
    x = "sent and received so far, all clients of one seed (MiB)"
    figure, axes = draw_lines(styles, lines, "Global accuracy for the traffic it took", x, "global accuracy (%)")
    ends = [line[0, -1] for line in lines.values()]
    if 0 < 6 * min(ends) < max(ends):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return figure


def bias(styles: Styles, rows: Rows) -> Figure | None:
    """The server's error of aggregation against round; logarithmic where methods differ by orders of magnitude."""
    if not (lines := over_rounds(styles, rows, "bias_share")):
        return None
    every, named = np.concatenate([line[1] for line in lines.values()]), dict(styles)
    top, logarithmic = every.max(), every.max() > 30 * every.min()
    floor = 10 ** np.floor(np.log10(every[every > 0].min()) - 0.5) if logarithmic else 0.0
    if logarithmic and every.min() < ROUNDING:
        floor = min(floor, ROUNDING / 10)  # where a line of zeros is drawn; single ones have no place on the axis
    for name, line in lines.items():
        zero = line[1].max() == 0
        suffix = " (exactly 0)" if zero else " (to rounding)" if line[1].max() < ROUNDING else ""
        named[name] = styles[name]._replace(label=styles[name].label + suffix)
        if logarithmic:  # an interval that reaches 0 has none either
            line[1] = np.where(line[1] > 0, line[1], floor if zero else np.nan)
            line[2:, line[2] <= floor] = np.nan
    title, y = "What the server misses of the mean of its clients", "bias, as a share of the mean update"
    figure, axes = draw_lines(named, lines, title, "round", y)
    axes.set_ylim(floor / 1.5, 3 * max(top, ROUNDING) if logarithmic else 1.15 * top or 1)
    if logarithmic:
        axes.set_yscale("log")
    if logarithmic and every.min() < ROUNDING:
        axes.axhspan(floor / 1.5, ROUNDING, color=FAINT, zorder=0)
        note(axes, "no more than float32 rounding", 0.99, 0.8 * ROUNDING, ha="right", va="top")
    return along_rounds(figure, lines)


def accuracies(styles: Styles, summary: dict[str, Any]) -> Figure | None:
    """Those of ``metrics.py`` that are drawn, before and after local steps."""
    shown = metrics.columns(metrics.BARS, "{},\nlocal steps", also(summary["config"]))
    groups = [(title, {m: e[key]["last5"] for m, e in summary["methods"].items()}) for key, title in shown.items()]
    return draw_bars(styles, groups, f"Accuracies, mean of {window(summary['config'])}", "accuracy (%)")


def domains(styles: Styles, summary: dict[str, Any]) -> Figure | None:
    """The global model on each domain; ``None`` with a single one."""
    methods = summary["methods"]
    names = list(next(iter(methods.values()))["per_domain"])
    groups = [(plain(d, 16), {m: e["per_domain"][d]["last5"] for m, e in methods.items()}) for d in names]
    title = f"Global model on each domain, mean of {window(summary['config'])}"
    return draw_bars(styles, groups, title, "accuracy (%)") if len(names) > 1 else None


def clients(styles: Styles, rows: Rows) -> Figure | None:
    """Sorted accuracies of the training clients after the final round, all seeds together."""
    panels = {"as dispatched": "client_accuracies", "after local steps": "client_accuracies_tuned"}
    values = {title: {name: _final(rows, name, key) for name in styles} for title, key in panels.items()}
    values = {title: own for title, own in values.items() if any(map(len, own.values()))}
    if not values:
        return None
    figure = Figure((7.2, 4.3), 150, layout="constrained")
    figure.suptitle("Accuracy of each training client after the final round", **TITLE, x=0.015, ha="left")
    grid = figure.subplots(1, len(values), sharey=True, squeeze=False)[0]
    for axes, (title, own) in zip(grid, values.items(), strict=True):
        dress(axes, "", "clients of all seeds, worst to best (%)", "accuracy (%)" if axes is grid[0] else "")
        axes.set_title(title, loc="left", fontsize=10)
        axes.axvspan(0, 10, color=FAINT, zorder=0)
        axes.text(5, 101, "worst\n10 %", ha="center", va="top", fontsize=7, color=GREY)
        for name, accuracy in own.items():
            x = 100 * (np.arange(len(accuracy)) + 0.5) / max(1, len(accuracy))
            axes.plot(x, accuracy, **stroke(styles, name, len(x)))
        axes.set(xlim=(0, 100), ylim=(0, 102))
    return legend(figure, styles, styles)


def held(holdings: dict[str, Any]) -> Figure | None:
    """Training images of each client by class (across) and domain (colour); the area of a dot is their number."""
    counts, names, training = np.asarray(holdings["counts"]), holdings["domains"], holdings["training"]
    every, width = -(-len(counts) // client_map.CLIENTS), counts.shape[-1]  # of very many, some are drawn
    if not counts.sum():
        return None
    order = sorted(range(len(counts)), key=lambda i: (i >= training, counts[i].sum(1).argmax(), i))[::every]
    unseen = [i >= training for i in order]
    n, training = len(order), unseen.count(False)
    rings = counts[order].cumsum(1)  # [clients, domains, classes]: within one dot, the first domain innermost
    step = float(np.clip(9 / n, 0.02, 0.26))  # inches from one client to the next
    label = f"client (one of {every} is drawn)" if every > 1 else "client"
    figure, axes = new("Who holds what", "class", label, 2 + step * n)
    own = colours(len(names))
    widest = max(4, 68 * min(step, 5.4 / width))  # points
    for j in reversed(range(len(names))):
        y, x = np.nonzero(counts[order][:, j])
        axes.scatter(x, y, np.maximum(1.5, widest**2 * rings[y, j, x] / rings.max()), color=own[j], linewidths=0)
    shown, classes = range(0, n, -(-n // 60)), range(0, width, -(-width // 40))
    labels = [f"{order[y]}, unseen" if unseen[y] else f"{order[y]}" for y in shown]
    texts = [plain(holdings["classes"][c], 16) for c in classes]
    font = 8 if n <= 40 else 6
    axes.set_yticks(shown, labels, fontsize=font)
    axes.set_xticks(classes, texts, fontsize=8, rotation=90 if sum(map(len, texts)) > 70 else 0)
    axes.set(xlim=(-0.6, width - 0.4), ylim=(n - 0.4, -0.6))
    axes.grid(False)
    if training < n:
        axes.axhspan(training - 0.5, n - 0.4, color=FAINT, zorder=0)
    right = axes.secondary_yaxis("right")
    right.set_yticks(shown, [f"{rings[y, -1].sum()}" for y in shown], fontsize=font)
    right.tick_params(length=0)
    right.set_ylabel("training images", fontsize=10)
    right.spines[:].set_visible(False)
    several = "; a ring: one of several domains" if ((counts > 0).sum(1) > 1).any() else ""
    told = f"seed {holdings['seed']}; largest dot: {rings.max()} images{several}"
    axes.set_title(told, loc="right", fontsize=8, color=GREY)
    return below(figure, [Patch(color=own[j], label=plain(d)) for j, d in enumerate(names)])


def _moved(rows: Rows, method: str) -> np.ndarray:
    """MiB up and down until the end of each round, mean over seeds. [rounds]"""
    own = [row for row in rows if row["method"] == method]
    moved = np.zeros(max(row["round"] for row in own))
    for row in own:
        moved[row["round"] - 1] += row["bytes_up"] + row["bytes_down"]
    return moved.cumsum() / len({row["seed"] for row in own}) / 2**20


def _final(rows: Rows, method: str, key: str) -> np.ndarray:
    """Sorted; [clients of all seeds], without those that have no test images."""
    found = [a for row in rows if row["method"] == method for a in row.get(key, ()) if a is not None]
    return 100 * np.sort(np.array(found, float))
