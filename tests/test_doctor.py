"""What a machine has is said as it is, and what would be in the way with what to do."""

import os
import sys

import jax
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.commands import doctor


def test_a_machine_is_described(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "fedlora-jax").mkdir()
    (tmp_path / "fedlora-jax" / "program").write_bytes(bytes(2**29))
    monkeypatch.setattr(sys, "argv", ["experiments", "doctor"])
    main()
    said = capsys.readouterr().out
    for part in (jax.__version__, np.__version__, f"{tmp_path}/fedlora-jax, 0.50 GiB", "pytest", jax.default_backend()):
        assert part in said
    assert ("missing, for --data tfds:NAME" in said) == (doctor.importlib.util.find_spec("tensorflow_datasets") is None)


def test_what_is_in_the_way_is_said_with_a_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("GLIBC_TUNABLES", "set")
    folders = {"programs": tmp_path / "not" / "yet"}
    if jax.default_backend() == "cpu":
        assert doctor.problems(folders) == []
        (tmp_path / "nvidia0").touch()
        monkeypatch.setattr(doctor, "ACCELERATORS", {str(tmp_path / "nvidia0"): "cuda12"})
        (found,) = doctor.problems(folders)
        assert "pip install -e '.[cuda12]'" in found
        monkeypatch.setattr(doctor, "ACCELERATORS", {})
    monkeypatch.setattr(os, "access", lambda path, how: str(path) != str(tmp_path))
    (found,) = doctor.problems(folders)
    assert f"make {tmp_path} writable" in found


@pytest.mark.parametrize("module", doctor.OPTIONAL)
def test_every_extra_that_is_named_is_one(module):
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert doctor.OPTIONAL[module][1] in project["optional-dependencies"]
