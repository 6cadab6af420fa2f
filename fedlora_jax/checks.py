"""Numbers out of their bounds are refused before anything compiles."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.core import Tracer


def is_concrete(*numbers: Any) -> bool:
    """Are these plain numbers, so that they can be compared with their bounds now?

    A traced hyper-parameter is being learned or swept over: whoever traces it looks at its values first.
    """
    return not any(isinstance(x, Tracer) for x in numbers)


def refuse_outside(interval: str, **numbers: Any) -> None:
    """Refuse numbers outside an interval such as ``"[0, 1)"`` or ``"(0, inf)"``; traced ones pass (``is_concrete``).

    Nan and infinity are in no interval, nor is what a device cannot hold: integers beyond int32, and real numbers that
    float32 makes infinite or flushes to zero.

    Raises:
      ValueError: says which number, what it is and what it should be.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    for name, value in numbers.items():
        if not is_concrete(value):
            continue
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below and _representable(value)):
            raise ValueError(f"{name} must be {in_words(interval)}, got {value}{_beyond(value)}")


def in_words(interval: str) -> str:
    """``"[0, 1)"``: at least 0 and below 1."""
    low, high = interval[1:-1].replace(" ", "").split(",")
    least = f"{'at least' if interval[0] == '[' else 'above'} {low}"
    most = f"{'at most' if interval[-1] == ']' else 'below'} {high}"
    return " and ".join(end for end in (least, most) if "inf" not in end) or "a finite number"


def _representable(value: Any) -> bool:
    if isinstance(value, (int, np.integer)):
        return abs(int(value)) < 2**31
    limits = np.finfo(np.float32)
    return value == 0 or bool(float(limits.tiny) <= abs(value) <= float(limits.max))


def _beyond(value: Any) -> str:
    if isinstance(value, (int, np.integer)) or _representable(value):
        return "" if _representable(value) else ", which int32 cannot hold"
    return ", which is not finite" if not np.isfinite(value) else ", which float32 cannot hold"
