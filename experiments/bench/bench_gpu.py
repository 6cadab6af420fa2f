"""Everything that wants a GPU, in one command: our round and PyTorch's on every work, and then no more time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

from experiments.bench import bench_peers, works
from experiments.bench.measure import Line, line
from experiments.bench.options import Options


def run(options: Options) -> Iterator[Line]:
    """Without a GPU the heavy works give a line that says so."""
    deadline = time.perf_counter() + 60 * options.minutes
    for name in options.works:
        work = works.find(name)
        try:
            yield from bench_peers.compare(dataclasses.replace(options, work=name), work, deadline)
        except ValueError as error:
            yield from (line(options.bench, work, contender, skipped=f"{error}") for contender in options.contenders)
