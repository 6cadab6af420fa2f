"""The same round by several contenders, each in a process of its own, taking turns; and whether they agree."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

from experiments.bench import works
from experiments.bench.children import Child, absent, together
from experiments.bench.contenders import INSTALL
from experiments.bench.measure import Line, digits, line
from experiments.bench.options import Options, interpreter
from experiments.bench.works import Work

HEAVY = ("base",)


def run(options: Options) -> Iterator[Line]:
    return compare(options, works.find(options.work))


def compare(options: Options, work: Work, deadline: float = float("inf")) -> Iterator[Line]:
    """One line for each contender; first, before any starts, of those that are not installed.

    Args:
      deadline: ``time.perf_counter()`` after which no further contender starts and no further round.
    """
    refuse_on_cpu(work, options.force)
    missing = {name: absent(name, interpreter(options, name)) for name in options.contenders}
    for name, modules in missing.items():
        if modules:
            why = {"skipped": f"pip install {INSTALL[name]}", "reason": f"there is no module {modules[0]}"}
            yield line(options.bench, work, name, **why)
    children: list[Child] = []
    late = []
    try:
        for name in tqdm(
            [name for name in missing if not missing[name]], desc=f"{work.name}: starting", dynamic_ncols=True
        ):
            if time.perf_counter() > deadline:
                late.append(name)
                continue
            told = {"chunk": options.chunk} if name in ("fedlora_jax", "torch_vmap") else {}
            told |= {"devices": options.devices} if name == "fedlora_jax" else {}
            children.append(Child(name, work, interpreter(options, name), **told))
        bar = tqdm(range(options.repeats), desc=f"{work.name}: rounds", dynamic_ncols=True)
        together(children, (turn for turn in bar if turn == 0 or time.perf_counter() < deadline))
        lines = [child.line(options.bench) for child in children]
    finally:
        for child in children:
            child.close()
    lines += [line(options.bench, work, name, skipped="no time left") for name in late]
    yield from compared(work, lines)


def refuse_on_cpu(work: Work, force: bool) -> None:
    """Asks another process what there is: this one stays off the device, whose memory children share."""
    if work.name not in HEAVY or force:
        return
    ask = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    if subprocess.run(ask, capture_output=True, text=True).stdout.strip() in ("", "cpu"):
        raise ValueError(f"the work {work.name!r} takes hours on a CPU: choose tiny or nano, or use --force")


def compared(work: Work, lines: list[Line]) -> list[Line]:
    """With what every contender is beside ours, where both have run.

    ``seconds_scaled``: if its process had had our rate of a matrix product. ``difference`` of the sum of squares of the
    aggregated adapter, ``moved_difference`` of what the round changed, relative; ``agrees``: both are rounding.
    """
    ran = [found for found in lines if found["seconds_per_round"] is not None]
    ours = next((found for found in ran if found["contender"] == "fedlora_jax"), None)
    if ours is None:
        return lines
    exact = work.dtype == "float32" and all("cpu" in found["device"] for found in ran)  # a GPU's products are shorter
    for found in ran:
        found["seconds_scaled"] = digits(found["seconds_per_round"] * found["peak_gflops"] / ours["peak_gflops"])
        found["difference"] = digits(abs(found["squares"] / ours["squares"] - 1))
        found["moved_difference"] = digits(abs(found["moved"] / ours["moved"] - 1))
        limits = (1e-5, 1e-3) if exact else (1e-2, 1e-1)
        found["agrees"] = found["difference"] < limits[0] and found["moved_difference"] < limits[1]
    return lines
