"""Our round of a fixed work, compiled ahead of time, and its parts for the benches that need them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import jit
from jax.sharding import NamedSharding, PartitionSpec

from experiments.bench import machine, works
from experiments.bench.measure import Contender
from experiments.bench.works import Arrays, Work
from experiments.engine import chunking, methods
from experiments.engine.facts import describe
from fedlora_jax import lora, rounds, signatures
from fedlora_jax import matmul as products
from fedlora_jax.clients import Sampling
from fedlora_jax.lora import Adapter, LoRA, Params
from fedlora_jax.method import Cohort, Method
from fedlora_jax.signatures import Signature
from models.vit import ViT, normalise


class Problem(NamedTuple):
    """A work as arrays on the device."""

    base: Params
    adapter: Adapter
    cohort: Cohort
    loss_fn: Callable


class Compiled(NamedTuple):
    """A program, what to call it with, and what it took to make."""

    call: Callable[[], Any]  # to its end
    program: Any  # jax.stages.Compiled
    seconds: dict[str, float]  # to trace, to lower, to compile


def problem(work: Work) -> Problem:
    base = lora.unflatten({name: jnp.asarray(x) for name, x in works.weights(work).items()})
    images, labels = map(jnp.asarray, works.batches(work))
    cohort = Cohort(
        ids=jnp.arange(work.clients),
        weights=jnp.ones(work.clients) / work.clients,
        ranks=jnp.full(work.clients, work.rank),
        signatures=told(work, work.clients),
        batches=(images, labels),
        queries=(images[:, 0], labels[:, 0]),  # of methods that learn; what they are does not matter for speed
    )
    return Problem(base, _adapter(work), cohort, _loss(work))


def told(work: Work, clients: int) -> Signature:
    rng = np.random.default_rng(3)
    sizes = (2 * signatures.SIZE, work.classes, 1)
    return Signature(*(jnp.asarray(rng.normal(size=(clients, size)), jnp.float32) for size in sizes))


def _adapter(work: Work) -> Adapter:
    flat = {name: jnp.asarray(x) for name, x in works.adapter(work).items()}
    full = {name: x for name, x in flat.items() if name.startswith("head/")}
    low_rank = {name: LoRA(flat[f"{name}/a"], flat[f"{name}/b"], work.scale) for name in works.ADAPTED}
    return lora.unflatten(full | low_rank)


def model(work: Work) -> ViT:
    sizes = (work.classes, work.patch, work.width, work.depth, work.heads, work.mlp)
    return ViT(*sizes, unroll=True, dtype=jnp.dtype(work.dtype))


def _loss(work: Work) -> Callable:
    vit = model(work)

    def loss_fn(base, adapter, batch, key):
        logits, _ = vit.apply(lora.variables(base, adapter), normalise(batch[0], 0.5, 0.5))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    return loss_fn


def chunk_of(work: Work, p: Problem, chunk: int | None, devices: int = 1) -> int:
    """As a run would choose it."""
    one = jax.tree.map(lambda x: x[0, 0], p.cohort.batches)
    fit = chunking.at_once(p.loss_fn, p.base, p.adapter, one, jax.random.key(0))
    return chunk or work.chunk or chunking.divisor(work.clients // devices, fit)


def method(work: Work, name: str) -> Method:
    one = jax.tree.map(lambda x: np.zeros(x.shape[1:], x.dtype), told(work, 1))
    facts: dict[str, Any] = {"participants": work.clients, "population": work.clients, "rounds": 50, "uses": 1}
    facts["sampling"] = Sampling(work.clients, work.clients)
    return methods.build(name, signature=one, theta=None, **facts)


def arguments(
    work: Work, p: Problem, name: str, chunk: int | None = None, remat: bool = True, devices: int = 1
) -> tuple:
    """A method's round, and what to call it with, for ``compiled``."""
    made = method(work, name)
    run = rounds.start(made, jax.random.key(0), p.adapter, work.clients)
    chunk, mesh = chunk_of(work, p, chunk, devices), chunking.mesh_of(devices)
    round_fn = rounds.make_round(made, p.loss_fn, optax.sgd(work.lr), chunk=chunk, remat=remat, mesh=mesh)
    given = p.base, run.state, p.cohort._replace(memory=run.memory), jax.random.key(1)
    return round_fn, *(given if mesh is None else jax.device_put(given, NamedSharding(mesh, PartitionSpec())))


def compiled(function: Callable, *arguments: Any) -> Compiled:
    """Compile ahead of time, a clock at each stage."""
    begin = time.perf_counter()
    traced = jit(function).trace(*arguments)
    after_trace = time.perf_counter()
    lowered = traced.lower()
    after_lowering = time.perf_counter()
    program = lowered.compile()
    end = time.perf_counter()
    seconds = {"trace": after_trace - begin, "lower": after_lowering - after_trace, "compile": end - after_lowering}
    return Compiled(lambda: jax.block_until_ready(program(*arguments)), program, seconds)


def contender(work: Work, chunk: int | None = None, devices: int = 1) -> Contender:
    """FedIT. The round includes what our rounds always do: losses and the bias of the aggregation."""
    p = problem(work)
    made = compiled(*arguments(work, p, "fedit", chunk, devices=devices))
    memory = made.program.memory_analysis()
    about = {
        **describe(),
        "compile_seconds": sum(made.seconds.values()),
        "chunk": chunk_of(work, p, chunk, devices),
        "devices": devices,
        "predicted_mb": sum(getattr(memory, f"{part}_size_in_bytes") for part in ("temp", "argument", "output"))
        / 2**20,
    }
    about["idle_mb"] = device_memory_mb() or machine.peak_memory_mb()
    return Contender(made.call, lambda out: flat(out[0].adapter), matmul(work), about, device_memory_mb)


def flat(adapter: Adapter) -> Arrays:
    """An adapter of ours, named as in ``works.adapter``."""
    named = {}
    for name, x in lora.flatten(adapter).items():
        named |= {f"{name}/a": x.a, f"{name}/b": x.b} if lora.is_lora(x) else {name: x}
    return {name: np.asarray(x) for name, x in named.items()}


def matmul(work: Work) -> Callable[[], float]:
    """A square product, as ``Contender.matmul``."""
    side = works.product_side(work, cpu=jax.default_backend() == "cpu")
    x = jax.random.normal(jax.random.key(0), (side, side)).astype(work.dtype)
    product = jax.jit(products.matmul)

    def call() -> float:
        jax.block_until_ready(product(x, x))
        return 2.0 * side**3

    call()
    return call


def device_memory_mb() -> float | None:
    stats = jax.devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] / 2**20 if stats else None
