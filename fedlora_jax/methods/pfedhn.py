"""pFedHN: *Personalized Federated Learning using Hypernetworks*, Shamsian et al., ICML 2021, arXiv 2103.04628.

    x_c = h(v_c; phi)        (phi, v) <- (phi, v) - lr (d x / d (phi, v))^T {p_c (x_c - y_c)}     y_c: after local steps

The server holds an embedding v_c of every client and a network (3 x 100) that makes a client's adapter of it; it learns
both from what local steps changed, clipped at norm 50 as in the public code, and averages nothing. Adapters travel both
ways. Ours: the network's output is added to the fresh adapter and starts at zero, a whole cohort makes one step, and a
client without an embedding gets the adapter of the mean embedding.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fedlora_jax import lora, meta
from fedlora_jax.checks import refuse_outside
from fedlora_jax.lora import Adapter
from fedlora_jax.method import About, Dispatch, Method

ABOUT = About(
    "pFedHN",
    "Shamsian et al. ICML 2021",
    "2103.04628",
    "a, b, head",
    "a, b, head",
    "n/a",
    tells="who it is, a meta-gradient",
)


class Phi(NamedTuple):
    """embeddings: [N, d]. layers: weights and biases of the hidden layers. heads: of the last, by array of x."""

    embeddings: Array
    layers: Any
    heads: Any


class PFedHNState(NamedTuple):
    """start: the fresh adapter. phi: what the server learns. meta: its optimizer's state."""

    start: Adapter
    phi: Phi
    meta: Any


def pfedhn(population: int, lr: float = 0.01, size: int = 16, width: int = 100) -> Method:
    """pFedHN.

    Args:
      population: number of clients N; ids are 0 to N - 1.
      lr: of SGD on the network and the embeddings.
      size: of an embedding.
      width: of the three hidden layers.

    Raises:
      ValueError: a number that is not above 0.
    """
    refuse_outside("[1, inf)", population=population, size=size, width=width)
    refuse_outside("(0, inf)", lr=lr)
    tx = optax.chain(optax.clip_by_global_norm(50.0), optax.sgd(lr))

    def init(key, adapter):
        keys = jax.random.split(key, 4)
        embeddings = jax.random.normal(keys[0], (population, size))
        layers = [_dense(k, n, width) for k, n in zip(keys[1:], (size, width, width), strict=True)]
        heads = jax.tree.map(lambda x: (jnp.zeros((width, *x.shape)), jnp.zeros_like(x)), adapter)
        phi = Phi(embeddings, layers, heads)
        return PFedHNState(adapter, phi, tx.init(phi))

    def starts(phi, state, cohort):
        known = ((cohort.ids >= 0) & (cohort.ids < population))[:, None]
        v = jnp.where(known, phi.embeddings[jnp.clip(cohort.ids, 0, population - 1)], phi.embeddings.mean(0))
        for weight, bias in phi.layers:
            v = jax.nn.relu(v @ weight + bias)
        out = lambda x, head: x + jnp.tensordot(v, head[0], 1) + head[1]  # [C, ...]
        return jax.tree.map(out, state.start, phi.heads)

    def dispatch(base, state, cohort):
        mask = lora.rank_mask(state.start, cohort.ranks)
        rows = jax.tree.map(jnp.multiply, starts(state.phi, state, cohort), mask)
        return Dispatch(base, rows, mask, context=())

    def learn(state, cohort, meta_gradients):
        frozen, cohort, meta_gradients = jax.lax.stop_gradient((state, cohort, meta_gradients))
        _, pull = jax.vjp(lambda phi: starts(phi, frozen, cohort), frozen.phi)
        (grads,) = pull(jax.tree.map(lambda g: jnp.einsum("c,c...->c...", cohort.weights, g), meta_gradients))
        updates, moments = tx.update(grads, frozen.meta, frozen.phi)
        phi: Any = optax.apply_updates(state.phi, updates)
        return state._replace(phi=phi, meta=moments)

    return Method(
        init,
        dispatch,
        aggregate=lambda base, state, cohort, sent, received: state,
        meta_gradient=meta.displacement,
        learn=learn,
    )


def _dense(key: Array, n_in: int, n_out: int) -> tuple[Array, Array]:
    return jax.random.normal(key, (n_in, n_out)) * math.sqrt(2 / n_in), jnp.zeros(n_out)
