"""What the machine did meanwhile: time, CPU time of this process and of everybody else, memory."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NOISE = 0.05  # of the machine's CPU time: more than that by others and a measurement is not quiet
SHORTEST = 0.5  # seconds: the machine counts CPU time in hundredths, and in less one cannot tell


class Watch:
    """Runs from when it is made. Children count where psutil is installed, else only those that have ended."""

    def __init__(self):
        self._begin = time.perf_counter(), _own_seconds(), _busy_seconds()

    def read(self) -> dict[str, float | None]:
        """Seconds; CPU seconds of this process and its children; share of the machine's CPU time that others had."""
        (begin, own, busy), end = self._begin, time.perf_counter()
        seconds, cpu_seconds, now = end - begin, _own_seconds() - own, _busy_seconds()
        elapsed = None if busy is None or now is None else now - busy
        others = others_share(elapsed, cpu_seconds, seconds)
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "others_share": others}


def others_share(busy: float | None, own: float, seconds: float) -> float | None:
    """Of the machine's CPU time, where ``busy`` seconds were used and ``own`` of them by us."""
    if busy is None or seconds < SHORTEST:
        return None
    return max(0.0, busy - own) / (seconds * (os.cpu_count() or 1))


def peak_memory_mb() -> float:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def family_memory_mb() -> float:
    """Resident size, now, of all living children, and the peak of this process."""
    return peak_memory_mb() + sum(_of_children(lambda child: child.memory_info().rss)) / 2**20


def _own_seconds() -> float:
    return sum(os.times()[:4]) + sum(_of_children(lambda child: sum(child.cpu_times()[:2])))


def _busy_seconds() -> float | None:
    """CPU seconds of everybody since the machine started; ``None`` where there is no ``/proc/stat``."""
    try:
        numbers = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, numbers)  # without idle and waiting
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _of_children(read: Callable[[Any], float]) -> list[float]:
    """A number of every child that still lives when it is asked."""
    try:
        import psutil
    except ImportError:
        return []
    numbers = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            numbers.append(read(child))
    return numbers
