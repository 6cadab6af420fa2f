"""The budget experiment: choices on other images and seeds than scores, claims paired by seed, costs charged."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from input_helpers import PLAIN, change

from experiments.__main__ import main
from experiments.commands import budget
from experiments.config import Config
from experiments.results import budget_claims, budget_figures, summary
from experiments.results.folder import sealed, write_json
from experiments.setup import data, problem
from fedlora_jax import fedit

TAUS = ("0", "1", "2", "5", "10")


def entry(method: str, steps: int, accuracy: float, validation: float, tau: int = 0) -> dict:
    rng = np.random.default_rng(steps)
    seeds = accuracy + 0.01 * rng.normal(size=4)
    scores = {0: validation - 0.02 * (tau > 0), tau: validation}  # steps of their own help who takes them
    curve = {t: summary.spread((seeds + 0.001 * int(t)).tolist()) for t in TAUS}
    return {
        "method": method, "about": {"name": method, "arxiv": ""}, "steps": steps, "lr": 0.1, "tau": tau,
        "passes": steps,
        "validation": [{"lr": 0.1, "tau": t, "accuracy": a} for t, a in scores.items()], "training_clients": curve,
        "unseen_clients": curve, "rounds": [1, 2], "personal_by_round": [[0.5, accuracy]] * 4,
        "global_by_round": [[0.5, accuracy]] * 4, "global": summary.spread(seeds.tolist()),
    }  # fmt: skip


ENTRIES = [
    entry("fedit", 1, 0.70, 0.7),
    entry("fedit", 5, 0.80, 0.81, tau=5),
    entry("flexlora", 1, 0.71, 0.6),
    entry("flexlora", 5, 0.90, 0.80),  # better on test images; validation did not know
    entry("hyperlora", 1, 0.79, 0.75),
    entry("hyperlora", 5, 0.85, 0.85),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("budget") / "data.npz"
    change()(path)
    return str(path)


def test_a_claim_compares_with_the_baseline_that_validation_prefers():
    claims = [c for c in budget_claims.claims(ENTRIES) if c["kind"] == "training"]
    assert [(c["steps"], c["baseline"], c["baseline_steps"]) for c in claims] == [(1, "fedit", 5)] * 2
    own, other, less = (np.array(budget_claims.served_at(ENTRIES[i], "training_clients")["seeds"]) for i in (4, 1, 0))
    np.testing.assert_allclose(claims[0]["difference"]["seeds"], own - other)
    np.testing.assert_allclose(claims[0]["needed"]["seeds"], other - less)
    sent = next(c for c in budget_claims.claims(ENTRIES) if c["kind"] == "sent")
    assert (sent["steps"], sent["baseline"], sent["baseline_steps"]) == (1, "flexlora", 5)  # 0.80 as sent, fedit 0.79
    own, theirs = (np.array(ENTRIES[i]["training_clients"]["0"]["seeds"]) for i in (4, 3))
    np.testing.assert_allclose(sent["difference"]["seeds"], own - theirs)
    serving = [c for c in budget_claims.claims(ENTRIES) if c["kind"] == "serving" and c["steps"] == 5]
    own = np.array(ENTRIES[5]["training_clients"]["0"]["seeds"])
    np.testing.assert_allclose(serving[0]["difference"]["seeds"], own - other)
    assert serving[0]["needed"]["mean"] > 0  # five steps were worth 0.005


def test_what_is_generated_beside_a_baseline_is_none():
    """It has a claim of its own, and changes nobody else's."""
    beside = [entry("fedit+signature_adapter", steps, 0.95, 0.95) for steps in (1, 5)]
    claims = budget_claims.claims([*ENTRIES, *beside])
    own = [c for c in claims if c["method"] == "fedit+signature_adapter"]
    assert {(c["steps"], c["baseline"]) for c in own if c["kind"] == "training"} == {(1, "fedit")}
    assert [c for c in claims if c not in own] == budget_claims.claims(ENTRIES)


def test_reaching_a_target_counts_rounds_and_passes():
    assert budget_claims.to_target(ENTRIES[3], 0.85) == (2, 10)
    assert budget_claims.to_target(ENTRIES[0], 0.85) is None


