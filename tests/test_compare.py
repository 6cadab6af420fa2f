"""A small comparison from the command line to its files: what is written, and what it must not depend on."""

import html
import json
import sys

import jax
import numpy as np
import pytest
from helpers import CLIENTS, KEY, SIGNATURE, assert_near, begin, nudged
from input_helpers import PLAIN, change

from experiments.__main__ import main
from experiments.commands import compare_runs
from experiments.requests import CompareRuns
from experiments.results import record, variance
from experiments.results.finished import load
from experiments.results.summary import measures
from fedlora_jax.methods.hyperlora import hyperlora

OPTIONS = (
    "--clients 6 --holdout-clients 2 --partition domain_dirichlet:2.0 --rounds 2 --seeds 2 --local-steps 2 --batch 4 "
    "--rank 2,4 --minimum 5 --out"
).split()


def run(monkeypatch, out, *more: str) -> tuple[dict, list[dict]]:
    change()(data := out.parent / "data.npz")
    monkeypatch.setattr(sys, "argv", ["experiments", *more, "--data", str(data), *OPTIONS, str(out)])
    main()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return json.loads((out / "summary.json").read_text()), rows


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        out = tmp_path_factory.mktemp("runs") / "pair"
        return out, *run(monkeypatch, out, "compare", "--methods", "fedit,flora", "--clients-per-round", "4")


def test_the_folder_holds_what_is_promised(compared):
    out, summary, rows = compared
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "metrics.jsonl", "summary.json", "report.html", "checkpoints", "curves.png"} <= names
    assert not any(name.startswith(".") for name in names)
    assert [(r["method"], r["round"], r["seed"]) for r in rows] == [
        (m, r, s) for m in ("fedit", "flora") for r in (1, 2) for s in (0, 1)
    ]
    assert summary["schema"] == 1
    for entry in summary["methods"].values():
        for name in measures():
            assert len(entry[name]["last"]["seeds"]) == len(entry[name]["last5"]["seeds"]) == 2
            assert entry[name]["last"]["mean"] is not None
        assert entry["seconds_per_round"] > 0
        assert entry["compile_seconds"] > 0
    assert set(summary["paired"]) == {"flora"}
    assert set(summary["variance"]) == set(variance.MEASURES)
    assert variance.lines(summary)[-1].startswith("2 draws of clients are too few")
    page = html.unescape((out / "report.html").read_text())
    assert all(f"{line[0].upper()}{line[1:]}." in page for line in variance.lines(summary))


def test_finished_runs_are_compared_and_read(compared, tmp_path):
    """With itself nothing differs; with one of other options, more seeds and one other partition these are said."""
    out, summary, rows = compared
    whole = load(out)
    assert whole.rows == [{key: x for key, x in row.items() if key != "sum"} for row in rows]
    assert (whole.summary, whole.config["seeds"]) == (summary, [0, 1])
    said = compare_runs.table(CompareRuns((str(out), str(out))))
    assert said.count("+0.0 ±0.0") == 2
    assert "2 of 2" in said
    assert said.endswith("all options are the same")
    other = whole._replace(
        name="other",
        config=whole.config | {"lr": 0.9, "seeds": [1, 5, 0]},
        record=whole.record | {"partition_hash": [whole.record["partition_hash"][1], "new", "dealt anew"]},
        summary={"methods": {"fedit": {"global_accuracy": {"last5": {"seeds": [0.5, 0.1, 0.3]}}}}, "paired": {}},
    )
    apart, paired = compare_runs.against(whole, other, "fedit")
    first, second = whole.summary["methods"]["fedit"]["global_accuracy"]["last5"]["seeds"]
    assert apart.startswith(f"{100 * np.mean([0.3 - first, 0.5 - second]):+.1f}")
    assert paired == "1 of 2"
    lines = compare_runs.differing([whole, other])
    assert [line.split()[0] for line in lines] == ["differs", "seeds", "lr"]
    assert compare_runs.against(whole, other._replace(config=other.config | {"seeds": [7, 8, 9]}), "fedit")[0] == "-"
    for runs, expected in (
        ((str(out),), "expected two or more"),
        ((str(out), str(tmp_path)), "no finished compare or run"),
    ):
        with pytest.raises(ValueError, match=expected):
            compare_runs.table(CompareRuns(runs))


