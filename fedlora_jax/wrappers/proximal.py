"""FedProx: *Federated Optimization in Heterogeneous Networks*, Li et al., MLSys 2020, arXiv 1812.06127, eq. 2.

    minimise  f_c(w) + mu / 2 |w - w_g|^2        w_g: as sent

The norm is squared, over what clients share.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedlora_jax.checks import refuse_outside
from fedlora_jax.method import Method
from fedlora_jax.wrappers.around import AboutWrapper, Wrapper, around

ABOUT = {"proximal": AboutWrapper("FedProx", "Li et al. MLSys 2020", "1812.06127", "mu / 2 |w - w_g|^2 on the loss")}


def proximal(inner: Method, mu: float = 0.01) -> Method:
    """FedProx around ``inner``; ``mu = 0`` is ``inner``.

    Args:
      inner: any method.
      mu: weight of the squared distance to the adapter as sent, at least 0.

    Raises:
      ValueError: mu below 0.
    """
    refuse_outside("[0, inf)", mu=mu)

    def penalty(w, context):
        start, mask = context
        squares = jax.tree.map(lambda x, y, m: jnp.sum(m * (x - y) ** 2), w, start, mask)
        return mu / 2 * sum(jax.tree.leaves(squares), jnp.zeros(()))

    return around(
        inner, Wrapper("proximal", client_context=lambda own, cohort, sent: (sent.adapter, sent.mask), penalty=penalty)
    )
