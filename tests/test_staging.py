"""Images that are staged, read as they are drawn, give the numbers of images that are all on the device."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments.cli import parse
from experiments.commands.compare import Plan
from experiments.engine import parts

OPTIONS = (
    "compare --clients 4 --holdout-clients 2 --partition dirichlet:1 --minimum 4 --rounds 4 --eval-every 2 --seeds 2 "
    "--local-steps 2 --batch 3 --rank 2 --test-images 7"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of images, of three classes that can be told apart, in two domains; its cache."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(150):
        path = root / "data" / f"domain{i % 2}" / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        x = rng.integers(0, 120, (8, 8, 3)) + 60 * (i % 3)
        Image.fromarray(x.astype(np.uint8)).save(path)
    return root


@pytest.fixture(autouse=True)
def own_cache(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


def run(folder, out, images, *more):
    options = [*OPTIONS, "--data", str(folder / "data"), "--images", images, "--out", str(out), *more]
    plan = Plan("compare", parse(options)[1])
    assert plan.problem.staged is (images == "staged")
    plan.execute()
    return (out / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    "more",
    [
        "--methods fedit,hyperlora",
        "--methods hilora:root=0.4:cluster=0.6 --clients-per-round 2",
        "--methods fedit+scaffold,ditto --rank 1,2 --clients-per-round 3 --augment flip",
        "--methods fedit --adapt-last 1 --prefix stored --seeds-at-once 2",
        "--methods fedit --adapt-last 1 --prefix anew --chunk 2 --local-epochs 0.3",
    ],
)
def test_every_row_is_the_same_to_the_last_bit(more, folder, tmp_path, monkeypatch, capsys):
    resident = run(folder, tmp_path / "resident", "resident", *more.split())
    assert run(folder, tmp_path / "staged", "staged", *more.split()) == resident
    monkeypatch.setattr(parts, "STAGE", 1)  # a part for every round, and for the clients scored at once
    assert run(folder, tmp_path / "split", "staged", *more.split()) == resident
    rows = [json.loads(line) for line in resident.splitlines()]
    assert len({row["loss"] for row in rows}) > 1
    assert "client_positions" in rows[-1]
