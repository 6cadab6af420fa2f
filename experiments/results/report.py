"""``report.html``: one page with everything a run found; it needs no network and no other file."""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path
from typing import Any

from experiments import attack
from experiments.results import client_map, figures, findings, metrics, page, spent, typed, variance
from experiments.results.folder import write_atomically
from experiments.results.style import png, svg
from experiments.results.summary import also, averages, counted, draws_clients, window, without_result

INTERVALS = "Lines and bars are means over seeds, bands and whiskers 95 % t-intervals, cut at 0 and 100 %."
DRAWN = ("curves", "traffic", "bias")  # in the page as lines that can be hidden; as files all are PNG
CAPTIONS = {
    "curves": "How fast each method rises, and where it settles.",
    "differences": "What is not chance: an interval on one side of zero tells a method from the first, on the same "
    "clients and batches. Small dots are seeds.",
    "cost": "Filled: personal models, hollow: the global one. What lies below a dotted line is bettered by a method "
    "that costs no more.",
    "learned": "What methods that learn on the server report of it: gates, rates, sizes.",
    "accuracies": "What a method gains globally against what single clients, the worst served ones and unseen ones "
    "get, and how much of a gap a few local steps close.",
    "domains": "Whether a method gains everywhere or buys one domain with another.",
    "bias": "Exact methods lie at zero or in the grey band of rounding; for the others, whether the error of "
    "aggregation shrinks as training settles. (An interval that reaches zero is not drawn on a logarithmic axis.)",
    "clients": "Fairness: the flatter a line and the higher its left end, the more evenly clients are served; clients "
    "of all seeds together.",
    "map": "Who resembles whom: one point for each client of the first seed, its distances those of the subspaces that "
    "its model's b spans after local steps, as near as a plane allows. The colour is what most of its images are, the "
    "shape the cluster that spectral clustering of the distances finds; hollow clients never train.",
    "traffic": "Accuracy per byte: at the same height, the line further to the left has moved less.",
    "holdings": "How unlike the clients are: what is empty in a row, its client has never seen. The number of images "
    "sets the area of a dot, the domain its colour; clients on grey never train.",
}


def write(folder: Path, summary: dict[str, Any], rows: list[dict[str, Any]], holdings: dict[str, Any]) -> Path:
    """Write the figures and the page into ``folder``, each file whole or not at all.

    Args:
      folder: an existing folder.
      summary: as in ``summary.json``.
      rows: those of ``metrics.jsonl`` whose methods have a result.
      holdings: ``counts`` integer ``[clients, domains, classes]``, training images of the first seed; ``training``,
        the number of clients that train (the first ones); ``scored``, the numbers of those that are scored; the names
        of ``domains`` and ``classes``; ``seed``.

    Returns:
      The path of ``report.html``.
    """
    drawn, names = figures.draw(summary, rows, holdings), _names(summary["methods"])
    images: dict[str, bytes | str] = {}
    for name, figure in drawn.items():
        write_atomically(folder / f"{name}.png", image := png(figure))
        images[name] = svg(figure, name, names) if name in DRAWN else image
    path = folder / "report.html"
    write_atomically(path, _page(summary, holdings, images).encode("utf-8", "xmlcharrefreplace"))
    return path


def _names(methods: dict[str, Any]) -> list[str]:
    return [entry["about"]["name"] for entry in methods.values()]


def _page(summary: dict[str, Any], holdings: dict[str, Any], images: dict[str, bytes | str]) -> str:
    methods, config, names = summary["methods"], summary["config"], _names(summary["methods"])
    data = Path(config["data"]).name
    what = names[0] if len(names) == 1 else f"{len(names)} methods"
    title = escape(f"{summary['command']}: {what} on {data}")
    parts = [
        f"<h1>{title}</h1>",
        f"<p>{escape(_sentence(config, holdings, names, data))}</p>",
        _found(summary),
        "<h2>Results</h2>",
        page.toggles(names),
        _headline(summary),
        f'<p class="note">{_statistics(summary)} {_meaning(summary["config"])}</p>',
        *(
            f'<p class="note">{escape(line[0].upper() + line[1:])}.</p>'
            for line in (*without_result(summary), *variance.lines(summary), *spent.lines(summary))
        ),
        "<h2>Figures</h2>",
        f'<p class="note">{INTERVALS}</p>' if len(config["seeds"]) > 1 else "",
        *(page.figure(name, CAPTIONS[name], image) for name, image in images.items()),
        _without_map(len(holdings["scored"])),
        *(["<h2>Global model on each domain</h2>", _domains(summary)] if len(holdings["domains"]) > 1 else []),
        "<h2>Methods</h2>",
        _methods(methods),
        "<h2>Again</h2>",
        f"<pre>{escape(typed.again(summary['command'], config))}</pre>",
        '<p class="note">All other options are as by default; data and weights lie where they lay.</p>',
        _record(summary),
    ]
    return page.whole(title, parts)


