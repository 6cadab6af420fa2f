"""What the machine did meanwhile: CPU time of this process and of everybody else, peak memory."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

NOISE = 0.05  # of the machine's CPU time: more than that by others and a measurement is not quiet
SHORTEST = 0.5  # seconds: the machine counts CPU time in hundredths, and in less one cannot tell


def own_seconds() -> float:
    """CPU seconds of this process and its children, the living ones only where psutil is installed."""
    total = sum(os.times()[:4])
    try:
        import psutil
    except ImportError:
        return total
    for child in psutil.Process().children(recursive=True):
        try:
            total += sum(child.cpu_times()[:2])
        except psutil.Error:  # it has just ended
            continue
    return total


def busy_seconds() -> float | None:
    """CPU seconds of everybody since the machine started; ``None`` where there is no ``/proc/stat``."""
    try:
        numbers = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, numbers)  # without idle and waiting
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def others_share(busy: float | None, own: float, seconds: float) -> float | None:
    """Share of the machine's CPU time that went to others."""
    if busy is None or seconds < SHORTEST:
        return None
    return max(0.0, busy - own) / (seconds * (os.cpu_count() or 1))


def peak_memory_mb() -> float:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
