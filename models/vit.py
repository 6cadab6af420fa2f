"""Vision Transformer with pre-norm blocks, every dense layer a ``lora.Dense``.

Dosovitskiy et al., *An Image is Worth 16x16 Words*, ICLR 2021, arXiv 2010.11929, table 1; Touvron et al., *Training
data-efficient image transformers*, ICML 2021, arXiv 2012.12877, table 1 (Ti, S); ``nano`` is ours, for the embedded
digits.

Blocks are stacked: a parameter of all blocks is one array ``[depth, ...]``, so adapters, aggregation and compilation
see one kernel per kind (``blocks/attn/query/kernel``), not one per block.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from fedlora_jax.lora import Dense

from .parts import LayerNorm, Mlp, attend, patches, stacked, switched

# variant: (width, depth, heads, mlp width)
SIZES = {
    "nano": (64, 4, 4, 128),
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
}


TARGETS = {  # sets of kernels by name
    "default": ("attn/(query|value)/kernel",),
    "qv": ("attn/(query|value)/kernel",),
    "qkv": ("attn/(query|key|value)/kernel",),
    "qkvo": ("attn/(query|key|value|out)/kernel",),
    "mlp": ("mlp/(fc1|fc2)/kernel",),
    "all": ("attn/(query|key|value|out)/kernel", "mlp/(fc1|fc2)/kernel"),
    "out_fc2": ("attn/out/kernel", "mlp/fc2/kernel"),  # FedRA, LoRA-FAIR
}


class Attention(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        # [.., tokens, width] -> [.., heads, tokens, width / heads]: the layout in which products are fast on CPU
        split = lambda y: y.reshape(*y.shape[:-1], self.heads, width // self.heads).swapaxes(-3, -2)
        query, key, value = (split(Dense(width, name=name)(x)) for name in ("query", "key", "value"))
        mixed = attend(query, key, value).swapaxes(-3, -2)
        return Dense(width, name="out")(mixed.reshape(x.shape))


class Block(nn.Module):
    heads: int
    mlp_width: int
    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        norm = partial(LayerNorm, self.epsilon)
        h = x + Attention(self.heads, name="attn")(norm(name="norm1")(x))
        h = h + Mlp(self.mlp_width, name="mlp")(norm(name="norm2")(h))
        return switched(self, x, h)


class ViT(nn.Module):
    """``images [.., height, width, 3] -> (logits [.., classes], {"features": [.., width]})``.

    Attributes:
      classes, patch, width, depth, heads, mlp_width: sizes.
      epsilon: of the layer norms (timm's weights use 1e-6).
      pool: ``cls``, the class token, or ``mean``, the mean of the patch tokens.
      unroll: write the blocks out one after another instead of ``lax.scan``, which would copy what the backward pass
        needs into stacks and out again. Same parameters, same results; compiles longer.
      remat: keep only the blocks' inputs for the backward pass. Same results, less memory, more arithmetic.
      dtype: of the activations.
      part: ``whole``; or the ``stem`` (images to tokens, without final norm and head) or the ``top`` (tokens to
        logits) of a model cut between two blocks, see ``split_blocks``.
    """

    classes: int
    patch: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    epsilon: float = 1e-6
    pool: str = "cls"
    unroll: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    part: Literal["whole", "stem", "top"] = "whole"

    @nn.compact
    def __call__(self, images: Array) -> tuple[Array, dict[str, Array]]:
        x = images.astype(self.dtype) if self.part == "top" else self._embedded(images)
        body = nn.remat(Block, prevent_cse=self.unroll) if self.remat else Block
        x = stacked(body(self.heads, self.mlp_width, self.epsilon, name="blocks"), x, self.depth, self.unroll)
        if self.part == "stem":
            return x, {}
        x = LayerNorm(self.epsilon, name="norm")(x)
        features = (x[..., 0, :] if self.pool == "cls" else x[..., 1:, :].mean(-2)).astype(jnp.float32)
        return Dense(self.classes, name="head")(features), {"features": features}

    def _embedded(self, images: Array) -> Array:
        x = patches(images.astype(self.dtype), self.patch)
        *lead, count, _ = x.shape
        x = Dense(self.width, name="embed")(x)
        cls = self.param("cls", nn.initializers.zeros, (1, self.width)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(cls, (*lead, 1, self.width)), x], -2)
        return x + self.param("pos", nn.initializers.normal(0.02), (1 + count, self.width)).astype(self.dtype)


def vit(variant: str, classes: int, **options: Any) -> ViT:
    """A ViT by name, such as ``Ti/16``: a size of ``SIZES``, a slash, the patch size."""
    size, _, patch = variant.partition("/")
    if size not in SIZES or not patch.isdigit():
        raise ValueError(
            f"unknown ViT {variant!r}: expected SIZE/PATCH with SIZE one of {', '.join(SIZES)}, e.g. Ti/16"
        )
    width, depth, heads, mlp_width = SIZES[size]
    return ViT(classes, int(patch), width, depth, heads, mlp_width, **options)


def normalise(images: ArrayLike, mean: ArrayLike, std: ArrayLike) -> Array:
    """uint8 images to floats: ``(x / 255 - mean) / std`` per channel."""
    return (jnp.asarray(images, jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)
