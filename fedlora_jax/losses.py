"""Losses that look at logits, where a method needs more than the scalar that ``LossFn`` gives."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax.lora import Adapter, Params
from fedlora_jax.training import LossFn


def fedga(logits_fn: Callable[[Params, Adapter, object, Array], tuple[Array, Array]]) -> LossFn:
    """The loss of FedGA: gradient adjustment for skewed labels, 2024, arXiv 2412.16582, after public code.

        L = - sum_j t_j log p_j        t_y = 1,  t_j = sg(p_j) (n_y - n_j) / n_y        n: class counts in the batch

    so that logit j is pushed down about as ``p_j n_j / n_y`` and absent classes hardly at all. Targets need logits and
    labels, which the contract of methods does not show, hence a loss and no wrapper; the server is FedIT's, and the
    code's clipping of gradients at norm 5 is ``optax.clip_by_global_norm(5.0)`` in the local optimizer.

    Args:
      logits_fn: ``(base, adapter, batch, key) -> (logits [B, classes], labels [B])``.
    """

    def loss_fn(base: Params, adapter: Adapter, batch, key: Array) -> Array:
        logits, y = logits_fn(base, adapter, batch, key)
        one_hot = jax.nn.one_hot(y, logits.shape[-1])
        n = one_hot.sum(0)
        n_y = n[y][:, None]
        p = jax.lax.stop_gradient(jax.nn.softmax(logits))
        t = jnp.where(one_hot > 0, 1.0, p * (n_y - n) / n_y)
        return -jnp.mean(jnp.sum(t * jax.nn.log_softmax(logits), -1))

    return loss_fn
