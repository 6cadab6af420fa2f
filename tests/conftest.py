"""Tests run on the CPU unless told otherwise; ``x64`` computes one test in float64."""

import gc
import itertools
import os
from pathlib import Path

from quick import GIVEN, QUICK

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # see experiments/__init__.py
# Compiling is most of what tests do: programs are kept for the next run, and for the tests that start processes.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

os.environ.update(QUICK)

import jax
import pytest
from helpers import EVERY, float64, forget
from xdist.scheduler import LoadScopeScheduling

jax.local_devices()  # by now the environment has been read; processes that tests start compile as a user's
for name in QUICK:
    del os.environ[name]
os.environ |= GIVEN

# Tracing leaves much behind that refers to itself; looking for it often takes a tenth of the time.
gc.freeze()
gc.set_threshold(50_000, 20, 20)

MAPPINGS = 45_000  # Linux allows a process 65,530; every compiled program takes some, and one too many aborts it
TESTS = itertools.count(1)


def group(nodeid: str) -> str:
    """What one process runs: a file, or of the battery all tests of one method, which share what they compile."""
    file, _, test = nodeid.partition("::")
    if file.endswith("test_every_method.py") and test.endswith("]"):
        return f"[{test[test.index('[') + 1 : -1].rpartition('-')[2]}]"  # behind any other parameter
    return file


def pytest_collection_modifyitems(items):
    """The battery last, method by method: its groups are short, so that all processes have work to the end."""
    methods = [f"[{name}]" for name in EVERY]
    items.sort(key=lambda item: 1 + methods.index(group(item.nodeid)) if group(item.nodeid) in methods else 0)


class ByGroup(LoadScopeScheduling):
    """As ``--dist loadfile``, by ``group``."""

    def _split_scope(self, nodeid):
        return group(nodeid)


def pytest_xdist_make_scheduler(config, log):
    config.option.loadscopereorder = False  # in the order of collection
    return ByGroup(config, log)


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


@pytest.fixture(scope="session", autouse=True)
def no_pictures():
    """Figures of a run are drawn, which finds what cannot be; most of a second a run it takes to render them."""
    from experiments.results import report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "png", lambda figure: b"")
        patch.setattr(report, "svg", lambda *_: "")
        yield


@pytest.fixture
def pictures(monkeypatch):
    """Figures are rendered as well."""
    from experiments.results import report, style

    monkeypatch.setattr(report, "png", style.png)
    monkeypatch.setattr(report, "svg", style.svg)


@pytest.fixture(autouse=True)
def few_programs():
    """Programs of tests that have run are forgotten before the process holds too many; counting takes a while."""
    yield
    maps = Path("/proc/self/maps")
    if next(TESTS) % 20 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS:
        forget()
