"""FedGLOMO: *Faster Non-Convex Federated Learning via Global and Local Momentum*, Das et al., UAI 2022, arXiv
2012.04061.

    D_c(w) = w - (w after client c's local steps)        u <- D(w) + (1 - beta) (u - D(w_before))        w <- w - u

with ``D = sum_c p_c D_c`` and ``w_before`` the adapter of the round before: clients take their local steps from both,
on the same batches, and what the old one would have done now takes the noise out of u. Two adapters travel, both ways,
and local work is twice FedIT's. This is the global momentum; the local one (a STORM step: gradients at the last two
local iterates of one batch) is no optax transformation, which sees one gradient, and is left out. Ours: in the first
round u is D(w), and both adapters are trained by one optimizer: one that clips by the global norm scales them together.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax.checks import refuse_outside
from fedlora_jax.lora import Adapter
from fedlora_jax.method import About, MetaGradient, Method, Traffic, mean, no_meta_gradient, revived
from fedlora_jax.methods.fedit import FedITState, fedit

ABOUT = About("FedGLOMO", "Das et al. UAI 2022", "2012.04061", "a, b, head (twice)", "a, b, head; twice", "no")


class FedGLOMOState(NamedTuple):
    """adapter: w. before: w of the round before. step: u, the last step. rounds: [] rounds done."""

    adapter: Adapter
    before: Adapter
    step: Adapter
    rounds: Array


def fedglomo(beta: float = 0.2) -> Method:
    """FedGLOMO.

    Args:
      beta: how much of u is new, above 0 and at most 1; 1: FedIT.

    Raises:
      ValueError: another beta.
    """
    refuse_outside("(0, 1]", beta=beta)
    inner = fedit()

    def init(key, adapter):
        return FedGLOMOState(adapter, adapter, jax.tree.map(jnp.zeros_like, adapter), jnp.zeros((), jnp.int32))

    def dispatch(base, state, cohort):
        now, before = (inner.dispatch(base, FedITState(w), cohort) for w in (state.adapter, state.before))
        both = lambda x, y: {"now": x, "before": y}
        return now._replace(adapter=both(now.adapter, before.adapter), mask=both(now.mask, now.mask), context=())

    def aggregate(base, state, cohort, sent, received):
        way = lambda w, ends: jax.tree.map(jnp.subtract, w, mean(ends, cohort.weights))
        now, before = way(state.adapter, received["now"]), way(state.before, received["before"])
        kept = jnp.where(state.rounds > 0, 1 - beta, 0.0)
        step = jax.tree.map(lambda d, u, old: d + kept.astype(d.dtype) * (u - old), now, state.step, before)
        new = revived(state.adapter, jax.tree.map(jnp.subtract, state.adapter, step), cohort.ranks, cohort.weights)
        return FedGLOMOState(new, state.adapter, step, state.rounds + 1)

    def objective(task, carried, context):
        loss = task(carried["now"])
        return loss + task(carried["before"]), loss

    return Method(
        init,
        dispatch,
        aggregate,
        model=lambda carried, context: carried["now"],
        aggregated=lambda carried: carried["now"],
        objective=objective,
        traffic=lambda own, cohort: Traffic(up=(own, own), down=(own, own)),
        meta_gradient=MetaGradient(no_meta_gradient.train, lambda steps: 2 * steps),
    )