def test_what_a_method_learned_is_written_and_can_be_given_to_another_run(tmp_path):
    state = begin(hyperlora(CLIENTS, SIGNATURE).init, KEY)
    seeds = jax.tree.map(lambda x: np.stack([x, x]), state._replace(theta=nudged(state.theta)))
    record.keep_theta(tmp_path, "hyperlora:mode=exact", seeds)
    arrays = record.read_arrays(str(tmp_path / "hyperlora_mode=exact.theta.npz"))
    again = begin(hyperlora(CLIENTS, SIGNATURE, "frozen", theta=arrays).init, KEY)
    assert_near(again.theta, nudged(state.theta), 0)


def test_methods_are_paired(compared):
    """The same clients in the same rounds, and, as both start from the same adapters, the same first losses."""
    _, _, rows = compared
    by_method = {m: [r for r in rows if r["method"] == m] for m in ("fedit", "flora")}
    for one, two in zip(by_method["fedit"], by_method["flora"], strict=True):
        assert one["clients"] == two["clients"]
        assert len(set(one["clients"])) == 4
        if one["round"] == 1:
            np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-5)
    assert len({tuple(r["clients"]) for r in by_method["fedit"]}) > 1


def test_bytes_are_those_of_the_arrays_that_move(compared):
    """By hand: rank r on query and value of 4 blocks of width 64, and a head of 195 numbers, in float32."""
    _, summary, rows = compared
    adapter = lambda rank: 4 * (4 * 2 * rank * (64 + 64) + 195)
    ups = {adapter(2) * k + adapter(4) * (4 - k) for k in range(5)}
    left = {}  # by flora's first round, of each seed: all who come to the second need it
    for row in rows:
        assert row["bytes_up"] in ups
        stack = row["bytes_up"] - 4 * 4 * 195
        missed = left.get(row["seed"], 0)
        assert row["bytes_down"] == (row["bytes_up"] if row["method"] == "fedit" else 4 * (missed + 4 * 195))
        left |= {row["seed"]: stack} if row["method"] == "flora" else {}
    entry = summary["methods"]["fedit"]
    assert entry["bytes_up"]["total"] == sum(r["bytes_up"] for r in rows if r["method"] == "fedit" and r["seed"] == 0)


def test_exact_methods_are_reported_exact(compared):
    _, summary, _ = compared
    assert summary["methods"]["flora"]["bias_share"]["last5"]["mean"] < 1e-4
    assert summary["methods"]["fedit"]["bias_share"]["last5"]["mean"] > 1e-3


@pytest.mark.long
def test_what_did_not_travel_is_not_counted_and_newcomers_have_a_trial(tmp_path, monkeypatch):
    """HiLoRA's leaf stage sends nothing; the lowest clients are told apart."""
    more = ("--methods", "hilora:root=0.5:cluster=0.0", *PLAIN)
    rows = run(monkeypatch, tmp_path / "out", "compare", *more)[1]
    first, last = (row for row in rows if row["seed"] == 0)
    assert first["bytes_up"] > 0 == last["bytes_up"]
    assert last["bytes_down"] == first["bytes_down"]  # the root once more, as it is frozen
    assert last["bytes_behind"] == 0
    assert (first["stage"], last["stage"], "travels_up" in last) == (0, 2, False)
    assert len(last["client_positions"]) == len(last["client_clusters"]) == len(last["client_accuracies"]) + 2
    own = last["client_accuracies"]
    np.testing.assert_allclose(last["worst_accuracy"], min(own), atol=1e-6)
    np.testing.assert_allclose(last["p10_accuracy"], np.percentile(own, 10), atol=1e-6)
    assert 0 <= last["unseen_accuracy"] <= 1
