"""Contenders as child processes that take turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.bench import measure
from experiments.bench.contenders import NEEDS
from experiments.bench.measure import Line
from experiments.bench.works import Work

ROOT = Path(__file__).parents[2]
OWN = {
    "PYTHONPATH": str(ROOT),
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share one accelerator
    "FLWR_TELEMETRY_ENABLED": "0",  # nothing leaves this machine
    "RAY_USAGE_STATS_ENABLED": "0",
}


# Run by a process that is small: of a child that has been forked the peak begins at that of its parent.
MEASURED = """
import json, resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)]))
"""


def whole_run(typed: Sequence[str], **environment: str) -> dict[str, Any]:
    """CPU seconds and peak memory of ``compare`` with some options, seconds of a round of its first method, and of
    compiling all."""
    with tempfile.TemporaryDirectory(prefix="fedlora-run-") as folder:
        command = [sys.executable, "-m", "experiments", "compare", *typed, "--out", f"{folder}/run"]
        call = [sys.executable, "-c", MEASURED, *command]
        env = os.environ | OWN | environment
        done = subprocess.run(call, cwd=ROOT, env=env, stdout=subprocess.PIPE, check=True)
        result = json.loads((Path(folder) / "run" / "summary.json").read_text())
    if result["failed"]:  # another one would be the first
        raise RuntimeError("; ".join(result["failed"].values()))
    methods = result["methods"].values()
    found = zip(("cpu_seconds", "peak_memory_mb"), json.loads(done.stdout), strict=True)
    compiling = sum(entry["compile_seconds"] for entry in methods)
    return {**dict(found), "seconds_per_round": next(iter(methods))["seconds_per_round"], "compile_seconds": compiling}


class Child:
    """A contender that waits for its turn. ``about`` is what it said at its start."""

    def __init__(self, name: str, work: Work, python: str | None = None, **options: int | None):
        self.name, self.work, self.turns = name, work, []
        arguments = [python or sys.executable, "-m", "experiments.bench.peer", name, work.name]
        self._process = subprocess.Popen(
            arguments + [f"{option}={value}" for option, value in options.items() if value is not None],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | OWN,
        )
        self.about = self._answer()

    def turn(self) -> None:
        """One round, unless the contender is skipped or has failed."""
        if self.about.keys() & {"skipped", "failed"}:
            return
        assert self._process.stdin is not None
        self._process.stdin.write("round\n")
        self._process.stdin.flush()
        answer = self._answer()
        if "failed" in answer:
            self.about |= answer
        else:
            self.turns.append(answer)

    def line(self, bench: str, **more: Any) -> Line:
        found = measure.summary(self.work, self.turns) if self.turns else {}
        return measure.line(bench, self.work, self.name, **self.about, **found, **more)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        text = self._process.stdout.readline()
        if text:
            return json.loads(text)
        return {"failed": f"ended with exit status {self._process.wait()}; see its messages on stderr"}


def absent(name: str, python: str | None = None) -> list[str]:
    """Modules that a contender needs and its interpreter does not find; none is imported, which would take a while."""
    look = "import importlib.util, sys; print(*(m for m in sys.argv[1:] if importlib.util.find_spec(m) is None))"
    ask = [python or sys.executable, "-c", look, *NEEDS[name]]
    return subprocess.run(ask, cwd=ROOT, capture_output=True, text=True).stdout.split()


def together(children: list[Child], repeats: Any) -> None:
    """Rounds in turns, so that a busy moment of the machine hits all."""
    for _ in repeats:
        for child in children:
            child.turn()
