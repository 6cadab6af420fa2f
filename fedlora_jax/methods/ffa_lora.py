"""FFA-LoRA: *Improving LoRA in Privacy-preserving Federated Learning*, Sun et al., ICLR 2024, arXiv 2403.12313.

    a = a_0 for ever        b = sum_c p_c b_c        so   sum_c p_c a_0 b_c = a_0 b   exactly

Only b and the head are trained and travel; a comes from a shared seed.
"""

from __future__ import annotations

import jax.numpy as jnp

from fedlora_jax import lora
from fedlora_jax.lora import LoRA
from fedlora_jax.method import About, Method, Traffic
from fedlora_jax.methods.fedit import fedit

ABOUT = About("FFA-LoRA", "Sun et al. ICLR 2024", "2403.12313", "b, head", "b, head", "yes")


def ffa_lora() -> Method:
    """FFA-LoRA. It has no options."""

    inner = fedit()

    def dispatch(base, state, cohort):
        sent = inner.dispatch(base, state, cohort)
        frozen_a = lora.tree_map(lambda m: LoRA(jnp.zeros_like(m.a), m.b, m.scale), sent.mask)
        return sent._replace(mask=frozen_a)

    def aggregate(base, state, cohort, sent, received):
        new = inner.aggregate(base, state, cohort, sent, received)
        keep_a = lora.tree_map(
            lambda old, x: LoRA(old.a, x.b, x.scale), state.adapter, new.adapter, full=lambda old, x: x
        )
        return new._replace(adapter=keep_a)

    def traffic(own, cohort):
        only_b = lora.tree_map(lambda x: x.b, own)
        return Traffic(up=only_b, down=only_b)

    return inner._replace(dispatch=dispatch, aggregate=aggregate, traffic=traffic)
