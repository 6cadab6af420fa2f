"""What is refused before anything compiles: numbers out of their bounds, and what rounds cannot work with."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.interpreters.partial_eval import dce_jaxpr

from fedlora_jax import lora
from fedlora_jax.method import Cohort, Dispatch, Memory, Method, State
from fedlora_jax.training import LossFn


def is_concrete(*numbers: Any) -> bool:
    """Are these plain numbers, so that they can be compared with their bounds now?

    A traced hyper-parameter is being learned or swept over: whoever traces it looks at its values first.
    """
    return not any(isinstance(x, Tracer) for x in numbers)


def refuse_outside(interval: str, **numbers: Any) -> None:
    """Refuse numbers outside an interval such as ``"[0, 1)"`` or ``"(0, inf)"``; traced ones pass (``is_concrete``).

    Nan and infinity are in no interval, nor is what a device cannot hold: integers beyond int32, and real numbers that
    float32 makes infinite or flushes to zero.

    Raises:
      ValueError: says which number, what it is and what it should be.
    """
    low, high = (float(end) for end in interval[1:-1].split(","))
    for name, value in numbers.items():
        if not is_concrete(value):
            continue
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below and _representable(value)):
            raise ValueError(f"{name} must be {in_words(interval)}, got {value}{_beyond(value)}")


def in_words(interval: str) -> str:
    """``"[0, 1)"``: at least 0 and below 1."""
    low, high = interval[1:-1].replace(" ", "").split(",")
    least = f"{'at least' if interval[0] == '[' else 'above'} {low}"
    most = f"{'at most' if interval[-1] == ']' else 'below'} {high}"
    return " and ".join(end for end in (least, most) if "inf" not in end) or "a finite number"


def _representable(value: Any) -> bool:
    if isinstance(value, (int, np.integer)):
        return abs(int(value)) < 2**31
    limits = np.finfo(np.float32)
    return value == 0 or bool(float(limits.tiny) <= abs(value) <= float(limits.max))


def _beyond(value: Any) -> str:
    if isinstance(value, (int, np.integer)) or _representable(value):
        return "" if _representable(value) else ", which int32 cannot hold"
    return ", which is not finite" if not np.isfinite(value) else ", which float32 cannot hold"


def refuse_widened(old: State, new: State) -> None:
    """Refuse a method that makes float32 of a state of 16 bits: rounds could not follow one another."""
    for x, y in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=False):
        if jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32 and x.dtype != y.dtype:
            raise ValueError(
                f"the method computes in {y.dtype} what it was given in {x.dtype}: give it a {y.dtype} adapter, as "
                f"lora.new makes them (jax.tree.map(lambda x: x.astype({str(y.dtype)!r}), adapter)); base may stay"
            )


def refuse_unread(method: Method, loss_fn: LossFn, sent: Dispatch, cohort: Cohort, key: Array) -> None:
    """Refuse an adapter of which the loss does not read everything: that part would never be trained.

    Looks at the program of the loss on one client's batch and computes nothing.
    """
    row = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype))
    model = jax.eval_shape(method.model, row(sent.adapter), row(sent.context))
    program = jax.make_jaxpr(loss_fn)(sent.base, model, row(row(cohort.batches)), key).jaxpr
    read = dce_jaxpr(program, [True] * len(program.outvars))[1]
    before = len(jax.tree.leaves(sent.base))
    is_read = jax.tree.unflatten(jax.tree.structure(model), read[before : before + len(jax.tree.leaves(model))])
    unread = [name for name, x in lora.flatten(is_read).items() if not all(jax.tree.leaves(x))]
    if switches := [name for name in unread if name not in lora.flatten(sent.base)]:
        raise ValueError(
            f"the method switches parts of the model by {', '.join(switches)} in the adapter, and the loss does not "
            "read it: use a model that looks for it in its lora collection, or another method"
        )
    if unread:
        raise ValueError(
            f"the loss does not read {', '.join(unread[:5])}{' ...' * (len(unread) > 5)} of the adapter, so it would "
            "never be trained. Layers of fedlora_jax.Dense read lora.variables(base, adapter); for any other model "
            "merge it, as in loss_fn = lambda base, adapter, batch, key: "
            "loss(model.apply({'params': lora.merge(base, adapter)}, batch[0]), batch[1])"
        )


def refuse_other_clients(memory: Memory, clients: int) -> None:
    """Refuse the memory of a run that was started for another number of clients: rows out of range would be others'."""
    rows = {x.shape[0] for x in jax.tree.leaves(memory)}
    if rows - {clients}:
        raise ValueError(
            f"the run keeps rows of {max(rows)} clients between rounds, and the population has {clients}: give their "
            "number to rounds.start(..., clients=)"
        )


def refuse_twice(ids: Array) -> None:
    """Refuse a cohort in which a client is twice, where that can be seen (not while a program is traced).

    Methods that count clients (FedHL, HetLoRA, FedRA, Fed-HeLLo) would count it twice, whatever its weights, and of
    what it keeps one row of two would be lost.
    """
    if is_concrete(ids) and len(some := np.asarray(ids)[np.asarray(ids) >= 0]) > len(np.unique(some)):
        found, times = np.unique(some, return_counts=True)
        raise ValueError(
            f"client {found[times > 1][0]} is in the cohort {times.max()} times: give it once, with the sum of its "
            "weights"
        )
