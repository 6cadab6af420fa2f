"""Where the time of a round goes: matrix products, what is computed entry by entry, and changes of layout, by part.

One round under ``jax.profiler``; every operation of the compiled program that ran is counted under the part of the
model that its metadata names. Fused operations are one: the part is that of the last of them. Products that a library
computes (on a GPU) count as products, and have no ``of_peak``: the program's text does not tell their size.
"""

from __future__ import annotations

import math
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
from experiments.engine.facts import describe

PARTS = {  # of an operation's name, which is made of the modules' in models/vit.py; all else is "other"
    "/attn/(query|key|value|out)": "projections",
    "/attn": "attention",
    "/mlp": "mlp",
    "/norm": "norm",
    "/head": "head",
    "/embed": "embed",
}
LIBRARY = {"convolution", "custom-call"}
LAYOUT = {"copy", "transpose", "bitcast", "reshape", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate"}
LAYOUT |= {"parameter", "constant", "tuple", "get-tuple-element", "broadcast", "pad"}
INDEX = {"add", "compare", "select"}  # of where a slice begins
AROUND = {"while", "conditional", "call"}  # their time is that of the operations inside
# Of the text of a program: name and lines of a computation; name, type, code and rest of an instruction.
BODY = re.compile(r"^%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?([\w.\-]+) = ([^\n]*?) ([\w\-]+)\(([^\n]*)", re.MULTILINE)


class Operation(NamedTuple):
    """What an instruction of a compiled program is for."""

    kind: str  # "products", "thin products", "entries" or "layout"
    part: str
    flops: float = 0.0  # of its matrix products, each time it runs


def run(options: Options) -> Iterator[Line]:
    """A line for each kind and part, the longest first; ``share`` is of the time of all operations.

    A product is thin if the ranks of adapters, or a single number, are all there is along one of its sides.
    """
    work = works.find(options.work)
    refuse_on_cpu(work, options.force)
    p = ours.problem(work)
    made = ours.compiled(*ours.arguments(work, p, "fedit", options.chunk))
    made.call()
    product = ours.matmul(work)
    seconds = measure.timed(made.call)
    peak = measure.rate(product)
    known = operations(made.program.as_text(), work.rank)
    spent: defaultdict[tuple[str, str], float] = defaultdict(float)
    flops: defaultdict[tuple[str, str], float] = defaultdict(float)
    for name, (duration, times) in durations(made.call).items():
        if name in known:
            kind, part, each = known[name]
            spent[kind, part] += duration
            flops[kind, part] += times * each
    for (kind, part), duration in sorted(spent.items(), key=lambda item: -item[1]):
        yield line(
            options.bench,
            work,
            "fedlora_jax",
            seconds_per_round=seconds,
            peak_fraction=works.flops(work) / seconds / peak,
            compile_seconds=sum(made.seconds.values()),
            kind=kind,
            part=part,
            seconds=duration,
            share=duration / sum(spent.values()),
            of_peak=flops[kind, part] / duration / peak if flops[kind, part] else None,
            chunk=ours.chunk_of(work, p, options.chunk),
            **describe(),
        )


def durations(call: Callable[[], Any]) -> dict[str, tuple[float, int]]:
    """Seconds of every instruction, by name, that ran during a call, of all threads together; and how often it ran."""
    quiet = jax.profiler.ProfileOptions()
    quiet.python_tracer_level = 0
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=quiet):
            call()
        (file,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for thread in plane.lines:
                for event in thread.events:
                    if (name := dict(event.stats).get("hlo_op")) is not None:
                        seconds[str(name)].append(event.duration_ns / 1e9)
    return {name: (sum(each), len(each)) for name, each in seconds.items()}


def operations(program: str, thin: int) -> dict[str, Operation]:
    """The instructions of a compiled program, by name; loops and calls are left out.

    Args:
      program: its text.
      thin: the longest side of a product that counts as thin.
    """
    bodies, instructions, found = dict(BODY.findall(program)), INSTRUCTION.findall(program), {}
    dims = {name: _dims(type_) for name, type_, _, _ in instructions}
    for name, type_, code, rest in instructions:
        if code in AROUND:
            continue
        called = re.search(r"calls=%?([\w.\-]+)", rest)
        inside = INSTRUCTION.findall(bodies.get(called[1], "")) if called else [(name, type_, code, rest)]
        sizes = [_size(type_, rest, dims) for _, type_, code, rest in inside if code == "dot"]
        codes = {code for _, _, code, _ in inside}
        moves = LAYOUT | INDEX if any("dynamic" in code for code in codes) else LAYOUT
        kind = "layout" if codes <= moves else "entries"
        if codes & LIBRARY:
            kind = "products"
        elif sizes:
            kind = "thin products" if all(min(sides) <= thin for sides, _ in sizes) else "products"
        told = re.search(r'op_name="([^"]*)"', rest)
        part = next((part for path, part in PARTS.items() if told and re.search(path, told[1])), "other")
        found[name] = Operation(kind, part, sum(flops for _, flops in sizes))
    return found


def _dims(type_: str) -> list[int]:
    inside = re.search(r"\[([\d,]*)\]", type_)
    return [int(d) for d in inside[1].split(",") if d] if inside else []


def _size(type_: str, rest: str, dims: dict[str, list[int]]) -> tuple[list[int], float]:
    """A product's sides, those of the batch left out, and its FLOPs."""
    listed = lambda key: [int(d) for d in (re.search(key + r"=\{([\d,]*)\}", rest) or ["", ""])[1].split(",") if d]
    left = re.search(r"%?([\w.\-]+)", rest.split("%", 1)[-1])
    inner = math.prod(dims[left[1]][i] for i in listed("lhs_contracting_dims")) if left else 1
    out = _dims(type_)
    return [inner, *out[len(listed("lhs_batch_dims")) :]], 2.0 * inner * math.prod(out)
