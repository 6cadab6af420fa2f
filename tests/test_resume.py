"""A run killed at any moment and resumed ends with the same bytes as one that was left alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.record import Checkpoints, Metrics, write_atomically

ROOT = Path(__file__).parents[1]
# flora carries a random key in its state, hyperlora an optimizer's moments and a round counter
OPTIONS = (
    "compare --methods flora,hyperlora --clients 6 --clients-per-round 3 --holdout-clients 2 --partition iid "
    "--rounds 6 --checkpoint-every 2 --seeds 2 --local-steps 2 --batch 4 --eval-every 1 --rank 2"
).split()


def start(out: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments", *OPTIONS, "--out", str(out), *more]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(out.parent / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | cache, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-2000:]


def kill_when(process: subprocess.Popen, condition) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def state(folder: Path, method: str) -> dict[str, np.ndarray]:
    path = folder / "checkpoints" / method / "6" / "default"
    return ocp.StandardCheckpointer().restore(path.absolute())


@pytest.mark.long
@pytest.mark.timeout(600)
def test_kill_nine_then_resume_gives_the_same_bytes(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(whole))  # first, so that the others find everything compiled
    metrics = killed / "metrics.jsonl"
    lines = lambda: metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    kill_when(start(killed), lambda: lines() >= 5)  # in round 3 of flora: after one checkpoint, before the next
    kill_when(start(killed, "--resume"), lambda: lines() >= 17)  # in round 3 of hyperlora
    finish(start(killed, "--resume"))

    assert metrics.read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for method in ("flora", "hyperlora"):
        one, two = state(whole, method), state(killed, method)
        assert one.keys() == two.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], two[name], strict=True)
    assert (killed / "report.html").exists()


def test_rows_without_a_checkpoint_are_dropped_and_a_cut_line_too(tmp_path):
    metrics = Metrics(tmp_path)
    rows = [{"method": m, "seed": 0, "round": r} for m in ("fedit", "flora") for r in (1, 2, 3)]
    metrics.append(rows)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"method": "flora", "se')
    metrics.keep({"fedit": 3, "flora": 2})
    assert metrics.read() == rows[:5]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_checkpoint_gives_back_every_leaf_that_of_no_size_included(tmp_path):
    """Signatures without labels have an array of size zero, which orbax does not write."""
    run = {"labels": jnp.zeros((2, 0)), "key": jax.random.key(3), "x": jnp.arange(3.0)}
    store = Checkpoints(tmp_path, "hyperlora")
    store.save(1, run)
    back = store.restore({"labels": run["labels"], "key": jax.random.key(0), "x": jnp.zeros(3)})
    store.close()
    assert jax.tree.structure(back) == jax.tree.structure(run)
    assert back["labels"].shape == (2, 0)
    np.testing.assert_array_equal(jax.random.key_data(back["key"]), jax.random.key_data(run["key"]))
    np.testing.assert_array_equal(back["x"], run["x"])


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