def test_entries_that_are_not_as_they_were_written_are_computed_again(tmp_path, capsys):
    path = tmp_path / "budget.json"
    assert budget.held_in(path) == []
    write_json(path, {"entries": [sealed(e) for e in ENTRIES]})
    assert budget.held_in(path) == ENTRIES
    assert not capsys.readouterr().err
    text = path.read_text()
    path.write_text(text.replace('"lr": 0.1', '"lr": 0.2', 1))
    assert budget.held_in(path) == ENTRIES[1:]
    assert capsys.readouterr().err.count("\n") == 1
    for other in ("", "[]", "null", '{"entries": 3}', text[:-100]):
        path.write_text(other)
        assert budget.held_in(path) == []
        assert "is damaged" in capsys.readouterr().err


def test_the_table_and_the_pictures_show_every_entry():
    result = {
        "config": {"target": 0.75},
        "entries": ENTRIES,
        "claims": budget_claims.claims(ENTRIES),
        "taus": [0, 1, 2, 5, 10],
    }
    text = budget_claims.table(result)
    assert text.count("\nfedit") == 5
    assert "2 / 10" in text
    assert "79.0" in text
    assert "hyperlora (1 step per round) against fedit (5), clients never seen" in text
    figures = budget_figures.draw(result)
    assert set(figures) == {"budget", "steps", "cost"}
    assert len(figures["budget"].axes[0].lines) == 3


def test_validation_images_are_training_images():
    images = data.load("digits")
    own = data.validation(images, 0.25)
    assert len(own.x) == (~images.test).sum()
    np.testing.assert_array_equal(own.x, images.x[~images.test])
    np.testing.assert_allclose(own.test.mean(), 0.25, atol=0.03)


@pytest.mark.long
def test_a_budget_goes_on_where_it_was_cut_off_and_takes_more_methods(small, tmp_path, monkeypatch, capsys):
    cells: list[tuple[str, int]] = []

    def compute(plan: budget.Plan, name: str, steps: int) -> dict:
        cells.append((name, steps))
        if len(cells) == 2:
            raise KeyboardInterrupt
        return entry(name, steps, 0.8, 0.8)

    def run(options: str) -> None:
        same = f"--clients 6 --holdout-clients 2 --minimum 4 --partition iid --seeds 2 --tuning-seeds 7, --data {small}"
        monkeypatch.setattr(
            sys,
            "argv",
            ["experiments", "budget", *same.split(), *PLAIN, "--out", str(tmp_path / "out"), *options.split()],
        )
        main()

    monkeypatch.setattr(budget.Plan, "_entry", compute)
    with pytest.raises(KeyboardInterrupt):
        run("--methods fedit --budgets 1,5")
    run("--methods fedit,hyperlora --budgets 1,5 --resume")
    assert cells == [("fedit", 1), ("fedit", 5), ("fedit", 5), ("hyperlora", 1), ("hyperlora", 5)]
    written = json.loads((tmp_path / "out" / "budget.json").read_text())
    assert [(e["method"], e["steps"]) for e in written["entries"]] == [("fedit", 1), *cells[2:]]
    assert written["config"]["methods"] == ["fedit", "hyperlora"]
    for options, told in (
        ("--local-steps 3", "unrecognized"),
        ("--rounds 3 --resume", "rounds was 10, is 3"),
        ("", "--resume"),
    ):
        with pytest.raises(SystemExit):
            run(f"--methods fedit --budgets 1,5 {options}")
        assert told in capsys.readouterr().err


TELLS = """
from fedlora_jax import fedit, meta


def tells(query=4):
    return fedit()._replace(meta_gradient=meta.first_order, query=query)
"""


