"""FedEx-LoRA: *Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models*, Singhal et al., ACL
2025, arXiv 2410.09432.

    a = abar        b = bbar        W_res += s (sum_c p_c a_c b_c - abar bbar)

What the mean of factors misses goes into a dense residual [in, out] that every client adds to its base. Factors and
head travel both ways; what a round adds to the residual travels down, factored or dense, whichever is smaller, and to
who was away for some rounds what each of them added, or all of the residual.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedlora_jax import lora, product
from fedlora_jax.lora import Adapter, LoRA, Params
from fedlora_jax.method import About, Method, Traffic, broadcast, mean, revived

ABOUT = About("FedEx-LoRA", "Singhal et al. ACL 2025", "2410.09432", "a, b, head", "a, b, head; residual down", "yes")


class FedExState(NamedTuple):
    """adapter: as FedIT's. residual: [.., in, out] at each adapted kernel, scale included."""

    adapter: Adapter
    residual: Params


def fedex_lora() -> Method:
    """FedEx-LoRA. It has no options."""

    def init(key, adapter):
        return FedExState(adapter, lora.zero_deltas(adapter))

    def dispatch(base, state, cohort):
        return broadcast(lora.add(base, state.residual), state.adapter, cohort)

    def aggregate(base, state, cohort, sent, received):
        p = cohort.weights
        center = mean(received, p)

        def missed(x: LoRA, center: LoRA) -> jax.Array:
            return lora.delta(product.total(LoRA(x.a - center.a, x.b - center.b, x.scale), p))

        low_rank, _ = lora.split(received)
        missing = lora.tree_map(missed, low_rank, lora.split(center)[0])
        adapter = revived(state.adapter, center, cohort.ranks, p)  # the same product
        return FedExState(adapter, jax.tree.map(jnp.add, state.residual, missing))

    def traffic(own, cohort):
        def residual(x: LoRA, *held: LoRA):
            # Everybody needs the same one. Column k adds the rank of its holders' centred columns.
            ranks, dense = [y.a.shape[-1] for y in held], lora.delta(x)
            holders = [sum(r > k for r in ranks) for k in range(max(ranks, default=0))]
            rank = sum(min(n, len(held) - 1) for n in holders)
            factored = jnp.zeros((*dense.shape[:-2], rank, sum(dense.shape[-2:])))
            return factored if factored.size < dense.size else dense

        low_rank = [lora.split(x)[0] for x in (own, *cohort)]
        whole = lora.zero_deltas(own)
        return Traffic(up=own, down=own, missed=lora.tree_map(residual, *low_rank), whole=whole)

    return Method(init, dispatch, aggregate, traffic=traffic)
