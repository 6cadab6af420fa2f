"""Contenders as child processes that take turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
