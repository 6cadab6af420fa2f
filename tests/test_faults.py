"""Faults of the machine at random moments: a run that goes on after all of them ends with the bytes of one left alone.

``FAULTS=200 python -m pytest -n 0 -s -m long tests/test_faults.py`` has so many of them, and says of which kinds;
``SEED`` others.
"""

import contextlib
import functools
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from fault_helpers import COMMANDS, ERRORS, GOES_ON, SIZES, arguments, content, damage, newest, suffering
from input_helpers import PLAIN, change
from process_helpers import Ended, Process

from experiments.__main__ import main
from experiments.commands import compare
from experiments.engine.resident import Resident

FAULTS, SOAK = (int(os.environ.get(name, default)) for name, default in (("FAULTS", "4"), ("SOAK", "200")))
OFTEN = dict(zip(COMMANDS, (12, 4, 2, 1, 1, 5), strict=True))  # those that take less time, more often
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")
DAMAGES = ("truncated", "flipped", "removed")


class Tried:
    """What has suffered so far, in a folder: of each command a run that nothing happened to, and one that it does."""

    def __init__(self, place: Path):
        self.place, self.done, self._count = place, Counter(), itertools.count()
        self._whole: dict[str, tuple[Path, float]] = {}
        self.out = {name: self.fresh() for name in COMMANDS}
        change()(place / "data.npz")

    def fresh(self) -> Path:
        return self.place / f"{next(self._count)}"

    def start(self, name: str, out: Path, run: Path | None = None, **trouble) -> Process:
        run = run or (self.whole("run")[0] if name == "export" else out)
        return Process(arguments(name, self.place / "data.npz", run, out), functools.partial(suffering, **trouble))

    def whole(self, name: str) -> tuple[Path, float]:
        """The folder, and the seconds it took."""
        if name not in self._whole:
            out, began = self.fresh(), time.monotonic()
            ended = self.start(name, out).end()
            assert ended.code == 0, ended.errors
            self._whole[name] = out, time.monotonic() - began
        return self._whole[name]

    def goes_on(self, name: str, ended: Ended) -> None:
        """Look at what is there; where it came to its end, or cannot go on, the next begins anew."""
        assert "Traceback" not in ended.errors, ended.errors
        out, whole = self.out[name], content(name, self.whole(name)[0])
        if ended.code == 0:
            assert content(name, out) == whole
        elif name == "export":
            assert content(name, out).items() <= whole.items()  # whole files
        if ended.code == 0 or name not in GOES_ON:
            self.out[name] = self.fresh()


@pytest.mark.long
@pytest.mark.timeout(300 + 60 * FAULTS)
def test_nothing_is_lost_by_faults_at_random_moments(tmp_path):
    """Signals, disks that refuse or are too small, damaged checkpoints, a second process, no home, a clock that goes
    back: several in one process, counted where they came to be."""
    rng, tried = random.Random(int(os.environ.get("SEED", "0"))), Tried(tmp_path)
    while tried.done.total() < FAULTS:
        (name,) = rng.choices(list(OFTEN), list(OFTEN.values()))
        if name == "export" and rng.random() < 0.3:
            export_of_a_damaged_run(tried, rng.choice(DAMAGES))
            continue
        suffers(name, tried, rng)
    for name in filter(lambda name: tried.out[name].exists(), GOES_ON):
        tried.goes_on(name, ended := tried.start(name, tried.out[name]).end())
        assert ended.code == 0, ended.errors


def suffers(name: str, tried: Tried, rng: random.Random) -> None:
    """A command is started, or goes on, and something ends it; it may not be alone, nor the first that happens."""
    out, took, ends = tried.out[name], tried.whole(name)[1], rng.choice((*SIGNALS, *ERRORS, "too small"))
    rows = out / "metrics.jsonl"
    for path in (newest(out), rows if rows.exists() and rows.stat().st_size else None) if name in GOES_ON else ():
        if path and rng.random() < 0.7:
            damage(path, how := rng.choice(DAMAGES))
            tried.done[f"{name}: {'rows ' * (path == rows)}{how}"] += 1
    trouble = {"clock": int(rng.random() < 0.7), "homeless": name in GOES_ON and rng.random() < 0.1}
    if ends in ERRORS:
        trouble |= {"refuse": ERRORS[ends], "after": rng.randrange(30)}
    process = tried.start(name, out, longest=rng.randrange(200, 20_000) if ends == "too small" else None, **trouble)
    if rng.random() < 0.15 and locked(out / ".lock", process):
        other = tried.start(name, out).end()
        assert other.code == 2 or not process.runs(), other.errors
        assert "Traceback" not in other.errors, other.errors
        tried.done[f"{name}: second process"] += other.code == 2
    if ends in SIGNALS:
        time.sleep(rng.uniform(0.1, 0.9) * took)
        process.send(getattr(signal, ends))
    ended = process.end()
    stopped = 128 + getattr(signal, ends) if ends in SIGNALS else 1
    assert ended.code in (0, stopped, 2 if ends not in SIGNALS else 0), ended.errors
    if ended.code == stopped and ends != "SIGKILL":
        assert "to go on: python -m experiments" in ended.errors.splitlines()[-1], ended.errors
    tried.done[f"{name}: {ends}"] += ended.code != 0
    for what in filter(trouble.get, ("clock", "homeless")):
        tried.done[f"{name}: {what}"] += 1
    tried.goes_on(name, ended)
    print(f"{tried.done.total()} faults: {dict(tried.done)}", flush=True)


