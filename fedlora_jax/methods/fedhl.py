"""FedHL: *Federated Learning for Heterogeneous Low-Rank Adaptation via Unbiased Aggregation*, Peng et al., 2025, arXiv
2505.18494, eq. 8 and 15.

    client c starts from T_{r_c}(Wt) and returns P_c = s a_c b_c
    rhat_c = |Wt - T_{r_c}(Wt)|^2        p_c ~ 1 / (rhat_c^2 + eps)        Wt += sum_c p_c (P_c - T_{r_c}(Wt))

Truncation to a client's rank forgets what lies beyond it. Here the server keeps its whole update ``Wt`` dense, and adds
only what clients changed. With ``Wt = U S V^T`` and ``pi_i = sum_{c: r_c >= i} p_c`` the last line is one scaled SVD,

    Wt <- U diag(S (1 - pi)) V^T + s sum_c p_c a_c b_c,

so one decomposition a round serves all ranks. Factors and head travel, both ways; ``Wt`` stays at the server.

The weights' form is the paper's, by way of public code; eps, one weight per client (not per layer) and the split
``(U, S V^T / s)`` are that code's. Ours: the head's mean by number of examples, and ``tail_decay``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import lora, product
from fedlora_jax.checks import refuse_outside
from fedlora_jax.lora import Adapter, LoRA, Params
from fedlora_jax.method import About, Cohort, Method, broadcast, mean

ABOUT = About("FedHL", "Peng et al. 2025", "2505.18494", "a, b, head", "a, b, head", "in what clients changed")

_POWERS = {"2": 2, "1": 1, "data": 0}


class FedHLState(NamedTuple):
    """adapter: factors of T_r(Wt) / s, a orthonormal (a fresh start before the first round), head differences.
    residual: Wt [.., in, out] at each adapted kernel, scale included: as large as the kernels."""

    adapter: Adapter
    residual: Params


def fedhl(weighting: Literal["2", "1", "data"] = "2", eps: float = 1e-6, tail_decay: float = 1.0) -> Method:
    """FedHL.

    The global model is ``W0 + Wt``, of full rank: that is what is dispatched to a cohort of nobody in particular
    (``average_client``). A client is sent, and evaluated with, its truncation ``W0 + T_{r_c}(Wt)``.

    Args:
      weighting: the power of ``rhat`` in the weights (the literal reading of eq. 15 is 2; the bound itself, minimised,
        gives 1), or ``data``, by number of examples.
      eps: absolute, so weights are even while ``Wt`` is small and prefer high ranks later.
      tail_decay: multiplies what no client is sent, ``Wt - T_r(Wt)``, each round. Nothing else pulls it back, and under
        strong heterogeneity it grows; the round reports its share as ``tail``.
    """
    if weighting not in _POWERS:
        raise ValueError(f"weighting must be '2', '1' or 'data', got {weighting!r}")
    refuse_outside("(0, inf)", eps=eps)
    refuse_outside("[0, 1]", tail_decay=tail_decay)

    def init(key, adapter):
        return FedHLState(adapter, lora.tree_map(lora.delta, lora.split(adapter)[0]))

    def dispatch(base, state, cohort):
        sent = broadcast(base, state.adapter, cohort)
        nobody = jnp.all(cohort.ids < 0)
        first = lora.split(jax.tree.map(lambda x: x[0], sent.adapter))[0]
        beyond = jax.tree.map(lambda w, x: jnp.where(nobody, w - lora.delta(x), 0.0), state.residual, first)
        return sent._replace(base=lora.add(base, beyond))

    def aggregate(base, state, cohort, sent, received):
        low_rank, full = lora.split(received)
        p = client_weights(state, cohort, _POWERS[weighting], eps)
        dense = jax.tree.map(
            lambda w, x, c: moved(w, x, c, p, cohort.ranks), state.residual, lora.split(state.adapter)[0], low_rank
        )
        factors = jax.tree.map(lambda w, x: product.best(w, x.a.shape[-1], x.scale), dense, low_rank)
        if tail_decay < 1:
            dense = jax.tree.map(lambda w, x: lora.delta(x) + tail_decay * (w - lora.delta(x)), dense, factors)
        heads = mean(full, cohort.weights)
        return FedHLState(lora.unflatten(lora.flatten(factors) | lora.flatten(heads)), dense)

    def report(state):
        pairs = _pairs(state)
        beyond = sum(jnp.sum((w - lora.delta(x)) ** 2) for w, x in pairs)
        return {"tail": product.safe_sqrt(beyond / jnp.maximum(sum(jnp.sum(w**2) for w, _ in pairs), 1e-30))}

    return Method(init, dispatch, aggregate, report=report)


def truncation_errors(state: FedHLState, ranks: Array) -> Array:
    """``rhat_c = sum_l sum_{i > r_c} S_i^2``, ``[C]``: what was cut off each client's start, over all layers."""
    total = jnp.zeros(ranks.shape[0], "float32")  # at least: a state of float32 stays one where jax has 64 bits
    for w, x in _pairs(state):
        square = x.scale**2 * jnp.sum(x.a**2, -2) * jnp.sum(x.b**2, -1)  # S_i^2  [.., r]
        held = jnp.arange(square.shape[-1]) < ranks[:, None]
        square = square.reshape(-1, square.shape[-1]).sum(0)  # over layers  [r]
        total += jnp.sum((w - lora.delta(x)) ** 2) + jnp.sum(square * ~held, -1)  # never a difference of squares
    return total


def client_weights(state: FedHLState, cohort: Cohort, power: int, eps: float) -> Array:
    """``p_c = q_c / sum q``, ``q_c = 1 / (rhat_c^power + eps)``, ``[C]``; power 0: by number of examples."""
    if power == 0:
        return cohort.weights
    q = (cohort.weights > 0) / (truncation_errors(state, cohort.ranks) ** power + eps)
    return q / jnp.maximum(q.sum(), 1e-30)


def moved(w: Array, start: LoRA, received: LoRA, p: Array, ranks: Array) -> Array:
    """``U diag(S (1 - pi)) V^T + s sum_c p_c a_c b_c``, with ``U S V^T`` replaced by ``w`` and the factors sent."""
    pi = jnp.sum(p[:, None] * (jnp.arange(start.a.shape[-1]) < ranks[:, None]), 0)  # [r]
    seen = LoRA(start.a * pi, start.b, start.scale)
    return w + lora.delta(product.plus(product.total(received, p), seen, -1.0))


def _pairs(state: FedHLState) -> list[tuple[Array, LoRA]]:
    adapter = lora.flatten(state.adapter)
    return [(w, adapter[name]) for name, w in lora.flatten(state.residual).items()]
