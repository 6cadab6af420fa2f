"""``python -m experiments COMMAND``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from experiments import bench, process
from experiments.cli import fail, parse
from experiments.config import SEEDS, check_fields


def main() -> None:
    command, options = parse()
    try:
        execute = planned(command, options)
    except (ValueError, OSError) as error:
        fail(str(error))
    if (count := len(getattr(options, "seeds", ()))) > SEEDS:
        print(f"note: {count} seeds are run; to run the one seed {count}, write --seeds {count},", file=sys.stderr)
    try:
        execute()
    except (FloatingPointError, MemoryError) as error:
        fail(str(error))


def planned(command: str, options: Any) -> Callable[[], Any]:
    """What remains to be done once everything that can be refused has been."""
    match command:  # imports wait until here: --help and typing errors need no jax
        case "bench":  # many small runs, each of which may be refused: nothing is left for later
            bench.execute(options)
            return lambda: None
        case "methods":
            from experiments import overview

            text = overview.table(options)
            return lambda: print(text)
        case "bounds":
            from experiments import bounds

            return bounds.Plan(options).execute
        case "budget":
            from experiments import budget

            return budget.Plan(options).execute
        case "sweep":
            from experiments import sweep

            return sweep.Plan(options).execute
        case "meta":
            from experiments import meta

            return meta.Plan(options).execute
        case _:
            from experiments import compare

            plan = compare.Plan(command, options)
            return plan.forecast if options.dry_run else plan.execute


if __name__ == "__main__":
    given = parse()[1]
    try:
        check_fields(given)
    except ValueError as error:
        fail(str(error))
    process.settle(getattr(given, "devices", 1))  # before anything imports jax, and may start again from here
    main()
