"""``fedlora COMMAND``, or ``python -m fedlora_jax COMMAND``: the command line of the clone that this lies in.

The wheel holds the library alone. Installed from it there is no command line, and this says so.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from fedlora_jax import __version__

CLONE = Path(__file__).parents[1]


def main() -> None:
    """Hand over to ``experiments`` beside this package, or end with one line and exit code 2 where there is none."""
    if (CLONE / "experiments" / "__main__.py").is_file():
        sys.path.insert(0, str(CLONE))  # before any other package of that name
        importlib.import_module("experiments.__main__").run()
    elif sys.argv[1:] == ["--version"]:
        print(f"fedlora-jax {__version__}")
    else:
        print(
            f"error: {CLONE} holds the library alone; the command line runs from a clone of the repository: "
            "pip install -e '.[experiments]' there, then fedlora or python -m experiments",
            file=sys.stderr,
        )
        sys.exit(2)


if __name__ == "__main__":
    main()
