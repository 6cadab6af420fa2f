"""LoRA-A2: *Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous Clients*, Koo et al., ACL
2025, arXiv 2410.22815, algorithms 1 and 2.

    odd rounds train b, even rounds a        b += sum_c p_c M_c db_c        M_c: the ranks that client c chose
    score of rank i of a module:  |a_i db_i|  (or |da_i b_i|)  after a trial        chosen: the best over all modules

RoLoRA in which a client trains and sends as many ranks as its budget allows, those that its own data move most, many in
one layer and none in another; all hold all. The factor at rest is the same for all, and the mean is exact. A budget is
the client's rank times ``share`` in every module on average. Ours: the trial is as long as the local steps, on the same
batches (in the paper one epoch; either way work is twice RoLoRA's), and both factors have one learning rate (in the
paper b's is five times a's).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import lora, product
from fedlora_jax.checks import refuse_outside
from fedlora_jax.lora import Adapter, LoRA
from fedlora_jax.method import About, MetaGradient, Method, Traffic
from fedlora_jax.methods.rolora import rolora

ABOUT = About(
    "LoRA-A2",
    "Koo et al. ACL 2025",
    "2410.22815",
    "chosen ranks of b or a in turn, head",
    "chosen ranks, head",
    "yes",
    tells="which ranks it chose",
)


class Carried(NamedTuple):
    """adapter: as RoLoRA's. chosen: 1 for a rank that moves, [.., r] of each kernel by name. budget: [] how many."""

    adapter: Adapter
    chosen: dict[str, Array]
    budget: Array


def lora_a2(share: float = 0.5) -> Method:
    """LoRA-A2.

    Args:
      share: of a client's rank, how much it trains and sends on average over modules, above 0; 1: RoLoRA.

    Raises:
      ValueError: another share.
    """
    refuse_outside("(0, 1]", share=share)
    inner = rolora()

    def dispatch(base, state, cohort):
        whole = cohort._replace(ranks=jnp.full_like(cohort.ranks, lora.max_rank(state.adapter)))
        sent = inner.dispatch(base, state, whole)
        chosen = {name: jnp.ones(x.a.shape[:-2] + x.a.shape[-1:]) for name, x in low_rank(state.adapter).items()}
        chosen = {name: jnp.broadcast_to(x, (len(cohort.ids), *x.shape)) for name, x in chosen.items()}
        modules = sum(x[0].size // x.shape[-1] for x in chosen.values())
        ranks = jnp.minimum(cohort.ranks, lora.max_rank(state.adapter))  # nobody in particular has all there are
        budget = jnp.maximum(jnp.round(share * ranks * modules), 1.0)
        still = jax.tree.map(lambda x: jnp.zeros((len(x), *(1,) * (x.ndim - 1))), (chosen, budget))
        return sent._replace(
            adapter=Carried(sent.adapter, chosen, budget), mask=Carried(sent.mask, *still), context=sent.adapter
        )

    def train(tune, judge, start):
        trial, _ = tune(start)
        chosen = best(scores(start.adapter, trial.adapter), start.budget)
        end, trace = tune(start._replace(chosen=chosen))
        return Carried(moved(end, start.adapter), chosen, start.budget), trace, ()

    def aggregate(base, state, cohort, sent, received):
        whole = cohort._replace(ranks=jnp.full_like(cohort.ranks, lora.max_rank(state.adapter)))
        only = sent._replace(adapter=sent.adapter.adapter, mask=sent.mask.adapter)
        return inner.aggregate(base, state, whole, only, received.adapter)

    def held(mask, context, received):
        return mask._replace(adapter=of_chosen(mask.adapter, received.chosen))

    def traffic(own, cohort):
        theirs = inner.traffic(own, cohort)
        half, head = theirs.up
        part = jax.tree.map(lambda x: x[: max(1, round(share * x.size))], half)
        return Traffic(up=(part, head), down=theirs.down, missed=theirs.missed, whole=theirs.whole)

    return inner._replace(
        dispatch=dispatch,
        aggregate=aggregate,
        model=moved,
        aggregated=lambda carried: carried.adapter,
        held=held,
        traffic=traffic,
        meta_gradient=MetaGradient(train, lambda steps: 2 * steps),
    )


def low_rank(adapter: Adapter) -> dict[str, LoRA]:
    """The low-rank updates by name."""
    return lora.flatten(lora.split(adapter)[0])


def moved(carried: Carried, start: Adapter) -> Adapter:
    """What of a client's adapter counts: of ranks that are not chosen where it started."""

    def one(x: LoRA, old: LoRA, chosen: Array) -> LoRA:
        a, b = chosen[..., None, :], chosen[..., :, None]
        return LoRA(old.a + a * (x.a - old.a), old.b + b * (x.b - old.b), x.scale)

    flat, old = lora.flatten(carried.adapter), lora.flatten(start)
    return lora.unflatten(flat | {name: one(flat[name], old[name], m) for name, m in carried.chosen.items()})


def of_chosen(mask: Adapter, chosen: dict[str, Array]) -> Adapter:
    """A client's mask without the ranks that it has not chosen."""
    one = lambda m, c: LoRA(m.a * c[..., None, :], m.b * c[..., :, None], m.scale)
    flat = lora.flatten(mask)
    return lora.unflatten(flat | {name: one(flat[name], c) for name, c in chosen.items()})


def scores(start: Adapter, end: Adapter) -> dict[str, Array]:
    """``[.., r]`` how far each rank has moved its product: ``|da_i| |b_i| + |a_i| |db_i|``, one of which is zero."""
    size = lambda x, axis: product.safe_sqrt(jnp.sum(x**2, axis))

    def one(x: LoRA, y: LoRA) -> Array:
        return size(y.a - x.a, -2) * size(x.b, -1) + size(x.a, -2) * size(y.b - x.b, -1)

    ends = low_rank(end)
    return {name: one(x, ends[name]) for name, x in low_rank(start).items()}


def best(scores: dict[str, Array], budget: Array) -> dict[str, Array]:
    """1 for the ``budget`` largest scores over all modules, 0 elsewhere."""
    every = jnp.sort(jnp.concatenate([x.ravel() for x in scores.values()]))[::-1]
    least = every[jnp.clip(budget.astype(int), 1, every.size) - 1]
    return {name: (x >= least).astype(x.dtype) for name, x in scores.items()}
