"""Faults of the machine at random moments: a run that goes on after all of them ends with the bytes of one left alone.

``FAULTS=200 python -m pytest -n 0 -m long tests/test_faults.py`` has so many of them.
"""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from input_helpers import change
from quick import QUICK

from experiments.__main__ import main
from experiments.commands import compare
from experiments.engine.resident import Resident

ROOT, FAULTS = Path(__file__).parents[1], int(os.environ.get("FAULTS", "6"))
METHODS = ("flora", "fedit+fedadam", "ditto")  # with a key in its state, moments of a server, memory of clients
RUN = (
    f"compare --methods {','.join(METHODS)} --clients 4 --clients-per-round 2 --holdout-clients 1 --partition iid "
    "--minimum 4 --rounds 12 --checkpoint-every 2 --seeds 2 --local-steps 1 --batch 4 --rank 2 --adapt-last 1 "
    "--dropouts 0.3"
).split()
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")
DAMAGES = ("truncated", "flipped", "removed")


def start(out: Path, *more: str, env: dict[str, str] | None = None, limit: int | None = None) -> subprocess.Popen:
    """A process that goes on with a run; ``limit``: no file may have more bytes."""
    command = [sys.executable, "-m", "experiments", *RUN, "--data", str(out.parent / "data.npz"), "--out", str(out)]
    command += ["--resume"] * (out / "config.json").exists() + list(more)
    small = None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | QUICK | (env or {}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=small,
    )


def arrays(out: Path) -> dict[str, dict[str, np.ndarray]]:
    last = {path.parent.parent.name: path for path in out.glob("checkpoints/*/*/12")}
    return {name: ocp.StandardCheckpointer().restore(path.absolute()) for name, path in last.items()}


def newest(out: Path) -> Path | None:
    """A file of the newest checkpoint."""
    found = [path for path in out.glob("checkpoints/*/*/*/**/*") if path.is_file() and path.stat().st_size]
    return max(found, key=lambda path: path.stat().st_mtime) if found else None


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.long
@pytest.mark.timeout(60 + 60 * FAULTS)
def test_nothing_is_lost_by_faults_at_random_moments(tmp_path):
    """Signals, kills, files that may not grow, damaged checkpoints, a second process, a home that cannot be written."""
    rng, done, whole, out = random.Random(int(os.environ.get("SEED", "0"))), Counter(), tmp_path / "0", tmp_path / "1"
    change()(tmp_path / "data.npz")
    began = time.monotonic()
    process = start(whole)
    errors = process.communicate(timeout=600)[1]
    assert process.returncode == 0, errors
    took, tried = time.monotonic() - began, 0
    while sum(done.values()) < FAULTS:
        fault = rng.choice((*SIGNALS, *DAMAGES, "full", "second", "homeless"))
        if fault in DAMAGES:
            if path := newest(out):
                damage(path, fault)
                done[fault] += 1
            fault = rng.choice(SIGNALS)
        env = {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "/proc/nowhere"} if fault == "homeless" else None
        process = start(out, env=env, limit=rng.randrange(200, 20_000) if fault == "full" else None)
        if fault == "second":
            wait_for(out / ".lock", process)
            other = start(out)
            errors = other.communicate(timeout=300)[1]
            assert other.returncode == 2 or process.poll() is not None, errors
            assert "Traceback" not in errors, errors
        if fault == "full":
            errors = process.communicate(timeout=300)[1]
            assert process.returncode in (0, 1, 2), errors
        else:
            time.sleep(rng.uniform(0.2, 1) * took)
            name = fault if fault in SIGNALS else "SIGKILL"
            ended = process.poll() is not None
            process.send_signal(getattr(signal, name))
            errors = process.communicate(timeout=300)[1]
            if not ended and name != "SIGKILL" and process.returncode != 0:
                assert process.returncode == 128 + getattr(signal, name), errors
                assert "; to go on: python -m experiments compare" in errors.splitlines()[-1]
        assert "Traceback" not in errors, errors
        done[fault] += 1
        tried += 1
        if (out / "report.html").exists():  # it was through: another begins
            assert_same(whole, out)
            out = tmp_path / f"{tried + 1}"
    process = start(out)
    errors = process.communicate(timeout=600)[1]
    assert process.returncode == 0, errors
    assert_same(whole, out)
    print(f"{sum(done.values())} faults: {dict(done)}")


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists() and process.poll() is None:
        time.sleep(0.05)


def assert_same(whole: Path, out: Path) -> None:
    assert (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), arrays(whole), arrays(out))


def test_a_device_without_memory_goes_on_with_half_as_many_clients(tmp_path, monkeypatch, capsys):
    """From the newest checkpoint, said in a line and in the record; a device that has none for one client ends it."""
    change()(tmp_path / "data.npz")
    monkeypatch.setattr(compare.report, "write", lambda *_: "")
    small = (
        "run --method fedit --clients 4 --holdout-clients 0 --partition iid --minimum 4 --rounds 3 --seeds 1 --chunk 4"
    )
    real, left = Resident.block, [2]

    def block(self, run):
        left[0] -= 1
        if self._config.chunk > 2 and left[0] < 0:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")
        return real(self, run)

    def rows(name):
        more = (
            f"--local-steps 1 --batch 4 --adapt-last 1 --checkpoint-every 1 --data {tmp_path / 'data.npz'} --out {name}"
        )
        monkeypatch.setattr(sys, "argv", ["experiments", *small.split(), *more.split()])
        main()
        return [json.loads(line) for line in (Path(name) / "metrics.jsonl").read_text().splitlines()]

    whole = rows(tmp_path / "whole")
    monkeypatch.setattr(Resident, "block", block)
    halved = rows(tmp_path / "halved")
    assert "note: fedit: the device has no memory for 4 clients at once, it goes on with 2" in capsys.readouterr().err
    np.testing.assert_allclose([row["loss"] for row in halved], [row["loss"] for row in whole], rtol=1e-4)
    assert json.loads((tmp_path / "halved" / "summary.json").read_text())["methods"]["fedit"]["halved_to_chunk"] == 2

    def never(self, run):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")

    monkeypatch.setattr(Resident, "block", never)
    with pytest.raises(SystemExit):
        rows(tmp_path / "never")
    assert "error: fedit: the device has no memory for a single client" in capsys.readouterr().err.splitlines()[-1]
