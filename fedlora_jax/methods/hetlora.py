"""HetLoRA: *Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models*, Cho et al., EMNLP 2024, arXiv
2401.06432.

    client:  f_c + lam |a[:, k:]| |b[k:, :]|,  k = floor(gamma r_c);    r_c <- k where that tail shrank in training
    server:  a = sum_c p_c a_c,  b = sum_c p_c b_c  (zero-padded),     p_c ~ |a_c b_c| over all layers

Clients hold the first ``r_c`` columns and let go of the last where they do not need them. Factors and head travel, both
ways; the rank stays with the client. The head is averaged with the same weights: ours.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import lora, product
from fedlora_jax.checks import refuse_outside
from fedlora_jax.lora import Adapter, LoRA
from fedlora_jax.method import About, Method, mean, memory_of, revived, uniform
from fedlora_jax.methods.fedit import fedit

ABOUT = About("HetLoRA", "Cho et al. EMNLP 2024", "2401.06432", "a, b, head", "a, b, head", "no", "rank", "its rank")


class Ranks(NamedTuple):
    """rank: columns the client holds. next: columns left if it prunes, k."""

    rank: Array  # [] or [C]
    next: Array


class HetLoRAState(NamedTuple):
    """adapter: as FedIT's. down, up: the shares of ``traffic`` that are left of it, as the last cohort has pruned."""

    adapter: Adapter
    down: Array
    up: Array


def hetlora(gamma: float = 0.99, lam: float = 1e-3, min_rank: int = 4) -> Method:
    """HetLoRA.

    Args:
      gamma: share of the columns that pruning keeps; any gamma of at least ``1 - 1/r`` takes one column at a time.
      lam: weight of the penalty on the tail.
      min_rank: nobody prunes below it; clients of smaller ranks never prune.
    """
    refuse_outside("(0, 1]", gamma=gamma)
    refuse_outside("[0, inf)", lam=lam)
    refuse_outside("[1, inf)", min_rank=min_rank)
    inner = fedit()

    def init(key, adapter):
        return HetLoRAState(adapter, jnp.ones(()), jnp.ones(()))

    def dispatch(base, state, cohort):
        pruned = jnp.where(cohort.ids < 0, 0, memory_of(cohort))  # nobody in particular has lost nothing
        rank = jnp.maximum(cohort.ranks - pruned, 1)
        least = jnp.minimum(rank, min_rank)
        k = jnp.maximum(jnp.floor(gamma * rank + 1e-4).astype(rank.dtype), least)
        return inner.dispatch(base, state, cohort._replace(ranks=rank))._replace(context=Ranks(rank, k))

    def penalty(adapter, context):
        return lam * tail(adapter, context)

    def kept(context: Ranks, sent: Adapter, received: Adapter) -> Array:
        """The rank after training, of one client."""
        return jnp.where(tail(received, context) < tail(sent, context), context.next, context.rank)

    def remember(memory, context, sent, received):
        return memory + context.rank - kept(context, sent, received)

    def aggregate(base, state, cohort, sent, received):
        ranks = jax.vmap(kept)(sent.context, sent.adapter, received)
        pruned = jax.tree.map(jnp.multiply, received, lora.rank_mask(state.adapter, ranks))
        size = jnp.sqrt(
            sum(jnp.sum(product.norm(x).reshape(ranks.size, -1) ** 2, 1) for x in lora.low_rank_leaves(pruned))
        )
        size *= cohort.weights > 0
        p = jnp.where(size.sum() > 0, size / jnp.maximum(size.sum(), 1e-30), uniform(cohort))
        adapter = revived(state.adapter, mean(pruned, p), ranks, p)
        whole, down, up = (numbers(adapter, r) for r in (cohort.ranks, sent.context.rank, ranks))
        return HetLoRAState(adapter, down / whole, up / whole)

    def report(state):
        return {"travels_up": state.up, "travels_down": state.down}

    nothing = lambda adapter: jnp.zeros((), jnp.int32)  # columns pruned so far
    return Method(init, dispatch, aggregate, penalty, init_client=nothing, remember=remember, report=report)


def numbers(adapter: Adapter, ranks: Array) -> Array:
    """Of a client's adapter at one of the ranks ``[C]``, in the mean: all together may be more than int32 holds."""
    low_rank, full = lora.split(adapter)
    column = sum(x.a[..., 0].size + x.b[..., 0, :].size for x in lora.low_rank_leaves(low_rank))
    return column * ranks.mean() + sum(x.size for x in jax.tree.leaves(full))


def tail(adapter: Adapter, ranks: Ranks) -> Array:
    """``sum_l |a[:, k:r]| |b[k:r, :]|`` of one client; 0 where nothing can be pruned."""

    def one(x: LoRA) -> Array:
        column = jnp.arange(x.a.shape[-1])
        live = ((column >= ranks.next) & (column < ranks.rank)).astype(x.a.dtype)
        norm = lambda y, axis: product.safe_sqrt(jnp.sum(y**2, axis))
        sizes = product.safe_sqrt(jnp.sum((x.a * live) ** 2, (-2, -1))), norm(x.b * live[:, None], (-2, -1))
        return jnp.sum(sizes[0] * sizes[1])

    return sum((one(x) for x in lora.low_rank_leaves(adapter)), jnp.zeros(()))
