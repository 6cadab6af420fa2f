"""Of many clients some are drawn and scored, as they would be among all; intervals say what drawing them adds."""

import functools
import itertools
import json

import numpy as np
import pytest
from input_helpers import PLAIN, change

from experiments.cli import parse
from experiments.commands import export
from experiments.commands.compare import Plan
from experiments.requests import Export
from experiments.results import client_map, metrics, summary
from experiments.setup import memory, problem

OPTIONS = (
    "compare --clients 5 --holdout-clients 4 --clients-per-round 2 --minimum 2 "
    "--partition iid --rounds 2 --eval-every 2 --seeds 2 --local-steps 2 --batch 3 --rank 2 --lr 0.3"
).split() + PLAIN
KEPT, TRIED = ("--methods", "ditto"), ("--methods", "hilora:root=0.4:cluster=0.6")  # memory; and trials of the unseen
DRAWN = "--eval-clients", "3"
ROW = {"seed": 0, "round": 1, "per_domain": {}, "clients": [0], "bytes_up": 0, "bytes_down": 0, "bytes_behind": 0}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The last row of each seed, of a run that is computed once."""
    folder = tmp_path_factory.mktemp("runs")
    change()(folder / "data.npz")

    @functools.cache
    def rows(*more):
        out = folder / " ".join(("run", *more))
        Plan("compare", parse([*OPTIONS, "--data", str(folder / "data.npz"), "--out", str(out), *more])[1]).execute()
        held = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [row["round"] for row in held if "global_accuracy" in row] == [2, 2], "as --eval-every says"
        return out, [row for row in held if row["round"] == 2]

    return rows


def scored_in(out):
    config = parse(["compare", "--config", str(out / "config.json")])[1]
    return config, problem.build(config, may_stage=True).clients.all_scored()


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "images"),
    [
        pytest.param(KEPT, "resident", id="kept"),
        pytest.param(TRIED, "staged", id="tried"),
    ],
)
def test_who_is_drawn_has_the_accuracies_that_all_have(method, images, rows):
    (_, of_all), (out, drawn) = rows(*method), rows(*method, *DRAWN, "--images", images)
    config, scored = scored_in(out)
    assert config.scored == (3, 3)
    assert scored.tolist() != [scored[0].tolist()] * 2, "each seed draws its own"
    for own, ids, every in zip(drawn, scored, of_all, strict=True):
        assert (len(set(ids)), *np.sort(ids)) == (6, *ids)
        assert (ids[:3] < 5).all()
        assert (ids[3:] >= 5).all()
        for same in ("loss", "clients", "global_accuracy", "bytes_up", "bytes_down"):
            assert own[same] == every[same]
        for tuned in ("", metrics.TUNED):
            whole = every["client_accuracies" + tuned]
            assert own["client_accuracies" + tuned] == [whole[i] for i in ids[:3]]
        assert own["client_numbers"] == ids[:3].tolist()
        assert len(own["client_positions"]) == 6
        assert {"personal_accuracy_error", "unseen_accuracy_error_tuned"} <= own.keys()
        assert not any(metrics.ERROR in name or name == "client_numbers" for name in every)


@pytest.mark.long
def test_the_interval_of_one_seed_is_that_of_drawing_clients(rows):
    out, (row, _) = rows(*KEPT, *DRAWN, "--images", "resident")
    told = summary.summarise([row], 0.8)
    for name in ("personal_accuracy", "personal_accuracy_tuned"):
        own = np.array(row["client_accuracies" + metrics.TUNED * name.endswith(metrics.TUNED)], float)
        half = 1.96 * np.sqrt(own.var(ddof=1) / 3 * (1 - 3 / 5))
        np.testing.assert_allclose(told[name]["last5"]["ci95"], [own.mean() - half, own.mean() + half])
    assert told["global_accuracy"]["last"]["ci95"] is None
    page = (out / "report.html").read_text()
    assert "of each at most 3 drawn to be scored" in page
    whole, _ = rows(*KEPT)
    assert "drawn to be scored" not in (whole / "report.html").read_text()


@pytest.mark.parametrize("n", [2, 4, 6])
def test_the_error_of_a_mean_is_that_of_all_samples_there_are(n):
    """Drawn without replacement, its square is unbiased: on average the variance of the means."""
    values = np.random.default_rng(0).uniform(size=6)
    samples = np.array(list(itertools.combinations(values, n)))
    found = np.mean([metrics.error_of_mean(own, n / 6) ** 2 for own in samples])
    np.testing.assert_allclose(found, samples.mean(1).var(), atol=1e-18)


def test_errors_of_the_lowest_clients_are_as_large_as_draws_differ():
    """Of many draws of 100 of 250 clients, against the deviation of what they give."""
    rng = np.random.default_rng(0)
    values = rng.beta(5, 2, 250)
    samples = [rng.permutation(values)[:100] for _ in range(1000)]
    for of, error in (
        (metrics.worst_tenth, metrics.error_of_worst_tenth),
        (lambda x: metrics.lowest(x, 10), lambda x, share: metrics.error_of_lowest(x, 10, share)),
    ):
        found = np.mean([error(own, 0.4) ** 2 for own in samples]) ** 0.5
        np.testing.assert_allclose(found, np.std([of(own) for own in samples]), rtol=0.15)
        assert error(values, 1.0) == 0
    assert np.isnan(metrics.error_of_worst_tenth(np.array([0.5, np.nan]), 0.5))
    assert np.isnan(metrics.error_of_lowest(np.array([0.5]), 10, 0.5))


def test_means_on_either_side_and_their_harmonic_mean_have_errors_too():
    """That of the harmonic mean, against the means of all samples of clients that differ little, and in all three."""
    rng = np.random.default_rng(1)
    values = np.array([0.9, 0.6, 0.3]) + 1e-3 * rng.normal(size=(6, 3)) @ rng.normal(size=(3, 3))
    samples = [values[list(rows)] for rows in itertools.combinations(range(6), 3)]
    found = [
        metrics.of(metrics.Evaluation(*np.zeros((3, 1)), own[:, 0], np.zeros(1), (0.5, 1.0), own[:, 1:]))
        for own in samples
    ]
    for name, means in {
        "base_accuracy": [own[:, 1].mean() for own in samples],
        "novel_accuracy": [own[:, 2].mean() for own in samples],
        "harmonic_mean": [3 / sum(1 / own.mean(0)) for own in samples],
    }.items():
        np.testing.assert_allclose([one[name] for one in found], means)
        squares = [one[metrics.error_name(name)] ** 2 for one in found]
        np.testing.assert_allclose(np.mean(squares), np.var(means), rtol=0.02)
    told = summary.summarise([{**ROW, **found[0]}], 0.8)
    assert np.diff(told["harmonic_mean"]["last"]["ci95"]) == pytest.approx(2 * 1.96 * found[0]["harmonic_mean_error"])


def test_an_interval_is_no_narrower_than_drawing_makes_it():
    alike, apart = summary.spread([0.5, 0.5], [0.03, 0.04]), summary.spread([0.1, 0.9], [0.03, 0.04])
    np.testing.assert_allclose(alike["ci95"], [0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025])
    assert apart == summary.spread([0.1, 0.9])
    assert summary.spread([0.5], [None]) == summary.spread([0.5])
    assert summary.spread([0.5], [0.0]) == summary.spread([0.5])  # all are scored, and it is one seed still


def test_a_run_that_scores_all_there_are_does_not_say_that_it_draws():
    config = {"clients": 5, "holdout_clients": 2, "seeds": [0], "eval_every": 1, "rounds": 1}
    for most, drawn in ((None, False), (4, True), (5, False), (50, False)):
        assert ("the clients scored" in summary.meaning({**config, "eval_clients": most})) == drawn


@pytest.mark.long
def test_any_model_can_be_exported_whoever_was_scored(rows, tmp_path, monkeypatch):
    """Newcomers find their place by images, which are then staged as well."""
    out, _ = rows(*TRIED, *DRAWN, "--images", "staged")
    whole, _ = rows(*TRIED)
    held = []
    for run, most in ((out, 0), (whole, memory.RESIDENT)):
        monkeypatch.setattr(memory, "RESIDENT", most)
        folder = tmp_path / run.name.replace(" ", "")
        plan = export.Plan(Export(str(run), model="all", to="npz", out=str(folder)))
        assert plan.problem.staged is (most == 0)
        plan.execute()
        held.append({path.name: dict(np.load(path)) for path in folder.glob("*.npz")})
    assert len(held[0]) == 10
    for name, arrays in held[0].items():
        for key in arrays.keys() - {"meta"}:
            np.testing.assert_array_equal(arrays[key], held[1][name][key])


def test_of_many_clients_a_map_is_drawn_of_those_that_are_scored():
    config = parse("compare --clients 10000 --clients-per-round 64 --eval-clients 200".split())[1]
    assert not client_map.is_drawn(config.clients)
    assert client_map.is_drawn(sum(config.scored))
