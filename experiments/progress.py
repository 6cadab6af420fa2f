"""How far something is: a bar on a terminal, and elsewhere, as in a file or under a scheduler, a line now and then."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
EVERY = 10.0  # seconds between lines


class Lines:
    """What a bar of tqdm says, by the same names, in lines: the first after ``EVERY`` seconds, the last at the end."""

    def __init__(self, total: int, unit: str, desc: str = ""):
        self._total, self._unit, self._desc, self._more, self.n = total, unit, desc, "", 0
        self._begin = self._last = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def set_description(self, desc: str) -> None:
        self._desc = desc

    def set_postfix_str(self, more: str) -> None:
        self._more = more

    def update(self, n: int = 1) -> None:
        self.n, now = self.n + n, time.monotonic()
        ends = self.n >= self._total and self._last > self._begin  # what was over at once needs no line
        if now - self._last < EVERY and not ends:
            return
        self._last, took = now, now - self._begin
        left = took / self.n * (self._total - self.n)
        parts = [self._desc, f"{self.n} of {self._total} {self._unit}s", self._more]
        parts += [f"{tqdm.format_interval(took)} so far, some {tqdm.format_interval(left)} left"]
        print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)


Bar = tqdm | Lines


def has_width() -> bool:
    """Is there a terminal, and is its width known? That of one which a program has made may be 0."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


def bar(total: int, unit: str, desc: str = "", leave: bool = True, delay: float = 0.0) -> Bar:
    """To be entered, and told of each ``unit`` that is done; ``leave``: whether a bar stays where it was drawn."""
    if not has_width():
        return Lines(total, unit, desc)
    return tqdm(total=total, unit=unit, desc=desc or None, leave=leave, delay=delay, smoothing=0.1, dynamic_ncols=True)


def following(items: Sequence[T], unit: str) -> Iterator[T]:
    """The items, each of which is a ``unit`` that is done when the next is asked for."""
    with bar(len(items), unit) as own:
        for item in items:
            yield item
            own.update()
