"""What the networks of G, S and C share: the list of adapted kernels, and an MLP that knows which of them it is at."""

from __future__ import annotations

import math
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from fedlora_jax.lora import Adapter, flatten, is_lora


class Place(NamedTuple):
    """One adapted kernel as the networks see it; static."""

    name: str
    number: int  # of the kernel, among ``of``
    of: int
    layers: tuple[int, ...]  # its leading axes
    depth: int  # the largest number of layers of any kernel


def places(adapter: Adapter) -> list[Place]:
    """The low-rank leaves of an adapter, in sorted order, as transformed trees are: a kernel's number must not depend
    on how a dict was built."""
    low_rank = {name: x.a.shape[:-2] for name, x in sorted(flatten(adapter).items()) if is_lora(x)}
    depth = max((math.prod(layers) for layers in low_rank.values()), default=1)
    return [Place(name, i, len(low_rank), layers, depth) for i, (name, layers) in enumerate(low_rank.items())]


class Conditioned(nn.Module):
    """A small residual MLP that knows which layer of which kernel it speaks for; its output is zero at initialisation.

    ``context [..., layers, f] -> [..., layers, outputs]``.
    """

    outputs: int
    width: int
    blocks: int

    @nn.compact
    def __call__(self, context: Array, place: Place) -> Array:
        which = self.param("kernel_code", nn.initializers.normal(0.2), (place.of, 32))[place.number]
        where = self.param("layer_code", nn.initializers.normal(0.2), (place.depth, 32))[: math.prod(place.layers)]
        code = jnp.broadcast_to((where + which).reshape(*place.layers, 32), (*context.shape[:-1], 32))
        return Mlp(self.outputs, self.width, self.blocks, name="mlp")(jnp.concatenate([context, code], -1))


class Mlp(nn.Module):
    """``context [..., f] -> [..., outputs]``, zero at initialisation: dense, residual blocks, dense."""

    outputs: int
    width: int
    blocks: int

    @nn.compact
    def __call__(self, context: Array) -> Array:
        h = nn.Dense(self.width)(context)
        for _ in range(self.blocks):
            h += nn.Dense(self.width)(nn.silu(nn.Dense(self.width)(nn.LayerNorm()(h))))
        return nn.Dense(self.outputs, kernel_init=nn.initializers.zeros)(nn.silu(h))


def per_layer(signatures: Array, layers: tuple[int, ...]) -> Array:
    """``[C, m]`` repeated for every layer, ``[C, layers, m]``."""
    clients, size = signatures.shape
    return jnp.broadcast_to(signatures.reshape(clients, *(1,) * len(layers), size), (clients, *layers, size))
