"""What a newcomer meets: a first start without a warning, and a second one that compiles nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from input_helpers import PLAIN, SMALL, change
from quick import QUICK

RUN = """
import atexit, sys
from experiments.engine import process

process.settle()
import jax

seen = []
jax.monitoring.register_event_listener(lambda event, **_: seen.append(event.rpartition("/")[2]))
atexit.register(lambda: print("compiled", seen.count("cache_misses"), "found", seen.count("cache_hits")))
from experiments.__main__ import main

main()
"""


def call(code: str, caches: Path, *options: str, **environment: str) -> list[str]:
    """What it prints, in words; it may not warn."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *options],
        env=env | QUICK | {"XDG_CACHE_HOME": str(caches)} | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "arning" not in done.stderr
    return done.stdout.split()


def start(caches: Path, out: str) -> tuple[int, int]:
    """Programs that a small comparison compiled, and that it found compiled."""
    change()(data := caches / "data.npz")
    options = ["run", "--method", "fedit", *SMALL, *PLAIN, "--partition", "iid", "--data", str(data)]
    *_, compiled, _, found = call(RUN, caches, *options, "--out", str(caches / out))
    return int(compiled), int(found)


@pytest.mark.long
def test_a_second_start_compiles_nothing_and_none_warns(tmp_path):
    compiled, _ = start(tmp_path, "first")
    again, found = start(tmp_path, "second")
    assert compiled > 0
    assert (again, found) == (0, compiled)


def test_a_folder_of_the_user_gets_no_limit_and_is_written_beside_what_others_left(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "jit_of_others-0-cache").write_bytes(b"x")  # without the time of its last use, as jax writes unlimited
    code = "from experiments.engine import process; process.settle(); import jax; jax.jit(lambda x: x + 1)(1.0)"
    own = {"JAX_COMPILATION_CACHE_DIR": str(theirs), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    call(code, tmp_path, **own)
    assert any(theirs.glob("*lambda*-cache")), "the program is kept"
    assert not list((tmp_path).glob("fedlora-jax"))


@pytest.mark.long
def test_programs_are_kept_where_the_process_does_not_start_again(tmp_path):
    """On an accelerator, say, and jax has read its environment while options were parsed."""
    code = "from experiments import start; start.settle(); import jax; print(jax.config.jax_compilation_cache_dir, "
    code += "jax.config.jax_compilation_cache_max_size, jax.config.jax_persistent_cache_min_compile_time_secs)"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
    said = lambda **own: subprocess.run(
        [sys.executable, "-c", code, "methods"],
        env=env | {"XDG_CACHE_HOME": str(tmp_path), "GLIBC_TUNABLES": ""} | own, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert said() == f"{tmp_path / 'fedlora-jax'} {2**30} 0.0\n"
    assert said(JAX_COMPILATION_CACHE_MAX_SIZE="5") == f"{tmp_path / 'fedlora-jax'} 5 0.0\n"
    assert said(JAX_COMPILATION_CACHE_DIR="theirs") == "theirs -1 1.0\n"
