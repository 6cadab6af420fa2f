"""Each part declares what it imports, and no more: the library, and what the command line needs beside it."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from experiments.__main__ import NEEDS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {
    "orbax-checkpoint": "orbax",
    "scikit-learn": "sklearn",
    "pillow": "PIL",
    "mlflow-skinny": "mlflow",
    "dp-accounting": "dp_accounting",
}
BY_THE_TRACKED = {"pandas", "xarray"}  # for whoever has them: no command needs them
OWN = {"fedlora_jax", "models", "experiments"}
INSTALLED_APART = ROOT / "experiments" / "bench" / "contenders"  # whom rounds are compared with


def declared(requirements):
    """Modules of the packages that are required."""
    names = [re.match(r"[\w-]+", text)[0] for text in requirements]
    return {MODULES.get(name, name) for name in names}


def imported(package):
    """Top-level modules, without those of Python, that the files of a package import anywhere."""
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        if path.is_relative_to(INSTALLED_APART):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - OWN


def test_the_library_depends_on_what_it_imports():
    """And on what an extra brings, where an error names it."""
    extras = PROJECT["optional-dependencies"]
    assert imported("fedlora_jax") == declared([*PROJECT["dependencies"], *extras["privacy"]])


def test_models_are_imported_with_the_librarys_dependencies_alone():
    """What reads files is imported when a file is read."""
    found = set()
    for path in (ROOT / "models").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).partition(".")[0])
    assert found - set(sys.stdlib_module_names) - OWN <= declared(PROJECT["dependencies"])
    extras = PROJECT["optional-dependencies"]
    assert imported("models") - declared(PROJECT["dependencies"]) == declared([*extras["weights"], *extras["hub"]])


def test_the_command_line_needs_what_it_imports_beside_the_library():
    extras = PROJECT["optional-dependencies"]
    by_jax = {"filelock"}  # which imports it to limit its cache
    needs = imported("experiments") | imported("models") | by_jax
    asked = {
        name for extra in ("bench", "completion", "hub", "track") for name in declared(extras[extra])
    } | BY_THE_TRACKED
    assert needs - asked - BY_THE_TRACKED == set(NEEDS)
    assert set(NEEDS) - declared(PROJECT["dependencies"]) == declared(extras["experiments"])


@pytest.mark.parametrize("extra", ["bench", "test"])
def test_extras_that_run_the_command_line_bring_what_it_needs(extra):
    assert any(text.startswith("fedlora-jax[experiments") for text in PROJECT["optional-dependencies"][extra])
