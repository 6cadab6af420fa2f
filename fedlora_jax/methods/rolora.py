"""RoLoRA: *Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA*, Chen et al., NeurIPS 2025, arXiv
2502.01755.

    odd rounds:   b = sum_c p_c b_c, a stays        even rounds:   a = sum_c p_c a_c, b stays

One factor is the same for all, so the mean of products is the product of means, every round. b comes first: at b = 0 a
has no gradient. Only the factor of the round and the head are trained and travel; who was away for several rounds needs
both. The optimizer of the idle factor starts afresh like all local optimizers here; what the paper does with it is not
public.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from fedlora_jax import lora
from fedlora_jax.lora import Adapter, LoRA
from fedlora_jax.method import About, Method, Traffic, broadcast, mean, revived

ABOUT = About("RoLoRA", "Chen et al. NeurIPS 2025", "2502.01755", "b or a in turn, head", "that factor, head", "yes")


class RoLoRAState(NamedTuple):
    """adapter: as FedIT's. round: rounds done."""

    adapter: Adapter
    round: Array


def rolora() -> Method:
    """RoLoRA. It has no options: the factors take turns round by round, ``b`` first."""

    def init(key, adapter):
        return RoLoRAState(adapter, jnp.zeros((), jnp.int32))

    def dispatch(base, state, cohort):
        sent = broadcast(base, state.adapter, cohort)
        return sent._replace(mask=one_factor(sent.mask, state.round))

    def aggregate(base, state, cohort, sent, received):
        only_b = state.round % 2 == 0
        new = mean(received, cohort.weights)
        keep = lambda old, x: LoRA(jnp.where(only_b, old.a, x.a), jnp.where(only_b, x.b, old.b), x.scale)
        adapter = lora.tree_map(keep, state.adapter, new, full=lambda old, x: x)
        adapter = revived(state.adapter, adapter, cohort.ranks, cohort.weights)
        return RoLoRAState(adapter, state.round + 1)

    def traffic(own, cohort):
        low_rank, head = lora.split(own)
        half = lora.tree_map(lambda x: jnp.zeros((x.a.size + x.b.size + 1) // 2, x.a.dtype), low_rank)  # of two rounds
        return Traffic(up=(half, head), down=head, missed=half, whole=low_rank)

    return Method(init, dispatch, aggregate, traffic=traffic)


def one_factor(mask: Adapter, round: Array) -> Adapter:
    """The mask of a round in which one factor moves, ``b`` in the first; what is trained in full moves always."""
    only_b = round % 2 == 0
    phase = lambda m: LoRA(jnp.where(only_b, 0, m.a), jnp.where(only_b, m.b, 0), m.scale)
    return lora.tree_map(phase, mask)
