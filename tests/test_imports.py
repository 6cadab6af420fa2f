"""Imports run one way: the library knows nothing of who uses it, and in experiments each room only what is below it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = [  # from the door down; the modules of one line do not know of the other rooms of that line
    {"__main__"},
    {"start"},
    {"cli", "completion"},
    {"parsers"},
    {"commands", "bench"},
    {"engine"},
    {"results"},
    {"setup"},
    {"config", "requests", "stopping"},
    {"attack", "groups"},
    {"options", "progress", "experiments"},
]
FLOOR = {room: i for i, rooms in enumerate(ROOMS) for room in rooms}


def modules(package):
    """Every module of a package by its full name, and its file."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path):
    """Modules that a file imports, wherever in it; ``from package import module`` is the module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(ROOT).parent.parts if node.level else ()
            module = ".".join([*above[: len(above) + 1 - node.level], *filter(None, [node.module])])
            inside = {alias: f"{module}.{alias.name}" for alias in node.names}
            names |= {full if is_module(full) else module for full in inside.values()}
    return names


def is_module(name):
    path = ROOT / Path(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def room(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def test_the_library_knows_neither_models_nor_experiments():
    for name, path in modules("fedlora_jax").items():
        assert not {x for x in imports(path) if x.split(".")[0] in ("models", "experiments")}, name
    for name, path in modules("models").items():
        assert not {x for x in imports(path) if x.split(".")[0] == "experiments"}, name


def test_every_room_of_experiments_imports_only_from_below():
    every = modules("experiments")
    up = []
    for name, path in every.items():
        for other in imports(path) & every.keys() - {"experiments"}:
            mine, theirs = room(name), room(other)
            if mine != theirs and FLOOR[theirs] <= FLOOR[mine]:
                up.append(f"{name} imports {other}")
    assert not up


def test_models_import_one_another_by_what_lies_beside_them():
    """In the wheel they are ``fedlora_jax.models``, and ``models`` is whatever its user calls so."""
    for name, path in modules("models").items():
        tree = ast.walk(ast.parse(path.read_text()))
        absolute = [node.module or "" for node in tree if isinstance(node, ast.ImportFrom) and not node.level]
        assert not [x for x in absolute if x.split(".")[0] == "models"], f"{name}: write from . import, from .x import"


@pytest.mark.parametrize("package", ["fedlora_jax", "models", "experiments"])
def test_no_module_imports_itself_through_others(package):
    """Type checking counts: who needs the type of a module depends on it."""
    every = modules(package)
    graph = {name: imports(path) & every.keys() - {name} for name, path in every.items()}
    done, way = set(), []

    def visit(name):
        assert name not in way, f"a circle: {' -> '.join([*way[way.index(name) :], name])}"
        if name in done:
            return
        way.append(name)
        for other in sorted(graph[name]):
            visit(other)
        done.add(way.pop())

    for name in sorted(graph):
        visit(name)
