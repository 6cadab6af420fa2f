"""The report holds what the run found, stands alone, and survives missing values and hostile names."""

import base64
import hashlib
import re
import shlex
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from experiments.cli import parse
from experiments.options import RESULTS
from experiments.results import client_map, comparisons, figures, findings, metrics, report, typed, variance
from experiments.results.budget_figures import line
from experiments.results.style import legend, png, styles_of
from experiments.results.summary import paired, spread, summarise, table

rendered = pytest.mark.usefixtures("pictures")  # which takes most of the time: where it is about what is in them
FIGURES = ("curves", "differences", "accuracies", "domains", "clients", "cost", "traffic", "bias", "map", "holdings")
DOMAINS = ("ink", "chalk", "_neon $x$")
ABOUT = {"paper": "Zhang et al. 2023", "arxiv": "2305.05644", "trains": "a, b", "travels": "a, b", "exact": "no"}
SHARES = (0.4, 3e-7, 0.0, 0.05)


def make_rows(method, index, seeds, rounds=8, clients=10, unseen=True, every=1, domains=DOMAINS):
    rows = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)  # the same for every method: paired
        for r in range(1, rounds + 1):
            row = {"method": method, "seed": seed, "round": r, "clients": list(range(clients)), "loss": 1.0 / r,
                   "update": 0.3, "bias": 0.01, "bias_share": SHARES[index % 4] * rng.uniform(0.5, 1),
                   "factor_bias": 0.01, "bytes_up": 40_000 * clients,
                   "bytes_down": 40_000 * clients * (1 + index), "bytes_behind": 5}  # fmt: skip
            if r % every == 0:
                accuracy = 0.8 - 0.6 * np.exp(-(2 + index) * r / rounds) + 0.02 * rng.normal() + 0.01 * index
                own = np.clip(accuracy + 0.15 * rng.normal(size=clients), 0, 1)
                tuned = np.clip(own + 0.1, 0, 1)
                final = r == rounds
                row |= {"global_accuracy": accuracy, "pooled_accuracy": accuracy, "personal_std": own.std()}
                row |= {"per_domain": {d: accuracy - 0.05 * j for j, d in enumerate(domains)}}
                for suffix, values in (("", own), ("_tuned", tuned)):
                    if suffix and r <= rounds - 5:
                        continue
                    row[f"personal_accuracy{suffix}"] = values.mean()
                    row[f"worst10_accuracy{suffix}"] = row[f"worst_accuracy{suffix}"] = values.min()
                    row[f"gap{suffix}"] = values.max() - values.min()
                    row[f"p10_accuracy{suffix}"] = np.percentile(values, 10)
                    row[f"unseen_accuracy{suffix}"] = values.mean() - 0.1 if unseen else None
                    if final:
                        row[f"client_accuracies{suffix}"] = [None, *values[1:].tolist()]
                        row["client_positions"] = rng.normal(size=(clients + 3 * unseen, 2)).tolist()
                        row["client_clusters"] = [i % 3 for i in range(clients + 3 * unseen)]
            rows.append(row)
    return rows


def make(names=("FedIT", "FLoRA"), seeds=3, classes=4, held=3, **options):
    """Summary, rows and holdings of a made-up run."""
    methods = {name.lower(): name for name in names}
    by_method = {key: make_rows(key, i, seeds, unseen=held > 0, **options) for i, key in enumerate(methods)}
    timings = {"seconds_per_round": 0.0512, "compile_seconds": None}
    entries = {
        key: {"about": {"name": methods[key], **ABOUT}, **summarise(rows, 0.7), **timings}
        for key, rows in by_method.items()
    }
    rows = [row for rows in by_method.values() for row in rows]
    clients, rounds = len(rows[0]["clients"]), max(row["round"] for row in rows)
    config = {"methods": list(methods), "data": "digits", "weights": "nano", "clients": clients,
              "clients_per_round": None, "holdout_clients": held, "partition": "domain_dirichlet:1.0", "rank": [4],
              "rounds": rounds, "local_steps": 5, "batch": 16, "optimizer": "sgd", "lr": 0.3,
              "seeds": list(range(seeds)), "target": 0.7, "eval_every": options.get("every", 1)}  # fmt: skip
    summary = {"schema": 1, "command": "compare", "config": config, "speed": {"chunk": None},
               "record": {"data_hash": "abc123", "weights": "nano", "adapted": ["blocks/attn/query/kernel"]},
               "versions": {"jax": "0.10.2"}, "device": "cpu (cpu), x86_64", "date": "2026-11-21",
               "methods": entries, "paired": paired(entries), "variance": {}}  # fmt: skip
    domains = list(rows[-1]["per_domain"])
    rng, total = np.random.default_rng(0), clients + held
    counts = rng.poisson(8 * rng.dirichlet(np.ones(classes), total))[:, None].repeat(len(domains), 1)
    counts *= (np.arange(total)[:, None] % len(domains) == np.arange(len(domains)))[:, :, None]
    counts[0] = 3  # one client with several domains
    holdings = {"counts": counts, "training": clients, "scored": list(range(len(counts))), "domains": domains,
                "classes": [f"class {c}" for c in range(classes)], "seed": 0}  # fmt: skip
    return summary, rows, holdings


