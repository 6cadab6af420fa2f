"""FedLESAM: *Locally Estimated Global Perturbations are Better than Local Perturbations for Federated Sharpness-aware
Minimization*, Fan et al., ICML 2024, arXiv 2405.18890.

    y <- y - eta grad f_i(y + rho (w_old - w) / |w_old - w|)        w, w_old: the model sent now, and the last time

A client looks for flat places around the model of all, not around its own: the way that the server's model came since
the client last took part stands for its gradient, and the perturbation is the same in all local steps, so that a step
is one backward pass. A client that takes part for the first time has none. Ours: models are what clients are sent of
the adapter, factors and all; what they compute in evaluation is without the perturbation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedlora_jax import personal
from fedlora_jax.checks import refuse_outside
from fedlora_jax.method import Method, as_carried, per_client
from fedlora_jax.wrappers import order
from fedlora_jax.wrappers.around import AboutWrapper, Wrapper, around

ABOUT = {"fedlesam": AboutWrapper("FedLESAM", "Fan et al. ICML 2024", "2405.18890", "gradients where the server was")}


def fedlesam(inner: Method, rho: float = 0.05) -> Method:
    """FedLESAM around ``inner``; ``rho = 0`` is ``inner``.

    Args:
      inner: a method whose clients compute with the one adapter that they carry.
      rho: length of the perturbation, at least 0.

    Raises:
      ValueError: rho below 0, or another inner method.
    """
    refuse_outside("[0, inf)", rho=rho)
    order.check("fedlesam", inner.stack, inner.uploads)
    if inner.model is not as_carried or inner.objective is not None:
        raise ValueError(
            "fedlesam perturbs models as they are sent, and clients of this method carry something else: wrap a method "
            "whose clients train one adapter, such as fedit"
        )

    def client_context(own, cohort, sent):
        past = personal.own_or(cohort, sent.adapter)
        way = jax.tree.map(lambda old, now, m: (old - now) * m, past, sent.adapter, sent.mask)
        square = sum(jnp.sum(x**2, range(1, x.ndim)) for x in jax.tree.leaves(way))  # [C]
        length = jnp.sqrt(jnp.maximum(square, 1e-24))
        return jax.tree.map(lambda x: rho * x / per_client(length, x), way)

    wrapper = Wrapper(
        "fedlesam",
        init_client=personal.nothing_yet,
        client_context=client_context,
        training_model=lambda model, way: jax.tree.map(jnp.add, model, way),
        remember=lambda own, context, sent, received: personal.keep(sent),
    )
    return around(inner, wrapper)
