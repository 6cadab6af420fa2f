"""Tests run on the CPU unless told otherwise; ``x64`` computes one test in float64."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # see experiments/__init__.py

import jax
import pytest
from helpers import EVERY, float64, forget

MAPPINGS = 30_000  # Linux allows a process 65,530; every compiled program takes some, and one too many aborts it


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """One process runs a whole file, and of the battery all that one method compiles once; the battery comes last, as
    its groups are short and processes then end together."""
    method = lambda item: item.path.stem == "test_every_method" and getattr(item, "callspec", None)
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(method(item).params["name"] if method(item) else item.path.stem))
    items.sort(key=lambda item: bool(method(item)) and (1 + list(EVERY).index(method(item).params["name"])))


@pytest.fixture
def x64():
    with float64():
        yield


@pytest.fixture
def compilations():
    """Counts what XLA compiles while the test runs."""
    seen: list[str] = []
    listen = lambda event, duration, **_: seen.append(event) if "backend_compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(autouse=True)
def few_programs():
    """Programs of tests that have run are forgotten before the process holds too many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS:
        forget()
