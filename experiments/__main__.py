"""``python -m experiments COMMAND``; imports, which take a second, can be stopped like anything else."""

import importlib.util
import sys
from pathlib import Path

from experiments.results.folder import command
from experiments.stopping import stoppable

# What is imported here and in models, whose packages are those of the extra in pyproject.toml, and the library's own
NEEDS = (
    *("PIL", "filelock", "flax", "jax", "matplotlib", "numpy", "optax", "orbax"),
    *("safetensors", "scipy", "sklearn", "tokenizers", "tqdm"),
)


def main() -> None:
    from experiments import start

    start.main()


def run() -> None:
    """A process of its own: set up, and started again where that has to be."""
    refuse_without(NEEDS)
    with stoppable(lambda: f"to go on: {command()}"):
        from experiments import start

        start.main(start.settle())  # set up before jax finds its devices


def refuse_without(needs: tuple[str, ...]) -> None:
    """End with one line where modules are not installed."""
    if lacks := [name for name in needs if importlib.util.find_spec(name) is None]:
        where = Path(__file__).parents[1]
        print(
            f"error: the command line needs {', '.join(lacks)} beside the library: "
            f"pip install -e '{where}[experiments]'",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    run()
