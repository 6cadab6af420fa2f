"""What clients keep may stay on the host: every row is the same to the last bit, and the device holds a part of it."""

import functools
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from input_helpers import change, refused

from experiments.cli import parse
from experiments.commands.compare import Plan
from experiments.engine import evaluation, kept, parts
from experiments.engine.staging import Staged
from experiments.setup import memory

# A small model that compiles quickly; three of seven clients take part
OPTIONS = (
    "compare --clients 7 --clients-per-round 3 --holdout-clients 2 --partition iid --minimum 4 --rounds 4 "
    "--eval-every 2 --checkpoint-every 2 --local-steps 1 --batch 4 --lr 0.3"
).split()
OWN = f"{Path(__file__).parents[1] / 'examples' / 'own_backbones.py'}:plain"
MODELS = "--methods ditto --seeds 2 --rank 1,2"  # a model of each client's own
# A number, a client's cluster; some are scored, and newcomers have a trial
TRIED = "--methods hilora:root=0.5:cluster=0.25 --seeds 2 --seeds-at-once 2 --eval-clients 4"
IMAGES = f"{MODELS} --images staged"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("kept")
    change()(root / "data.npz")
    return root


def plan(folder: Path, out: str, where: str, more: str) -> Plan:
    files = ["--model", OWN, "--data", str(folder / "data.npz"), "--out", str(folder / out)]
    return Plan("compare", parse([*OPTIONS, *files, "--kept", where, *more.split()])[1])


def rows(folder: Path, out: str) -> bytes:
    return (folder / out / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def resident(folder):
    """The rows of a run whose memory is on the device, computed once."""

    @functools.cache
    def computed(more: str) -> bytes:
        out = f"resident {len(os.listdir(folder))}"
        plan(folder, out, "resident", more).execute()
        return rows(folder, out)

    return computed


@pytest.mark.long
@pytest.mark.parametrize(
    ("more", "most"),
    [
        pytest.param(MODELS, parts.STAGE, id="two rounds at a time"),
        pytest.param(IMAGES, 1, id="a round at a time, of images too"),
        pytest.param(TRIED, 1, id="newcomers"),
    ],
)
def test_every_row_is_the_same_to_the_last_bit(more, most, folder, resident, monkeypatch):
    monkeypatch.setattr(parts, "STAGE", most)
    if more == MODELS:  # the last of three groups is filled up, and one has trained and unseen clients
        monkeypatch.setattr(evaluation, "GROUP", 4)
    out = f"staged {len(os.listdir(folder))}"
    made = plan(folder, out, "staged", more)
    assert all(isinstance(trial.course, Staged) and trial.course.hosted for trial in made.trials.values())
    made.execute()
    assert rows(folder, out) == resident(more.removesuffix(" --images staged"))
    assert len({json.loads(row)["loss"] for row in rows(folder, out).splitlines()}) >= 4


@pytest.mark.long
def test_a_run_goes_on_on_the_other_path(folder, resident, capsys):
    """After two of four rounds."""
    for first, then in (("staged", "resident"), ("resident", "staged")):
        plan(folder, f"{first} first", first, f"{MODELS} --rounds 2").execute()
        capsys.readouterr()
        plan(folder, f"{first} first", then, f"{MODELS} --resume").execute()
        assert "note: " not in capsys.readouterr().err, "its checkpoint is gone on from"
        assert rows(folder, f"{first} first") == resident(MODELS)


def test_a_device_is_given_those_who_take_part_and_they_alone_are_written():
    rng = np.random.default_rng(0)
    held = {"a": rng.normal(size=(2, 5, 3)), "b": rng.integers(0, 9, (2, 5))}
    before, ids = jax.tree.map(np.copy, held), np.array([[[4, 0], [4, 2]]])  # of the second seed, two rounds
    given, who = kept.taken(held, 1, ids, 4)
    assert given.memory["a"].shape == (1, 4, 3)
    np.testing.assert_array_equal(given.memory["b"][0][given.places[0]], before["b"][1][ids[0]])
    kept.put_back(held, 1, who, jax.tree.map(lambda x: x + 1, given.memory))
    for name, x in held.items():
        expected = before[name].copy()
        expected[1, [0, 2, 4]] += 1
        np.testing.assert_array_equal(x, expected)
    strangers = {"a": np.full((1, 2, 3), 7.0), "b": np.full((1, 2), 7)}
    served = kept.served(held, strangers, 1, np.array([[3, 1]]), np.array([1, 3, 0]))
    np.testing.assert_array_equal(served["b"][0], [held["b"][1, 1], 7, held["b"][1, 3]])


@pytest.mark.long
def test_it_is_chosen_by_itself_and_said_before_anything_runs(folder, monkeypatch, capsys):
    """And what a device is given does not grow with the number of clients."""
    made = plan(folder, "none", "auto", f"{MODELS} --dry-run")
    made.forecast()
    said = capsys.readouterr().out
    assert "--images resident: 96 images (0.1 MiB) are all on the device" in said
    assert "--kept resident: what ditto has 7 clients keep (" in said
    size = memory.bytes_of(made.trials["ditto"].kept)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available", lambda: 2 * size - 1)
        assert kept.is_staged("auto", size)
        assert not kept.is_staged("auto", size - 1)
        assert not kept.is_staged("resident", size)
        assert not kept.is_staged("staged", 0)
    few, many = (plan(folder, "none", "staged", f"{MODELS} --dry-run --clients {n} --minimum 1") for n in (7, 14))
    few.forecast()
    assert "stays on the host; for 2 rounds" in capsys.readouterr().out
    shapes = lambda made: [x.shape for x in jax.tree.leaves(made.trials["ditto"].course._like_rows())]
    assert shapes(few)[0][:2] == (1, 6)
    assert shapes(few) == shapes(many)


def test_what_is_scored_all_at_once_is_not_kept_in_parts(capsys, monkeypatch):
    text = refused(["compare", "--kept", "staged", "--novel", "half"], capsys, monkeypatch)
    assert "--kept staged serves clients in parts, and --novel scores every model at once" in text
