"""Command line, data, recording and figures. Run from a clone: ``python -m experiments --help``."""

import os

# XLA calls LAPACK from its own threads; OpenBLAS threads beside them only get in the way: an aggregation of the
# built-in model takes 4 to 15 times as long with them on two busy cores. Read when NumPy and SciPy are first imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
