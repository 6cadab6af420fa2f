"""Methods by their file names in ``fedlora_jax/methods``: a new file there is a new method here."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from typing import Any

import fedlora_jax.methods
from fedlora_jax.method import About, Method


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(fedlora_jax.methods.__path__))


def about(name: str) -> About:
    return _module(name).ABOUT


def build(name: str, **facts: Any) -> Method:
    """The method with its default hyper-parameters; it is given those facts of the run that it asks for by name."""
    make = getattr(_module(name), name)
    return make(**{key: facts[key] for key in inspect.signature(make).parameters if key in facts})


def table() -> str:
    """All methods, a line each."""
    header = ("name", "method", "paper", "arXiv", "trains", "travels", "exact")
    rows = [header, *((name, *about(name)) for name in names())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    line = lambda row: "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    return "\n".join([line(rows[0]), "  ".join("-" * width for width in widths), *map(line, rows[1:])])


def _module(name: str) -> Any:
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.0)
        raise ValueError(f"unknown method {name!r}: did you mean {near[0]}? There are {', '.join(names())}")
    return importlib.import_module(f"fedlora_jax.methods.{name}")
