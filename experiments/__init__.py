"""Command line, data, recording and figures. Run from a clone: ``python -m experiments --help``."""
