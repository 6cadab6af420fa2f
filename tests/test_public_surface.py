"""``import fedlora_jax as fl`` is enough: every method and wrapper is there, typed, and says what it takes."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedlora_jax as fl
import fedlora_jax.methods
import fedlora_jax.wrappers

LIBRARY = Path(fl.__file__).parent


def files(package):
    return [
        importlib.import_module(f"{package.__name__}.{found.name}") for found in pkgutil.iter_modules(package.__path__)
    ]


METHODS = {module.__name__.rpartition(".")[2]: module for module in files(fedlora_jax.methods)}
WRAPPERS = {name: module for module in files(fedlora_jax.wrappers) for name in getattr(module, "ABOUT", ())}
CONSTRUCTORS = {name: getattr(module, name) for name, module in (METHODS | WRAPPERS).items()}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_every_method_and_wrapper_is_at_the_top_level(name):
    module = (METHODS | WRAPPERS)[name].__name__
    line = f"from {module} import {name}"
    assert getattr(fl, name, None) is CONSTRUCTORS[name], f"fedlora_jax/__init__.py lacks: {line}"
    assert name in fl.__all__, f'fedlora_jax/__init__.py lacks in __all__: "{name}"'


def test_all_of_it_is_listed_and_nothing_is_listed_twice():
    imported = {name for name in vars(fl) if not name.startswith("_")}
    for name in fl.__all__:
        assert name in dir(fl)
    assert len(set(fl.__all__)) == len(fl.__all__)
    modules = {found.name for found in pkgutil.iter_modules(fl.__path__)}  # that others have imported
    assert imported - set(fl.__all__) <= modules


def test_methods_and_wrappers_compose_at_the_top_level():
    method = fl.fedadam(fl.proximal(fl.fedit(), 0.1), lr=0.01)
    assert isinstance(method, fl.Method)
    assert method.stack == ("proximal", "fedadam")


def public(tree):
    """Functions and classes of a module, and the functions of these classes, by name."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                inside = (part for part in node.body if isinstance(part, ast.FunctionDef))
                yield from ((f"{node.name}.{part.name}", part) for part in inside if not part.name.startswith("_"))


@pytest.mark.parametrize("path", sorted(LIBRARY.rglob("*.py")), ids=lambda path: str(path.relative_to(LIBRARY)))
def test_every_public_function_has_a_docstring(path):
    for name, node in public(ast.parse(path.read_text())):
        is_linen = name.endswith(".setup")
        assert is_linen or ast.get_docstring(node), f"{path.relative_to(LIBRARY.parent)}: {name} has no docstring"


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_every_constructor_says_what_each_of_its_arguments_is(name):
    parameters = list(inspect.signature(CONSTRUCTORS[name]).parameters)
    text = inspect.getdoc(CONSTRUCTORS[name]) or ""
    _, _, arguments = text.partition("\nArgs:\n")
    explained = {word.strip() for line in arguments.splitlines() for word in line.partition(":")[0].split(",")}
    assert not set(parameters) - explained, f"{name}: Args of its docstring lack {sorted(set(parameters) - explained)}"


def test_types_of_the_package_are_for_its_users():
    assert (LIBRARY / "py.typed").exists()


@pytest.mark.long
def test_a_type_checker_knows_what_is_at_the_top_level(tmp_path):
    pytest.importorskip("pyright")
    (tmp_path / "own.py").write_text(
        "import fedlora_jax as fl\n"
        "from fedlora_jax import lora_fair, rounds\n"
        "method = fl.proximal(fl.fedit(), 0.1)\n"
        "reveal_type(method)\n"
        'lora_fair(solver="no such")\n'
        "def loss(base, adapter, batch): ...\n"
        "fl.make_round(method, loss, None)\n"
    )
    told = subprocess.run([sys.executable, "-m", "pyright", str(tmp_path / "own.py")], capture_output=True, text=True)
    assert 'Type of "method" is "Method"' in told.stdout
    wrong = {int(number) for number in re.findall(r"own\.py:(\d+):\d+ - error", told.stdout)}
    assert wrong == {5, 7}  # an option that does not exist; a loss of too few arguments
    assert "reportPrivateImportUsage" not in told.stdout
