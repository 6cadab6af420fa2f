"""Images that are staged, read as they are drawn, give the numbers of images that are all on the device."""

import functools
import itertools
import json
import os
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from input_helpers import PLAIN, change
from PIL import Image

from experiments.__main__ import main
from experiments.cli import parse
from experiments.commands.compare import Plan
from experiments.config import Config
from experiments.engine import evaluation, parts, reading, staging
from experiments.engine.trial import Trial
from experiments.results.checkpoints import Checkpoints
from experiments.setup import data, memory, on_disk, problem
from models import archive

OPTIONS = (
    "compare --clients 4 --holdout-clients 2 --partition dirichlet:1 --minimum 4 --rounds 4 --eval-every 2 --seeds 2 "
    "--batch 3 --rank 2 --test-images 7"
).split()
DRAWN = f"--methods fedit+scaffold --clients-per-round 3 --rank 1,2 --augment flip --chunk 1 {' '.join(PLAIN)}"
DRAWN += " --local-epochs 0.3"
JUDGED = f"--methods pfedme+signature_bias:warmup=1 --clients-per-round 3 --rank 1,2 {' '.join(PLAIN)}"
STORED = "--methods fedit --adapt-last 1 --prefix stored --seeds-at-once 2 --clients-per-round 2 --rounds 2"
FEDIT = f"--methods fedit {' '.join(PLAIN)}"
STEPS = lambda more: [] if "--local-epochs" in more else ["--local-steps", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of images, of three classes that can be told apart, in two domains; and runs on it."""
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


@pytest.fixture(scope="module")
def resident(folder):
    """The rows of a run whose images are resident, computed once."""
    numbers = itertools.count()
    return functools.cache(lambda more: run(folder, folder / f"resident{next(numbers)}", "resident", more))


def typed(folder: Path, out: Path, images: str, more: str) -> list[str]:
    return [
        *OPTIONS,
        "--data",
        str(folder / "data"),
        "--images",
        images,
        "--out",
        str(out),
        *more.split(),
        *STEPS(more),
    ]


def run(folder: Path, out: Path, images: str, more: str) -> bytes:
    plan = Plan("compare", parse(typed(folder, out, images, more))[1])
    assert plan.problem.staged is (images == "staged")
    plan.execute()
    return (out / "metrics.jsonl").read_bytes()


@pytest.mark.long
@pytest.mark.parametrize(
    ("more", "most"),
    [
        pytest.param(DRAWN, 1, id="a round and few clients of unequal work at a time"),
        pytest.param(JUDGED, parts.STAGE, id="queries and signatures"),
        pytest.param(STORED, 1, id="stored tokens"),
    ],
)
def test_every_row_is_the_same_to_the_last_bit(more, most, folder, resident, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "STAGE", most)
    if more == DRAWN:  # of the six clients four are sent models at once: the second four are filled up
        monkeypatch.setattr(evaluation, "GROUP", 4)
    staged = run(folder, tmp_path / "staged", "staged", more)
    rows, others = ([json.loads(line) for line in each.splitlines()] for each in (resident(more), staged))
    if more == JUDGED:  # XLA fuses what t learns from otherwise where images are an argument: a last place of float32
        named = lambda each: jax.tree_util.tree_leaves_with_path([{**row, "sum": 0} for row in each])
        for (path, one), (same, other) in zip(named(rows), named(others), strict=True):
            assert path == same
            assert one == (other if isinstance(other, str) else pytest.approx(other, rel=1e-6, nan_ok=True))
    else:
        assert staged == resident(more)
    assert len({row["loss"] for row in rows}) > len(rows) / 2  # methods begin alike
    assert "client_positions" in rows[-1]


@pytest.mark.long
def test_a_part_sees_what_it_draws_and_no_more(folder, monkeypatch):
    """And one that may see little has one round of one seed, and the clients that are scored at once."""
    config = parse(typed(folder, folder / "none", "staged", f"{FEDIT} --chunk 1 --clients-per-round 2"))[1]
    p = problem.build(config, may_stage=True)
    trial = staging.Staged(config, p, *_method_and_start(config, p))
    assert (trial.sizes.seeds, trial.sizes.rounds, trial.sizes.clients) == (1, 2, 6)
    monkeypatch.setattr(parts, "STAGE", 1)
    small = staging.Staged(config, p, *_method_and_start(config, p))
    assert (small.sizes.rounds, small.sizes.clients) == (1, 1)
    assert small.sizes.by_rounds == 2 * 2 * 3  # clients, steps, batch
    shown, _ = small._of_rounds(1, 3)  # of the second seed, after three rounds
    drawn = np.unique(np.concatenate([np.ravel(x) for x in jax.tree.leaves(small._draws.of_rounds(1, 3))]))
    np.testing.assert_array_equal(shown.train[0][: len(drawn)], p.train[0][drawn])
    np.testing.assert_array_equal(shown.train[1][: len(drawn)], p.train[1][drawn])
    rows = np.asarray(p.clients.population.rows[1])
    for place, row in zip(shown.rows[0].ravel(), rows.ravel(), strict=True):
        assert place == (np.searchsorted(drawn, row) if row in drawn else 0)


def _method_and_start(config, p):
    trial = Trial(config, p, "fedit")
    return trial.method, trial.course._start


@pytest.mark.long
def test_images_that_end_while_a_run_goes_on_are_said_and_nothing_is_lost(
    folder, resident, tmp_path, monkeypatch, capsys
):
    """What is decoded is cut off after the first checkpoint. Gone on with, resident, it ends with the same bytes."""
    more = f"{FEDIT} --checkpoint-every 2 --rounds 8 --seeds 1"
    whole, save = resident(more), Checkpoints.save

    def cut(self, rounds_done, *rest):
        save(self, rounds_done, *rest)
        (x,) = (folder / "cache" / "fedlora-jax-images").glob("*/x")
        os.truncate(x, 1000)

    monkeypatch.setattr(Checkpoints, "save", cut)
    monkeypatch.setattr(sys, "argv", ["experiments", *typed(folder, tmp_path / "run", "staged", more)])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: cannot read the images in "), said
    assert said.endswith("bytes; what has been computed is kept, so start again, with --resume, when they are there")
    assert list((tmp_path / "run" / "checkpoints" / "fedit" / "0-1").iterdir())
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    assert run(folder, tmp_path / "run", "resident", f"{more} --resume") == whole


def test_images_are_staged_where_they_take_more_than_half_of_memory(monkeypatch):
    for have, staged in ((200, False), (199, True), (None, False)):
        monkeypatch.setattr(memory, "available", lambda have=have: have)
        assert problem.is_staged(Config(), 100) is staged
        assert problem.is_staged(Config(images="staged"), 100)
        assert not problem.is_staged(Config(images="resident"), 100)


def test_images_of_a_npz_larger_than_memory_are_read_as_they_are_needed(tmp_path, monkeypatch):
    change()(tmp_path / "whole.npz")
    whole = data.load(str(tmp_path / "whole.npz"))
    monkeypatch.setattr(memory, "RESIDENT", 0)
    monkeypatch.setattr(archive, "_memory", lambda: 4000)  # all but x
    images = data.load(str(tmp_path / "whole.npz"))
    assert isinstance(images.x, on_disk.OnDisk)
    assert images.fingerprint() == whole.fingerprint()
    for some in (lambda x: data.of_classes(x, ["c", "a"]), lambda x: data.validation(x, 0.25)):
        np.testing.assert_array_equal(np.asarray(some(images).x), some(whole).x)
    np.savez_compressed(tmp_path / "packed.npz", **np.load(tmp_path / "whole.npz"))
    with pytest.raises(ValueError, match=r"of images x as np.savez writes them, not packed"):
        data.load(str(tmp_path / "packed.npz"))
    monkeypatch.setattr(archive, "_memory", lambda: 2**40)
    built = problem.build(
        Config(data=str(tmp_path / "whole.npz"), clients=4, holdout_clients=0, minimum=2), may_stage=True
    )
    assert built.staged


def test_what_needs_all_images_at_once_says_so(tmp_path, monkeypatch):
    change()(tmp_path / "data.npz")
    config = Config(data=str(tmp_path / "data.npz"), minimum=2)
    monkeypatch.setattr(memory, "available", lambda: 50_000)  # bytes
    with pytest.raises(ValueError, match=r"96 images of 16 x 16 take .*, or compare and run, which need not hold all"):
        problem.build(config)
    with pytest.raises(ValueError, match=r"--images staged is of compare and run: .* leave it out"):
        problem.build(Config(data=config.data, images="staged"))


@pytest.mark.long
def test_a_dry_run_says_where_images_are(folder, capsys):
    """Of resident ones: ``test_kept``."""
    Plan("compare", parse(typed(folder, folder / "none", "staged", FEDIT))[1]).forecast()
    text = "--images staged: 150 images (0.0 MiB) stay on disk; a round draws 0.0 MiB of them, in "
    assert text in capsys.readouterr().out


def test_arrays_on_disk_are_indexed_as_in_memory(tmp_path):
    held = np.random.default_rng(0).normal(size=(20, 3, 2)).astype(np.float32)
    x = on_disk.scratch(tmp_path, held.shape, held.dtype)
    x[0:13], x[13:20] = held[:13], held[13:]
    assert not list(tmp_path.iterdir())
    assert (x.shape, x.ndim, x.size, x.nbytes, len(x)) == ((20, 3, 2), 3, 120, 480, 20)
    mask = held[:, 0, 0] > 0
    for index in (3, -1, slice(2, 19, 3), np.array([7, 7, 0, 1, 2]), mask, np.array([[1, 2], [4, 0]]), [5]):
        np.testing.assert_array_equal(x[index], held[index])
    np.testing.assert_array_equal(x[4:9, 1, 0], held[4:9, 1, 0])
    np.testing.assert_array_equal(x[4, 1], held[4, 1])
    some = x.of(np.flatnonzero(mask)).of(np.array([3, 1, 1]))
    np.testing.assert_array_equal(some, held[mask][[3, 1, 1]])
    np.testing.assert_array_equal(np.stack(list(some)), held[mask][[3, 1, 1]])
    with pytest.raises(IndexError):
        x[20]


def test_one_part_is_made_while_one_is_used_and_no_more():
    made, go = [], threading.Semaphore(0)

    def make(i):
        go.acquire()
        made.append(i)
        if i == 3:
            raise OSError("lost")
        return i

    parts_ahead = reading.ahead(functools.partial(make, i) for i in range(5))
    go.release()
    assert next(parts_ahead) == 0
    go.release(9)
    for i in (1, 2):
        assert next(parts_ahead) == i
        assert max(made) <= i + 1
    with pytest.raises(OSError, match="lost"):
        next(parts_ahead)
