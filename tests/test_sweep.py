"""A sweep: one compiled program for all values, and each point what a run with these options reports."""

import json

import numpy as np
import pytest
from input_helpers import PLAIN, change

from experiments.cli import parse
from experiments.commands import compare, sweep
from experiments.engine import methods
from experiments.results import sweep_figures
from experiments.results.summary import measures

SMALL = (
    "--partition iid --clients 4 --holdout-clients 2 --minimum 2 --rounds 2 --seeds 2 --local-steps 2 --batch 4"
).split() + PLAIN


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    change()(folder / "data.npz")
    return [*SMALL, "--data", str(folder / "data.npz")]


def plan(*arguments: str) -> sweep.Plan:
    return sweep.Plan(parse(["sweep", *arguments])[1])


@pytest.mark.long
def test_all_values_and_seeds_are_one_program_and_each_point_is_a_run(small, tmp_path, compilations, monkeypatch):
    out = tmp_path / "swept"
    swept = plan(*"--methods fedit+proximal --vary mu=0,1 --lrs 0.2,1e30".split(), *small, "--out", str(out))
    compilations.clear()
    swept.execute()
    assert len(compilations) == 1, "one program for four points and two seeds"
    assert {p.name for p in out.iterdir()} == {"summary.json", "sweep.png"}
    found = json.loads((out / "summary.json").read_text())["entries"]
    assert [(e["lr"], e["value"], e["diverged"]) for e in found] == [
        *[(0.2, mu, []) for mu in (0, 1)],
        *[(1e30, mu, [0, 1]) for mu in (0, 1)],
    ]
    assert "global_accuracy" not in found[2], "what diverged has no results, and spoils no others"
    monkeypatch.setattr(compare.report, "write", lambda *_: "")
    for i, entry in enumerate(found[:2]):
        assert entry["run"] == f"--method fedit+proximal:mu={i} --lr 0.2"
    ran = tmp_path / "ran"
    compare.Plan(*parse(["run", *found[1]["run"].split(), *small, "--out", str(ran)])).execute()
    (same,) = json.loads((ran / "summary.json").read_text())["methods"].values()
    for name in measures():
        np.testing.assert_allclose(found[1][name]["last5"]["seeds"], same[name]["last5"]["seeds"], atol=1e-4)
    assert np.abs(np.subtract(*(e["bias"]["last"]["seeds"] for e in found[:2]))).min() > 1e-6, "every value arrives"


@pytest.mark.long
def test_a_method_that_is_built_for_the_learning_rate_is_given_the_traced_one(small, tmp_path):
    swept = plan(*"--methods fedit+scaffold --lrs 0.1,0.2".split(), *small, "--out", str(tmp_path / "out"))
    assert list(swept.lowered) == ["fedit+scaffold"]


REFUSED = {
    "an option nobody has": ("--methods lora_fair --vary mu=0,1", "no part has such a number"),
    "an option only one method has": ("--methods lora_fair,fedit --vary lam=0,1", "no part has such a number in fedit"),
    "an option several parts have": ("--methods fedit+signature_bias+fedavgm --vary lr=0.1,1", "several parts have"),
    "an option that is set": ("--methods lora_fair:lam=1 --vary lam=0,1", "sets it already"),
    "an option that is no real number": ("--methods lora_fair --vary steps=1,2", "no part has such a number"),
    "a value that a method refuses": ("--methods ditto --vary lam=0,-1", "lam must be at least 0"),
    "a value twice": ("--methods ditto --vary lam=1,1", "different finite numbers"),
    "no values": ("--methods ditto --vary lam", "different finite numbers"),
    "a value that is no number": ("--methods ditto --vary lam=much", "different finite numbers"),
    "a learning rate of 0": ("--methods ditto --lrs 0,0.1", "--lrs must be above 0, got 0"),
    "a number that decides what is computed": ("--methods finetune --vary share=0.2,0.5", "programs of their own"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_swept_is_refused_before_anything_compiles(case, small, tmp_path, compilations):
    options, reason = REFUSED[case]
    built_in = [option for option in small if option not in PLAIN]  # a user's model may compile to be there at all
    with pytest.raises(ValueError, match=reason):
        plan(*options.split(), *built_in, "--out", str(tmp_path / "out"))
    assert not compilations
    assert not (tmp_path / "out").exists()


def test_an_option_is_found_in_the_part_that_has_it():
    spec = "fedit+proximal+signature_bias:start=0.5+fedavgm"
    set_there = spec.replace("proximal", "proximal:mu=0.1")
    assert methods.with_option(spec, methods.find(spec, "mu"), 0.1) == set_there
    assert methods.find(spec, "fedavgm:lr") == methods.Varied(3, "lr")


def test_the_picture_has_a_line_for_each_method_and_learning_rate():
    spread = {"mean": 0.5, "std": 0.1, "ci95": [0.4, 0.6], "seeds": [0.4, 0.6]}
    own = {"diverged": [], "about": {"name": "M", "arxiv": ""}}
    own |= {key: {"last5": spread} for key in sweep_figures.PANELS}
    entries = [own | {"method": m, "lr": lr, "value": v} for m in "ab" for lr in (0.1, 0.2) for v in (0.0, 0.1, 1.0)]
    entries[0] = {"method": "a", "lr": 0.1, "value": 0.0, "diverged": [0], "about": own["about"]}
    config = {"eval_every": 1, "rounds": 5}
    figure = sweep_figures.draw({"option": "mu", "entries": entries, "config": config})
    assert [len(axes.lines) for axes in figure.axes] == [4, 4]
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["0", "0.1", "1"]
    assert len(figure.axes[0].lines[0].get_xdata()) == 2, "what diverged has no point"
    assert len(sweep_figures.draw({"option": None, "entries": entries[:3], "config": config}).axes) == 2
