"""A command from what is typed to its end: refused, carried out, or stopped, with one line and an exit code."""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
from collections.abc import Callable
from typing import Any

from experiments import bench
from experiments.cli import parse
from experiments.config import SEEDS, Config, check
from experiments.engine import hosts, process
from experiments.engine.hosts import ALONE, Joined
from experiments.options import check_fields
from experiments.parsers import fail
from experiments.results.folder import Folder, command
from experiments.setup import option_files
from experiments.stopping import stoppable

# What the system may refuse while a folder is being written, and what to do about it
REFUSED = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it writable"),
    **dict.fromkeys((errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENODEV), "see to the disk"),
    errno.EPIPE: "nobody reads what is printed",
}


def main(joined: Joined = ALONE) -> None:
    name, options = parse()
    folder: Folder | None = None
    goes_on = lambda: f"to go on: {folder.command() if folder else command()}"

    def last_words() -> str:
        joined.leave()
        return goes_on()

    with stoppable(last_words), hosts.together(joined, goes_on):
        refusal, execute = None, lambda: None
        try:
            if isinstance(options, Config) and options.hosts > 1:
                name, options = _as_the_first(name, options)
            with hosts.quiet():
                folder, execute = planned(name, options)
        except (ValueError, OSError) as error:
            refusal = str(error)
        if hosts.refused(refusal is not None):
            fail(joined.name + refusal) if refusal else sys.exit(2)
        if (count := len(getattr(options, "seeds", ()))) > SEEDS:
            print(f"note: {count} seeds are run; to run the one seed {count}, write --seeds {count},", file=sys.stderr)
        try:
            with hosts.quiet():
                execute()
            sys.stdout.flush()
        except (FloatingPointError, MemoryError) as error:
            fail(joined.name + str(error))
        except RuntimeError as error:  # jax's, that of run and compare comes after their chunks were halved
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            less = "use a smaller --chunk, --batch or model, fewer seeds or values"
            fail(f"{joined.name}the device ran out of memory: {less}; {goes_on()}", code=1)
        except OSError as error:
            if error.errno is None:  # ours: somebody else has taken the folder
                fail(str(error))
            if error.errno not in REFUSED or (error.filename and not (folder and folder.holds(error.filename))):
                raise
            if error.errno == errno.EPIPE:  # nor can Python's last words be
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            where = error.filename or (folder.path if folder else "the output")
            fail(f"cannot write to {where}: {error.strerror}; {REFUSED[error.errno]}; {goes_on()}", code=1)


def _as_the_first(command: str, options: Config) -> tuple[str, Config]:
    """What the first of several processes was told."""
    command, told = hosts.agreed([command, dataclasses.asdict(options)])
    held: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in told.items()}
    return command, Config(**held)


def planned(command: str, options: Any) -> tuple[Folder | None, Callable[[], Any]]:
    """The folder that is written, and what remains to be done once everything that can be refused has been."""
    match command:  # imports wait until here: --help and typing errors need none of them
        case "bench":  # many small runs, each of which may be refused: nothing is left for later
            bench.execute(options)
            return None, lambda: None
        case "methods":
            from experiments.commands import list_methods

            text = list_methods.table(options)
            return None, lambda: print(text)
        case "compare-runs":
            from experiments.commands import compare_runs

            found = compare_runs.table(options)
            return None, lambda: print(found)
        case "data":
            from experiments.commands import describe_data

            return None, describe_data.Plan(options).execute
        case "recipes":
            text = option_files.listing(options.name)
            return None, lambda: print(text)
        case "completion":
            from experiments import completion

            script = completion.script(options.shell)
            return None, lambda: print(script)
        case "doctor":
            from experiments.commands import doctor

            found = doctor.table()
            return None, lambda: print(found)
        case "models":
            from experiments.commands import list_models

            listing = list_models.table(options)
            return None, lambda: print(listing)
        case "export":
            from experiments.commands import export

            plan = export.Plan(options)
            return plan.folder, plan.execute
        case "pool":
            from experiments.commands import pool

            plan = pool.Plan(options)
            return plan.folder, plan.execute
        case "bounds":
            from experiments.commands import bounds

            return None, bounds.Plan(options).execute
        case "budget":
            from experiments.commands import budget

            plan = budget.Plan(options)
            return plan.folder, plan.execute
        case "sweep":
            from experiments.commands import sweep

            plan = sweep.Plan(options)
            return plan.folder, plan.execute
        case "meta":
            from experiments.commands import meta_train

            plan = meta_train.Plan(options)
            return plan.folder, plan.execute
        case _:
            from experiments.commands import compare

            plan = compare.Plan(command, options)
            return (None, plan.forecast) if options.dry_run else (plan.folder, plan.execute)


def settle() -> Joined:
    """Check what is typed, and set up the process for it; it may start again from here."""
    given = parse()[1]
    several = isinstance(given, Config) and given.hosts > 1
    try:
        check(given) if several else check_fields(given)
    except ValueError as error:
        fail(str(error))
    process.settle(getattr(given, "devices", 1))
    if not several:
        return ALONE
    try:
        return hosts.join(given.hosts, given.devices, given.coordinator, given.process_id)
    except ValueError as error:
        fail(str(error))
