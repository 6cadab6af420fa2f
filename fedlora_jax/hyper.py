"""The three learned parts of HyperLoRA as pure functions of their parameters, each with an exact neutral setting.

*Amortizing Federated Adaptation: Hypernetwork Driven LoRA for Personalized Foundation Models*, Gupta, Shanker and
Sethi, 2026, arXiv 2606.06154, names the parts (generator G, synthesizer S, corrector C) and their roles. Their
architectures are not public: what follows is our design, made so that at initialisation the whole is FlexLoRA with
balanced factors.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import product
from fedlora_jax.lora import Adapter, LoRA, flatten, is_lora, unflatten
from fedlora_jax.method import mean
from fedlora_jax.product import matmul


class Theta(NamedTuple):
    """Everything learned. Dicts are keyed by the adapted kernel's name; ``...`` are its layers."""

    generator: Any
    bases: dict[str, Array]  # [..., bases, rank, out] directions of b that G may add
    synthesizer: Any
    memory: dict[str, Array]  # [...] how much of the previous product S keeps
    gains: dict[str, Array]  # [..., 3] coefficients of S's spectral gain
    corrector: Any


class Conditioned(nn.Module):
    """A small network that knows which layer of which kernel it speaks for; zero at initialisation.

    ``context [..., layers, f] -> [..., layers, outputs]``.
    """

    outputs: int
    width: int
    blocks: int

    @nn.compact
    def __call__(self, context: Array, kernel: int, kernels: int, depth: int, layers: tuple[int, ...]) -> Array:
        which = self.param("kernel_code", nn.initializers.normal(0.2), (kernels, 32))[kernel]
        where = self.param("layer_code", nn.initializers.normal(0.2), (depth, 32))[: math.prod(layers)]
        code = jnp.broadcast_to((where + which).reshape(*layers, 32), (*context.shape[:-1], 32))
        h = nn.Dense(self.width)(jnp.concatenate([context, code], -1))
        for _ in range(self.blocks):
            h += nn.Dense(self.width)(nn.silu(nn.Dense(self.width)(nn.LayerNorm()(h))))
        return nn.Dense(self.outputs, kernel_init=nn.initializers.zeros)(nn.silu(h))


class Layout(NamedTuple):
    """Names and shapes of the adapted kernels, read off an adapter; static."""

    names: tuple[str, ...]
    layers: tuple[tuple[int, ...], ...]
    depth: int

    @classmethod
    def of(cls, adapter: Adapter) -> Layout:
        # In sorted order, as transformed trees are: a kernel's number must not depend on how a dict was built.
        flat = {name: x for name, x in sorted(flatten(adapter).items()) if is_lora(x)}
        layers = tuple(x.a.shape[:-2] for x in flat.values())
        return cls(tuple(flat), layers, max(math.prod(shape) for shape in layers))


_BASES = 4
_FEATURES = 4


def _networks(rank: int) -> tuple[Conditioned, Conditioned, Conditioned]:
    """G, S and C; only G's output depends on the rank."""
    generator = Conditioned(outputs=2 * rank**2 + _BASES + 1, width=128, blocks=2)
    return generator, Conditioned(outputs=1, width=32, blocks=0), Conditioned(outputs=2, width=32, blocks=0)


