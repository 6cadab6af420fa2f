"""Tests run on the CPU unless told otherwise; ``x64`` computes one test in float64."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest
from helpers import float64


@pytest.fixture
def x64():
    with float64():
        yield
