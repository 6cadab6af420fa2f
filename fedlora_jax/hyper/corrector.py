"""C: what truncation and memory left out, added back where it helps; and what is one client's own.

    global     b <- b + gamma (a^T a + lam I)^-1 a^T (sum_c w_c a_c b_c - a b)
    personal   a_c b_c <- T_r( a_c b_c + rho(z_c) q_c )        q_c: the client's last local update, to a small rank

The gates ``gamma`` (with ``lam``, from what the clients' updates look like) and ``rho`` come from networks whose last
layer starts at zero: then C adds nothing, and a client starts from the very factors it would have without it (where
``rho`` is open from those of a truncation, scaled so that ``a_c`` stays as long as it was). While S is a plain
truncated SVD the residual is orthogonal to ``a``, and the global correction is zero whatever its gate; it acts against
S's step and gain.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import lora, product
from fedlora_jax.decomposition import solve
from fedlora_jax.hyper.networks import Conditioned, Place, per_layer, places
from fedlora_jax.hyper.synthesizer import FEATURES, Synthesis, Uploads, steady
from fedlora_jax.lora import Adapter, LoRA, flatten, unflatten
from fedlora_jax.product import matmul
from fedlora_jax.signatures import Signature


class Corrector(NamedTuple):
    """The parameters of C."""

    gates: Any  # of the network that gives gamma and lam; () where nothing is added to the global adapter
    personal: Any  # of the network that gives rho; () where clients keep nothing


def init(key: Array, adapter: Adapter, like: Signature, shared: bool = True, own: bool = True) -> Corrector:
    """Parameters with which C adds nothing; of the signature only its shapes are read.

    Args:
      shared: whether there is a correction of the global adapter.
      own: whether there is one of a client's start, by its last update.
    """
    at, (key_gates, key_personal) = places(adapter)[0], jax.random.split(key)
    z = jnp.zeros((*at.layers, like.flat().shape[-1]))
    return Corrector(
        gates=_gates().init(key_gates, jnp.zeros((*at.layers, 2 * FEATURES)), at) if shared else (),
        personal=_rho().init(key_personal, z, at) if own else (),
    )


def correct(c: Corrector, x: Uploads, synthesized: dict[str, Synthesis]) -> dict[str, LoRA]:
    """The corrected products by name."""
    if not c.gates:
        return {name: t.product for name, t in synthesized.items()}
    received, out = flatten(x.received), {}
    for place in places(x.previous):
        t, w, feat = synthesized[place.name]
        gamma, lam = gates(c, feat, x.weights, place)
        out[place.name] = LoRA(t.a, t.b + _ridge(gamma, lam, t, received[place.name], w), t.scale)
    return out


def gates(c: Corrector, feat: Array, weights: Array, place: Place) -> tuple[Array, Array]:
    """``gamma`` in (-1, 1) and ``lam`` above 0, for the layers of a kernel."""
    p = weights.reshape(-1, *(1,) * (feat.ndim - 1))
    center = jnp.sum(p * feat, 0)
    spread = product.safe_sqrt(jnp.sum(p * (feat - center) ** 2, 0))
    out = jnp.asarray(_gates().apply(c.gates, jnp.concatenate([center, spread], -1), place))
    return jnp.tanh(out[..., 0]), nn.softplus(out[..., 1])


def nothing_personal(adapter: Adapter, rank: int) -> Adapter:
    """``q`` of a client that never took part: zero, ``[..., in, rank]`` and ``[..., rank, out]``."""
    return jax.tree.map(jnp.zeros_like, lora.first_columns(lora.split(adapter)[0], rank))


def own_update(sent: Adapter, received: Adapter, rank: int) -> Adapter:
    """``q``: what one client's local steps added to each product, to the given rank."""
    change = lambda y, x: product.truncate(product.difference(y, x), rank)
    return lora.tree_map(change, lora.split(received)[0], lora.split(sent)[0])


def personalise(
    c: Corrector, signatures: Signature, rows: Adapter, own: Adapter, split: product.Split = "balanced"
) -> Adapter:
    """The starts ``[C, ...]`` with every client's own update ``[C, ...]`` added, as far as its gate is open."""
    flat, mine, z = flatten(rows), flatten(own), signatures.flat()
    for place in places(jax.tree.map(lambda x: x[0], rows)):
        x, q = flat[place.name], mine[place.name]
        rho = jnp.tanh(jnp.asarray(_rho().apply(c.personal, per_layer(z, place.layers), place))[..., 0])
        flat[place.name] = _opened(rho[..., None, None], x, q, split)
    return unflatten(flat)


def _opened(rho: Array, x: LoRA, q: LoRA, split: product.Split) -> LoRA:
    def added(x: LoRA) -> LoRA:
        both = product.plus(x, LoRA(rho * q.a, q.b, q.scale))
        return steady(product.truncate(both, x.a.shape[-1], split=split, like=x), x)

    def one(x: Array, still: Array, new: Array) -> Array:
        closed = x + (still - jax.lax.stop_gradient(still))  # x itself, and how it would change if the gate opened
        return jnp.where(rho == 0, closed, new)

    return jax.tree.map(one, x, added(jax.lax.stop_gradient(x)), added(x))


def _ridge(gamma: Array, lam: Array, t: LoRA, x: LoRA, w: Array) -> Array:
    """``gamma (G + lam I)^-1 a^T (sum_c w_c a_c b_c - a b)``, ``lam`` in units of the mean eigenvalue of ``G``."""
    g = matmul(t.a.mT, t.a)
    ideal = jnp.einsum("...ir,c...,c...iq,c...qo->...ro", t.a, w, x.a, x.b, precision="highest", optimize="optimal")
    unit = jnp.trace(g, axis1=-2, axis2=-1) / g.shape[-1]
    shift = (lam * unit + 1e-12)[..., None, None] * jnp.eye(g.shape[-1], dtype=g.dtype)
    return gamma[..., None, None] * solve(g + shift, ideal - matmul(g, t.b))


def _gates() -> Conditioned:
    return Conditioned(outputs=2, width=32, blocks=0)


def _rho() -> Conditioned:
    return Conditioned(outputs=1, width=32, blocks=0)