def export_of_a_damaged_run(tried: Tried, how: str) -> None:
    """It is refused in a line, and nothing is written."""
    hurt, out = tried.fresh(), tried.fresh()
    shutil.copytree(tried.whole("run")[0], hurt)
    damage(newest(hurt), how)
    ended = tried.start("export", out, hurt).end()
    assert ended.code == 2, ended.errors
    assert ended.errors.count("\n") == 1, ended.errors
    assert not out.exists()
    tried.done[f"export: {how}"] += 1


def locked(path: Path, process: Process) -> bool:
    """Whether it comes to write a folder."""
    mine = f"process {process.number} on"  # the file of one that was killed may be there
    while process.runs() and not (path.exists() and mine in path.read_text()):
        time.sleep(0.02)
    return process.runs()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_terminal_that_is_closed_where_there_is_no_home_is_no_matter(tmp_path):
    """SIGHUP once something is written, and on without a home: what random moments seldom bring to ``budget``."""
    tried, name = Tried(tmp_path), "budget"
    process = tried.start(name, out := tried.out[name], homeless=True)
    while process.runs() and not ((out / "budget.json").exists() and (out / "budget.json").stat().st_size):
        time.sleep(0.02)
    process.send(signal.SIGHUP)
    ended = process.end()
    assert ended.code == 128 + signal.SIGHUP, ended.errors
    assert "to go on: python -m experiments" in ended.errors.splitlines()[-1], ended.errors
    tried.goes_on(name, ended := tried.start(name, out, homeless=True).end())
    assert ended.code == 0, ended.errors


@pytest.mark.long
def test_a_clock_that_goes_back_is_no_matter(tmp_path):
    """An hour at every look: what is newest, who holds a lock, and where a run goes on depend on no time."""
    tried = Tried(tmp_path)
    process = tried.start("run", out := tried.out["run"], clock=1)
    while process.runs() and not list(out.glob("checkpoints/*/*/4/manifest.json")):
        time.sleep(0.02)
    assert tried.start("run", out).end().code == 2, "it is locked"
    process.send(signal.SIGKILL)
    process.end()
    tried.goes_on("run", ended := tried.start("run", out, clock=1).end())
    assert ended.code == 0, ended.errors


@pytest.mark.long
@pytest.mark.timeout(300 + SOAK)
def test_many_rounds_take_no_more_memory_and_files_than_few(tmp_path):
    """From a quarter of the rounds to the last five, after which more is scored; ``SOAK=2000`` has so many."""
    change()(tmp_path / "data.npz")
    out = tmp_path / "soak"
    many = f"run --method fedit --rounds {SOAK} --eval-every 5 --checkpoint-every 20 --seeds 1 {SIZES}".split()
    process = Process([*many, *PLAIN, "--data", str(tmp_path / "data.npz"), "--out", str(out)])
    there, seen, rows = Path(f"/proc/{process.number}"), [], out / "metrics.jsonl"
    while process.runs():
        with contextlib.suppress(OSError):
            done = rows.read_bytes().count(b"\n")
            pages = int((there / "statm").read_text().split()[1])
            seen.append((done, pages * resource.getpagesize() / 2**20, len(list((there / "fd").iterdir()))))
        time.sleep(0.02)
    ended = process.end()
    assert ended.code == 0, ended.errors
    late = np.array([x for x in seen if SOAK / 4 <= x[0] < SOAK - 5])
    assert len(late) > 10
    early, last = late[: len(late) // 4], late[-(len(late) // 4) :]
    print(f"{SOAK} rounds: {early[0, 1]:.1f} MiB after {early[0, 0]:.0f}, {last[-1, 1]:.1f} after {last[-1, 0]:.0f}; "
          f"files: {early[:, 2].min():.0f}, {last[:, 2].min():.0f}")  # fmt: skip
    assert last[-1, 1] < early[:, 1].max() + 8
    assert last[:, 2].min() < early[:, 2].min() + 3  # some are open while a checkpoint is written


@pytest.mark.long
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
        more = f"--local-steps 1 --batch 4 --checkpoint-every 1 --data {tmp_path / 'data.npz'} --out {name}"
        monkeypatch.setattr(sys, "argv", ["experiments", *small.split(), *PLAIN, *more.split()])
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
