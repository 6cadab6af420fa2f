"""Bad inputs by the hundred: what is made of every option and of every array of a file, and who looks at the refusal.

A case is a label and the arguments of a command. All of them are for one process, which they must leave as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import sys
import traceback
import types
import typing
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from experiments.__main__ import main

HOSTILE = "<script>alert(1)</script>\x1b[2J\u202e\n\ud7ff'\"&"  # HTML, a terminal, a turned line, a second line
RUNS = "__import__('pathlib').Path('RAN').touch()"  # what nobody may execute
# What is typed for a number. Which of them an option may be, its interval says.
NUMBERS = (
    *("", " ", "four", "0", "-1", "1.5", "1e300", "-1e300", "1e-300", "99999999999999999999", "nan", "inf", "-inf"),
    *("0x10", "1;2", "\u00bd", "\u221e", "1\u202e2", "\x1b[31m1", RUNS, "None", "[1]"),
)
# What is typed for a text that names something. No such thing exists.
TEXTS = (
    "",
    " ",
    HOSTILE,
    RUNS,
    "nan",
    "-1",
    "../../../etc/passwd",
    "a" * 5000,
    "\u00e9\u0301\u2603",
    ":",
    "=",
    "(",
    "{}",
)


class Case(NamedTuple):
    """Arguments that are refused; ``said``: one of these stands in the message."""

    label: str
    arguments: list[str]
    said: tuple[str, ...] = ()


def fault(case: Case, place: Path, compilations: list, untouched: bool = True) -> str | None:
    """What is wrong with how a case is refused; nothing, where it is right.

    Args:
      case: the arguments.
      place: where everything lies that might be written.
      compilations: of the fixture.
      untouched: also nothing is written to a cache, the folder ``home``.
    """
    before, out, err = snapshot(place, untouched), io.StringIO(), io.StringIO()
    compilations.clear()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = _exit_code(case.arguments)
    lines = err.getvalue().splitlines()
    if code != 2:
        return f"ended with {code}"
    if out.getvalue():
        return f"printed {out.getvalue()[:80]!r}"
    if len(lines) != 1 or not err.getvalue().endswith("\n") or not lines[0].startswith("error: "):
        return f"said {err.getvalue()[:300]!r}"
    if len(lines[0]) > 1300 or not lines[0].isprintable():
        return f"said what no terminal should be told: {lines[0][:200]!r}"
    if case.said and not any(text in lines[0] for text in case.said):
        return f"does not say {' or '.join(case.said)}: {lines[0][:200]}"
    if compilations:
        return "compiled"
    changed = snapshot(place, untouched) ^ before
    return f"wrote {sorted(changed)[:2]}" if changed else None


def snapshot(place: Path, home: bool) -> set[tuple]:
    """All files below a folder, by size and time."""
    found = set()
    for folder, folders, files in os.walk(place):
        folders[:] = [name for name in folders if home or name != "home"]
        for name in (*folders, *files):
            about = os.lstat(os.path.join(folder, name))
            kept = (about.st_size, about.st_mtime_ns) if name in files else ()
            found.add((os.path.join(folder, name), *kept))
    return found


def _exit_code(arguments: list[str]) -> Any:
    with mock.patch.object(sys, "argv", ["experiments", *arguments]):
        try:
            main()
        except SystemExit as stop:
            return stop.code
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"[:300]
    return "no error"


def of_options(
    options: type,
    command: Callable[[str], list[str]],
    free: dict[str, tuple[str, ...]],
    names: Collection[str] | None = None,
) -> Iterator[Case]:
    """Every option of a dataclass with every bad text.

    Args:
      options: the dataclass.
      command: ``(field) -> arguments`` that are right but for the option, which comes last.
      free: of options that may be almost any text, which texts are none.
      names: of the fields; ``None``: all.
    """
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        if names is not None and field.name not in names:
            continue
        kind, several = kind_of(hints[field.name])
        flag = "--" + field.name.replace("_", "-")
        if kind is bool or not field.metadata:
            continue
        typed = NUMBERS if kind in (int, float) else TEXTS
        for text in free.get(field.name, typed):
            if not may_be(text, kind, several, field.metadata):
                said = (flag, field.name) if kind in (int, float) else ()
                yield Case(f"{flag} {text[:40]!r}", [*command(field.name), f"{flag}={text}"], said)


def kind_of(hint: Any) -> tuple[type, bool]:
    """The type of an option's entries, and whether it has several."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    several = typing.get_origin(hint) is tuple
    return (typing.get_args(hint)[0] if several else hint), several


def may_be(text: str, kind: type, several: bool, about: Any) -> bool:
    """Is it a value of the option, by its interval or choices alone?"""
    if several and not text.strip():
        return about["empty"]
    if kind is str:
        return text in about["among"]
    try:
        value = kind(text)
    except ValueError:
        return False
    if about["inside"] is None:
        return math.isfinite(value)
    low, high = (float(end) for end in about["inside"][1:-1].split(","))
    above = value >= low if about["inside"][0] == "[" else value > low
    below = value <= high if about["inside"][-1] == "]" else value < high
    held = abs(value) < 2**31 if kind is int else value == 0 or 1.2e-38 < abs(value) < 3.4e38
    return above and below and held and (not about["among"] or value in about["among"])


