"""FLoRA: *FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations*, Wang et al.,
NeurIPS 2024, arXiv 2409.05976.

    W_res += s [p_1 a_1 .. p_C a_C] [b_1; ..; b_C] = s sum_c p_c a_c b_c        then  a fresh, b = 0

Stacking is exact for any mix of ranks. Clients send their factors and receive the stack of the whole cohort, which
they merge into their base; every round starts from a fresh adapter. Who was away for some rounds receives all of their
stacks before it trains again.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedlora_jax import lora, product
from fedlora_jax.lora import Adapter, Params
from fedlora_jax.method import About, Method, Traffic, broadcast, mean

ABOUT = About("FLoRA", "Wang et al. NeurIPS 2024", "2409.05976", "a, b, head", "a, b, head; stack down", "yes")


class FLoRAState(NamedTuple):
    """adapter: this round's fresh start. residual: [.., in, out] merged stacks, scale included. key: of restarts."""

    adapter: Adapter
    residual: Params
    key: jax.Array


def flora() -> Method:
    """FLoRA. It has no options."""

    def init(key, adapter):
        return FLoRAState(adapter, lora.zero_deltas(adapter), key)

    def dispatch(base, state, cohort):
        return broadcast(lora.add(base, state.residual), state.adapter, cohort)

    def aggregate(base, state, cohort, sent, received):
        p = cohort.weights
        merged = lora.tree_map(lambda x: lora.delta(product.total(x, p)), lora.split(received)[0])
        key, fresh = jax.random.split(state.key)
        means = lora.tree_map(lambda old, x: old, state.adapter, received, full=lambda old, x: mean(x, p))
        return FLoRAState(lora.restart(fresh, means), jax.tree.map(jnp.add, state.residual, merged), key)

    def traffic(own, cohort):
        return Traffic(up=own, down=lora.split(own)[1], missed=[lora.split(x)[0] for x in cohort])

    return Method(init, dispatch, aggregate, traffic=traffic, uploads="stacked")
