"""FedGA: *Federated Learning with Gradient Alignment for Error Asymmetry Mitigation*, Xiao et al., 2024, arXiv
2412.16582, after public code.

    minimise  - sum_j t_j log p_j        t_y = 1,  t_j = sg(p_j) (n_y - n_j) / n_y        n: class counts in the batch

so that logit j is pushed down about as ``p_j n_j / n_y`` and absent classes hardly at all. It takes the place of the
cross-entropy of the task; the reported loss is this one. The code's clipping of gradients at norm 5 is ``--clip-norm
5``. Ours: of mixed labels the largest share counts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedlora_jax.method import Method
from fedlora_jax.task import Seen
from fedlora_jax.wrappers.around import AboutWrapper, Wrapper, around

ABOUT = {"fedga": AboutWrapper("FedGA", "Xiao et al. 2024", "2412.16582", "targets calibrated by a batch's classes")}


def fedga(inner: Method) -> Method:
    """FedGA around ``inner``.

    Args:
      inner: any method.

    Raises:
      ValueError: (when a round is traced) a loss that does not show logits and labels (``fedlora_jax.task.Shown``).
    """
    return around(inner, Wrapper("fedga", training_loss=lambda task, model, context: calibrated(task.seen(model))))


def calibrated(seen: Seen) -> jax.Array:
    """The mean loss of a batch."""
    own = seen.one_hot
    n = jnp.sum(seen.present[:, None] * own, 0)
    n_y = jnp.maximum((own * n).sum(-1, keepdims=True), 1.0)  # [B, 1]
    p = jax.lax.stop_gradient(jax.nn.softmax(seen.logits))
    t = jnp.where(own > 0, 1.0, p * (n_y - n) / n_y)
    return seen.mean(-jnp.sum(t * jax.nn.log_softmax(seen.logits), -1))
