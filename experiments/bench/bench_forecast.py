"""What ``--dry-run`` foretells of some runs, and what they take, each in a process of its own.

In CPU seconds, of all threads together, from the start of Python to the report: those of others who use the machine do
not count. ``foretold_cpu_seconds`` are those until a dry run has traced everything, which a run takes as well, and what
it then foretells; ``foretold_memory_mb`` is of the method that takes the most. Nothing is found in a cache of programs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from experiments.bench import works
from experiments.bench.children import OWN, ROOT, whole_run
from experiments.bench.measure import Line, line
from experiments.bench.options import Options
from experiments.engine.facts import describe

_MANY = (
    "--methods ditto --clients {} --clients-per-round 64 --holdout-clients 0 --minimum 1 --partition iid --rounds 20 "
    "--eval-every 5 --seeds 0:1 --eval-clients 200 --test-images 10"
)
RUNS = {  # options of ``compare``
    "toy": "--methods fedit --clients 2 --holdout-clients 0 --rounds 1 --seeds 0:1 --local-steps 1 --adapt-last 1 "
    "--partition iid --batch 2",
    "digits": "",  # the main job
    "mixer": "--methods flora --model mixer --rounds 100 --eval-every 50 --seeds 0:1",
    "photos": "--model experiments/bench/bench_staging.py:model --image-size 224 --methods fedit --clients 8 --chunk 8 "
    "--holdout-clients 2 --minimum 1 --partition iid --rounds 10 --eval-every 5 --seeds 0:1",
    "hundred": _MANY.format(100),
    "many": _MANY.format(10_000),
}
FORETELL = """
import json, sys, time
from experiments.cli import parse
from experiments.commands.compare import Plan
from experiments.engine import forecast
plan = Plan("compare", parse(sys.argv[1:])[1])
before, trials = time.process_time(), list(plan.trials.values())
found = forecast.foretell(plan.config, plan.problem, trials, time.process_time)
seconds = before + sum(sum(own.seconds) for own in found.methods)
print(json.dumps({"foretold_memory_mb": max(own.need.peak for own in found.methods) / 2**20,
                  "foretold_cpu_seconds": seconds, "foretelling_cpu_seconds": time.process_time()}))
"""


def run(options: Options) -> Iterator[Line]:
    for name in tqdm(options.runs, desc="runs", dynamic_ncols=True):
        with tempfile.TemporaryDirectory(prefix="fedlora-forecast-") as folder:
            typed = ["compare", *RUNS[name].split(), *data_of(name, Path(folder))]
            own = OWN | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/programs"}
            told = subprocess.run(
                [sys.executable, "-c", FORETELL, *typed],
                cwd=ROOT,
                env=os.environ | own,
                stdout=subprocess.PIPE,
                check=True,
            )
            foretold = json.loads(told.stdout.splitlines()[-1])
            taken = whole_run(typed[1:], JAX_COMPILATION_CACHE_DIR=f"{folder}/programs-of-the-run")
        ratios = {
            "foretold_memory": foretold["foretold_memory_mb"] / taken["peak_memory_mb"],
            "foretold_time": foretold["foretold_cpu_seconds"] / taken["cpu_seconds"],
        }
        yield line(
            options.bench,
            works.find("nano")._replace(name=name),
            "fedlora_jax",
            **foretold,
            **taken,
            **ratios,
            **describe(),
        )


def data_of(name: str, folder: Path) -> list[str]:
    """Images that a run is given: a few, photos, or those of a crowd, small; none of the digits."""
    made: dict[str, Callable] = {"toy": lambda: images(70, 16, 1), "photos": lambda: images(700, 7, 32)}
    made |= {"hundred": crowd, "many": crowd}
    if name not in made:
        return []
    np.savez(folder / "data.npz", **made[name]())
    return ["--data", f"{folder / 'data.npz'}"]


def crowd() -> dict[str, np.ndarray]:
    return images(70_000, 16, 1)


def images(count: int, side: int, times: int) -> dict[str, np.ndarray]:
    """Noise in ten classes that differ in brightness, every pixel repeated; a seventh to test on."""
    rng, y = np.random.default_rng(0), np.arange(count) % 10
    x = (rng.integers(0, 120, (count, side, side, 3)) + 12 * y[:, None, None, None]).astype(np.uint8)
    split = (np.arange(count) // 10 % 7 == 0).astype(int)
    return {"x": x.repeat(times, 1).repeat(times, 2), "y": y, "split": split, "classes": np.array(list("abcdefghij"))}
