"""Tests run on the CPU unless told otherwise; ``x64`` computes one test in float64."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # see experiments/__init__.py

import pytest
from helpers import float64


@pytest.fixture
def x64():
    with float64():
        yield
