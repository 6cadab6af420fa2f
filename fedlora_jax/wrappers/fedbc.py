"""FedBC: *FedBC: Calibrating Global and Local Models via Federated Learning Beyond Consensus*, Bedi et al., 2022, arXiv
2206.10815, algorithm 1.

    minimise  f_i(x) + lam_i (|x - z|^2 - gam)        lam_i <- [lam_i + lr (|z - x_i|^2 - gam)]_+
    z = sum_i lam_i x_i / sum_i lam_i                 the plain mean while all lam_i are zero

Clients pay for leaving the tolerance gam around what they were sent, the more the longer they do. lam_i is kept by the
client and sent beside its adapter. Ours: one fixed gam for all clients, and weights in place of a mean, so that any
aggregation can follow. What bounds uploads (clip) stands outside: a client far away weighs most.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax.checks import refuse_outside
from fedlora_jax.lora import Adapter
from fedlora_jax.method import Method
from fedlora_jax.wrappers.around import AboutWrapper, Wrapper, around
from fedlora_jax.wrappers.updates import present, square_norms, updates

ABOUT = {
    "fedbc": AboutWrapper(
        "FedBC", "Bedi et al. 2022", "2206.10815", "a learned penalty weighs each client", "its multiplier"
    )
}


class Context(NamedTuple):
    """z: [C, ...] as sent. mask: of what clients share. lam: [C]."""

    z: Adapter
    mask: Adapter
    lam: Array


def fedbc(inner: Method, lr: float = 1e-3, gam: float = 0.0, lam: float = 0.0) -> Method:
    """FedBC around ``inner``; with ``lr = lam = 0`` it is ``inner``.

    Args:
      inner: any method.
      lr: of the multipliers lam_i.
      gam: squared distance that is free.
      lam: where they start.

    Raises:
      ValueError: a number below 0.
    """
    refuse_outside("[0, inf)", lr=lr, gam=gam, lam=lam)

    def distance(context, x):
        return sum(
            (jnp.sum(m * (x - z) ** 2) for x, z, m in zip(*map(jax.tree.leaves, (x, *context[:2])), strict=True)),
            jnp.zeros(()),
        )

    raised = lambda lam, far: jnp.maximum(lam + lr * (far - gam), 0.0).astype(lam.dtype)

    def receive(own, cohort, sent, received):
        new = raised(cohort.memory, square_norms(updates(sent, received))) * present(cohort)
        total = new.sum()
        return jnp.where(total > 0, new / jnp.where(total > 0, total, 1.0), cohort.weights), received

    def traffic(own, cohort):
        theirs = inner.traffic(own, cohort)
        return theirs._replace(up=(theirs.up, jnp.zeros(())))

    wrapper = Wrapper(
        "fedbc",
        init_client=lambda adapter: jnp.asarray(lam, jnp.float32),
        client_context=lambda own, cohort, sent: Context(sent.adapter, sent.mask, cohort.memory),
        penalty=lambda x, context: context.lam * (distance(context, x) - gam),
        remember=lambda old, context, z, x: raised(old, distance(context, x)),
        receive=receive,
    )
    return around(inner, wrapper)._replace(traffic=traffic)