def _found(summary: dict[str, Any]) -> str:
    items = [
        f"<li><b>{escape(title[0].upper() + title[1:])}</b>: {escape(text)}</li>"
        for title, text in findings.lines(summary)
    ]
    return f'<ul class="found">{"".join(items)}</ul>' if items else ""


def _without_map(clients: int) -> str:
    if client_map.is_drawn(clients):
        return ""
    return (
        f'<p class="note">No map of clients: they are {clients}, and one is drawn of {client_map.CLIENTS} at most.</p>'
    )


def _sentence(config: dict[str, Any], holdings: dict[str, Any], names: list[str], data: str) -> str:
    cohort, unseen, seeds = config["clients_per_round"], config["holdout_clients"], config["seeds"]
    domains, classes = len(holdings["domains"]), len(holdings["classes"])
    return (
        f"{', '.join(names)} on {data} ({f'{domains} domains, ' if domains > 1 else ''}{classes} classes): "
        f"{counted(config['clients'], 'training client')}, {cohort or 'all'} of them in every round, and "
        f"{counted(unseen, 'unseen client')}{_drawn(config)}{_attacked(config)}; data split by {config['partition']}; "
        f"{counted(config['rounds'], 'round')} of {_work(config)}; "
        f"{counted(len(seeds), 'seed')} ({', '.join(map(str, seeds))})"
        + ("; the same clients, starts and batches for every method." if len(names) > 1 else ".")
    )


def _drawn(config: dict[str, Any]) -> str:
    """How many of them are scored."""
    return f", of each at most {config.get('eval_clients')} drawn to be scored for each seed" * draws_clients(config)


def _attacked(config: dict[str, Any]) -> str:
    """Who of them attacks; they are not scored."""
    text = config.get("attack")
    if text is None:
        return ""
    return f"; {attack.malicious(text, config['clients'])} of those that train attack by {text} and are not scored"


def _work(config: dict[str, Any]) -> str:
    if config.get("local_epochs") is not None:
        epochs = config["local_epochs"]
        return f"{epochs:g} local epoch{'s' * (epochs != 1)}"
    least = config.get("local_steps_from")
    return f"{least} to " * (least is not None) + counted(config["local_steps"], "local step")


def _statistics(summary: dict[str, Any]) -> str:
    seeds = len(summary["config"]["seeds"])
    over = window(summary["config"])
    drawn = "the clients drawn to be scored" * draws_clients(summary["config"])
    spread = f"mean and 95 % t-interval over {seeds} seeds" if seeds > 1 else "mean; one seed, so there is no interval"
    if drawn:
        spread += f", nor narrower than {drawn} make it" if seeds > 1 else f" but for {drawn}"
    paired = " Differences are in percentage points of global accuracy, paired by seed." if summary["paired"] else ""
    return f"<b>{over[0].upper()}{over[1:]}, {spread}.</b> Accuracies in %.{paired}"


def _meaning(config: dict[str, Any]) -> str:
    """What stands under the table of results."""
    shown = [(m.title, m.meaning) for m in metrics.taken(False, also(config)) if metrics.REPORT in m.shown]
    shown += [
        ("local steps", "after one round's local steps on the client's own training images"),
        (
            "bias share",
            "how far the server's model is from the mean of its clients' models, as a share of the mean update "
            "(– where no mean is meant)",
        ),
    ]
    words = [
        f"<b>{escape(title[0].upper() + title[1:])}</b>: {escape(meaning, quote=False)}." for title, meaning in shown
    ]
    return " ".join([*words, "Of all clients together the accuracies are drawn below."])


