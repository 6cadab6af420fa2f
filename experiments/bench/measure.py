"""What every bench does alike: rounds between two matrix products, and lines with the same fields."""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from experiments.bench import machine, works
from experiments.bench.works import Arrays, Work
from experiments.engine import process

FIELDS = (
    "bench",
    "work",
    "contender",
    "seconds_per_round",  # median
    "spread",  # of these, the least and the most
    "peak_fraction",  # of the rate of a large matrix product, in the same process, just before and after each round
    "cpu_seconds",  # of one round, all threads and child processes, median
    "peak_memory_mb",  # of the process since it started; on an accelerator of the device
    "compile_seconds",
    "quiet",  # nobody else used the CPU
    "versions",
    "device",
    "processor",
    "vector_bits",  # of the widest vectors that its library says it uses (XLA: that there are). A library for products
    #   below it may use narrower ones, as PyTorch's does on processors of AMD: that shows in peak_gflops
    "date",
)
EXACT = ("squares", "moved")  # compared to the last digits
Line = dict[str, Any]


class Contender(NamedTuple):
    """One implementation of a round, ready to run: everything is compiled, weights and batches are in place."""

    round: Callable[[], Any]  # runs one round to its end
    adapter: Callable[[Any], Arrays]  # the aggregated adapter of what ``round`` gave, named as in ``works.adapter``
    matmul: Callable[[], float]  # one square product of side ``works.product_side``, to its end; gives its FLOP
    about: dict[str, Any]  # versions, device, compile_seconds, and what else belongs on the line
    device_memory_mb: Callable[[], float | None] = lambda: None  # the peak, where the device has memory of its own
    clock: Callable[[Any], dict[str, Any]] = lambda out: {}  # its own measurements, where ``round`` does more


class Times(NamedTuple):
    """Seconds of several calls."""

    median: float
    spread: list[float]  # the least and the most


class Turns(NamedTuple):
    """Seconds of calls that took turns with others, and those of all cores."""

    median: float
    spread: list[float]
    cpu_seconds: float  # median; what others do on the machine counts less in it


def times(values: Iterable[float]) -> Times:
    seconds = sorted(values)
    return Times(statistics.median(seconds), [digits(seconds[0]), digits(seconds[-1])])


def timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def rate(matmul: Callable[[], float], products: int = 5) -> float:
    """FLOP/s of a product, median."""
    return matmul() / statistics.median(timed(matmul) for _ in range(products))


def turn(work: Work, contender: Contender) -> dict[str, Any]:
    """One round between two measurements of the peak."""
    before = rate(contender.matmul)
    watch = machine.Watch()
    out = contender.round()
    measured = watch.read()
    peak = (before + rate(contender.matmul)) / 2
    adapter = contender.adapter(out)
    return {
        **measured,
        "peak_flops": peak,
        "peak_memory_mb": contender.device_memory_mb() or machine.peak_memory_mb(),
        "squares": works.squares(adapter),
        "moved": works.moved(work, adapter),
        **contender.clock(out),
    }


def summary(work: Work, turns: list[dict[str, Any]]) -> Line:
    """The fields of a line that several turns of one contender decide."""
    median = lambda values: statistics.median(values)
    seconds, spread = times(t["seconds"] for t in turns)
    others = [t["others_share"] for t in turns if t["others_share"] is not None]
    return {
        "seconds_per_round": digits(seconds),
        "spread": spread,
        "peak_fraction": digits(median(works.flops(work) / t["seconds"] / t["peak_flops"] for t in turns)),
        "peak_gflops": digits(median(t["peak_flops"] for t in turns) / 1e9),
        "cpu_seconds": digits(median(t["cpu_seconds"] for t in turns)),
        "peak_memory_mb": digits(max(t["peak_memory_mb"] for t in turns)),
        "quiet": max(others) <= machine.NOISE if others else None,
        "others_share": digits(max(others)) if others else None,
        "rounds": len(turns),
        "squares": turns[-1]["squares"],
        "moved": turns[-1]["moved"],
    }


def interleaved(calls: Mapping[Any, Callable[[], Any]], repeats: Iterable[Any]) -> dict[Any, Turns]:
    """Calls that take turns, so that a busy moment of the machine hits all of them."""
    took: dict[Any, list[tuple[float, float]]] = {key: [] for key in calls}
    for _ in repeats:
        for key, call in calls.items():
            begin = time.process_time()
            took[key].append((timed(call), time.process_time() - begin))
    columns = {key: list(zip(*values, strict=True)) for key, values in took.items()}
    return {key: Turns(*times(seconds), statistics.median(cpu)) for key, (seconds, cpu) in columns.items()}


def line(bench: str, work: Work, contender: str, **found: Any) -> Line:
    """A line with every field of ``FIELDS`` (``None`` where it does not apply), then what else was found."""
    found |= {"bench": bench, "work": work.name, "contender": contender, "date": f"{datetime.date.today()}"}
    found = dict(zip(("processor", "vector_bits"), process.processor(), strict=True)) | found
    rounded = lambda name, x: digits(x) if isinstance(x, float) and name not in EXACT else x
    found = {name: rounded(name, x) for name, x in found.items()}
    return {name: found.pop(name, None) for name in FIELDS} | found


def digits(x: float) -> float:
    """Four significant digits: more are noise."""
    return float(f"{x:.4g}")
