"""Our round alone: ``bench peers`` with one contender."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from experiments.bench import bench_peers
from experiments.bench.measure import Line
from experiments.bench.options import Options


def run(options: Options) -> Iterator[Line]:
    return bench_peers.run(dataclasses.replace(options, contenders=("fedlora_jax",)))
