"""The wheel alone, in an environment with nothing else, federates a model of its user's own."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_wheel_alone_is_enough(tmp_path):
    pytest.importorskip("pip")
    env = {key: x for key, x in os.environ.items() if key != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}

    def call(*command, code=0):
        done = subprocess.run(list(map(str, command)), env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr[-2000:]
        return done

    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fedlora_jax"}
    assert "fedlora_jax/py.typed" in names

    call(sys.executable, "-m", "venv", tmp_path / "bare")
    python = tmp_path / "bare" / "bin" / "python"
    call(python, "-m", "pip", "install", "-q", wheel)
    where = call(python, "-c", "import fedlora_jax; print(fedlora_jax.__file__)").stdout
    assert where.startswith(str(tmp_path / "bare"))
    call(python, "-c", "import matplotlib", code=1)

    shutil.copy(ROOT / "examples" / "own_model.py", tmp_path / "own_model.py")
    printed = call(python, "-W", "error", tmp_path / "own_model.py").stdout
    before, after = ([float(word) for word in line.split() if "." in word] for line in printed.splitlines())
    assert min(after) > max(before) + 0.2

    refused = call(python.parent / "fedlora", "compare", code=2).stderr
    assert "runs from a clone" in refused
    assert refused.count("\n") == 1
    assert call(python.parent / "fedlora", "--version").stdout.startswith("fedlora-jax ")
