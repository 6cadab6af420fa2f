"""S: from what clients send to the new global adapter, in product space.

    w_c = softmax(log p_c + alpha(z_c, feat_c))
    T   = T_r( a b + eta (sum_c w_c a_c b_c - a b) + q )   a b: the previous product       0 < eta < 4
    b  <- (1 + g_0 + g_1 N + g_2 N^2) b                    N = b b^T / tr(b b^T), eigenvalues S_i / sum S

``T_r`` is the best approximation of rank r, in factors turned towards the previous ones: ``balanced`` (``U sqrt(S)``,
``sqrt(S) V^T``), ``steady``, the same but scaled so that ``a`` stays as long as it was, or ``orthogonal``, where the
columns of ``a`` are ``U``, all of one length, and ``a`` is again as long as it was. A step of ``b`` is then as long in
each of the r directions as with the first ``a``, whatever has been learned; in balanced factors it grows with the
product, in steady ones the first direction has nearly all of it. ``q`` is memory, a part of the last move of the global
product (``push``). Parameters trained in full move by ``eta (mean - previous) + q``. ``eta`` and ``g`` are numbers of
each layer, ``alpha`` is a network; with ``steps`` alone there are neither ``alpha`` nor ``g``. Every feature is
invariant to the clients' order and to the gauge of their factors. At first ``alpha = g = 0`` and ``eta = 1``: without
memory FlexLoRA in such factors.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import product
from fedlora_jax.hyper.networks import Conditioned, Place, per_layer, places
from fedlora_jax.lora import Adapter, LoRA, flatten, is_lora, tree_map
from fedlora_jax.method import mean
from fedlora_jax.product import matmul
from fedlora_jax.signatures import Signature

Factors = Literal["balanced", "steady", "orthogonal"]
Server = Literal["steps", "full"]
FEATURES = 4


class Uploads(NamedTuple):
    """What the server got in a round and what it needs to aggregate it once more."""

    received: Adapter  # [C, ...]
    weights: Array  # [C], summing to one
    signatures: Signature  # [C, ...]
    previous: Adapter  # the global adapter then in force
    push: Adapter | tuple[()] = ()  # what memory adds: products of rank 2 r, differences of what is trained in full


class Synthesizer(NamedTuple):
    """The parameters of S. Dicts are keyed by parameter name; ``...`` are its layers."""

    network: Any  # of alpha; () with steps alone
    steps: dict[str, Array]  # [...] or [] (trained in full): eta = 4 / (1 + 3 exp(-steps))
    gains: dict[str, Array]  # [..., 3]: g = tanh(gains) / 4; none with steps alone


class Synthesis(NamedTuple):
    """One kernel's aggregate and what the corrector needs to know of it."""

    product: LoRA  # of rank r
    weights: Array  # [C, ...]
    features: Any  # [C, ..., FEATURES]; () with steps alone


def init(key: Array, adapter: Adapter, like: Signature, server: Server = "full") -> Synthesizer:
    """Neutral parameters; of the signature only its shapes are read."""
    at, flat = places(adapter), flatten(adapter)
    layers = {name: x.a.shape[:-2] if is_lora(x) else () for name, x in flat.items()}
    steps = {name: jnp.zeros(shape) for name, shape in layers.items()}
    if server == "steps":
        return Synthesizer((), steps, {})
    network = _network().init(key, jnp.zeros((*at[0].layers, like.flat().shape[-1] + FEATURES)), at[0])
    return Synthesizer(network, steps, {place.name: jnp.zeros((*place.layers, 3)) for place in at})


def synthesize(s: Synthesizer, x: Uploads, factors: Factors) -> tuple[dict[str, Synthesis], dict[str, Array]]:
    """By name: the new products of low-rank kernels, and the new values of what is trained in full."""
    old, new = flatten(x.previous), flatten(x.received)
    q = flatten(x.push) if x.push else {}
    low_rank = {}
    for place in places(x.previous):
        name = place.name
        feat, w = _weighed(s, x, new[name], old[name], place)
        t = _truncated(server_step(s.steps[name]), new[name], w, old[name], q.get(name))
        t = LoRA(t.a, _gain(0.25 * jnp.tanh(s.gains[name]), t.b), t.scale) if s.gains else t
        t = factored(t, old[name], factors)
        low_rank[name] = Synthesis(t, w, feat)
    step = lambda name, y: server_step(s.steps[name]) * (mean(y, x.weights) - old[name])
    move = lambda name, y: old[name] + step(name, y) + q.get(name, 0.0)
    return low_rank, {name: move(name, y) for name, y in new.items() if not is_lora(y)}


