"""FedNova: *Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization*, Wang et al., NeurIPS
2020, arXiv 2007.07481, eq. 6 to 8.

    w <- w + (sum_j p_j |a_j|) sum_i p_i (w_i - w) / |a_i|        |a_i|: how often client i's gradients count

Under plain SGD ``|a_i|`` is the number of its local steps, under momentum m ``sum_k (1 - m^k) / (1 - m)`` over them.
The mean of models weighs clients by their steps as well, and settles elsewhere than where the mean of their losses is
least; this mean of updates per step does not. Where all take the same number of steps it is the inner method. Ours: any
other optimizer, and whatever else changes a step (``proximal``), counts as plain SGD, and the mean is that of the inner
method.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax.batches import steps_taken
from fedlora_jax.checks import refuse_outside
from fedlora_jax.method import Method, per_client
from fedlora_jax.wrappers.around import AboutWrapper, Wrapper, around
from fedlora_jax.wrappers.updates import changed, updates

ABOUT = {
    "fednova": AboutWrapper(
        "FedNova", "Wang et al. NeurIPS 2020", "2007.07481", "updates per local step", "how many steps it took"
    )
}


def fednova(inner: Method, momentum: float = 0.0) -> Method:
    """FedNova around ``inner``.

    Args:
      inner: a method that aggregates adapters.
      momentum: of the clients' SGD, from 0 to below 1.

    Raises:
      ValueError: another momentum.
    """
    refuse_outside("[0, 1)", momentum=momentum)

    def receive(own, cohort, sent, received):
        steps = steps_taken(cohort.batches, 1) if jax.tree.leaves(cohort.batches) else 1  # of nobody any number does
        counted = times_counted(jnp.broadcast_to(steps, cohort.weights.shape), momentum)
        scale = jnp.sum(cohort.weights * counted) / counted
        d = jax.tree.map(lambda x: x * per_client(scale, x), updates(sent, received))
        return cohort.weights, changed(sent.mask, sent.adapter, received, d)

    return around(inner, Wrapper("fednova", receive=receive))


def times_counted(steps: Array, momentum: float) -> Array:
    """``|a|`` of that many steps of SGD with momentum: how often all their gradients together are in the update."""
    steps = steps.astype(jnp.float32)
    decayed = momentum * (1 - momentum**steps) / (1 - momentum)
    return (steps - decayed) / (1 - momentum)
