"""Command line, data, recording and figures. Run from a clone: ``python -m experiments --help``."""

import importlib.util
import os
from pathlib import Path

# Both lie in the clone under plain names: where another ``models`` is found first, say so rather than fail inside it.
_found = importlib.util.find_spec("models")
if _found is None or _found.origin is None or Path(_found.origin).parent.parent != Path(__file__).parents[1]:
    _where = "none" if _found is None else _found.origin or "a folder without __init__.py"
    raise ImportError(
        f"experiments needs the package models of its own clone, found {_where}: run from {Path(__file__).parents[1]}"
    )

# XLA calls LAPACK from its own threads; OpenBLAS threads beside them only get in the way: an aggregation of the
# built-in model takes 4 to 15 times as long with them on two busy cores. Read when NumPy and SciPy are first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
