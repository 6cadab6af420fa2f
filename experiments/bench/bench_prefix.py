"""A FedIT round that adapts the last blocks only: what the blocks before them compute stored, or computed in each step.

``anew`` goes backward as deep as the adapted blocks too: what storing saves is the forward computation below them.
Each line says what was stored, and what it took to compute it once for all images of the round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.bench import works
from experiments.bench.contenders import fedlora_jax as ours
from experiments.bench.measure import Line, interleaved, line, timed
from experiments.bench.options import Options
from experiments.engine.facts import describe
from experiments.setup.task import STEM, TASKS, objectives
from fedlora_jax import lora
from fedlora_jax.lora import LoRA
from models.pretrained import Pretrained, backbone


def run(options: Options) -> Iterator[Line]:
    """``contender`` is the way; both lines are ours."""
    work = works.find(options.work)
    if not options.last < work.depth:
        raise ValueError(f"--last must leave blocks below: got {options.last} of {work.depth}")
    p, model = ours.problem(work), ours.model(work)
    whole = backbone(Pretrained(model, p.base, np.full(3, 0.5), np.full(3, 0.5), work.name))
    assert whole.cut is not None
    (stem, top), images = whole.cut(options.last), p.cohort.batches[0]
    adapter = lora.tree_map(lambda x: LoRA(x.a[-options.last :], x.b[-options.last :], x.scale), p.adapter)

    @jax.jit
    def tokens(params, images):
        one = lambda x: stem.apply(params, x)
        return jax.lax.map(lambda steps: jax.lax.map(one, steps), images)

    program = tokens.lower(stem.params, images).compile()
    kept = jax.block_until_ready(program(stem.params, images))
    once = timed(lambda: jax.block_until_ready(program(stem.params, images)))
    calls: dict[str, Callable[[], Any]] = {}
    compile_seconds = {}
    for name, base, x, below in (
        ("stored", top.params, kept, None),
        ("anew", {**top.params, STEM: stem.params}, images, stem),
    ):
        cohort = p.cohort._replace(batches=(x, p.cohort.batches[1]), queries=())
        own = ours.Problem(base, adapter, cohort, objectives(TASKS["softmax"], top, below)[0])
        made = ours.compiled(*ours.arguments(work, own, "fedit", options.chunk))
        calls[name], compile_seconds[name] = made.call, sum(made.seconds.values())
    ends = {
        name: jnp.stack([jnp.sum(x**2) for x in jax.tree.leaves(call()[0].adapter)]) for name, call in calls.items()
    }
    seconds = interleaved(calls, tqdm(range(options.repeats), desc="rounds", dynamic_ncols=True))
    for name in calls:
        yield line(
            options.bench,
            work,
            name,
            seconds_per_round=seconds[name].median,
            spread=seconds[name].spread,
            compile_seconds=compile_seconds[name],
            last=options.last,
            faster_than_anew=seconds["anew"].median / seconds[name].median,
            off_by=float(jnp.abs(ends[name] - ends["anew"]).max() / jnp.abs(ends["anew"]).max()),
            stored_mb=kept.nbytes / 2**20 if name == "stored" else None,
            once_seconds=once if name == "stored" else None,
            **describe(),
        )