def _weighed(s: Synthesizer, x: Uploads, new: LoRA, old: LoRA, place: Place) -> tuple[Any, Array]:
    """What clients' updates look like, where that is asked, and ``w``, ``[C, ...]`` for the layers of a kernel."""
    if not s.network:
        return (), per_layer(x.weights[:, None], place.layers)[..., 0]
    feat = features(new, x.weights, old)  # [C, ..., 4]
    told = jnp.concatenate([per_layer(x.signatures.flat(), place.layers), feat], -1)
    return feat, client_weights(s, x.weights, told, place)


def client_weights(s: Synthesizer, weights: Array, features: Array, place: Place) -> Array:
    """``softmax(log p_c + alpha)`` over clients, ``[C, ...]`` for the layers of a kernel."""
    log_p = jnp.log(weights).reshape(-1, *(1,) * len(place.layers))
    return jax.nn.softmax(log_p + jnp.asarray(_network().apply(s.network, features, place))[..., 0], 0)


def server_step(steps: Array) -> Array:
    """``eta``, between 0 and 4; 1 at zero."""
    return 4 / (1 + 3 * jnp.exp(-steps))


def factored(t: LoRA, like: LoRA, factors: Factors) -> LoRA:
    """A product of balanced factors in others."""
    match factors:
        case "balanced":
            return t
        case "steady":
            return steady(t, like)
        case "orthogonal":
            return steady(product.truncate(t, like.a.shape[-1], split="left", like=like), like)


def no_shorter(s: Synthesizer, before: Synthesizer) -> Synthesizer:
    """The same with no ``eta`` that has come below 1, or farther below it.

    What is learned from the next round alone takes steps that are too short (Wu et al., ICLR 2018, arXiv 1803.02021):
    where clients' own steps are long it would stop the server.
    """

    def one(x: Array, old: Array) -> Array:
        floor = jnp.minimum(old, 0.0)
        return jnp.where(x < floor, floor, x)  # jnp.maximum has half a derivative where they are equal, as at first

    return s._replace(steps=jax.tree.map(one, s.steps, before.steps))


def steady(x: LoRA, like: LoRA) -> LoRA:
    """The same product with an ``a`` as long as that of ``like``, in each layer: then steps of ``b`` do not depend on
    how large the product is, as with the first ``a``, which nothing has trained yet."""
    length = lambda a: product.safe_sqrt(jnp.sum(a**2, (-2, -1)))
    k = (length(like.a) / jnp.maximum(length(x.a), 1e-12))[..., None, None]
    return LoRA(k * x.a, x.b / k, x.scale)


def push(part: float | Array, now: Adapter, before: Adapter) -> Adapter:
    """``q``, a part of the way that the global adapter last went (heavy ball: Polyak 1964), in product space."""
    scaled = lambda q: LoRA(part * q.a, q.b, q.scale)
    low_rank = lambda x, y: scaled(product.difference(x, y))
    return tree_map(low_rank, now, before, full=lambda x, y: part * (x - y))


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


def _network() -> Conditioned:
    return Conditioned(outputs=1, width=32, blocks=0)


def _truncated(eta: Array, x: LoRA, w: Array, before: LoRA, q: LoRA | None) -> LoRA:
    kept = LoRA((1 - eta)[..., None, None] * before.a, before.b, before.scale)
    mixed = product.plus(product.total(x, eta * w), kept)
    mixed = mixed if q is None else product.plus(mixed, q)
    return product.truncate(mixed, before.a.shape[-1], split="balanced", like=before)


def _gain(coefficients: Array, b: Array) -> Array:
    gram = matmul(b, b.mT)
    trace = jnp.trace(gram, axis1=-2, axis2=-1)
    n = gram / jnp.maximum(trace, 1e-15)[..., None, None]  # the derivative squares this floor: it must not underflow
    c0, c1, c2 = jnp.moveaxis(coefficients[..., None, None], -3, 0)
    nb = matmul(n, b)
    return b + c0 * b + c1 * nb + c2 * matmul(n, nb)
