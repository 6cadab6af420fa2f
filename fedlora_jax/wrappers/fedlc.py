"""FedLC: *Federated Learning with Label Distribution Skew via Logits Calibration*, Zhang et al., ICML 2022, arXiv
2209.00189.

    minimise  - log softmax(logits_k - tau n_k^(-1/4))_y        n_k: how many examples of class k the client holds

Lowering logit k by a number is lowering entry k of the head's bias by it, so clients train with a bias shifted down and
neither send nor use the shift. This is the variant with the usual denominator (as PFLlib's), not the paper's own, which
leaves the true class out. n_k comes from the client's signature; a class that it lacks counts as ``ABSENT`` examples:
practically masked, and finite if its label turns up none the less. The reported loss is the calibrated one.
"""

from __future__ import annotations

import jax.numpy as jnp

from fedlora_jax import lora
from fedlora_jax.checks import refuse_outside
from fedlora_jax.method import Method
from fedlora_jax.wrappers.around import AboutWrapper, Wrapper, around
from fedlora_jax.wrappers.refusals import class_bias, tells_of_labels

ABOUT = {"fedlc": AboutWrapper("FedLC", "Zhang et al. ICML 2022", "2209.00189", "logits calibrated by class counts")}
ABSENT = 1e-4  # lowers the logit of a class that a client lacks by 10 tau


def fedlc(inner: Method, tau: float = 1.0) -> Method:
    """FedLC around ``inner``; ``tau = 0`` is ``inner``.

    Args:
      inner: a method whose clients train the bias of their head.
      tau: how far logits are moved, at least 0.

    Raises:
      ValueError: tau below 0; (when a round is traced) signatures that do not tell of labels, or a model without one
        bias of its classes that is trained in full.
    """
    refuse_outside("[0, inf)", tau=tau)

    def client_context(own, cohort, sent):
        z = tells_of_labels("fedlc", cohort.signatures)
        n = jnp.expm1(10 * z.amount) * z.labels**2  # [C, classes]
        return tau * jnp.maximum(n, ABSENT) ** -0.25

    def training_model(model, margin):
        flat, name = lora.flatten(model), class_bias("fedlc", model, margin.shape[0])
        return lora.unflatten(flat | {name: flat[name] - margin})

    return around(inner, Wrapper("fedlc", client_context=client_context, training_model=training_model))
