"""Peak memory of a round against the number of clients trained at once: as XLA predicts it, and as measured.

Each in a process of its own, since a process never gives its peak back. Measured includes the interpreter, the
libraries and what compilation took; ``idle_mb`` is that much: the peak before the round ran.
"""

from __future__ import annotations

from collections.abc import Iterator

from tqdm import tqdm

from experiments.bench import works
from experiments.bench.bench_peers import refuse_on_cpu
from experiments.bench.children import Child
from experiments.bench.measure import Line
from experiments.bench.options import Options


def run(options: Options) -> Iterator[Line]:
    work = works.find(options.work)
    refuse_on_cpu(work, options.force)
    for chunk in tqdm([c for c in options.chunks if work.clients % c == 0], desc="chunks", dynamic_ncols=True):
        child = Child("fedlora_jax", work, chunk=chunk)
        try:
            child.turn()
            yield child.line(options.bench)
        finally:
            child.close()
