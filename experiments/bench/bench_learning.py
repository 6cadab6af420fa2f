"""What learning costs: rounds of HyperLoRA against plain rounds of the same work, and the server's part alone.

Programs take turns, so that a busy moment of the machine hits all of them; figures are medians. Weights and
images are random: speed does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from experiments.bench import works
from experiments.bench.bench_server import alone
from experiments.bench.contenders import fedlora_jax as ours
from experiments.bench.measure import Line, interleaved, line
from experiments.bench.options import Options
from experiments.engine.facts import describe

EXACT, KEPT = "hyperlora:mode=exact", ", every step kept"  # not computed again: more memory, less arithmetic


def run(options: Options) -> Iterator[Line]:
    """``contender`` is the method here; all lines are ours."""
    work = works.find(options.work)
    p, names = ours.problem(work), (*options.methods, *(name + KEPT for name in options.methods if name == EXACT))
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    compile_seconds = {}
    for name in tqdm(names, desc="compiling", dynamic_ncols=True):
        method = name.removesuffix(KEPT)
        made = ours.compiled(*ours.arguments(work, p, method, remat=not name.endswith(KEPT)))
        compile_seconds[name] = sum(made.seconds.values())
        calls |= {(name, "round"): made.call, (name, "server"): alone(work, p, method, learn=True).call}
    seconds = interleaved(calls, tqdm(range(options.repeats), desc="rounds", dynamic_ncols=True))
    median = {key: own.median for key, own in seconds.items()}
    for name in names:
        yield line(
            options.bench,
            work,
            name,
            seconds_per_round=median[name, "round"],
            spread=seconds[name, "round"].spread,
            cpu_seconds=seconds[name, "round"].cpu_seconds,
            of_a_fedit_round=median[name, "round"] / median["fedit", "round"] if "fedit" in names else None,
            server_seconds=median[name, "server"],
            server_share=median[name, "server"] / median[name, "round"],
            compile_seconds=compile_seconds[name],
            **describe(),
        )
