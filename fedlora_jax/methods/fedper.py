"""FedPer: *Federated Learning with Personalization Layers*, Arivazhagan et al., 2019, arXiv 1912.00818.

    (a, b) = sum_c p_c (a_c, b_c)        head_c stays with client c

All are trained together; the low-rank factors travel, what is trained in full (the head) does not. Ours: a client
that never took part starts from the base's head.
"""

from __future__ import annotations

import jax.numpy as jnp

from fedlora_jax import lora, personal
from fedlora_jax.method import About, Method, Traffic
from fedlora_jax.methods.fedit import FedITState, fedit

ABOUT = About("FedPer", "Arivazhagan et al. 2019", "1912.00818", "a, b, head", "a, b", "n/a")


def fedper() -> Method:
    """FedPer. It has no options: what is trained in full (``full`` of ``lora.new``) is what stays with clients."""

    inner = fedit()

    def init(key, adapter):
        personal.needs_head(adapter, "personal heads")
        return inner.init(key, adapter)

    def dispatch(base, state, cohort):
        sent = inner.dispatch(base, state, cohort)
        body, head = lora.split(sent.adapter)
        return sent._replace(adapter=lora.join(body, personal.own_or(cohort, head)))

    def aggregate(base, state, cohort, sent, received):
        new = inner.aggregate(base, state, cohort, sent, received)
        return FedITState(lora.join(lora.split(new.adapter)[0], lora.split(state.adapter)[1]))

    def only_body(own, cohort):
        body, _ = lora.split(own)
        return Traffic(up=body, down=body)

    return inner._replace(
        init=init,
        dispatch=dispatch,
        aggregate=aggregate,
        init_client=lambda adapter: personal.nothing_yet(lora.split(adapter)[1]),
        remember=lambda memory, context, sent, received: personal.keep(lora.split(received)[1]),
        upload_mask=lambda mask: lora.tree_map(lambda m: m, mask, full=jnp.zeros_like),
        traffic=only_body,
    )
