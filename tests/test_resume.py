"""A run killed at any moment and resumed ends with the same bytes as one that was left alone."""

import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from input_helpers import PLAIN, change
from process_helpers import Process
from quick import QUICK

from experiments.__main__ import main
from experiments.commands import compare
from experiments.results.checkpoints import Checkpoints
from experiments.results.record import Metrics, complete

# flora carries a random key in its state, fedadam an optimizer's moments
OPTIONS = (
    "compare --methods flora,fedit+fedadam --clients 4 --clients-per-round 2 --holdout-clients 1 --partition iid "
    "--minimum 4 --rounds 6 --checkpoint-every 2 --seeds 2 --local-steps 1 --batch 4 --rank 2"
).split() + PLAIN


def options(out: Path, *more: str) -> list[str]:
    return [*OPTIONS, "--data", str(out.parent / "data.npz"), "--out", str(out), *more]


def kill_when(process: Process, condition, number: int = signal.SIGKILL) -> str:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.runs(), "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send(number)
    return process.end().errors


def state(folder: Path, method: str) -> dict[str, np.ndarray]:
    path = folder / "checkpoints" / method / "0-2" / "6"
    return ocp.StandardCheckpointer().restore(path.absolute())


@pytest.mark.long
@pytest.mark.timeout(600)
def test_kill_nine_then_resume_gives_the_same_bytes(tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    change()(tmp_path / "data.npz")
    with monkeypatch.context() as patch:  # under the flags of the others, who then find everything compiled
        for name, value in QUICK.items():
            patch.setenv(name, value)
        patch.setattr(compare.report, "write", lambda *_: "")
        patch.setattr(sys, "argv", ["experiments", *options(whole)])
        main()
    metrics = killed / "metrics.jsonl"
    lines = lambda: metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    start = lambda *more: Process(options(killed, *more))
    kill_when(start(), lambda: lines() >= 5)  # in round 3 of flora: after one checkpoint, before the next
    errors = kill_when(start("--resume"), lambda: lines() >= 17, signal.SIGINT)  # in round 3 of fedadam
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith(
        "stopped by SIGINT; to go on: python -m experiments compare --methods flora"
    )
    ended = start("--resume").end()
    assert ended.code == 0, ended.errors

    assert metrics.read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for method in ("flora", "fedit+fedadam"):
        one, two = state(whole, method), state(killed, method)
        assert one.keys() == two.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], two[name], strict=True)
    assert (killed / "report.html").exists()


def test_a_line_cut_short_or_changed_is_no_row(tmp_path):
    metrics, path = Metrics(tmp_path), tmp_path / "metrics.jsonl"
    rows = [{"method": m, "seed": 0, "round": r, "loss": 0.1 * r} for m in ("fedit", "flora") for r in (1, 2, 3)]
    metrics.append(rows)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    assert metrics.read() == rows
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        lost = whole[:at].count(b"\n")
        assert metrics.read() == [row for i, row in enumerate(rows) if i not in (lost, lost + (whole[at] == 10))]
    path.write_bytes(whole + whole.split(b"\n")[1] + b"\n")
    assert metrics.read() == rows, "the same row twice is one"
    metrics.append([{**rows[4], "loss": 7.0}])
    assert metrics.read() == rows[:4] + rows[5:], "two that contradict are none"
    left = metrics.read()
    assert [complete(left, *of) for of in (("fedit", [0]), ("flora", [0]), ("flora", [0, 1]))] == [3, 1, 0]


def test_a_checkpoint_gives_back_every_leaf_that_of_no_size_included(tmp_path):
    """Signatures without labels have an array of size zero, which orbax does not write."""
    run = {"labels": jnp.zeros((2, 0)), "key": jax.random.key(3), "x": jnp.arange(3.0)}
    store = Checkpoints(tmp_path, {"method": "hyperlora"})
    store.save(1, run)
    back = store.restore(1, {"labels": run["labels"], "key": jax.random.key(0), "x": jnp.zeros(3)})
    assert jax.tree.structure(back) == jax.tree.structure(run)
    assert back["labels"].shape == (2, 0)
    np.testing.assert_array_equal(jax.random.key_data(back["key"]), jax.random.key_data(run["key"]))
    np.testing.assert_array_equal(back["x"], run["x"])
