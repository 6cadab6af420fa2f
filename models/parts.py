"""What families of models share. Layer norm, GELU and attention have derivatives written by hand, for the shapes in
which a CPU computes them fast.

The functions are the usual ones; only the way they are computed differs, and the results agree to rounding. Two things
cost a CPU most, apart from the matrix products: sums over the last axis, which end a fused loop and have their operands
written out (hence ``_mean`` as a product with a vector), and products of matrices that are stored the other way
round (hence ``matmul.written_out``). Accelerators fuse such things by themselves and get the plain form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax.lora import Dense
from fedlora_jax.matmul import written_out


class LayerNorm(nn.Module):
    """``nn.LayerNorm`` over the last axis, in float32 inside; the same parameters under the same names."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return layer_norm(x, scale, bias, self.epsilon)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """``n scale + bias`` with ``n = (x - mean) / sqrt(var + epsilon)`` over the last axis (Ba et al., 2016, eq. 3)."""
    return _layer_norm(x, scale, bias, epsilon)[0]


def _layer_norm(x: Array, scale: Array, bias: Array, epsilon: float):
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = y - _mean(y)
    r = jax.lax.rsqrt(_mean(centred * centred) + epsilon)
    n = centred * r
    return (n * scale + bias).astype(x.dtype), (n, r, scale)


def _layer_norm_vjp(epsilon: float, residuals, ct: Array):
    """``dx = r (d - mean(d) - n mean(d n))`` with ``d = ct scale``."""
    n, r, scale = residuals
    dy = ct.astype(n.dtype)
    d, rest = dy * scale, tuple(range(ct.ndim - 1))
    dx = r * (d - _mean(d) - n * _mean(d * n))
    return dx.astype(ct.dtype), jnp.sum(dy * n, rest), jnp.sum(dy, rest)


layer_norm.defvjp(_layer_norm, _layer_norm_vjp)


def _mean(x: Array) -> Array:
    """Over the last axis, which stays as 1."""
    as_product = lambda x: jnp.matmul(x, jnp.full((x.shape[-1], 1), 1 / x.shape[-1], x.dtype), precision="highest")
    return jax.lax.platform_dependent(x, cpu=as_product, default=lambda x: x.mean(-1, keepdims=True))


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """``x Phi(x)``, exactly (Hendrycks and Gimpel, 2016). The backward pass reads ``x`` alone."""
    return x * _phi(x)


def _gelu_vjp(x: Array, ct: Array) -> tuple[Array]:
    density = jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return (ct * (_phi(x) + x * density),)


gelu.defvjp(lambda x: (x * _phi(x), x), _gelu_vjp)


def _phi(x: Array) -> Array:
    return 0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))


def quick_gelu(x: Array) -> Array:
    """``x sigmoid(1.702 x)`` (Hendrycks and Gimpel, 2016, section 2), which OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {"gelu": gelu, "quick_gelu": quick_gelu, "gelu_tanh": partial(jax.nn.gelu, approximate=True)}
)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(query: Array, key: Array, value: Array, causal: bool = False) -> Array:
    """``softmax(Q K^T / sqrt(d)) V`` for ``[..., heads, tokens, d]`` (Vaswani et al., 2017, eq. 1).

    ``causal``: a token sees those before it and itself.
    """
    return _attend(query, key, value, causal)[0]


def _attend(query: Array, key: Array, value: Array, causal: bool):
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if causal:
        scores = jnp.where(jnp.tri(scores.shape[-1], dtype=bool), scores, -jnp.inf)
    p = jax.nn.softmax(scores)
    return p @ value, (query, key, value, p)


def _attend_vjp(causal: bool, residuals, ct: Array) -> tuple[Array, Array, Array]:
    query, key, value, p = residuals
    dp = ct @ value.mT
    ds = p * (dp - jnp.sum(dp * p, -1, keepdims=True)) * query.shape[-1] ** -0.5
    return ds @ key, written_out(ds.mT) @ query, written_out(p.mT) @ ct


attend.defvjp(_attend, _attend_vjp)


class Mlp(nn.Module):
    width: int
    act: str = "gelu"  # of ACTIVATIONS

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return Dense(x.shape[-1], name="fc2")(ACTIVATIONS[self.act](Dense(self.width, name="fc1")(x)))


def switched(block: nn.Module, x: Array, h: Array) -> Array:
    """``h``, what a block makes of ``x``; a ``gate`` of 0 in its lora collection: as if the block were not there."""
    if not block.has_variable("lora", "gate"):
        return h
    return x + block.get_variable("lora", "gate").astype(x.dtype) * (h - x)


def stacked(block: nn.Module, x: Array, depth: int, unroll: bool) -> Array:
    """``depth`` blocks after one another, all of whose parameters (and adapters) are one stack; a loop, or unrolled."""
    blocks = nn.scan(
        lambda block, x, _: (block(x), None),
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True},
        length=depth,
        unroll=depth if unroll else 1,
    )
    return blocks(block, x, None)[0]


def patches(images: Array, p: int) -> Array:
    """``[.., height, width, channels] -> [.., patches, p * p * channels]``, each row by row.

    Raises:
      ValueError: the images cannot be cut into patches of that side.
    """
    *lead, height, width, channels = images.shape
    if height % p or width % p:
        raise ValueError(f"images of {height} x {width} cannot be cut into patches of {p} x {p}: resize them")
    rows, columns = height // p, width // p
    x = images.reshape(*lead, rows, p, columns, p, channels)
    return jnp.moveaxis(x, -3, -4).reshape(*lead, rows * columns, p * p * channels)


def split_blocks(model: Any, params: Any, top: int) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """The model as two, each with its parameters: everything before the last ``top`` blocks, and the rest.

    Where adapters touch the last blocks only, the stem gives the same tokens in every step and round: compute them once
    per image and train the top on them. ``top(stem(x))`` is the model.

    Args:
      model: of a family here, with a stack ``blocks`` of ``depth`` between what makes tokens and what reads them
        (``norm``, ``projection``, ``head``).
      params: its parameters.
      top: how many blocks the second has.
    """
    if not 1 <= top < model.depth:
        raise ValueError(f"cannot keep the last {top} blocks of {model.depth}: choose 1 to {model.depth - 1}")
    first = jax.tree.map(lambda x: x[: model.depth - top], params["blocks"])
    last = jax.tree.map(lambda x: x[model.depth - top :], params["blocks"])
    rest = {name: params[name] for name in ("norm", "projection", "head") if name in params} | {"blocks": last}
    stem = {name: x for name, x in params.items() if name not in rest} | {"blocks": first}
    return (model.clone(depth=model.depth - top, part="stem"), stem), (model.clone(depth=top, part="top"), rest)


def join_blocks(stem: Any, rest: Any) -> Any:
    """The parameters of the whole model, of those of its two parts; the inverse of ``split_blocks``."""
    blocks = jax.tree.map(lambda *parts: jnp.concatenate(parts), stem["blocks"], rest["blocks"])
    return {**stem, **rest, "blocks": blocks}
