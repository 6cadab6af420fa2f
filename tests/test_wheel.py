"""The wheel alone, in an environment with nothing else, federates its own models and one of its user's."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from quick import QUICK

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text().split("\n## The library in 25 lines\n")[1]
EXAMPLE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
# test_readme runs the whole
IMPORTS = "".join(f"{line}\n" for line in EXAMPLE.splitlines() if re.match("(import|from) ", line))


def own_models(folder, example):
    """A project with a ``models`` of its own, and an example in it."""
    (folder / "models").mkdir()
    (folder / "models" / "__init__.py").write_text("mine = True\n")
    code = "import sys\nimport fedlora_jax\nassert 'fedlora_jax.models' not in sys.modules\n"
    code += "import models\nassert models.mine\n" + example
    code += "assert 'safetensors' not in sys.modules\nassert not hasattr(models, 'vit')\n"
    (folder / "example.py").write_text(code)
    return folder / "example.py"


@pytest.mark.long
def test_in_a_clone_models_have_a_name_that_no_project_takes(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", own_models(tmp_path, IMPORTS)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_backbone_may_come_under_either_name():
    from fedlora_jax.models.backbone import Backbone

    from models.backbone import checked

    made = Backbone("mine", {"kernel": np.zeros((2, 2))}, lambda params, adapter, images: (images, images))
    assert checked(made, "here") is made


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_wheel_alone_is_enough(tmp_path):
    pytest.importorskip("pip")
    env = {key: x for key, x in os.environ.items() if key != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
    env |= QUICK | {"PIP_NO_COMPILE": "1"}  # of what is installed only a part is imported

    def call(*command, code=0):
        done = subprocess.run(list(map(str, command)), env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr[-2000:]
        return done

    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fedlora_jax"}
    assert "fedlora_jax/py.typed" in names
    own = {f"fedlora_jax/models/{path.name}" for path in (ROOT / "models").glob("*.py")}
    assert own == {name for name in names if name.startswith("fedlora_jax/models")}

    call(sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare")
    python = tmp_path / "bare" / "bin" / "python"
    call(sys.executable, "-m", "pip", "--python", python, "install", "-q", wheel)
    where = call(python, "-c", "import fedlora_jax; print(fedlora_jax.__file__)").stdout
    assert where.startswith(str(tmp_path / "bare"))
    call(python, "-c", "import matplotlib", code=1)

    shutil.copy(ROOT / "examples" / "own_model.py", tmp_path / "own_model.py")
    printed = call(python, "-W", "error", tmp_path / "own_model.py").stdout
    before, after = ([float(word) for word in line.split() if "." in word] for line in printed.splitlines())
    assert min(after) > max(before) + 0.2

    call(python, "-W", "error", own_models(tmp_path, IMPORTS))
    shutil.copy(ROOT / "experiments" / "data" / "nano_glyphs.npz", tmp_path / "nano.npz")
    (tmp_path / "nano.safetensors").write_bytes(b"anything")
    load = "import sys; from fedlora_jax.models.pretrained import load_vit\n"
    load += "for path in sys.argv[1:]: print(load_vit(path, 3).facts())"
    done = call(python, "-c", load, "nano.npz", "nano.safetensors", code=1)
    assert "'heads': '4 (nano.npz)'" in done.stdout
    assert "pip install safetensors" in done.stderr

    refused = call(python.parent / "fedlora", "compare", code=2).stderr
    assert "runs from a clone" in refused
    assert refused.count("\n") == 1
    assert call(python.parent / "fedlora", "--version").stdout.startswith("fedlora-jax ")
