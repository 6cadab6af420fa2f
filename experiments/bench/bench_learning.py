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
from experiments.compare import describe

CONTENDERS = ("fedit", "flexlora", "hyperlora", "hyperlora:mode=first_order", "hyperlora:mode=exact")
KEPT = "hyperlora:mode=exact, every step kept"  # no step is computed again: more memory, less arithmetic


def run(options: Options) -> Iterator[Line]:
    """``contender`` is the method here; all lines are ours."""
    work = works.find(options.work)
    p = ours.problem(work)
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    compile_seconds = {}
    for name in tqdm((*CONTENDERS, KEPT), desc="compiling", dynamic_ncols=True):
        method = name.partition(",")[0]
        made = ours.compiled(*ours.arguments(work, p, method, remat=name != KEPT))
        compile_seconds[name] = sum(made.seconds.values())
        calls |= {(name, "round"): made.call, (name, "server"): alone(work, p, method, learn=True).call}
    median = interleaved(calls, tqdm(range(options.repeats), desc="rounds", dynamic_ncols=True))
    for name in (*CONTENDERS, KEPT):
        yield line(
            options.bench,
            work,
            name,
            seconds_per_round=median[name, "round"],
            of_a_fedit_round=median[name, "round"] / median["fedit", "round"],
            server_seconds=median[name, "server"],
            server_share=median[name, "server"] / median[name, "round"],
            compile_seconds=compile_seconds[name],
            **describe(),
        )
