"""Seconds per client of our round against the number of clients, and against rank, local steps and depth.

Everybody takes part in every round: their images (uint8) and one adapter for each lie on the device, and nothing else
grows with the clients. FedIT's clients keep nothing between rounds; for a method whose clients do, ``rounds.start``
makes one row of memory for each client of the population, of which a round reads and writes those that take part.
``peak_memory_mb`` is of this process so far, so it says something only where sizes rise.
"""

from __future__ import annotations

from collections.abc import Iterator

from tqdm import tqdm

from experiments.bench import works
from experiments.bench.contenders import fedlora_jax
from experiments.bench.measure import Line, line, summary, turn
from experiments.bench.options import Options
from experiments.bench.works import Work


def run(options: Options) -> Iterator[Line]:
    work = works.find(options.work)
    for axis, varied in tqdm(points(work, options), desc=work.name, dynamic_ncols=True):
        contender = fedlora_jax.contender(varied)
        found = summary(varied, [turn(varied, contender) for _ in range(options.repeats)])
        per_client = found["seconds_per_round"] / varied.clients
        images_mb = varied.images * (3 * varied.side**2 + 4) / 2**20
        sizes = {key: getattr(varied, key) for key in ("clients", "rank", "steps", "depth")}
        yield line(
            options.bench,
            varied,
            "fedlora_jax",
            **{**contender.about, **found},
            axis=axis,
            **sizes,
            seconds_per_client=per_client,
            images_mb=images_mb,
        )


def points(work: Work, options: Options) -> list[tuple[str, Work]]:
    """One size varied at a time; the others as in the work, with 16 clients where it is not they that vary."""
    few = work._replace(clients=min(16, work.clients))
    return [
        *(("clients", work._replace(clients=n)) for n in options.clients),
        *(("rank", few._replace(rank=n)) for n in options.ranks if n <= work.width),
        *(("steps", few._replace(steps=n)) for n in options.local_steps),
        *(("depth", few._replace(depth=n)) for n in options.depths),
    ]
