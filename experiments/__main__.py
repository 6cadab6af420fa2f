"""``python -m experiments COMMAND``."""

from __future__ import annotations

from experiments import bench
from experiments.cli import fail, parse


def main() -> None:
    command, config = parse()
    if command == "methods":
        from experiments.methods import table

        print(table())
        return
    if isinstance(config, bench.Options):
        try:
            bench.execute(config)
        except (ValueError, OSError) as error:
            fail(str(error))
        return
    from experiments import bounds, budget, compare  # after parsing: --help and typing errors need no jax

    assert config is not None
    try:
        match command:
            case "bounds":
                plan = bounds.Plan(config)
            case "budget":
                plan = budget.Plan(config)
            case _:
                plan = compare.Plan(command, config)
    except (ValueError, OSError) as error:
        fail(str(error))
    try:
        plan.execute()
    except FloatingPointError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
