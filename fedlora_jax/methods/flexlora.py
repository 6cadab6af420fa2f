"""FlexLoRA: *Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources*, Bai et
al., NeurIPS 2024, arXiv 2402.11505.

    M = sum_c p_c a_c b_c        (a, b) = factors of T_r(M)        client c gets T_{r_c}(M)

The best rank-r approximation of the mean of products replaces the mean of factors; what lies beyond rank r is lost.
Factors and head travel, both ways.
"""

from __future__ import annotations

import jax.numpy as jnp

from fedlora_jax import lora, product
from fedlora_jax.lora import LoRA
from fedlora_jax.method import About, Method, mean
from fedlora_jax.methods.fedit import FedITState, fedit
from fedlora_jax.product import Split

ABOUT = About("FlexLoRA", "Bai et al. NeurIPS 2024", "2402.11505", "a, b, head", "a, b, head", "to rank r")


def flexlora(split: Split = "left", gauge: bool = False) -> Method:
    """FlexLoRA.

    Args:
      split: how ``U S V^T`` becomes factors; ``left`` is the public code's.
      gauge: rotate the new factors towards the old ones, so that they move continuously. Then columns are no longer
        ordered by singular value, so it is for clients of equal rank only (a client of rank k is sent the first k
        columns).
    """

    def aggregate(base, state, cohort, sent, received):
        p = cohort.weights

        def truncated(old, x):
            like = old if gauge else None
            new = product.truncate(product.total(x, p), old.a.shape[-1], split=split, like=like)
            if split != "balanced" or gauge:
                return new
            dead = ~new.b.any(-1)[..., None, :]  # zero in both factors: goes on with the old a, or it never moves again
            return LoRA(jnp.where(dead, old.a, new.a), new.b, new.scale)

        return FedITState(lora.tree_map(truncated, state.adapter, received, full=lambda old, x: mean(x, p)))

    return fedit()._replace(aggregate=aggregate)
