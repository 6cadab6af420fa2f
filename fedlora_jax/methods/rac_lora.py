"""RAC-LoRA: *Randomized Asymmetric Chain of LoRA*, Malinovsky et al., 2024, arXiv 2410.08305, in its federated form.

    block t:  a_t drawn and frozen,  b = sum_c p_c b_c from b = 0;      at its end  W_res += s a_t b

A chain of FFA-LoRA runs with a fresh a each: every block is exact, and over blocks the update is of any rank. Only b
and the head are trained and travel; a comes from a shared seed and clients add the finished product themselves. Who
was away receives the b of every block it missed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import lora
from fedlora_jax.checks import refuse_outside
from fedlora_jax.lora import Adapter, Params
from fedlora_jax.method import About, Method, Traffic
from fedlora_jax.methods.fedit import FedITState
from fedlora_jax.methods.ffa_lora import ffa_lora

ABOUT = About("RAC-LoRA", "Malinovsky et al. 2024", "2410.08305", "b, head", "b, head", "yes")


class RACState(NamedTuple):
    """adapter: of the running block. residual: [.., in, out] finished blocks, scale included. key: of the draws of a.
    round: rounds done."""

    adapter: Adapter
    residual: Params
    key: Array
    round: Array


def rac_lora(block: int = 1) -> Method:
    """RAC-LoRA.

    Args:
      block: rounds for which one ``a`` stays, at least 1.

    Raises:
      ValueError: a block below 1.
    """
    refuse_outside("[1, inf)", block=block)
    inner = ffa_lora()

    def init(key, adapter):
        return RACState(adapter, lora.zero_deltas(adapter), key, jnp.zeros((), jnp.int32))

    def dispatch(base, state, cohort):
        return inner.dispatch(lora.add(base, state.residual), FedITState(state.adapter), cohort)

    def aggregate(base, state, cohort, sent, received):
        adapter = inner.aggregate(base, FedITState(state.adapter), cohort, sent, received).adapter
        key, fresh = jax.random.split(state.key)
        ends = (state.round + 1) % block == 0
        grown = jax.tree.map(lambda w, x: w + lora.delta(x), state.residual, lora.split(adapter)[0])
        either = lambda new, old: jax.tree.map(lambda x, y: jnp.where(ends, x, y), new, old)
        adapter = either(lora.restart(fresh, adapter), adapter)
        return RACState(adapter, either(grown, state.residual), key, state.round + 1)

    def traffic(own, cohort):
        # A block's first round starts from b = 0, which nobody sends, and its last leaves the finished b behind.
        low_rank, head = lora.split(own)
        finished = lora.tree_map(lambda x: jnp.zeros(x.b.size // block, x.b.dtype), low_rank)
        running = lora.tree_map(lambda x: jnp.zeros(x.b.size - x.b.size // block, x.b.dtype), low_rank)
        return Traffic(up=inner.traffic(own, cohort).up, down=(running, head), missed=finished)

    return Method(init, dispatch, aggregate, traffic=traffic)
