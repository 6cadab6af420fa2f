"""The notebooks run as the scripts that they are; each checks what it says."""

import importlib.util
import re
import runpy
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.py"))
NEEDS = {"hugging_face_to_peft": ("torch", "transformers", "peft")}
OTHERS = "ignore:.*is_gradient_checkpointing:FutureWarning"  # what peft asks transformers


@pytest.mark.parametrize(
    "path", [p if p.stem in NEEDS else pytest.param(p, marks=pytest.mark.long) for p in NOTEBOOKS], ids=lambda p: p.stem
)
@pytest.mark.filterwarnings(OTHERS)
def test_a_notebook_runs(path, capsys):
    if lacks := [name for name in NEEDS.get(path.stem, ()) if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{', '.join(lacks)} not installed")
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_begins_with_its_title_and_has_words_before_code(path):
    kinds = re.findall(r"^# %%(.*)$", path.read_text(), re.MULTILINE)
    assert path.read_text().startswith("# %% [markdown]\n# # ")
    assert kinds.count("") <= kinds.count(" [markdown]") + 1