def init(key: Array, adapter: Adapter, signature_size: int, base_scale: float = 0.02) -> Theta:
    """Neutral parameters: G sends the global adapter unchanged, S is a truncated SVD, C adds nothing.

    ``bases`` start small and random, not at zero: together with their zero coefficients they would never learn.
    """
    layout, flat = Layout.of(adapter), flatten(adapter)
    rank = flat[layout.names[0]].a.shape[-1]
    if any(flat[name].a.shape[-1] != rank for name in layout.names):
        raise ValueError("hyperlora needs one rank for all kernels; give clients smaller ranks by mask instead")
    keys = jax.random.split(key, 4)
    at = layout.layers[0]
    arguments = (0, len(layout.names), layout.depth, at)
    generator, synthesizer, corrector = _networks(rank)
    features = jnp.zeros((*at, signature_size + _FEATURES))
    bases = {
        name: base_scale
        * jax.random.normal(jax.random.fold_in(keys[1], i), (*layers, _BASES, rank, flat[name].b.shape[-1]))
        for i, (name, layers) in enumerate(zip(layout.names, layout.layers, strict=True))
    }
    per_layer = dict(zip(layout.names, layout.layers, strict=True))
    return Theta(
        generator=generator.init(keys[0], jnp.zeros((*at, signature_size)), *arguments),
        bases=bases,
        synthesizer=synthesizer.init(keys[2], features, *arguments),
        memory={name: jnp.zeros(layers) for name, layers in per_layer.items()},
        gains={name: jnp.zeros((*layers, 3)) for name, layers in per_layer.items()},
        corrector=corrector.init(keys[3], jnp.zeros((*at, 2 * _FEATURES)), *arguments),
    )


def generate(theta: Theta, signatures: Array, adapter: Adapter) -> Adapter:
    """G: each client's start from its signature, ``[C, ...]``.

    a_c = a (I + m_a)        b_c = (I + m_b) b + g sum_j coef_j v_j        m = tanh(.) / (2 r)
    """
    layout, flat = Layout.of(adapter), flatten(adapter)
    clients = signatures.shape[0]
    rows: Adapter = {name: jnp.broadcast_to(x, (clients, *x.shape)) for name, x in flat.items() if not is_lora(x)}
    for kernel, (name, layers) in enumerate(zip(layout.names, layout.layers, strict=True)):
        x, r = flat[name], flat[name].a.shape[-1]
        z = _per_layer(signatures, layers)
        out = _networks(r)[0].apply(theta.generator, z, kernel, len(layout.names), layout.depth, layers)
        mix_a, mix_b, coef, gate = jnp.split(jnp.asarray(out), [r * r, 2 * r * r, 2 * r * r + _BASES], -1)
        square = lambda y: 0.5 / r * jnp.tanh(y).reshape(*y.shape[:-1], r, r)  # noqa: B023
        novel = jnp.einsum("c...j,...jro->c...ro", nn.sigmoid(gate) * coef, theta.bases[name])
        rows[name] = LoRA(x.a + x.a @ square(mix_a), x.b + square(mix_b) @ x.b + novel, x.scale)
    return unflatten(rows)


def synthesize(theta: Theta, received: Adapter, weights: Array, signatures: Array, previous: Adapter) -> Adapter:
    """S, then C: the new global adapter from what clients sent, in product space.

        S   w_c = softmax(log p_c + alpha(feat_c))        T = T_r( (1 - beta) sum_c w_c a_c b_c + beta a b )
            b <- (1 + g_0 + g_1 N + g_2 N^2) b            N = b b^T / tr(b b^T), eigenvalues S_i / sum S
        C   b <- b + gamma (a^T a + lam I)^-1 a^T (sum_c w_c a_c b_c - a b)

    Every feature is invariant to the clients' order and to the gauge of their factors.
    """
    layout = Layout.of(previous)
    old, new = flatten(previous), flatten(received)
    out: Adapter = {name: mean(x, weights) for name, x in new.items() if not is_lora(x)}
    for kernel, (name, layers) in enumerate(zip(layout.names, layout.layers, strict=True)):
        x, before, where = new[name], old[name], (kernel, len(layout.names), layout.depth, layers)
        feat = jax.lax.stop_gradient(features(x, weights, before))  # [C, ..., 4]
        z = _per_layer(signatures, layers)
        w = client_weights(theta, weights, jnp.concatenate([z, feat], -1), where)
        t = _truncated(theta.memory[name], theta.gains[name], x, w, before)
        out[name] = _corrected(theta, t, x, w, feat, weights, where)
    return unflatten(out)


