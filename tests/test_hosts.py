"""Several processes share a run from the command line: one writes, all stop where one is lost, and all go on.

Two processes talk over the loopback interface, as two hosts would; their devices are CPUs.
"""

import json
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from input_helpers import PLAIN, change, refused
from process_helpers import Ended, Process

# Three clients of mixed ranks on two devices, each with a model of its own; a small one, that compiles quickly
OPTIONS = (
    "run --method ditto --clients 4 --clients-per-round 3 --holdout-clients 0 --minimum 2 --partition iid --seeds 1 "
    "--batch 4 --local-steps 1 --rank 1,2 --checkpoint-every 1 --rounds 8"
).split() + PLAIN
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


def killed(out: Path, *more: str) -> list[Ended]:
    """A run of two of which the second is killed after two rounds."""
    processes, deadline = start(out, 2, *more), time.monotonic() + 200
    while not (out / "metrics.jsonl").exists() or len(rows(out)) < 2:
        assert all(process.runs() for process in processes), ended(processes)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    processes[1].send(signal.SIGKILL)
    return ended(processes)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_where_one_of_two_is_lost_the_other_ends_with_a_line_and_two_that_go_on_have_the_bytes_of_two_devices(folder):
    """What the first was told counts, and it alone writes and prints. Of two devices: ``test_devices``."""
    out = folder / "run"
    (code, said, _), (_, last, output) = killed(out, "--images", "staged")
    assert code == 1
    assert LOST in said.splitlines()[-1]
    assert said.splitlines()[-1].endswith("--resume")
    assert (output, last) == ("", f"error: process 1 of 2 {KILLED}\n")
    assert 2 <= len(rows(out)) < 8
    processes = start(out, 2, "--resume", "--images", "resident")
    (code, _, output), (other, *silent) = ended(processes)
    assert (code, other, silent) == (0, 0, ["", ""])
    assert "report: " in output
    assert Process(options(folder / "devices", "--devices", "2")).end().code == 0
    assert (out / "metrics.jsonl").read_bytes() == (folder / "devices" / "metrics.jsonl").read_bytes()
    held = json.loads((out / "config.json").read_text())
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
