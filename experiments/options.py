"""What an option is: a field of a frozen dataclass with its help, and what it may be; checked in one place.

Methods, wrappers and attacks have options of their own, ``NAME:OPTION=VALUE:...``: the arguments of a function.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any

from fedlora_jax.checks import refuse_outside

COUNT = "[1, 1000000]"  # clients, rounds, steps: more would be a slip, and take years or terabytes
INT32 = "[0, 2147483647]"
MANY = 10_000  # runs of one program: seeds, or values of a sweep

RESULTS, SPEED, RECORD, PLACE = "results", "speed", "record", "place"  # what an option decides


def option(
    default: Any,
    help: str,
    inside: str | None = None,
    among: tuple = (),
    empty: bool = False,
    decides: str = RESULTS,
) -> Any:
    """A field of options.

    Args:
      default: its default; ``None`` where it need not be given.
      help: what it is.
      inside: the interval of its numbers (``refuse_outside``); of each, where it holds several.
      among: what it (each of its entries) may be, where that is a choice.
      empty: whether nothing is an answer too (of a list).
      decides: the results; or only how fast they are computed, so that they are the same to rounding; or only what is
        kept of them, and where; or by which processes they are computed this time, which a run that goes on forgets.
    """
    about = {"help": help, "inside": inside, "among": among, "empty": empty, "decides": decides}
    return field(default=default, metadata=about)


def check_fields(options: Any) -> None:
    """Refuse a field of a dataclass of options that is empty, outside its interval or not among its choices."""
    for entry in dataclasses.fields(options):
        value, about = getattr(options, entry.name), entry.metadata
        if value is None or not about:
            continue
        flag, several = "--" + flag_of(entry.name), isinstance(value, tuple)
        values = value if several else (value,)
        if (not values and not about["empty"]) or any(isinstance(x, str) and not x.strip() for x in values):
            raise ValueError(f"{flag} is empty or has an empty entry: leave it out, or give it a value")
        if about["inside"] is not None:
            for x in values:
                refuse_outside(about["inside"], **{flag: x})
        if about["among"] and not set(values) <= set(about["among"]):
            got = ",".join(map(str, values))
            raise ValueError(f"{flag} must be one of {', '.join(map(str, about['among']))}; got {got}")
        if len(values) > MANY:
            raise ValueError(f"{flag} holds {len(values)} entries: expected at most {MANY}")


def flag_of(name: str) -> str:
    return name.replace("_", "-")


def settable(make: Callable) -> dict[str, inspect.Parameter]:
    """The parameters of a method, a wrapper or an attack that are options."""
    plain = lambda default: isinstance(default, (bool, int, float, str))
    return {key: p for key, p in inspect.signature(make).parameters.items() if plain(p.default)}


def read_options(part: str, name: str, texts: Sequence[str], settable: dict[str, inspect.Parameter]) -> dict[str, Any]:
    """The options that are set in ``part``, which is ``name`` and the ``texts`` ``OPTION=VALUE``.

    Raises:
      ValueError: no such option, a value that is none, or an option set twice.
    """
    pairs = [_read(part, name, text, settable) for text in texts]
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"{part!r} sets an option more than once: leave one of them")
    return dict(pairs)


def _read(part: str, name: str, text: str, settable: dict[str, inspect.Parameter]) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if key in settable and not equals:
        raise ValueError(f"{part!r}: {key} needs a value, as in {key}={settable[key].default}")
    if key not in settable:
        can = ", ".join(f"{k}={p.default}" for k, p in settable.items()) or "none"
        raise ValueError(f"{part!r}: {text!r} is no option of {name}; it has {can}")
    kind = type(settable[key].default)
    try:
        found = {"True": True, "False": False}[value] if kind is bool else kind(value)
    except (KeyError, ValueError):
        what = "True or False" if kind is bool else kind.__name__
        raise ValueError(f"{part!r}: {key} must be {what}, got {value!r}") from None
    if kind in (int, float):
        refuse_outside("(-inf, inf)", **{f"{part!r}: {key}": found})
    return key, found
