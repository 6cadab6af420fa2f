"""The value of one option, from what is typed or stands in a file."""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Callable
from typing import Any

from experiments.config import Config
from experiments.options import MANY

BY_DEFAULT = "default"  # takes back what a file says of an option


def converter(name: str, hint: Any, default: Any) -> tuple[Callable[[str], Any], str]:
    """What makes a value of a text, and what ``--help`` calls that; what argparse calls it is the function's name."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return converter(name, next(part for part in typing.get_args(hint) if part is not types.NoneType), default)
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        convert = _seeds if name == "seeds" else _list_of(kind)
        return _or_by_default(convert, default), "N[,N...]" if kind is int else "A[,B...]"
    return _or_by_default(hint, default), {int: "N", float: "X", str: "TEXT"}[hint]


def _or_by_default(kind: Callable[[str], Any], default: Any) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        return default if text == BY_DEFAULT else kind(text)

    convert.__name__ = kind.__name__
    return convert


def _list_of(kind: type) -> Callable[[str], tuple]:
    def convert(text: str) -> tuple:
        parts = [part.strip() for part in text.split(",")]
        entries = parts[:-1] if not parts[-1] else parts  # "42," is a list of one, "" of none
        return tuple(kind(part) for part in entries)

    convert.__name__ = f"comma-separated {kind.__name__}"  # argparse names it in its error
    return convert


def _seeds(text: str) -> tuple[int, ...]:
    if "," in text or not text.strip():
        return _list_of(int)(text)
    first, colon, end = text.partition(":")
    start, stop = (int(first), int(end)) if colon else (0, int(first))
    if not stop - start <= MANY:  # before a tuple of them is made
        raise argparse.ArgumentTypeError(f"{text} means {stop - start} seeds: expected at most {MANY}")
    if not stop > start:
        raise argparse.ArgumentTypeError(f"{text} holds no seeds: expected a count, or FIRST:END with END above FIRST")
    return tuple(range(start, stop))


_seeds.__name__ = "count, range (0:5) or comma-separated int"


def from_file(origin: str, name: str, value: Any, hint: Any) -> Any:
    """A value as the option has it: a text is read as if it had been typed, a list may stand for several."""
    if value == BY_DEFAULT:
        return getattr(Config, name)
    if isinstance(value, str) and hint is not bool and not is_a(value, hint):
        try:
            return converter(name, hint, getattr(Config, name))[0](value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"{origin}: {name} = {value!r}: {error}") from None
    whole = tuple(value) if isinstance(value, list) else value
    several = any(typing.get_origin(part) is tuple for part in (hint, *typing.get_args(hint)))
    if several and type(value) in (int, float):
        return from_file(origin, name, str(value), hint)  # one number for several
    floats = lambda x: float(x) if type(x) is int and abs(x) < 2**53 else x
    for own in (whole, tuple(map(floats, whole)) if isinstance(whole, tuple) else floats(whole)):
        if is_a(own, hint):
            return own
    raise ValueError(f"{origin}: {name} = {value!r} is not what --{name.replace('_', '-')} takes")


def is_a(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return any(is_a(value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(is_a(x, typing.get_args(hint)[0]) for x in value)
    return type(value) is hint
