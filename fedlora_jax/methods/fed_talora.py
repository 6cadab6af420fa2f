"""Fed-TaLoRA: *Efficient Federated Class-Incremental Learning of Pre-Trained Models via Task-agnostic Low-rank Residual
Adaptation*, Yu, Hu & Min, 2025, arXiv 2505.12318.

    a = abar        b = bbar        W_res += s (sum_c p_c a_c b_c - abar bbar)        one set of factors for all tasks

FedEx-LoRA's exact aggregation through a sequence of tasks, each with classes of its own. Factors and head travel both
ways, the residual travels down.

Classes are dealt to tasks in order; while a task lasts, only its classes' columns of the head are trained, so that
classes seen before keep theirs: our reading, the paper masks or grows the head. Which examples clients hold during a
task is the caller's affair: the population is an argument of a step, one with that task's rows needs no new program.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fedlora_jax import lora
from fedlora_jax.checks import refuse_outside
from fedlora_jax.lora import Adapter, Params
from fedlora_jax.method import About, Method
from fedlora_jax.methods.fedex_lora import FedExState, fedex_lora

ABOUT = About("Fed-TaLoRA", "Yu et al. 2025", "2505.12318", "a, b, head", "a, b, head; residual down", "yes")


class TaLoRAState(NamedTuple):
    """adapter, residual: as FedEx-LoRA's. round: rounds done."""

    adapter: Adapter
    residual: Params
    round: Array


def fed_talora(tasks: int = 1, rounds_per_task: int = 10) -> Method:
    """Fed-TaLoRA; with one task it is FedEx-LoRA.

    Args:
      tasks: how many the classes are dealt to, in order (the last axis of every parameter trained in full is classes).
      rounds_per_task: then the next task begins; the last one goes on for ever.
    """
    refuse_outside("[1, inf)", tasks=tasks, rounds_per_task=rounds_per_task)
    inner = fedex_lora()

    def init(key, adapter):
        few = {name: x.shape for name, x in lora.flatten(lora.split(adapter)[1]).items() if x.shape[-1] < tasks}
        if few:
            raise ValueError(f"{tasks} tasks need as many classes on the last axis of the head, got {few}")
        return TaLoRAState(adapter, lora.zero_deltas(adapter), jnp.zeros((), jnp.int32))

    def dispatch(base, state, cohort):
        sent = inner.dispatch(base, FedExState(state.adapter, state.residual), cohort)
        current = lambda x, m: m * lasting(state, x)
        return sent._replace(mask=lora.tree_map(lambda x, m: m, sent.adapter, sent.mask, full=current))

    def aggregate(base, state, cohort, sent, received):
        new = inner.aggregate(base, FedExState(state.adapter, state.residual), cohort, sent, received)
        still = lambda old, x: jnp.where(lasting(state, x), x, old)
        adapter = lora.tree_map(lambda old, x: x, state.adapter, new.adapter, full=still)
        return TaLoRAState(adapter, new.residual, state.round + 1)

    def lasting(state: TaLoRAState, x: Array) -> Array:
        """``[classes]``: does the class belong to the task of this round?"""
        return task_of_class(x.shape[-1], tasks) == jnp.minimum(state.round // rounds_per_task, tasks - 1)

    return Method(init, dispatch, aggregate, traffic=inner.traffic)


def task_of_class(classes: int, tasks: int) -> Array:
    """``[classes]``: the task each class belongs to."""
    return jnp.arange(classes) * tasks // classes


def accuracy_and_forgetting(accuracy: ArrayLike) -> tuple[Array, Array]:
    """Mean accuracy after the last task, and how far, on average, earlier tasks have fallen from their best.

    Args:
      accuracy: ``[tasks, tasks]``, row t after task t, column k on the test examples of task k.
    """
    accuracy = jnp.asarray(accuracy)
    earlier, last = accuracy[:-1, :-1], accuracy[-1]
    fallen = earlier.max(0, initial=0) - last[:-1]
    return last.mean(), fallen.sum() / max(1, fallen.shape[0])
