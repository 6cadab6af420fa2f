"""Bad input: exit code 2, one clear line, nothing written, before anything compiles."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from input_helpers import SMALL, change, cut_in_half, refused

ROOT = Path(__file__).parents[1]
OPTIONS = {
    "no command": ("", "required"),
    "unknown command": ("dance", "dance"),
    "unknown option": ("compare --rank 4 --colour red", "--colour"),
    "unknown method": ("compare --methods fedit,fed_it", "did you mean fedit"),
    "method twice": ("compare --methods fedit,fedit", "once"),
    "run without a method": ("run", "--method"),
    "an option that the method lacks": ("run --method fedit:lam=1", "it has none"),
    "an option that is misspelt": ("run --method hyperlora:kapa=1", "it has mode=displacement"),
    "an option that is no number": ("run --method lora_fair:lam=much", "lam must be float"),
    "a mode that does not exist": ("run --method hyperlora:mode=guess", "displacement or frozen, got 'guess'"),
    "what was learned, missing": ("run --method hyperlora --theta nowhere.npz", "cannot read what a method learned"),
    "what was learned for other signatures": ("run --method hyperlora --theta {theta}", "another signature"),
    "queries of clients with one image": ("run --method hyperlora:mode=exact --minimum 1", "must be at least 2"),
    "unknown signature": ("run --method hyperlora --signature vague", "--signature must be one of"),
    "groups of data that have none": (
        "run --method hyperlora --signature group",
        "--signature group: data has no columns",
    ),
    "stragglers of a single step": ("run --method fedit --stragglers 0.5 --local-steps 1", "no step before it"),
    "all of the training images set apart": ("run --method fedit --validation 1", "below 1"),
    "more blocks than there are": ("run --method fedit --adapt-last 5", "choose 1 to 3"),
    "budgets without unseen clients": ("budget --methods fedit {small}", "--holdout-clients 0"),
    "meta-training with a single client": (
        "budget --methods hyperlora {small} --clients 1 --holdout-clients 1",
        "at least 2 and 1",
    ),
    "a budget that is not scored": ("budget --methods fedit {small} --holdout-clients 1 --budgets 3", "1, 2, 5, 10"),
    "rank 0": ("run --method fedit --rank 0", "--rank must be at least 1"),
    "rank that is no number": ("run --method fedit --rank four", "'four'"),
    "rank larger than the layer": ("run --method fedit --rank 65", "choose a rank from 1 to 64"),
    "one of the ranks too large": ("run --method fedit --rank 4,128", "choose a rank from 1 to 64"),
    "chunk that does not divide": ("run --method fedit --chunk 3", "--chunk 3 does not divide"),
    "chunk 0": ("run --method fedit --chunk 0", "--chunk must be at least 1"),
    "no clients": ("run --method fedit --clients 0", "--clients must be at least 1"),
    "more clients than images": ("run --method fedit --clients 200", "200 clients"),
    "more clients per round than clients": ("run --method fedit --clients-per-round 5", "more than --clients 4"),
    "negative holdout": ("run --method fedit --holdout-clients -1", "--holdout-clients must be at least 0"),
    "minimum out of reach": ("run --method fedit --minimum 50", "at least 50"),
    "no rounds": ("run --method fedit --rounds 0", "--rounds must be at least 1"),
    "no steps": ("run --method fedit --local-steps 0", "--local-steps must be at least 1"),
    "batch 0": ("run --method fedit --batch 0", "--batch must be at least 1"),
    "learning rate 0": ("run --method fedit --lr 0", "--lr must be above 0"),
    "learning rate nan": ("run --method fedit --lr nan", "--lr must be above 0"),
    "scale 0": ("run --method fedit --scale 0", "--scale"),
    "rounds beyond all bounds": (
        "run --method fedit --rounds 1000000000000",
        "--rounds must be at least 1 and at most",
    ),
    "local steps beyond all bounds": ("run --method fedit --local-steps 1000000000000", "--local-steps must be"),
    "a batch beyond all bounds": ("run --method fedit --batch 1000000000000", "--batch must be"),
    "devices beyond all bounds": (
        "run --method fedit --devices 100000",
        "--devices must be at least 1 and at most 1024",
    ),
    "a count of seeds beyond all bounds": ("run --method fedit --seeds 1000000000", "means 1000000000 seeds"),
    "a range of seeds beyond all bounds": ("run --method fedit --seeds 5:3000000000", "means 2999999995 seeds"),
    "a range of no seeds": ("run --method fedit --seeds 5:5", "5:5 holds no seeds"),
    "a scale that float32 cannot hold": ("run --method fedit --scale 1e300", "--scale must be at least -1000000"),
    "a learning rate that float32 flushes to 0": ("run --method fedit --lr 1e-60", "float32 cannot hold"),
    "a validation share that sets nothing apart": ("run --method fedit --validation 1e-9", "use another --validation"),
    "alpha beyond all bounds": ("run --method fedit --partition dirichlet:1e999", "above 0, got inf"),
    "classes beyond all bounds": ("run --method fedit --partition classes:1e400", "above 0, got inf"),
    "classes beyond all clients": ("run --method fedit --partition classes:1e30", "more classes than there are"),
    "images beyond all memory": ("run --method fedit --image-size 16000", "GiB of memory"),
    "batches beyond all memory": ("run --method fedit --batch 100000 --local-steps 100000", "GiB of memory"),
    "a method that keeps more than there is": ("run --method pfedhn:size=2000000000", "GiB of memory"),
    "a method too long to name a file": (f"run --method fedit{':lam=1' * 400}", "at most 200 letters"),
    "a method that is a path": ("run --method fedit/../..", "is no method"),
    "commas for targets": ("run --method fedit --targets ,,", "--targets is empty"),
    "commas for what is trained in full": ("run --method fedit --full ,", "--full is empty"),
    "no folder": ("run --method fedit --out=", "--out is empty"),
    "no data": ("run --method fedit --data=", "--data is empty"),
    "no weights": ("run --method fedit --weights=", "--weights is empty"),
    "no theta": ("run --method fedit --theta=", "--theta is empty"),
    "two dashes for data": ("run --method fedit --data=--", "--data: expected one argument"),
    "no methods": ("compare --methods=", "--methods is empty"),
    "an empty method": ("compare --methods fedit,,lora_fair", "--methods is empty or has an empty entry"),
    "a penalty that is no number": (
        "run --method fedit+proximal:mu=nan",
        "'proximal:mu=nan': mu must be a finite number",
    ),
    "a penalty without end": ("run --method lora_fair:lam=inf", "'lora_fair:lam=inf': lam must be a finite number"),
    "a bound without end": ("run --method fedit+clip:bound=inf", "'clip:bound=inf': bound must be a finite number"),
    "a method's rate that is no number": ("run --method fedit+signature_bias:lr=nan", "lr must be a finite number"),
    "noise that float32 cannot hold": (
        "run --method fedit+dp:noise=1e300",
        "float32 cannot hold",
    ),
    "steps that int32 cannot hold": ("run --method lora_fair:steps=1000000000000", "int32 cannot hold"),
    "an option set twice": (
        "run --method fedit+clip:bound=1:bound=2",
        "'clip:bound=1:bound=2' sets an option more than once",
    ),
    "a switch that is neither": ("run --method lora_fair:squared=yes", "squared must be True or False, got 'yes'"),
    "an option out of its range": ("run --method fedit+proximal:mu=-1", "proximal:mu=-1: mu"),
    "a rate of meta-training without end": ("meta --method hyperlora --meta-lr inf", "--meta-lr must be above 0"),
    "a rate of a sweep that is no number": ("sweep --methods ditto --lrs 0.1,nan", "--lrs must be above 0, got nan"),
    "a value of a sweep without end": ("sweep --methods ditto --vary lam=1,inf", "--vary lam must be a finite number"),
    "unknown optimizer": ("run --method fedit --optimizer lion", "sgd, momentum, adam, adamw"),
    "unknown partition": ("run --method fedit --partition banana", "unknown partition"),
    "partition without its number": ("run --method fedit --partition dirichlet", "lacks its number"),
    "alpha 0": ("run --method fedit --partition dirichlet:0", "above 0"),
    "more classes than there are": ("run --method fedit --partition classes:9", "more classes"),
    "targets that match nothing": ("run --method fedit --targets attn/qvery", "near names"),
    "a broken regular expression": ("run --method fedit --targets attn/(", "regular expression"),
    "a target that is a vector": ("run --method fedit --targets norm/scale", "kernel"),
    "seed twice": ("run --method fedit --seeds 1,1", "--seeds"),
    "no seeds": ("run --method fedit --seeds 0", "--seeds"),
    "a seed too large": ("run --method fedit --seeds 1,5000000000", "--seeds"),
    "target above 1": ("run --method fedit --target 70", "--target"),
    "eval-every that does not divide": ("run --method fedit --rounds 4 --eval-every 3", "--eval-every 3"),
    "image size between patches": ("run --method fedit --image-size 18", "multiple"),
    "no such data": ("run --method fedit --data nowhere.npz", "no data 'nowhere.npz'"),
    "no such weights": ("run --method fedit --weights nowhere.npz", "no weight file"),
    "weights of an unknown kind": ("run --method fedit --weights README.md", "expected a .npz"),
    "weights that hold something else": ("run --method fedit --weights {data}", "not a ViT"),
    "truncated weights": ("run --method fedit --weights {cut}", "truncated"),
    "out below a file": ("run --method fedit --out {data}/deeper", "not a folder"),
    "out that holds something": ("run --method fedit --out {full}", "not empty"),
    "nothing to resume": ("run --method fedit --resume", "nothing to resume"),
    "resume of another run": ("run --method fedit --resume --out {other}", "belongs to another configuration"),
}

LATE = {  # what shows only once a model has been loaded, or described its images
    "images larger than a model's memory": ("run --method fedit --image-size 2048", "GiB of memory"),
    "queries beyond all memory": ("run --method ifca:query=2000000000", "GiB of memory"),
    "rounds to bounds beyond all memory": (
        "bounds --data {data} --partition iid --clients 4 --holdout-clients 0 --local-steps 1000000 --rounds 1000",
        "GiB of memory",
    ),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("input")
    change()(folder / "data.npz")
    cut_in_half(folder / "cut.npz")
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("precious")
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text(json.dumps({"config": {"rounds": 7}, "record": {}}))
    np.savez(folder / "theta.npz", **{".generator": np.zeros(3)})
    small = "--clients 4 --holdout-clients 0 --minimum 2 --rounds 2 --seeds 1 --batch 4 --eval-every 1"
    more = {"theta": folder / "theta.npz", "small": f"{small} --data {folder / 'data.npz'} --partition iid"}
    return more | {
        "data": folder / "data.npz",
        "cut": folder / "cut.npz",
        "full": folder / "full",
        "other": folder / "other",
    }


@pytest.mark.parametrize("case", OPTIONS | LATE)
def test_options(case, places, tmp_path, capsys, monkeypatch, compilations):
    text, reason = (OPTIONS | LATE)[case]
    own = text.format(**places).split()
    out = tmp_path / "out"
    if own[:1] in (["run"], ["compare"]):
        defaults = [*SMALL, "--data", str(places["data"]), "--partition", "iid", "--out", str(out)]
        own = [own[0], *defaults, *own[1:]]  # the case's own options come last and win
    assert reason in refused(own, capsys, monkeypatch)
    assert not out.exists()
    assert case in LATE or not compilations
    assert [p.name for p in places["full"].iterdir()] == ["thesis.txt"]
    assert [p.name for p in places["other"].iterdir()] == ["config.json"]


@pytest.mark.long
def test_as_a_process_there_is_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "run", "--method", "fediit", "--out", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr == f"error: {done.stderr[len('error: ') :].strip()}\n"
    assert "did you mean fedit" in done.stderr
    assert not (tmp_path / "out").exists()


def test_another_package_called_models_is_named(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "compare"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert f"found {tmp_path / 'models' / '__init__.py'}: run from {ROOT}" in done.stderr.splitlines()[-1]