def client_weights(theta: Theta, weights: Array, context: Array, where: tuple) -> Array:
    """``softmax(log p_c + alpha)`` over clients, ``[C, ...]`` for the layers of a kernel."""
    layers = where[-1]
    log_p = jnp.log(weights).reshape(-1, *(1,) * len(layers))
    alpha = _networks(1)[1].apply(theta.synthesizer, context, *where)
    return jax.nn.softmax(log_p + jnp.asarray(alpha)[..., 0], 0)


def _truncated(memory: Array, gains: Array, x: LoRA, w: Array, before: LoRA) -> LoRA:
    beta = 0.5 * jnp.tanh(memory)
    kept = LoRA(beta[..., None, None] * before.a, before.b, before.scale)
    mixed = product.plus(product.total(x, (1 - beta) * w), kept)
    t = product.truncate(mixed, before.a.shape[-1], split="balanced", like=before)
    return LoRA(t.a, _gain(0.25 * jnp.tanh(gains), t.b), t.scale)


def _corrected(theta: Theta, t: LoRA, x: LoRA, w: Array, feat: Array, weights: Array, where: tuple) -> LoRA:
    p = weights.reshape(-1, *(1,) * (feat.ndim - 1))
    center = jnp.sum(p * feat, 0)
    spread = product.safe_sqrt(jnp.sum(p * (feat - center) ** 2, 0))
    gates = _networks(1)[2].apply(theta.corrector, jnp.concatenate([center, spread], -1), *where)
    gamma, lam = jnp.moveaxis(jnp.asarray(gates), -1, 0)
    return LoRA(t.a, t.b + _ridge(jnp.tanh(gamma), nn.softplus(lam), t, x, w), t.scale)


def features(x: LoRA, weights: Array, previous: LoRA) -> Array:
    """``[C, ..., 4]``: log norm (centred), cosine to the mean, cosine to the previous product, log effective rank."""
    m = product.total(x, weights)
    one = jax.vmap(
        lambda y: jnp.stack(
            [
                jnp.log(product.norm(y) + 1e-8),
                product.cosine(y, m),
                product.cosine(y, previous),
                jnp.log(jnp.maximum(product.participation(y), 1.0)),
            ],
            -1,
        )
    )
    feat = one(x)
    return feat.at[..., 0].add(-jnp.einsum("c,c...->...", weights, feat[..., 0]))


def _gain(coefficients: Array, b: Array) -> Array:
    gram = matmul(b, b.mT)
    trace = jnp.trace(gram, axis1=-2, axis2=-1)
    n = gram / jnp.maximum(trace, 1e-15)[..., None, None]  # the derivative squares this floor: it must not underflow
    c0, c1, c2 = jnp.moveaxis(coefficients[..., None, None], -3, 0)
    nb = matmul(n, b)
    return b + c0 * b + c1 * nb + c2 * matmul(n, nb)


def _ridge(gamma: Array, lam: Array, t: LoRA, x: LoRA, w: Array) -> Array:
    """``gamma (G + lam I)^-1 a^T (sum_c w_c a_c b_c - a b)``, ``lam`` in units of the mean eigenvalue of ``G``."""
    g = matmul(t.a.mT, t.a)
    ideal = jnp.einsum("...ir,c...,c...iq,c...qo->...ro", t.a, w, x.a, x.b, precision="highest", optimize="optimal")
    unit = jnp.trace(g, axis1=-2, axis2=-1) / g.shape[-1]
    shift = (lam * unit + 1e-12)[..., None, None] * jnp.eye(g.shape[-1], dtype=g.dtype)
    return gamma[..., None, None] * jnp.linalg.solve(g + shift, ideal - matmul(g, t.b))


def _per_layer(signatures: Array, layers: tuple[int, ...]) -> Array:
    clients, size = signatures.shape
    return jnp.broadcast_to(signatures.reshape(clients, *(1,) * len(layers), size), (clients, *layers, size))
