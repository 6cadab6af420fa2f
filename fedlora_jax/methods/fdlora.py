"""FDLoRA: *Personalized Federated Learning of Large Language Model via Dual LoRA Tuning*, Qi et al., 2024, arXiv
2406.07925.

    client c's model:  share_c v_c + (1 - share_c) w_c,  factor by factor        share_c: least loss on examples apart

Every client trains two adapters: w, which travels and is averaged, and v_c, which stays; a fusion without gradients
puts their parameters together. The paper's server takes outer steps towards the mean: ``fdlora+fedavgm``. Known from
the abstract and summaries; ours: both are trained side by side as Ditto's, the fusion is one share of ``choices`` from
0 to 1, chosen in every round on examples kept apart, and v_c is never set back to w.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fedlora_jax import personal
from fedlora_jax.checks import refuse_outside
from fedlora_jax.lora import Adapter
from fedlora_jax.method import About, MetaGradient, Method, memory_of
from fedlora_jax.methods.fedit import fedit

ABOUT = About("FDLoRA", "Qi et al. 2024", "2406.07925", "a, b, head (twice)", "a, b, head", "n/a")


def fdlora(choices: int = 5, query: int = 16) -> Method:
    """FDLoRA.

    Args:
      choices: shares to choose from, evenly from 0 (the shared adapter) to 1 (the client's own); at least 2.
      query: examples a client keeps apart to choose by.

    Raises:
      ValueError: fewer choices, or no examples kept apart.
    """
    refuse_outside("[2, inf)", choices=choices)
    refuse_outside("[1, inf)", query=query)
    inner = personal.side_by_side(fedit())

    def dispatch(base, state, cohort):
        kept, share = memory_of(cohort)
        sent = inner.dispatch(base, state, cohort._replace(memory=kept))
        fixed = {"share": jnp.zeros_like(share)}
        return sent._replace(adapter=sent.adapter | {"share": share}, mask=sent.mask | fixed)

    def objective(task, carried, context):
        loss = task(carried["personal"])
        return task(carried["shared"]) + loss, loss

    def train(tune, judge, start):
        end, trace = tune(start)
        shares = jnp.linspace(0.0, 1.0, choices)
        losses = jax.lax.map(lambda share: judge(end | {"share": share}), shares)
        return end | {"share": shares[losses.argmin()]}, trace, ()

    return inner._replace(
        dispatch=dispatch,
        init_client=lambda adapter: (personal.nothing_yet(adapter), jnp.zeros(())),
        remember=lambda memory, context, sent, received: (personal.keep(received["personal"]), received["share"]),
        model=fused,
        objective=objective,
        upload_mask=lambda mask: inner.upload_mask(mask) | {"share": jnp.zeros_like(mask["share"])},
        meta_gradient=MetaGradient(train, lambda steps: 2 * steps + choices),
        query=query,
    )


def fused(carried: Adapter, context: Any = ()) -> Adapter:
    """The client's model: every parameter between the two adapters."""
    share = carried["share"]
    between = lambda v, w: share.astype(v.dtype) * v + (1 - share).astype(v.dtype) * w
    return jax.tree.map(between, carried["personal"], carried["shared"])