class Page(HTMLParser):
    """Tags, attributes and visible text; fails where tags are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words, self.scripts = [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self):
        return " ".join("".join(self.words).split())


def write(tmp_path, *run):
    path = report.write(tmp_path, *run)
    assert path == tmp_path / "report.html"
    return path.read_text(encoding="utf-8")


def embedded(text):
    return [base64.b64decode(code) for code in re.findall(r'src="data:image/png;base64,([^"]*)"', text)]


@pytest.mark.long
@rendered
def test_every_figure_is_a_file_and_in_the_page(tmp_path):
    text = write(tmp_path, *make())
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*(f"{name}.png" for name in FIGURES), "report.html"])
    files = [(tmp_path / f"{name}.png").read_bytes() for name in FIGURES]
    for file in files:
        assert file.startswith(b"\x89PNG\r\n\x1a\n")
        assert file.endswith(b"IEND\xaeB`\x82")
    assert embedded(text) == [file for name, file in zip(FIGURES, files, strict=True) if name not in report.DRAWN]
    assert text.count("<svg ") == len(report.DRAWN)
    names = re.findall(r'\bid="([^"]*)"', text)
    assert len(names) == len(set(names)), "what is named in one picture is no other's"
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', text)) <= set(names)


@pytest.mark.long
@rendered
def test_the_page_loads_nothing(tmp_path):
    text = write(tmp_path, *make())
    page = Page(text)
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    (script,) = page.scripts
    assert not re.search(r"fetch|import|XMLHttp|//|innerHTML|eval", script)
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{known}'\"" in text, "no other script is run"
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name == "src":
            assert value.startswith("data:image/png;base64,")
        if name == "href" and not value.startswith("#"):
            assert value == "https://arxiv.org/abs/2305.05644"
    for style in re.findall(r"<style[^>]*>(.*?)</style>", text, re.DOTALL):
        assert "url(" not in style
        assert "@import" not in style


def test_tables_hold_the_numbers_of_the_summary(tmp_path):
    summary, rows, holdings = make()
    text = Page(write(tmp_path, summary, rows, holdings)).text

    def shown(spread, sign=""):
        low, high = spread["ci95"]
        return f"{100 * spread['mean']:{sign}.1f} ± {50 * (high - low):.1f}"

    for entry in summary["methods"].values():
        for key in metrics.columns(metrics.REPORT, "{}"):
            assert shown(entry[key]["last5"]) in text
        for own in entry["per_domain"].values():
            assert shown(own["last5"]) in text
    assert shown(summary["paired"]["flora"], "+") in text
    for piece in ("The last five rounds, mean and 95 % t-interval over 3 seeds", "39.1 KiB", "0.0512", "abc123",
                  "10 training clients, all of them in every round, and 3 unseen clients"):  # fmt: skip
        assert piece in text
    assert "best" not in text.replace("worst to best", "").lower()


@pytest.mark.long
@rendered
def test_names_are_escaped(tmp_path):
    hostile = '<script>alert("$x$ & _y")</script>'
    summary, rows, holdings = make(names=(hostile, "_B$"), domains=(hostile[:20], "_<b>"))
    summary["config"]["data"] = "<img src=x>.npz"
    for entry in summary["methods"].values():
        entry["about"] |= {"paper": "<i>", "arxiv": '"><script>', "trains": "<a&b>"}
    holdings["classes"][0] = "<class> $\\frac$"
    text = write(tmp_path, summary, rows, holdings)
    page = Page(text)
    assert page.tags.count("script") == 1
    assert text.count("<img") == len(FIGURES) - len(report.DRAWN)
    assert hostile in page.text
    assert "<img src=x>.npz" in page.text
    assert "<a&b>" in page.text


def test_nothing_that_a_run_says_is_markup(tmp_path, monkeypatch):
    """Every text of it, and every name, with a tag and quotes in it: the page has the elements that it has without."""
    monkeypatch.setattr(report, "png", lambda figure: b"")
    sign = "<script>alert('\"&amp;\u202e')</script>"
    tags, attributes = [], []
    for hostile in ("", sign):
        told = lambda tree: poisoned(tree, hostile)  # noqa: B023
        names, domains = [f"A{hostile}", f"B{hostile}"], [f"x{hostile}", f"y{hostile}"]
        summary, rows, holdings = make(names, seeds=variance.FEWEST, domains=domains)
        summary["variance"] = variance.of_run(summary["methods"], draws := range(variance.FEWEST))
        summary["paired"] = variance.with_draws(summary["paired"], draws)
        for part in ("config", "record", "versions"):
            summary[part] = told(summary[part])
        summary |= {name: told(summary[name]) for name in ("command", "device", "date")}
        for entry in summary["methods"].values():
            entry["about"] = {name: told(text) for name, text in entry["about"].items()}
        holdings["classes"] = told(holdings["classes"])
        page = Page(write(tmp_path, summary, rows, holdings))
        tags.append(page.tags)
        attributes.append([(name, value) for name, value in page.attributes if name != "src"])
        shown = [x for part in ("record", "versions", "config") for x in summary[part].values() if isinstance(x, str)]
        assert all(text in page.text for text in (*shown, *names, *domains))
        assert f"as the one to {names[0].lower()}" in page.text
    plain = [[tag for tag in each if tag != "a"] for each in tags]  # no number of arXiv any more
    assert plain[0] == plain[1]
    assert [pair for pair in attributes[0] if "arxiv" not in f"{pair[1]}"] == attributes[1]


def poisoned(tree, sign):
    """Every text of a tree with a sign at its end."""
    if isinstance(tree, str):
        return tree + sign
    if isinstance(tree, dict):
        return {name: poisoned(value, sign) for name, value in tree.items()}
    return [poisoned(value, sign) for value in tree] if isinstance(tree, list) else tree


def test_one_seed_has_no_intervals(tmp_path):
    text = Page(write(tmp_path, *make(seeds=1))).text
    assert "The last five rounds, mean; one seed, so there is no interval." in text
    assert "±" not in text


def test_missing_values_are_dashes(tmp_path):
    run = make(held=0, every=4, seeds=2)
    reached = {"target": 0.7, "mean": None, "seeds": [3, None]}
    run[0]["methods"]["fedit"] |= {"seconds_per_round": None, "rounds_to_target": reached}
    text = Page(write(tmp_path, *run)).text
    assert "no unseen clients" in text
    assert "–" in text
    assert "1 of 2 seeds" in text
    assert "Rounds 4 and 8, mean" in text


@rendered
@pytest.mark.parametrize("seeds", [1, 3])
def test_figures_without_data_are_left_out(tmp_path, seeds):
    summary, rows, holdings = make(names=("FedIT",), seeds=seeds, domains=("all",), rounds=1)
    for row in rows:
        for key in ("client_accuracies", "client_accuracies_tuned", "client_positions", "bias_share"):
            row.pop(key, None)
    text = write(tmp_path, summary, rows, holdings)
    assert sorted(p.stem for p in tmp_path.glob("*.png")) == ["accuracies", "curves", "holdings", "traffic"]
    assert len(embedded(text)) == 2
    assert "difference" not in Page(text).text
    assert "input" not in Page(text).tags


def test_a_method_has_one_colour_and_colours_differ():
    styles = styles_of(make(names=[f"M{i}" for i in range(12)], seeds=1, rounds=1)[0])
    assert len({(look.colour, look.dash) for look in styles.values()}) == 12
    assert list(styles) == [f"m{i}" for i in range(12)]


@pytest.mark.long
@rendered
def test_the_same_run_gives_the_same_bytes(tmp_path):
    assert write(tmp_path, *make()) == write(tmp_path, *make())


@pytest.mark.parametrize("domains", [2, 12, 60])
def test_a_picture_has_room_for_a_legend_of_any_number_of_domains(domains):
    names = [f"domain {j} of a long name" for j in range(domains)]
    holdings = {"counts": np.ones((1, domains, 2), int), "training": 1, "domains": names, "classes": ["a", "b"]}
    figure = figures.held(holdings | {"superclasses": None, "seed": 0})
    assert figure is not None
    png(figure)  # matplotlib warns, and lays out nothing, where axes have no room left
    (axes,) = figure.axes
    assert axes.get_window_extent().height > 0.3 * figure.dpi


@pytest.mark.parametrize("name", ["HyperLoRA (memory=0.5, steady)", "FedIT + FedProx (mu=0.1) + " * 9])
def test_a_legend_of_long_names_stays_within_the_picture(name):
    styles = styles_of({"methods": {f"m{i}": {"about": {"name": name}} for i in range(4)}})
    figure = legend(Figure((7.2, 4.3), 150), styles, styles)
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


@pytest.mark.parametrize("share", [0.0, 1e-7, 0.3])
def test_bias_of_any_size_is_drawn(share):
    summary, rows, _ = make()
    for row in rows:
        row["bias_share"] = share
    figure = figures.bias(styles_of(summary), rows)
    assert figure is not None
    assert png(figure)
    assert figure.axes[0].get_yscale() == "linear"


def test_a_bias_of_zero_is_no_small_one_and_rounding_has_its_place():
    summary, rows, _ = make()
    first, *_ = summary["methods"]
    for row in rows:
        tiny, some = (0.0, 0.004 * row["round"]) if row["round"] > 2 else (1e-9, 0.0)
        row["bias_share"] = tiny if row["method"] == first else some
    axes = figures.bias(styles_of(summary), rows).axes[0]
    gaps = [not np.isfinite(drawn.get_ydata()).all() for drawn in axes.lines]
    assert all(gaps), "a round of exactly no bias is no point"
    for row in rows:  # all methods to rounding, over decades
        row["bias_share"] = 10.0 ** -(5 + row["round"] % 4)
    figure = figures.bias(styles_of(summary), rows)
    png(figure)
    low, high = figure.axes[0].get_ylim()
    assert all(low < text.get_position()[1] < high for text in figure.axes[0].texts)


def test_a_method_whose_server_means_no_mean_has_no_bias(tmp_path):
    summary, rows, holdings = make(names=("FedIT", "Ditto"))
    summary["methods"]["ditto"]["about"] |= {"exact": "n/a"}
    first, last = (line.split() for line in table(summary).splitlines()[-2:])
    assert first[-3].endswith("%")
    assert last[-3] == "-"
    assert len(figures.draw(summary, rows, holdings)["bias"].axes[0].lines) == 1
    text = write(tmp_path, summary, rows, holdings)
    assert re.search(r'scope="row">Ditto</th>.*<td>–</td><td>0.0512</td></tr>', text)


def test_methods_that_differ_at_the_end_of_their_names_are_told_apart():
    names = [f"FedIT + FedProx (mu=0.1) + SCAFFOLD + Gaussian noise (0.1) + FedAdam (lr={lr})" for lr in (0.01, 0.03)]
    styles = styles_of({"methods": {name: {"about": {"name": name}} for name in names}})
    assert len({look.label for look in styles.values()}) == 2


def test_of_very_many_clients_some_are_drawn_and_the_map_is_left_out_with_a_word(tmp_path):
    clients = 3 * client_map.CLIENTS
    summary, rows, holdings = make(names=("FedIT",), seeds=1, rounds=1, clients=clients)
    for row in rows:
        del row["client_positions"]
    text = Page(write(tmp_path, summary, rows, holdings)).text
    assert f"No map of clients: they are {clients + 3}" in text
    assert not (tmp_path / "map.png").exists()
    figure = figures.held(holdings)
    low, high = sorted(figure.axes[0].get_ylim())
    assert high - low < client_map.CLIENTS + 2
    assert figure.get_size_inches()[1] < 15
    assert figure.axes[0].get_ylabel() == "client (one of 4 is drawn)"
    assert "No map" not in Page(write(tmp_path, *make())).text


def drawn(axes):
    """All coordinates of lines, bands and whiskers on an axis, [points, 2]."""
    lines = [line.get_xydata() for line in axes.lines]
    paths = [path.vertices for own in axes.collections for path in own.get_paths() if len(path.vertices)]
    return np.concatenate([np.asarray(x, float) for x in (*lines, *paths)])


def test_an_interval_of_an_accuracy_is_drawn_no_further_than_it_can_go():
    summary, rows, _ = make()
    for row in rows:
        row["global_accuracy"] = (0.999, 0.9, 0.02)[row["seed"]]
    for entry in summary["methods"].values():
        entry["global_accuracy"]["last5"] = spread([0.999, 0.9, 0.02])
    low, high = spread([0.999, 0.9, 0.02])["ci95"]
    assert low < 0
    assert high > 1
    styles = styles_of(summary)
    curves, bars = figures.curves(styles, rows), figures.accuracies(styles, summary)
    (axes,) = Figure().subplots(1, 1, squeeze=False)[0]
    line(axes, styles, "fedit", [1, 2], [spread([0.999, 0.9, 0.02])] * 2)
    for x in (drawn(curves.axes[0])[:, 1], drawn(bars.axes[0])[:, 0], drawn(axes)[:, 1]):
        assert 0 <= x.min() <= x.max() <= 100
    assert bars.axes[0].get_xlim()[1] <= 100


@pytest.mark.parametrize("picture", [figures.curves, figures.bias])
def test_one_evaluated_round_is_a_whole_number_with_its_interval(picture):
    summary, rows, _ = make(rounds=5, every=5)
    rows = [row for row in rows if row["round"] == 5]
    axes = picture(styles_of(summary), rows).axes[0]
    low, high = axes.get_xlim()
    assert [t for t in axes.get_xticks() if low <= t <= high] == [5]
    assert len(axes.containers) == 2  # whiskers of both methods: a band over one round has no width


def test_the_summary_says_who_leads_and_whether_chance_would_do_as_well():
    entry = lambda name, seeds: {"about": {"name": name}, "global_accuracy": {"last5": spread(seeds)}}
    said = lambda *seeds: findings.sentence(
        {f"m{i}": entry("ABC"[i], own) for i, own in enumerate(seeds)}, "global_accuracy"
    )
    base, better, other = [0.5, 0.6, 0.7, 0.65], [0.6, 0.68, 0.83, 0.74], [0.5, 0.61, 0.69, 0.6736]
    p = 2 * stats.ttest_rel(better, base).pvalue  # the better one of two was picked
    assert said(base, better, other) == (
        f"B leads with 71.2 %, 10.0 points over A, the first: significant (p = {p:.2g}, paired t-test over 4 seeds, "
        "for 2 comparisons)."
    )
    p = stats.ttest_rel(other, base).pvalue
    assert said(other, base) == (
        f"A leads with 61.8 %, 0.6 points over B, the next: not told apart (p = {p:.2g}, paired t-test over 4 seeds)."
    )
    assert "one seed, which says nothing of chance" in said([0.5], [0.6])
    assert said(base, base) == "A and B have the same 61.3 % on every seed."
    assert said(base) == "A has 61.3 %."
    assert said(base, [0.5, None, 0.6, 0.7]) == ""


@pytest.mark.parametrize(
    "line",
    [
        "compare",
        "run --method ditto+proximal:mu=0.1 --rounds 3 --seeds 42, --data 'a b.npz' --rank 4,8 --optimizer adam",
        "compare --methods fedit,flora --seeds 3,1 --alpha 8 --mean 0.5,0.5,0.5 --keep-head --classes 0,1 --lr 0.01",
    ],
)
def test_what_is_shown_to_be_typed_is_the_run(line):
    command, config = parse(shlex.split(line))
    held = {name: list(x) if isinstance(x, tuple) else x for name, x in config.deciding(RESULTS).items()}
    text = typed.again(command, held)
    assert parse(shlex.split(text)[3:]) == (command, config)
    assert sorted(shlex.split(text)[3:]) == sorted(shlex.split(line))


def test_a_front_is_what_nothing_betters():
    points = [(3.0, 0.5), (1.0, 0.2), (2.0, 0.6), (1.0, 0.4), (4.0, 0.6), (5.0, 0.7)]
    beaten = lambda p: any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)
    assert comparisons.front(points) == sorted(p for p in points if not beaten(p))


def test_paired_differences_and_what_is_learned_are_drawn_as_they_are():
    summary, rows, _ = make(names=("FedIT", "FLoRA", "Ditto"))
    styles = styles_of(summary)
    axes = figures.comparisons.differences(styles, summary).axes[0]
    expected = {100 * e["mean"] for e in summary["paired"].values()}
    marks = {float(line.get_xdata()[0]) for line in axes.lines if len(line.get_xdata()) == 1}
    assert expected <= marks
    ends = [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2]
    for own in summary["paired"].values():
        assert any(np.allclose(end, 100 * np.array(own["ci95"])) for end in ends)
    assert comparisons.learned(styles, rows) is None
    for row in rows:
        if row["method"] == "ditto":
            row["gate"] = -0.1 * row["round"]
    axes = comparisons.learned(styles, rows).axes[0]
    (line,) = axes.lines
    assert np.allclose(line.get_ydata(), -0.1 * np.arange(1, 9))
