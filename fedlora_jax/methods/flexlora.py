"""FlexLoRA: *Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources*, Bai et
al., NeurIPS 2024, arXiv 2402.11505.

    M = sum_c p_c a_c b_c        (a, b) = factors of T_r(M)        client c gets T_{r_c}(M)

The best rank-r approximation of the mean of products replaces the mean of factors; what lies beyond rank r is lost.
Factors and head travel, both ways.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedlora_jax import lora, product
from fedlora_jax.method import About, Method, mean, per_client
from fedlora_jax.methods.fedit import FedITState, fedit
from fedlora_jax.product import Split

ABOUT = About("FlexLoRA", "Bai et al. NeurIPS 2024", "2402.11505", "a, b, head", "a, b, head", "to rank r")


def flexlora(split: Split = "left", gauge: bool = False) -> Method:
    """FlexLoRA.

    Args:
      split: how ``U S V^T`` becomes factors; ``left`` is the public code's.
      gauge: rotate the new factors towards the old ones, so that they move continuously from round to round, in the
        server. Clients of smaller ranks are sent them in the order of singular values.
    """
    inner = fedit()

    def dispatch(base, state, cohort):
        if not gauge:
            return inner.dispatch(base, state, cohort)
        sent = inner.dispatch(base, state, cohort)
        smaller = cohort.ranks < lora.max_rank(state.adapter)

        def truncated_row(x, y):
            best = jax.vmap(lambda rank: product.within(x, rank, split))(cohort.ranks)
            return jax.tree.map(lambda y, best: jnp.where(per_client(smaller, y) > 0, best, y), y, best)

        truncated = lambda: lora.tree_map(truncated_row, state.adapter, sent.adapter, full=lambda x, y: y)
        rows = jax.lax.cond(smaller.any(), truncated, lambda: sent.adapter)
        return sent._replace(adapter=rows, context=rows)

    def aggregate(base, state, cohort, sent, received):
        p = cohort.weights

        def truncated(old, x):
            like = old if gauge else None
            new = product.truncate(product.total(x, p), old.a.shape[-1], split=split, like=like)
            return new if split != "balanced" or gauge else product.continued(new, old)

        return FedITState(lora.tree_map(truncated, state.adapter, received, full=lambda old, x: mean(x, p)))

    return inner._replace(dispatch=dispatch, aggregate=aggregate)
