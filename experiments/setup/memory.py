"""The room that there is: how much memory a device has left, and what an array, a function or a run takes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

RESIDENT = 0.5  # of the memory there is, at most, for images that are all on the device, or read whole


def available() -> int | None:
    """Bytes that a device has for arrays: an accelerator's limit; of a CPU what is free and what ours hold already.

    ``None`` where the system does not say.
    """
    if jax.default_backend() != "cpu":
        return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    free = _free()
    return None if free is None else free + sum(x.nbytes for x in jax.live_arrays())


def refuse_more_than_there_is(needed: int, what: str, remedy: str, on_host: bool = False) -> None:
    """Refuse what takes more bytes than there are for arrays on the device, or host, before any of it is allocated.

    Raises:
      ValueError: it does; with what to change.
    """
    have = _free() if on_host and jax.default_backend() != "cpu" else available()
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
    resident = _said("/proc/self/status", "VmRSS") if jax.default_backend() == "cpu" else None
    return 0 if resident is None else max(0, resident - sum(x.nbytes for x in jax.live_arrays()))


def _free() -> int | None:
    return _said("/proc/meminfo", "MemAvailable")


def _said(file: str, name: str) -> int | None:
    """Bytes of what Linux calls ``name``."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def largest(function: Callable, *arguments: Any) -> int:
    """Bytes of the largest array that a function makes, of arguments or their shapes."""
    return max(map(_bytes, made(jax.make_jaxpr(function)(*arguments).jaxpr)))


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
