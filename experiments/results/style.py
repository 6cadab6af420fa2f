"""How everything that is drawn looks: one fixed colour per method, in the order of the summary, safe for colour-blind
readers; titles, axes, lines and legends alike in every picture.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

METHODS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")  # Okabe and Ito
DOMAINS = ("#332288", "#DDCC77", "#117733", "#CC6677", "#88CCEE", "#882255", "#999933", "#AA4499", "#44AA99")  # Tol
MARKERS, DASHES, HATCHES = "os^Dv<>P", ("-", "--", ":", "-."), ("", "///", "...", "xxx")
WIDE = 100  # letters of a legend beside each other
LINE = 0.2  # inches from one line of it to the next
GREY, FAINT = "#444444", "#f0f0f0"
TITLE: dict[str, Any] = {"fontsize": 12, "weight": "bold"}
LEGEND: dict[str, Any] = {"loc": "outside lower center", "ncols": 4, "frameon": False, "fontsize": 9}


class Style(NamedTuple):
    """How a method is drawn, in every figure."""

    label: str
    colour: str
    marker: str
    dash: str
    hatch: str


Styles = Mapping[str, Style]


def styles_of(summary: dict[str, Any]) -> dict[str, Style]:
    styles = {}
    for i, (name, entry) in enumerate(summary["methods"].items()):
        turn, j = i // len(METHODS) % len(DASHES), i % len(METHODS)
        styles[name] = Style(plain(entry["about"]["name"], 64), METHODS[j], MARKERS[j], DASHES[turn], HATCHES[turn])
    return styles


def new(title: str, x: str, y: str, height: float = 4.3) -> tuple[Figure, Axes]:
    figure = Figure((7.2, height), 150, layout="constrained")
    return figure, dress(figure.subplots(), title, x, y)


def dress(axes: Axes, title: str, x: str, y: str) -> Axes:
    axes.set_title(title, loc="left", **TITLE)
    axes.set_xlabel(x, fontsize=10)
    axes.set_ylabel(y, fontsize=10)
    axes.tick_params(labelsize=9)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def stroke(styles: Styles, name: str, points: int) -> dict[str, Any]:
    """A line's style; where lines coincide their markers do not."""
    own, every = styles[name], max(1, -(-points // 12), min(len(styles), points // 3))
    drawn = {"color": own.colour, "marker": own.marker, "linestyle": own.dash, "linewidth": 1.7, "markersize": 4}
    return drawn | {"markevery": (list(styles).index(name) % every, every)}


def legend(figure: Figure, styles: Styles, names: Collection[str], bars: bool = False) -> Figure:
    patch = lambda own: Patch(facecolor=own.colour, hatch=own.hatch, edgecolor="white", label=own.label)
    line = lambda name: Line2D([], [], label=styles[name].label, **stroke(styles, name, 1))
    return below(figure, [patch(styles[name]) if bars else line(name) for name in names])


def below(figure: Figure, handles: Sequence[Artist]) -> Figure:
    """The figure with a legend under it, higher by as many lines as the legend has beyond two."""
    longest = max((len(str(handle.get_label())) for handle in handles), default=0)
    columns = min(4, WIDE // (longest + 8))  # the line or patch before a label takes the room of some letters
    figure.set_figheight(figure.get_figheight() + LINE * max(0, -(-len(handles) // columns) - 2))
    figure.legend(handles=handles, **LEGEND | {"ncols": columns})
    return figure


def note(axes: Axes, text: str, across: float, y: float, **more: Any) -> None:
    axes.text(across, y, text, transform=axes.get_yaxis_transform(), fontsize=8, color=GREY, **more)


def colours(number: int) -> Any:
    return DOMAINS if number <= len(DOMAINS) else matplotlib.colormaps["turbo"](np.linspace(0, 1, number))


def plain(text: str, limit: int = 24) -> str:
    """A name as matplotlib is to show it: short, on one line, no formula, not hidden for a leading underscore."""
    text = " ".join(str(text).split())
    start = limit // 2  # both ends stay: methods that differ by an option differ at the end
    text = (text if len(text) <= limit else f"{text[:start]}…{text[start + 1 - limit :]}").replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def svg(figure: Figure, name: str, titles: Sequence[str]) -> str:
    """A figure as an element of a page, with the text as text; what is of a method (gid m0, m1, ...) shows its title
    where the pointer is, and is of that class.

    Args:
      figure: it.
      name: before all that is named in it, so that it is no other figure's.
      titles: of the methods.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    title = lambda match: f'<g class="m{match[1]}"><title>{escape(titles[int(match[1])])}</title>'
    return re.sub(rf'<g id="{name}-m(\d+)">', title, text).replace("xlink:href", "href").strip()


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # names of classes may be in any script
        figure.savefig(buffer, format="png", facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