class Pickled:
    """What executes code when it is unpickled."""

    def __reduce__(self):
        return eval, (RUNS,)


# What is made of an array; ``None``: it is left out. What does not apply to an array gives it back as it is.
ARRAYS: dict[str, Callable[[np.ndarray], np.ndarray | None]] = {
    "missing": lambda x: None,
    "pickled": lambda x: np.array([Pickled()], object),
    "complex": lambda x: x.astype(complex) if x.dtype.kind in "iuf" else x,
    "time": lambda x: np.zeros(x.shape, "datetime64[s]"),
    "structured": lambda x: np.zeros(x.shape, [("a", "f4"), ("b", "i4")]),
    "text": lambda x: np.full(x.shape, RUNS) if x.dtype.kind in "iuf" else x,
    "truth": lambda x: np.ones(x.shape, bool),
    "scalar": lambda x: x.reshape(-1)[0] if x.ndim else x,
    "one axis more": lambda x: x[None],
    "one axis less": lambda x: x.reshape(-1) if x.ndim > 1 else np.asarray(x.reshape(-1)[0]) if x.ndim else x,
    "empty": lambda x: x[:0] if x.ndim else x[None][:0],
    "one less": lambda x: x[:-1] if x.ndim else x,
    "one more": lambda x: np.concatenate([x, x[:1]]) if x.ndim else x,
    "turned": lambda x: x.T if x.T.shape != x.shape else x,
    "nan": lambda x: _with(x.astype(np.float32), math.nan) if x.dtype.kind in "iuf" else x,
    "inf": lambda x: _with(x.astype(np.float32), math.inf) if x.dtype.kind in "iuf" else x,
    "beyond float32": lambda x: _with(x.astype(np.float64), 1e300) if x.dtype.kind in "iuf" else x,
    "huge": lambda x: _with(x.astype(np.int64), 2**62) if x.dtype.kind in "iu" else x,
    "negative": lambda x: _with(x.astype(np.int64), -(2**62)) if x.dtype.kind in "iu" else x,
    "no text": lambda x: np.full(x.shape, b"\xff\xfe") if x.dtype.kind == "U" else x,
    "no name": lambda x: np.full(x.shape, "  ") if x.dtype.kind == "U" else x,
}


def _with(x: np.ndarray, value: float) -> np.ndarray:
    x = np.array(x)
    x.reshape(-1)[-1] = value
    return x


def of_arrays(arrays: dict[str, np.ndarray], fine: Callable[[str, str], bool]) -> Iterator[tuple[str, dict]]:
    """A file's arrays with one of them made bad, and what was; but for ``fine(array, what)``, no fault."""
    for name, x in arrays.items():
        for what, make in ARRAYS.items():
            made = make(x)
            if made is x or fine(name, what):
                continue
            yield f"{name}: {what}", {key: y for key, y in (arrays | {name: made}).items() if y is not None}


def with_one(values: dict[str, Any], bad: Any, fine: Callable[[str, Any], bool]) -> Iterator[tuple[str, dict]]:
    """A file's entries with one of them made bad, but for ``fine(entry, value)``."""
    for name in values:
        for value in bad:
            if not fine(name, value):
                yield f"{name} = {str(value)[:40]!r}", values | {name: value}


# Values that JSON can have and no number, text or list of an option is.
STRUCTURES = ({}, {"a": 1}, [[]], [None], [{}], 10**400)
OBJECTS = (*STRUCTURES, HOSTILE, RUNS, True, -1, 1e300, math.nan, math.inf, 1.5, "")


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of a header, which may be any text or JSON, that may claim another length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


SAFETENSORS = {
    "nothing": b"",
    "seven bytes": b"1234567",
    "a header beyond the file": safetensors({}, length=10**6),
    "a header beyond all bounds": safetensors({}, length=2**63 + 5),
    "no JSON": safetensors(b"{cut"),
    "a list": safetensors([]),
    "no text": safetensors(b"\xff\xfe"),
    "a deep header": safetensors(b"[" * 100_000),
    "no offsets": safetensors({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "offsets beyond the file": safetensors({"a": _entry(offsets=(0, 2**40))}, bytes(8)),
    "offsets turned": safetensors({"a": _entry(offsets=(8, 0))}, bytes(8)),
    "negative offsets": safetensors({"a": _entry(offsets=(-8, 0))}, bytes(8)),
    "offsets that overlap": safetensors({"a": _entry(), "b": _entry(offsets=(4, 12))}, bytes(12)),
    "an unknown type": safetensors({"a": _entry("O8")}, bytes(8)),
    "a shape that does not fit": safetensors({"a": _entry(shape=(3,))}, bytes(8)),
    "a shape beyond all bounds": safetensors({"a": _entry(shape=(2**62, 2**62))}, bytes(8)),
    "a negative shape": safetensors({"a": _entry(shape=(-2,))}, bytes(8)),
    "bytes too many": safetensors({"a": _entry()}, bytes(100)),
    "hostile names": safetensors({HOSTILE: _entry(), "../../etc/passwd": _entry(offsets=(8, 16))}, bytes(16)),
    "a name without end": safetensors({"a" * 100_000: _entry()}, bytes(8)),
}
