"""How many clients and seeds are computed side by side: what an accelerator's memory holds, what a CPU's caches like.

Results do not depend on it; memory and speed do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import AxisType, Mesh

from experiments.config import Config

if TYPE_CHECKING:
    from experiments.problem import Problem

CACHE = 4 * 2**20  # bytes: a CPU loses time where the arrays of one operation outgrow its caches
SHARE = 0.6  # of an accelerator's memory, for what clients keep for their backward pass


def mesh_of(devices: int) -> Mesh | None:
    """So many devices that share a cohort, where it is more than one.

    Raises:
      ValueError: there are fewer devices than asked for.
    """
    if devices == 1:
        return None
    if devices > jax.device_count():
        more = f"XLA_FLAGS=--xla_force_host_platform_device_count={devices} makes a CPU count as more"
        raise ValueError(f"--devices {devices}: jax finds {jax.device_count()} ({more})")
    return jax.make_mesh((devices,), ("clients",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def layout(config: Config, problem: Problem, points: int = 1) -> tuple[int, int]:
    """Clients and runs (every seed at each of ``points``) at once on each device: as set, or as they fit.

    A CPU takes one run after another.
    """
    clients = (config.clients_per_round or config.clients) // config.devices
    runs = points * problem.keys.shape[0]
    fit = at_once(problem.loss_fn, *one_step(config, problem))
    cpu = jax.default_backend() == "cpu"
    together = divisor(runs, config.seeds_at_once or (1 if cpu else fit // clients))
    return config.chunk or divisor(clients, fit if cpu else fit // together), together


def at_once(loss_fn: Callable, base: Any, adapter: Any, batch: Any, key: Any) -> int:
    """Clients in one device's memory, or a CPU's caches; the arguments are a local step's, or their shapes."""
    if jax.default_backend() == "cpu":
        return CACHE // largest(jax.grad(loss_fn, 1), base, adapter, batch, key)
    memory = jax.local_devices()[0].memory_stats()["bytes_limit"]
    return int(SHARE * memory / kept(loss_fn, base, adapter, batch, key))


def memory() -> int | None:
    """Bytes that a device has for arrays: an accelerator's limit; of a CPU what is free and what ours hold already.

    ``None`` where the system does not say.
    """
    if jax.default_backend() != "cpu":
        return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    free = _free()
    return None if free is None else free + sum(x.nbytes for x in jax.live_arrays())


def refuse_more_than_there_is(needed: int, what: str, remedy: str) -> None:
    """Refuse what takes more bytes than there are for arrays, before any of it is allocated.

    Raises:
      ValueError: it does; with what to change.
    """
    have = memory()
    if have is not None and needed > have:
        raise ValueError(f"{what} take {needed / 2**30:,.1f} GiB of memory, and there are {have / 2**30:.1f}: {remedy}")


def refuse_draws(image: Any, clients: int, steps: int, batch: int, query: int = 0) -> None:
    """Refuse more images than there is memory for: so many clients draw them for all their local steps at once.

    Args:
      image: one, as the model reads it, or its shape.
      clients, steps, batch: who draws, and what for.
      query: images that each keeps apart.
    """
    drawn = clients * (steps * batch + query)
    refuse_more_than_there_is(
        drawn * _bytes(image),
        f"the {drawn} images that {clients} clients draw for {steps} local steps of {batch} would",
        "use fewer --local-steps or --clients-per-round, a smaller --batch, or fewer queries of a method",
    )


def beside_arrays() -> int:
    """Bytes that this process holds on a CPU beside jax's arrays: libraries, compiled programs, what is on the host.

    0 on an accelerator, and where the system does not say.
    """
    resident = _told("/proc/self/status", "VmRSS") if jax.default_backend() == "cpu" else None
    return 0 if resident is None else max(0, resident - sum(x.nbytes for x in jax.live_arrays()))


def _free() -> int | None:
    return _told("/proc/meminfo", "MemAvailable")


def _told(file: str, name: str) -> int | None:
    """Bytes of what Linux calls ``name``."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def divisor(number: int, most: int) -> int:
    """The largest number that divides ``number`` and is at most ``most``, or 1."""
    return max(size for size in range(1, max(1, min(number, most)) + 1) if number % size == 0)


def one_step(config: Config, problem: Problem) -> tuple[Any, Any, Any, Any]:
    """The shapes of base, adapter, batch and key in one client's local step."""
    batch = tuple(jax.ShapeDtypeStruct((config.batch, *x.shape[1:]), x.dtype) for x in problem.train)
    adapter = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), problem.adapters)
    return problem.base, adapter, batch, jax.eval_shape(jax.random.key, 0)


def largest(function: Callable, *arguments: Any) -> int:
    """Bytes of the largest array that a function makes, of arguments or their shapes."""
    return max(map(_bytes, made(jax.make_jaxpr(function)(*arguments).jaxpr)))


def kept(loss_fn: Callable, base: Any, adapter: Any, batch: Any, key: Any) -> int:
    """Bytes that one client's forward pass keeps for the backward pass."""
    pull = lambda base, adapter, batch, key: jax.vjp(lambda x: loss_fn(base, x, batch, key), adapter)[1]
    shared = {(x.shape, x.dtype) for x in jax.tree.leaves(base)}
    residuals = jax.tree.leaves(jax.eval_shape(pull, base, adapter, batch, key))
    return max(1, sum(_bytes(x) for x in residuals if (x.shape, x.dtype) not in shared))


def made(jaxpr: Jaxpr) -> Iterator[Any]:
    """Shapes of all arrays that a program makes, but for the stacks of its loops."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name != "scan":  # its stacks over blocks are never read as one
            yield from (v.aval for v in eqn.outvars)
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: isinstance(x, (Jaxpr, ClosedJaxpr))):
            if isinstance(value, (Jaxpr, ClosedJaxpr)):
                yield from made(value.jaxpr if isinstance(value, ClosedJaxpr) else value)


def bytes_of(tree: Any) -> int:
    """Of all arrays in a tree, or of their shapes."""
    return sum(map(_bytes, jax.tree.leaves(tree)))


def _bytes(x: Any) -> int:
    return math.prod(x.shape) * x.dtype.itemsize if hasattr(x, "shape") else 0
