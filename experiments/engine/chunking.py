"""How many clients and seeds are computed side by side: what an accelerator's memory holds, what a CPU's caches like.

Results do not depend on it; memory and speed do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from experiments.config import Config
from experiments.setup.memory import bytes_of, largest
from experiments.setup.problem import Problem
from fedlora_jax.training import map_clients

CACHE = 4 * 2**20  # bytes: a CPU loses time where the arrays of one operation outgrow its caches
SHARE = 0.6  # of an accelerator's memory, for what clients keep for their backward pass


def mesh_of(devices: int) -> Mesh | None:
    """The devices that share a cohort or seeds, so many of each process, where there is more than one in all.

    Raises:
      ValueError: there are fewer devices than asked for.
    """
    if devices == jax.process_count() == 1:
        return None
    if devices > jax.local_device_count():
        more = f"XLA_FLAGS=--xla_force_host_platform_device_count={devices} makes a CPU count as more"
        raise ValueError(f"--devices {devices}: jax finds {jax.local_device_count()} ({more})")
    found = [d for i in range(jax.process_count()) for d in jax.local_devices(process_index=i)[:devices]]
    return jax.make_mesh((len(found),), ("shared",), axis_types=(AxisType.Auto,), devices=found)


def mesh_of_clients(config: Config) -> Mesh | None:
    """The devices that share a cohort, or ``None`` where one computes all of it."""
    return mesh_of(config.devices) if config.sharing_seeds == 1 else None


def map_runs(f: Callable, rows: Any, at_once: int, config: Config, *common: Any) -> Any:
    """``vmap`` of ``f(row, *common)`` over runs, at most so many at once on each of the devices that share them."""
    return map_clients(f, rows, at_once, mesh_of(config.devices) if config.sharing_seeds > 1 else None, common)


def runs_of(config: Config, problem: Problem, points: int = 1) -> int:
    """Runs of one device: every seed at each of ``points``, or its part of them."""
    return -(-points * problem.keys.shape[0] // config.sharing_seeds)


def choose(config: Config, problem: Problem, points: int = 1) -> tuple[int, int]:
    """Clients and runs (every seed at each of ``points``) at once on each device: as set, or as they fit.

    A CPU takes one run after another.
    """
    clients = -(-config.cohort // config.sharing)
    runs = runs_of(config, problem, points)
    fit = at_once(problem.loss_fn, *one_step(config, problem))
    cpu = jax.default_backend() == "cpu"
    together = divisor(runs, config.seeds_at_once or (1 if cpu else fit // clients))
    # A chunk that was set fits the whole run; the devices of a part of its seeds may share what those of others do not.
    return divisor(clients, config.chunk or (fit if cpu else fit // together)), together


def at_once(loss_fn: Callable, base: Any, adapter: Any, batch: Any, key: Any) -> int:
    """Clients in one device's memory, or a CPU's caches; the arguments are a local step's, or their shapes."""
    if jax.default_backend() == "cpu":
        return CACHE // largest(jax.grad(loss_fn, 1), base, adapter, batch, key)
    memory = jax.local_devices()[0].memory_stats()["bytes_limit"]
    return int(SHARE * memory / kept(loss_fn, base, adapter, batch, key))


def divisor(number: int, most: int) -> int:
    """The largest number that divides ``number`` and is at most ``most``, or 1."""
    return max(size for size in range(1, max(1, min(number, most)) + 1) if number % size == 0)


def one_step(config: Config, problem: Problem) -> tuple[Any, Any, Any, Any]:
    """The shapes of base, adapter, batch and key in one client's local step."""
    batch = tuple(jax.ShapeDtypeStruct((config.batch, *x.shape[1:]), x.dtype) for x in problem.train)
    adapter = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), problem.adapters)
    return problem.base, adapter, batch, jax.eval_shape(jax.random.key, 0)


def kept(loss_fn: Callable, base: Any, adapter: Any, batch: Any, key: Any) -> int:
    """Bytes that one client's forward pass keeps for the backward pass."""
    pull = lambda base, adapter, batch, key: jax.vjp(lambda x: loss_fn(base, x, batch, key), adapter)[1]
    shared = {(x.shape, x.dtype) for x in jax.tree.leaves(base)}
    residuals = jax.tree.leaves(jax.eval_shape(pull, base, adapter, batch, key))
    return max(1, bytes_of([x for x in residuals if (x.shape, x.dtype) not in shared]))
