"""Several processes share a run from the command line: one writes, all stop where one is lost, any number goes on.

Two processes talk over the loopback interface, as two hosts would; their devices are CPUs.
"""

import json
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from input_helpers import PLAIN, change, refused
from process_helpers import Ended, Process

from experiments.__main__ import main
from experiments.commands import compare

# Three clients of mixed ranks on two devices, each with a model of its own; a small one, that compiles quickly
OPTIONS = (
    "run --method ditto --clients 4 --clients-per-round 3 --holdout-clients 0 --minimum 2 --partition iid --seeds 1 "
    "--batch 4 --local-steps 1 --rank 1,2 --checkpoint-every 1 --rounds 8"
).split() + PLAIN
ROUNDED = "loss", "update", "bias", "personal_accuracy", "worst_accuracy", "global_accuracy"
LOST = "another process of this run was lost"
KILLED = "was killed, or ended because another was lost or did not come; start all again, with --out and --resume "
KILLED += "where it had begun"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("hosts")
    change()(root / "data.npz")
    return root


def options(out: Path, *more: str) -> list[str]:
    return [*OPTIONS, "--data", str(out.parent / "data.npz"), "--out", str(out), *more]


def here(out: Path, monkeypatch, *more: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(compare.report, "write", lambda *_: "")
        patch.setattr(sys, "argv", ["experiments", *options(out, *more)])
        main()


def start(out: Path, count: int, *more: str) -> list[Process]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    own = lambda i: ["--hosts", str(count), "--coordinator", f"localhost:{port}", "--process-id", str(i)]
    return [Process([*options(out, *more), *own(i)]) for i in range(count)]


def ended(processes: list[Process]) -> list[Ended]:
    return [process.end(240) for process in processes]


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def killed(out: Path, which: int, *more: str) -> list[Ended]:
    """A run of two of which one is killed after two rounds."""
    processes, deadline = start(out, 2, *more), time.monotonic() + 200
    while not (out / "metrics.jsonl").exists() or len(rows(out)) < 2:
        assert all(process.runs() for process in processes), ended(processes)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    processes[which].send(signal.SIGKILL)
    return ended(processes)


@pytest.fixture(scope="module")
def lost(folder):
    """What two said of whom the second was killed, in the folder ``lost``."""
    return killed(folder / "lost", 1)


def assert_same(out: Path, other: Path) -> None:
    for row, same in zip(rows(out), rows(other), strict=True):
        assert row["clients"] == same["clients"]
        for key in ROUNDED:
            assert row[key] == pytest.approx(same[key], abs=1e-4 if key == "bias" else 1e-5), key


@pytest.mark.long
def test_where_one_of_two_is_lost_the_other_ends_with_a_line(folder, lost):
    (code, said, _), (_, last, output) = lost
    assert code == 1
    assert LOST in said.splitlines()[-1]
    assert said.splitlines()[-1].endswith("--resume")
    assert (output, last) == ("", f"error: process 1 of 2 {KILLED}\n")
    assert 2 <= len(rows(folder / "lost")) < 8


@pytest.mark.long
@pytest.mark.timeout(600)
def test_one_alone_goes_on_with_the_numbers_of_one_alone(folder, lost, monkeypatch, capfd):
    here(folder / "whole", monkeypatch)
    capfd.readouterr()
    here(folder / "lost", monkeypatch, "--resume")
    assert "note: " not in capfd.readouterr().err, "its checkpoint is gone on from"
    assert_same(folder / "lost", folder / "whole")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_two_that_go_on_have_the_bytes_of_two_devices(folder, monkeypatch):
    """And where the first is lost the other ends too; what it was told counts, and it alone writes and prints."""
    (code, _, _), (other, said, output) = killed(folder / "first", 0, "--images", "staged")
    assert code == 128 + signal.SIGKILL
    assert other not in (0, None)
    assert output == ""
    assert LOST in said or KILLED in said
    processes = start(folder / "first", 2, "--resume", "--images", "resident")
    (code, _, output), (other, *silent) = ended(processes)
    assert (code, other, silent) == (0, 0, ["", ""])
    assert "report: " in output
    assert Process(options(folder / "devices", "--devices", "2")).end().code == 0
    assert (folder / "first" / "metrics.jsonl").read_bytes() == (folder / "devices" / "metrics.jsonl").read_bytes()
    held = json.loads((folder / "first" / "config.json").read_text())
    assert held["device"].endswith(", 2 processes")
    assert not held["config"].keys() & {"hosts", "coordinator", "process_id"}


@pytest.mark.long
def test_what_one_refuses_ends_all(folder):
    (folder / "full").mkdir(exist_ok=True)
    (folder / "full" / "file").write_text("mine")
    (code, said, output), (other, *silent) = ended(start(folder / "full", 2))
    assert (code, other, output, silent) == (2, 2, "", ["", ""])
    assert "exists and is not empty" in said


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ("--process-id 0", "--process-id is of processes that share a run: say how many, --hosts N"),
        ("--hosts 2 --coordinator here:1", "are given together, or are both found out: got one of them"),
        (
            "--hosts 2 --coordinator here --process-id 0",
            "--coordinator must be HOST:PORT with a port from 1 to 65535, got here",
        ),
        ("--hosts 2 --coordinator here:1 --process-id 2", "--process-id 2 is none of --hosts 2"),
        ("--hosts 2 --dry-run", "--dry-run is of one process"),
        ("--hosts 2 --devices 2", "--devices 2 of each of 2 hosts: more devices than the 3 clients of a round"),
    ],
)
def test_what_hosts_cannot_do_is_refused_before_they_are_looked_for(more, text, folder, capsys, monkeypatch):
    assert text in refused([*options(folder / "none"), *more.split()], capsys, monkeypatch)


def test_other_commands_do_not_know_of_hosts(capsys, monkeypatch):
    assert "unrecognized arguments: --hosts 2" in refused(["sweep", "--hosts", "2"], capsys, monkeypatch)


@pytest.mark.long
def test_where_nothing_says_where_the_others_are_it_is_said():
    done = Process(options(Path("none"), "--hosts", "2")).end()
    assert done.code == 2
    assert done.errors.startswith("error: --hosts 2: no SLURM, TPU, Open MPI or Kubernetes says where the others are")
    assert done.errors.count("\n") == 1


def test_arrays_are_the_same_where_there_is_one_process():
    from experiments.engine import hosts

    assert hosts.agreed({"a": [1, None]}) == {"a": [1, None]}
    np.testing.assert_array_equal(hosts.agreed_arrays(np.arange(3)), np.arange(3))
    assert hosts.lost(ValueError("Gloo AllGather failed")) is None
