"""FedDecorr: *Towards Understanding and Mitigating Dimensional Collapse in Heterogeneous Federated Learning*, Shi et
al., ICLR 2023, arXiv 2210.00226, eq. 5 and 6.

    minimise  f(w) + beta / d^2 |K|_F^2        K [d, d]: correlations of a batch's features, over its examples

Clients with few classes learn features that fill few directions, and so does their mean; the term spreads them.
Features are what the head reads. One that does not vary in a batch correlates with nothing. As in the public code the
diagonal, which is constant, is left out; the code takes the mean over pairs of the squared sum over n examples and
divides it by n, not by n^2: its 0.1 is a ``beta`` of 0.1 n here. The reported loss is with the term.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from fedlora_jax.checks import refuse_outside
from fedlora_jax.method import Method
from fedlora_jax.task import Seen
from fedlora_jax.wrappers.around import AboutWrapper, Wrapper, around

ABOUT = {"feddecorr": AboutWrapper("FedDecorr", "Shi et al. ICLR 2023", "2210.00226", "features that do not correlate")}
EPSILON = 1e-8  # of a variance, as in the public code


def feddecorr(inner: Method, beta: float = 0.1) -> Method:
    """FedDecorr around ``inner``; ``beta = 0`` is ``inner``.

    Args:
      inner: any method.
      beta: weight of the term, at least 0.

    Raises:
      ValueError: beta below 0, or (when a round is traced) a loss that does not show features (``task.Shown``).
    """
    refuse_outside("[0, inf)", beta=beta)

    def training_loss(task, model, context):
        return task(model) + beta * correlation(task.seen(model))

    return around(inner, Wrapper("feddecorr", training_loss=training_loss))


def correlation(seen: Seen) -> Array:
    """The mean over all pairs of features ``[B, d]`` of their squared correlation, 0 for one with itself."""
    there = seen.present[:, None] / jnp.maximum(seen.present.sum(), 1)  # [B, 1]
    z = seen.features - jnp.sum(there * seen.features, 0)
    z = z / jnp.sqrt(jnp.sum(there * z**2, 0) + EPSILON)
    k = jnp.einsum("bi,bj->ij", there * z, z, precision="highest")
    return (jnp.sum(k**2) - jnp.sum(jnp.diagonal(k) ** 2)) / k.size
