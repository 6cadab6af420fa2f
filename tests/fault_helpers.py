"""Commands that are started many times and suffer a fault of the machine each time."""

from __future__ import annotations

import errno
import functools
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from input_helpers import PLAIN

NOWHERE = "/proc/nowhere"
SIZES = "--clients 3 --holdout-clients 1 --partition iid --minimum 4 --local-steps 1 --batch 4 --rank 2"
# flora has a key in its state, fedadam moments of the server, ditto memory of clients
COMMANDS = {
    "run": "run --method fedit+fedadam --rounds 8 --checkpoint-every 2 --seeds 2 --dropouts 0.3",
    "compare": "compare --methods flora,ditto --rounds 4 --checkpoint-every 1 --seeds 1 --clients-per-round 2",
    "budget": "budget --methods fedit --rounds 2 --budgets 1,2 --lrs 0.1 --tuning-seeds 100 --seeds 1",
    "sweep": "sweep --methods fedit+proximal --vary mu=0.1,1 --lrs 0.05 --rounds 2 --seeds 1",
    "meta": "meta --method hyperlora:mode=frozen --rounds 3 --eval-every 1 --unroll 1 --seeds 1",
    "export": "export --to npz --model all",
}
GOES_ON = ("run", "compare", "budget")  # by --resume; the others are short and begin again, elsewhere


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
    return [head, *own, *sizes, *PLAIN, "--data", str(data), "--out", str(out), *goes_on]


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
