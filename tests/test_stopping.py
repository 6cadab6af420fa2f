"""What stops a command from outside, a signal or a disk, ends it with one line that says how to go on."""

import errno
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from input_helpers import PLAIN, change

from experiments import start
from experiments.__main__ import main
from experiments.commands import compare
from experiments.results import record

ROOT = Path(__file__).parents[1]
WORK = {
    "Python": "while True: pass",
    "sleeping": "time.sleep(60)",
    "in the kernel": "os.read(os.pipe()[0], 1)",
}
CODE = """
import os, signal, sys, time
{before}
from experiments.stopping import stoppable
with stoppable(lambda: "to go on: this"):
    print("ready", flush=True)
    {work}
"""


def process(work: str, before: str = "") -> subprocess.Popen:
    code = CODE.format(work=work, before=before)
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    assert child.stdout
    assert child.stdout.readline() == "ready\n"
    return child


def ended(child: subprocess.Popen) -> tuple[str, str]:
    """Its output and errors; one that does not end is not left behind."""
    try:
        return child.communicate(timeout=20)
    finally:
        child.kill()


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_one_line_and_its_exit_code_whatever_is_being_done(number, work):
    child = process(WORK[work])
    child.send_signal(number)
    _, errors = ended(child)
    assert errors == f"\nstopped by {number.name}; to go on: this\n"
    assert child.returncode == 128 + number


def test_what_is_ignored_stays_ignored():
    """As under nohup."""
    child = process("time.sleep(1); print('done')", "signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    child.send_signal(signal.SIGHUP)
    output, errors = ended(child)
    assert (output, errors, child.returncode) == ("done\n", "", 0)


def test_afterwards_signals_are_as_before():
    code = CODE.format(work="pass", before="") + "time.sleep(0.1); os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGTERM
    assert done.stderr == b""


@pytest.fixture
def small(tmp_path):
    change()(tmp_path / "data.npz")
    return [
        *"run --method fedit --clients 3 --holdout-clients 1 --partition iid --minimum 4 --rounds 3 --seeds 2".split(),
        *PLAIN,
        *"--local-steps 1 --batch 4 --checkpoint-every 1 --data".split(),
        str(tmp_path / "data.npz"),
    ]


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setattr(compare.report, "write", lambda *_: "")

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["experiments", *arguments])
        main()

    return run


REFUSALS = {
    "full": (errno.ENOSPC, "No space left on device; make room"),
    "over quota": (errno.EDQUOT, "make room"),
    "read-only": (errno.EROFS, "Read-only file system; make it writable"),
    "taken away": (errno.EACCES, "Permission denied; make it writable"),
    "broken": (errno.EIO, "Input/output error; see to the disk"),
}


@pytest.mark.parametrize(("number", "said"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_is_one_line_that_says_what_to_do(number, said, command, monkeypatch, capsys):
    def execute():
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(start, "planned", lambda *_: (None, execute))
    with pytest.raises(SystemExit) as stop:
        command("run", "--method", "fedit")
    assert stop.value.code == 1
    line = capsys.readouterr().err
    assert line.startswith("error: cannot write to the output: ")
    assert said in line
    assert "to go on: python -m experiments run --method fedit" in line
    assert line.count("\n") == 1


def test_a_device_without_memory_is_one_line(command, monkeypatch, capsys):
    """Of commands that do not halve by themselves: what is done (in budget) is kept."""

    def execute():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.")

    monkeypatch.setattr(start, "planned", lambda *_: (None, execute))
    with pytest.raises(SystemExit) as stop:
        command("budget", "--methods", "fedit")
    assert stop.value.code == 1
    line = capsys.readouterr().err
    assert line.startswith("error: the device ran out of memory: use a smaller --chunk, --batch")
    assert "to go on: python -m experiments budget --methods fedit" in line
    assert line.count("\n") == 1


@pytest.mark.long
def test_a_disk_that_refuses_loses_nothing(small, command, tmp_path, monkeypatch, capsys):
    """One line, exit code 1, and the command in it goes on; in the end there are the bytes of a run left alone."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    command(*small, "--out", str(whole))
    arguments, real = [*small, "--out", str(out)], os.fsync
    for at in (0, 4):  # the first write of the first try, the fifth of the second
        left = [at]

        def fsync(file: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(file)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(SystemExit) as stop:
            command(*arguments)
        assert stop.value.code == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"error: cannot write to {out}"), line
        assert "make room" in line
        assert not list(out.rglob(".*"))
        program, arguments = shlex.split(line.split("to go on: ")[1])[:3], shlex.split(line.split("to go on: ")[1])[3:]
        assert program == ["python", "-m", "experiments"]
        assert ("--resume" in arguments) == (at > 0), "at first there was nothing to go on with"
    monkeypatch.setattr(os, "fsync", real)
    command(*arguments)
    assert (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.long
def test_a_mistake_of_ours_is_no_refusal(small, command, tmp_path, monkeypatch):
    monkeypatch.setattr(record.Metrics, "append", lambda *_: np.load(tmp_path / "nowhere.npy"))
    with pytest.raises(FileNotFoundError):
        command(*small, "--out", str(tmp_path / "out"))
