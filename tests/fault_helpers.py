"""Commands that are started many times and suffer a fault of the machine each time.

A process takes seconds to import what it needs: all of them are forks of one that has (``multiprocessing``'s
forkserver), with the environment of whoever started that one.
"""

from __future__ import annotations

import errno
import functools
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
from quick import QUICK

ROOT = Path(__file__).parents[1]
NOWHERE = "/proc/nowhere"
SIZES = "--clients 3 --holdout-clients 1 --partition iid --minimum 4 --local-steps 1 --batch 4 --rank 2 --adapt-last 1"
# flora has a key in its state, fedadam moments of the server, ditto memory of clients
COMMANDS = {
    "run": "run --method fedit+fedadam --rounds 8 --checkpoint-every 2 --seeds 2 --dropouts 0.3",
    "compare": "compare --methods flora,ditto --rounds 4 --checkpoint-every 1 --seeds 1 --clients-per-round 2",
    "budget": "budget --methods fedit --rounds 2 --budgets 1,2 --lrs 0.1 --tuning-seeds 100 --seeds 1",
    "sweep": "sweep --methods fedit+proximal --vary mu=0.1,1 --lrs 0.05 --rounds 2 --seeds 1",
    "meta": "meta --method hyperlora:mode=frozen --rounds 3 --eval-every 1 --unroll 1 --seeds 1",
    "export": "export --to peft",
}
GOES_ON = ("run", "compare", "budget")  # by --resume; the others are short and begin again, elsewhere


class Ended(NamedTuple):
    """code: as a shell has it, 128 + the number of a signal. errors: what was printed there."""

    code: int
    errors: str


class Process:
    """A command in a process of its own."""

    def __init__(self, arguments: list[str], errors: Path, **trouble: Any):
        context, self._errors = server(), errors
        self._process = context.Process(target=command, args=(arguments, str(errors)), kwargs=trouble, daemon=True)
        self._process.start()

    @property
    def number(self) -> int | None:
        return self._process.pid

    def runs(self) -> bool:
        return self._process.exitcode is None

    def send(self, number: int) -> None:
        if self.runs() and self._process.pid:
            os.kill(self._process.pid, number)

    def end(self, limit: float = 300) -> Ended:
        self._process.join(limit)
        assert self._process.exitcode is not None, "it does not end"
        code = self._process.exitcode
        return Ended(128 - code if code < 0 else code, self._errors.read_text() if self._errors.exists() else "")


@functools.cache
def server() -> Any:
    """Of which all are forks: nothing is computed in it, so that it has one thread."""
    needs = ("start", "commands.compare", "commands.budget", "commands.sweep", "commands.meta_train", "commands.export")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"experiments.{name}" for name in needs])
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with mock.patch.dict(os.environ, QUICK | {"PYTHONPATH": paths}):
        forkserver.ensure_running()
    return context


def command(arguments: list[str], errors: str, **trouble: Any) -> None:
    """What a process does; see ``suffering``."""
    for number, path in ((1, os.devnull), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from experiments import start
    from experiments.commands import budget, sweep
    from experiments.results import report
    from experiments.results.folder import command
    from experiments.stopping import stoppable

    sys.argv = ["experiments", *arguments]
    for module in (report, budget, sweep):
        module.png = lambda figure: b""
    suffering(**trouble)
    with stoppable(lambda: f"to go on: {command()}"):
        start.main()


def suffering(longest: int | None = None, refuse: int = 0, after: int = 0, homeless: bool = False, clock: int = 0):
    """Make the process's machine one with a fault.

    Args:
      longest: bytes that a file may have.
      refuse: from then on the system refuses to write, with this number of an error; 0: never.
      after: so many calls that write.
      homeless: nothing can be written at home, nor in a cache of compiled programs.
      clock: hours that every look at the clock is earlier than the one before.
    """
    if longest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (longest, longest))
    if homeless:
        os.environ |= {"HOME": NOWHERE, "XDG_CACHE_HOME": NOWHERE}
        jax.config.update("jax_compilation_cache_dir", NOWHERE)
    left = [after]
    for name in ("fsync", "replace", "mkdir") if refuse else ():
        setattr(os, name, functools.partial(refused, getattr(os, name), left, refuse))
    if clock:
        now, looks = time.time, [0]

        def earlier() -> float:
            looks[0] += 1
            return now() - 3600 * clock * looks[0]

        time.time = earlier
        time.time_ns = lambda: int(earlier() * 1e9)


def refused(call: Any, left: list[int], number: int, *arguments: Any, **options: Any) -> Any:
    left[0] -= 1
    if left[0] < 0:
        raise OSError(number, os.strerror(number))
    return call(*arguments, **options)


ERRORS = {"full": errno.ENOSPC, "read-only": errno.EROFS, "taken away": errno.EACCES, "broken": errno.EIO}


def arguments(name: str, data: Path, run: Path, out: Path) -> list[str]:
    """A command that writes to ``out``, and goes on where it can; of data, or (export) of a run."""
    head, *own = COMMANDS[name].split()
    goes_on = ["--resume"] * (name in GOES_ON and (out / "config.json").exists())
    if name == "export":
        return [head, str(run), *own, "--out", str(out)]
    sizes = without(SIZES.split(), "--local-steps") if name == "budget" else SIZES.split()
    return [head, *own, *sizes, "--data", str(data), "--out", str(out), *goes_on]


def without(options: list[str], name: str) -> list[str]:
    at = options.index(name)
    return options[:at] + options[at + 2 :]


def content(name: str, out: Path) -> dict[str, Any]:
    """What a finished command has written, all but times: bytes, numbers and the arrays of its last checkpoints."""
    read = lambda path: json.loads(path.read_text())
    if name in ("run", "compare"):
        newest = {path.parent: path for path in sorted(out.glob("checkpoints/*/*/*"), key=lambda x: int(x.name))}
        arrays = [ocp.StandardCheckpointer().restore(path.absolute()) for _, path in sorted(newest.items())]
        arrays = jax.tree.map(lambda x: np.asarray(x).tobytes(), arrays)
        return {"metrics": (out / "metrics.jsonl").read_bytes(), "arrays": arrays}
    if name in ("budget", "sweep"):
        found = read(out / ("budget.json" if name == "budget" else "summary.json"))
        return {"entries": found["entries"], "claims": found.get("claims")}
    if name == "meta":
        thetas = [path.read_bytes() for path in sorted(out.glob("*.theta.npz"))]
        return {"theta": thetas, "loss": read(out / "meta.json")["loss"]}
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def newest(out: Path) -> Path | None:
    """A file of the newest checkpoint."""
    found = [path for path in out.glob("checkpoints/*/*/*/**/*") if path.is_file() and path.stat().st_size]
    found += [path for path in out.glob("budget.json") if path.stat().st_size]
    return max(found, key=lambda path: path.stat().st_mtime) if found else None


def damage(path: Path, how: str) -> None:
    before = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(before[: len(before) // 2])
    else:
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
