"""``python -m experiments COMMAND``; imports, which take a second, can be stopped like anything else."""

from experiments.results.folder import command
from experiments.stopping import stoppable


def main() -> None:
    from experiments import start

    start.main()


if __name__ == "__main__":
    with stoppable(lambda: f"to go on: {command()}"):
        from experiments import start

        start.settle()  # before jax finds its devices
        start.main()
