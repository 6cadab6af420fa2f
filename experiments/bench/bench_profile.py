"""Where the time of a round goes: matrix products, what is computed entry by entry, and changes of layout, by part.

One round under ``jax.profiler``; every operation of the compiled program that ran is counted under the part of the
model that its metadata names. Fused operations are one: the part is that of the last of them.
"""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.bench import measure, works
from experiments.bench.bench_peers import refuse_on_cpu
from experiments.bench.contenders import fedlora_jax as ours
from experiments.bench.measure import Line, line
from experiments.bench.options import Options
from experiments.compare import describe

PARTS = ("attn", "mlp", "norm", "head", "embed")  # as modules are called in models/vit.py; all else is "other"
PRODUCTS = {"dot", "convolution", "custom-call"}
LAYOUT = {"copy", "transpose", "bitcast", "reshape", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate"}
LAYOUT |= {"parameter", "constant", "tuple", "get-tuple-element", "broadcast", "pad"}
INDEX = {"add", "compare", "select"}  # of where a slice begins
BODY = re.compile(
    r"^%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL
)  # of the text of a program: name, lines
INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?([\w.\-]+) = [^\n]*? ([\w\-]+)\(([^\n]*)", re.MULTILINE)  # name, code, rest
AROUND = {"while", "conditional", "call"}  # their time is that of the operations inside


class Operation(NamedTuple):
    """What an instruction of a compiled program is for."""

    kind: str  # "products", "entries" or "layout"
    part: str


def run(options: Options) -> Iterator[Line]:
    """A line for each kind and part, the longest first; ``share`` is of the time of all operations."""
    work = works.find(options.work)
    refuse_on_cpu(work, options.force)
    p = ours.problem(work)
    made = ours.compiled(*ours.arguments(work, p, "fedit", options.chunk))
    made.call()
    product = ours.matmul(work)
    seconds = measure.timed(made.call)
    peak = measure.rate(work.matmul, product)
    known = operations(made.program.as_text())
    spent: defaultdict[Operation, float] = defaultdict(float)
    for name, duration in durations(made.call).items():
        if name in known:
            spent[known[name]] += duration
    whole = sum(spent.values())
    rate = works.flops(work) / sum(t for operation, t in spent.items() if operation.kind == "products")
    for operation, duration in sorted(spent.items(), key=lambda item: -item[1]):
        yield line(
            options.bench,
            work,
            "fedlora_jax",
            seconds_per_round=measure.digits(seconds),
            peak_fraction=measure.digits(works.flops(work) / seconds / peak),
            compile_seconds=sum(made.seconds.values()),
            **operation._asdict(),
            seconds=duration,
            share=duration / whole,
            products_of_peak=rate / peak,  # the rate of all products together, of that of one large product
            chunk=ours.chunk_of(work, p, options.chunk),
            **describe(),
        )


def durations(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds of every instruction, by name, that ran during a call; of all threads together."""
    quiet = jax.profiler.ProfileOptions()
    quiet.python_tracer_level = 0
    total: defaultdict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=quiet):
            call()
        (file,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for thread in plane.lines:
                for event in thread.events:
                    if (name := dict(event.stats).get("hlo_op")) is not None:
                        total[str(name)] += event.duration_ns / 1e9
    return dict(total)


def operations(program: str) -> dict[str, Operation]:
    """The instructions of a compiled program, by name; loops and calls are left out."""
    bodies, found = dict(BODY.findall(program)), {}
    for name, code, rest in INSTRUCTION.findall(program):
        if code in AROUND:
            continue
        called = re.search(r"calls=%?([\w.\-]+)", rest)
        inside = set(re.findall(r" ([\w\-]+)\(", bodies.get(called[1], ""))) if called else {code}
        moves = LAYOUT | INDEX if any("dynamic" in code for code in inside) else LAYOUT
        kind = "products" if inside & PRODUCTS else "layout" if inside <= moves else "entries"
        told = re.search(r'op_name="([^"]*)"', rest)
        part = next((part for part in PARTS if told and f"/{part}" in told[1]), "other")
        found[name] = Operation(kind, part)
    return found
