"""Commands in processes of their own, which are stopped, share a run, or whose machine has a fault.

A process takes seconds to import what it needs, and as long to draw figures: all of them are forks of one that has
imported (``multiprocessing``'s forkserver), with the environment of whoever started that one, and draw none.
How a process of a user's starts is looked at elsewhere (``test_starting``, ``test_first_start``).
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from quick import QUICK

ROOT = Path(__file__).parents[1]


class Ended(NamedTuple):
    """code: as a shell has it, 128 + the number of a signal. errors, output: what was printed."""

    code: int
    errors: str
    output: str


class Process:
    """A command in a process of its own; ``before`` is called there first."""

    def __init__(self, arguments: Sequence[str], before: Callable[[], Any] = bool):
        context, pipes = server(), [multiprocessing.Pipe(duplex=False) for _ in range(2)]
        call = context.Process(target=command, args=(list(arguments), *(write for _, write in pipes), before))
        call.daemon, self._process, self._said = True, call, [b"", b""]
        call.start()
        for _, write in pipes:
            write.close()
        self._readers = [threading.Thread(target=self._read, args=(i, read)) for i, (read, _) in enumerate(pipes)]
        for reader in self._readers:
            reader.start()

    def _read(self, i: int, pipe: Connection) -> None:
        """Until it, and whoever it started, has ended."""
        with pipe:
            while some := os.read(pipe.fileno(), 2**16):
                self._said[i] += some

    @property
    def number(self) -> int | None:
        return self._process.pid

    def runs(self) -> bool:
        return self._process.exitcode is None

    def send(self, number: int) -> None:
        if self.runs() and self._process.pid:
            with contextlib.suppress(ProcessLookupError):  # it may end at this very moment
                os.kill(self._process.pid, number)

    def end(self, limit: float = 300) -> Ended:
        self._process.join(limit)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
        for reader in self._readers:
            reader.join(60)
        errors, output = (said.decode() for said in self._said)
        assert code is not None, f"it did not end: {errors}"
        return Ended(128 - code if code < 0 else code, errors, output)


@functools.cache
def server() -> Any:
    """Of which all are forks: nothing is computed in it, so that it has one thread."""
    needs = ("start", "commands.compare", "commands.budget", "commands.sweep", "commands.meta_train", "commands.export")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*(f"experiments.{name}" for name in needs), "flax.nnx"])
    own = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "JAX_PLATFORMS": "cpu"}
    with mock.patch.dict(os.environ, QUICK | own | {"GLIBC_TUNABLES": ""}):  # or a process would start itself again
        forkserver.ensure_running()
    return context


def command(arguments: list[str], errors: Connection, output: Connection, before: Callable[[], Any]) -> None:
    """What a process does."""
    for number, pipe in ((1, output), (2, errors)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from experiments.__main__ import run
    from experiments.commands import budget, sweep
    from experiments.results import budget_figures, figures, report, sweep_figures

    sys.argv = ["experiments", *arguments]
    for module in (figures, budget_figures, sweep_figures):
        module.draw = lambda *_: {"curves": None}  # a file is written
    for module in (report, budget, sweep):
        module.png = lambda figure: b""
    report.svg = lambda *_: ""
    before()
    run()
