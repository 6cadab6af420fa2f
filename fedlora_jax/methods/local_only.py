"""Local-only: no federation, every client trains alone.

    v_c <- v_c after its local steps

The lower bound that personalised methods have to pass. Nothing travels; the server's model stays at the start.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedlora_jax import personal
from fedlora_jax.method import About, Method, Traffic
from fedlora_jax.methods.fedit import fedit

ABOUT = About("Local-only", "baseline", "-", "a, b, head", "nothing", "n/a")


def local_only() -> Method:
    """Local-only. It has no options."""

    inner = fedit()

    def dispatch(base, state, cohort):
        sent = inner.dispatch(base, state, cohort)
        own = personal.own_or(cohort, sent.adapter, nobody=False)
        return sent._replace(adapter=jax.tree.map(jnp.multiply, own, sent.mask))

    return inner._replace(
        dispatch=dispatch,
        aggregate=lambda base, state, cohort, sent, received: state,
        init_client=personal.nothing_yet,
        remember=lambda memory, context, sent, received: personal.keep(received),
        aggregated=lambda carried: {},
        upload_mask=lambda mask: jax.tree.map(jnp.zeros_like, mask),
        traffic=lambda own, cohort: Traffic(up=(), down=()),
        uploads="none",
    )
