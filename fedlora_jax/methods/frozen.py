"""Frozen: no federation and no training, the model as it came.

    v <- v

What everything that is trained has to pass, above all on what it was not trained on: of a CLIP it is the zero-shot one
(Radford et al., ICML 2021, arXiv 2103.00020, section 3.1). Clients take their local steps, which nobody hears of: after
them is what one round of training alone makes of the model.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedlora_jax.method import About, Method, Traffic
from fedlora_jax.methods.fedit import fedit

ABOUT = About("Frozen", "baseline", "-", "nothing", "nothing", "n/a")


def frozen() -> Method:
    """Frozen. It has no options."""

    return fedit()._replace(
        aggregate=lambda base, state, cohort, sent, received: state,
        aggregated=lambda carried: {},
        upload_mask=lambda mask: jax.tree.map(jnp.zeros_like, mask),
        traffic=lambda own, cohort: Traffic(up=(), down=()),
        uploads="none",
    )