@pytest.mark.long
def test_a_small_experiment_from_the_command_line(small, tmp_path, monkeypatch, capsys):
    """Of a method whose clients tell a gradient on images that they keep apart, which is another pass."""
    out, own = tmp_path / "out", f"{tmp_path / 'mine.py'}:tells"
    (tmp_path / "mine.py").write_text(TELLS)
    options = (
        f"--methods {own} --clients 4 --holdout-clients 2 --minimum 5 --rounds 2 "
        "--seeds 2 --batch 4 --partition iid --budgets 1 --lrs 0.05,0.2 --tuning-seeds 7, --eval-every 2"
    ).split() + PLAIN
    monkeypatch.setattr(budget, "TAUS", (0, 1, 10))
    monkeypatch.setattr(sys, "argv", ["experiments", "budget", *options, "--data", small, "--out", str(out)])
    main()
    assert "clients never seen" in capsys.readouterr().out
    result = json.loads((out / "budget.json").read_text())
    assert {p.name for p in out.iterdir()} == {"config.json", "budget.json", "budget.png", "steps.png", "cost.png"}
    for e, passes in zip(result["entries"], (2,), strict=True):
        best = max(e["validation"], key=lambda v: v["accuracy"])
        assert (e["lr"], e["tau"]) == (best["lr"], best["tau"])
        assert e["passes"] == passes
        assert len(e["unseen_clients"]["10"]["seeds"]) == 2


@pytest.mark.long
def test_what_chooses_a_rate_is_scored_after_the_steps_that_are_asked_for(config):
    own = dataclasses.replace(config, rounds=1, eval_every=1, batch=4, model=PLAIN[1], signature="constant")
    built = problem.build(own)
    scored = {taus: budget.program(own, built, fedit(), 1, taus)((0.5,)).clients[0] for taus in ((0, 2), (2, 1, 0))}
    np.testing.assert_array_equal(scored[0, 2], scored[2, 1, 0][:, ::-2])
    assert (scored[0, 2][:, 1] != scored[2, 1, 0][:, 1]).any()  # other scores than after one step


def test_of_many_clients_those_are_counted_that_are_scored():
    config = Config(clients=100, holdout_clients=5, eval_clients=2, eval_every=1, rounds=1)
    clients = np.broadcast_to([1.0, 0.5, 0.25, np.nan], (3, len(TAUS), 4))
    held = budget._numbers(config, budget.Outcome(clients, np.zeros((3, 1)), np.zeros((3, 1))))
    assert {held["training_clients"][t]["mean"] for t in TAUS} == {0.75}
    assert {held["unseen_clients"][t]["mean"] for t in TAUS} == {0.25}


@pytest.fixture(scope="module")
def config(small):
    return Config(seeds=(0,), clients=4, holdout_clients=2, minimum=4, partition="iid", data=small)


@pytest.fixture(scope="module")
def true(config):
    return _signatures(config)


@pytest.mark.parametrize("kind", ["shuffled", "constant", "random", "label_free", "noisy", "prototypes+shuffled"])
def test_what_clients_tell_can_be_made_a_control(kind, config, true):
    told = _signatures(dataclasses.replace(config, signature=kind))
    if kind == "label_free":
        assert told.labels.shape[-1] == 0
        np.testing.assert_array_equal(told.shape, true.shape)
        return
    assert told.shape.shape == true.shape.shape or "prototypes" in kind
    z, t = true.shape[0], told.shape[0]  # [clients, views, m]
    match kind:
        case "shuffled":
            np.testing.assert_array_equal(t[[1, 2, 3, 0, 5, 4]], z)
        case "constant":
            np.testing.assert_allclose(t, np.broadcast_to(z[:4, 0].mean(0), t.shape), atol=1e-6)
        case "random":
            assert abs(np.corrcoef(t[:, 0].ravel(), z[:, 0].ravel())[0, 1]) < 0.2
            np.testing.assert_array_equal(t[:, 0], t[:, 1])  # a fixed tag for each client
        case "prototypes+shuffled":
            where = _signatures(dataclasses.replace(config, signature="prototypes")).shape[0]
            np.testing.assert_array_equal(t[[1, 2, 3, 0, 5, 4]], where)
        case "noisy":
            assert 0.2 < np.std(t - np.clip(z, -3, 3)) < 0.4


def _signatures(config: Config) -> SimpleNamespace:
    return SimpleNamespace(**jax.tree.map(np.asarray, problem.build(config).clients.population.signatures)._asdict())