def _headline(summary: dict[str, Any]) -> str:
    methods, paired = summary["methods"], summary["paired"]
    first = next(iter(methods.values()))
    target = f"{100 * first['rounds_to_target']['target']:g}"
    difference = [f"difference to {first['about']['name']}"] if paired else []
    rest = (f"rounds to {target}\u00a0%", "up, per client and round", "bias share,\u00a0%", "seconds per round")
    shown, table = metrics.columns(metrics.REPORT, "{}, local steps", also(summary["config"])), []
    titles = [title.replace(" %", "\u00a0%") for title in shown.values()]
    for name, entry in methods.items():
        row = [entry["about"]["name"], *(_percent(entry[key]["last5"]) for key in shown)]
        if paired:
            row.append(_percent(paired[name], "+") if name in paired else "–")
        seconds = entry["seconds_per_round"]
        row += [_reached(entry["rounds_to_target"]), _bytes(entry["bytes_up"]["per_client_round"])]
        row += [
            _percent(entry["bias_share"]["last5"]) if averages(entry) else "–",
            "–" if seconds is None else f"{seconds:.3g}",
        ]
        table.append(row)
    hint = '<p class="note hint">On a narrow screen the table goes on to the right: scroll it.</p>'
    return page.table(["method", *titles, *difference, *rest], table, box="box wide") + hint


def _domains(summary: dict[str, Any]) -> str:
    methods = summary["methods"].values()
    names = list(next(iter(methods))["per_domain"])
    table = [[e["about"]["name"], *(_percent(e["per_domain"][d]["last5"]) for d in names)] for e in methods]
    return page.table(["method", *names], table) + f'<p class="note">{_statistics(summary | {"paired": {}})}</p>'


def _methods(methods: dict[str, Any]) -> str:
    header = ["method", "paper", "trains", "travels", "exact", "up", "down", "down, to all", "compile, s"]
    table = []
    for entry in methods.values():
        about, seconds = entry["about"], entry["compile_seconds"]
        table.append([about["name"], _paper(about), about["trains"], about["travels"], about["exact"],
                      *(_bytes(entry[way]["per_client_round"]) for way in ("bytes_up", "bytes_down")),
                      _bytes(entry["bytes_down"]["to_all"]),
                      "–" if seconds is None else f"{seconds:.1f}"])  # fmt: skip
    note = "Exact: is the server's new model the mean of its clients' models? Up, down: per client and round. "
    note += "Down is what it was sent so that it could start; to all: all of one seed, until every client that trains "
    note += "holds the final model."
    return page.table(header, table, "words sorts") + f'<p class="note">{note}</p>'


def _paper(about: dict[str, str]) -> str:
    number = about["arxiv"]
    if not re.fullmatch(r"[\w.-]+(/\d+)?", number, re.ASCII):
        return about["paper"]
    return page.Html(f'{escape(about["paper"])} <a href="https://arxiv.org/abs/{number}">arXiv:{number}</a>')


def _record(summary: dict[str, Any]) -> str:
    show = lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    groups = {
        "options": summary["config"],
        "speed": summary["speed"],
        "record": summary["record"],
        "versions": summary["versions"],
    }
    groups["run"] = {key: summary[key] for key in ("command", "device", "date", "schema")}
    table = [[key, group, show(value)] for group, own in groups.items() for key, value in own.items()]
    return f"<details><summary>Record</summary>{page.table(['name', 'of', 'value'], table, 'words')}</details>"


def _percent(spread: dict[str, Any], sign: str = "") -> str:
    """Mean and half the interval, in per cent."""
    if spread["mean"] is None:
        return "–"
    mean = 100 * spread["mean"]
    if 0 < mean < 0.05 and not sign:
        return "< 0.05"
    text = f"{mean:{sign}.1f}".replace("-", "−")
    if spread["ci95"] is None:
        return text
    low, high = spread["ci95"]
    return page.Html(f"{text} <small>± {50 * (high - low):.1f}</small>")


def _reached(rounds: dict[str, Any]) -> str:
    if rounds["mean"] is not None:
        return f"{rounds['mean']:.1f}"
    number = sum(r is not None for r in rounds["seeds"])
    return f"{number} of {len(rounds['seeds'])} seeds" if number else "not reached"


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.3g} {unit}" if number < 100 else f"{number:.0f} {unit}"
        number /= 1024
    return f"{number:.3g} GiB"
