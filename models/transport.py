"""Logits by optimal transport between the patches of an image and several prompts of each class.

    logit_c = exp(t) <T_c, S_c>        S_c [patches, prompts]: cosines of patches with the prompts of class c
    T_c = argmin <T, 1 - S_c> + epsilon <T, log T>    of all T >= 0 with T 1 <= 1 / patches, T^T 1 = mass / prompts

Li et al., *FedOTP: Global and Local Prompts Cooperation via Optimal Transport for Federated Learning*, CVPR 2024, arXiv
2403.00041, eq. 5-9 and algorithm 2, with the prompt that all clients share and one of each client's own. A mass below 1
leaves patches to no prompt. As in its code: T_c counts as a constant where the loss is differentiated.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

MASS, EPSILON = 0.8, 0.1  # of the paper's few-shot runs, and of its code
STEPS = 100  # at most there


def plan(cost: Array, mass: float = MASS, epsilon: float = EPSILON, steps: int = STEPS) -> Array:
    """``[.., patches, prompts]``: T by Dykstra's projections onto the two conditions in turn.

    Args:
      cost: ``[.., patches, prompts]``.
      mass: of the whole plan, above 0, at most 1.
      epsilon: how much its entropy counts.
      steps: of both projections; the last is onto the second condition, which holds exactly.
    """
    kernel, (patches, prompts) = jnp.exp(-cost / epsilon), cost.shape[-2:]

    def step(_: int, v: Array) -> Array:
        return mass / prompts / (kernel.mT @ rows(v))

    def rows(v: Array) -> Array:
        return jnp.minimum(1 / (patches * (kernel @ v)), 1.0)

    v = jax.lax.fori_loop(0, steps - 1, step, jnp.ones((*cost.shape[:-2], prompts, 1), cost.dtype))
    return rows(v) * kernel * step(0, v).mT


def similarity(patches: Array, texts: Array) -> Array:
    """``<T_c, S_c>``, ``[n, classes]``.

    Args:
      patches: ``[n, patches, d]`` of length 1.
      texts: ``[prompts, classes, d]`` of length 1.
    """
    s = jnp.einsum("nvd,pcd->ncvp", patches, texts)
    return (jax.lax.stop_gradient(plan(1 - jax.lax.stop_gradient(s))) * s).sum((-1, -2))
