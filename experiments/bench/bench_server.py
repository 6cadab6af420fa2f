"""Every method's aggregation alone: at the size of ViT-B for several numbers of clients, and beside a whole round.

What is aggregated are adapters that have moved apart at random. The first lines are of the adapted kernels of
``--kernels``, without the rest of its model; the last ones of ``--work`` with its own clients, where
``share_of_round`` is the aggregation's seconds over those of a FedIT round measured between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from experiments.bench import works
from experiments.bench.contenders import fedlora_jax as ours
from experiments.bench.measure import Line, interleaved, line
from experiments.bench.options import Options
from experiments.bench.works import Work
from experiments.engine import methods
from experiments.engine.facts import describe
from fedlora_jax import rounds


def run(options: Options) -> Iterator[Line]:
    chosen = options.methods or tuple(methods.names())
    kernels = works.find(options.kernels)
    # No images and a short sequence: of the model only the adapted kernels and the head matter here.
    bare = kernels._replace(name=f"{kernels.name} kernels", side=kernels.patch, steps=1, batch=1, mlp=1)
    for clients in options.clients:
        yield from _lines(options, bare._replace(clients=clients), chosen)
    yield from _lines(options, works.find(options.work), chosen, whole=True)


def _lines(options: Options, work: Work, chosen: tuple[str, ...], whole: bool = False) -> Iterator[Line]:
    p = ours.problem(work)
    made = {name: alone(work, p, name) for name in tqdm(chosen, desc=f"{work.name}: compiling", dynamic_ncols=True)}
    calls: dict[str, Callable[[], Any]] = {name: program.call for name, program in made.items()}
    if whole:
        calls["round"] = ours.compiled(*ours.arguments(work, p, "fedit")).call
    took = interleaved(calls, tqdm(range(options.repeats), desc=f"{work.name}: turns", dynamic_ncols=True))
    seconds = {name: own.median for name, own in took.items()}
    for name in chosen:
        yield line(
            options.bench,
            work,
            "fedlora_jax",
            seconds_per_round=seconds["round"] if whole else None,
            spread=took["round"].spread if whole else None,
            compile_seconds=sum(made[name].seconds.values()),
            method=name,
            clients=work.clients,
            server_seconds=seconds[name],
            server_spread=took[name].spread,
            share_of_round=seconds[name] / seconds["round"] if whole else None,
            **describe(),
        )


def alone(work: Work, p: ours.Problem, name: str, learn: bool = False) -> ours.Compiled:
    """A method's aggregation; with ``learn`` all that its server does in a round: dispatch, learning, aggregation."""
    method = ours.method(work, name)
    run = rounds.start(method, jax.random.key(2), p.adapter, work.clients)

    def server(base, state, cohort, received, sent):
        sent = method.dispatch(base, state, cohort) if learn else sent
        if learn:
            state = method.learn(state, cohort, jax.tree.map(jnp.subtract, sent.adapter, received))
        return method.aggregate(base, state, cohort, sent, received)

    cohort = p.cohort._replace(batches=(), queries=(), memory=run.memory)
    sent = jax.block_until_ready(jax.jit(method.dispatch)(p.base, run.state, cohort))
    leaves, structure = jax.tree.flatten(sent.adapter)
    keys = jax.random.split(jax.random.key(4), len(leaves))
    moved = [x + 0.01 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    return ours.compiled(server, p.base, run.state, cohort, jax.tree.unflatten(structure, moved), sent)
