"""Vision Transformer with pre-norm blocks, every dense layer a ``lora.Dense``.

Dosovitskiy et al., *An Image is Worth 16x16 Words*, ICLR 2021, arXiv 2010.11929, table 1; Touvron et al., *Training
data-efficient image transformers*, ICML 2021, arXiv 2012.12877, table 1 (Ti, S); ``nano`` is ours, for the embedded
digits. Variants of it: registers, Darcet et al., *Vision Transformers Need Registers*, ICLR 2024, arXiv 2309.16588;
the mean of tokens, as in He et al., *Masked Autoencoders*, CVPR 2022, arXiv 2111.06377; the image tower of CLIP,
Radford et al., ICML 2021, arXiv 2103.00020.

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

from .bridge import bridged
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
    "attn": ("attn/(query|key|value|out)/kernel",),
    "mlp": ("mlp/(fc1|fc2)/kernel",),
    "all": ("attn/(query|key|value|out)/kernel", "mlp/(fc1|fc2)/kernel"),
    "out_fc2": ("attn/out/kernel", "mlp/fc2/kernel"),  # FedRA, LoRA-FAIR
}


class Attention(nn.Module):
    heads: int
    causal: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        # [.., tokens, width] -> [.., heads, tokens, width / heads]: the layout in which products are fast on CPU
        split = lambda y: y.reshape(*y.shape[:-1], self.heads, width // self.heads).swapaxes(-3, -2)
        query, key, value = (split(Dense(width, name=name)(x)) for name in ("query", "key", "value"))
        mixed: Array = attend(query, key, value, self.causal)  # type: ignore[assignment]
        return Dense(width, name="out")(mixed.swapaxes(-3, -2).reshape(x.shape))


class Block(nn.Module):
    heads: int
    mlp_width: int
    epsilon: float
    act: str = "gelu"
    causal: bool = False  # a token sees those before it and itself: of text

    @nn.compact
    def __call__(self, x: Array) -> Array:
        norm = partial(LayerNorm, self.epsilon)
        y = norm(name="norm1")(x)
        h = x + Attention(self.heads, self.causal, name="attn")(y)
        h = h + Mlp(self.mlp_width, self.act, name="mlp")(norm(name="norm2")(h))
        return switched(self, x, bridged(self, y, h))


class ViT(nn.Module):
    """``images [.., height, width, 3] -> (logits [.., classes], {"features": [.., width]})``.

    Attributes:
      classes, patch, width, depth, heads, mlp_width: sizes.
      epsilon: of the layer norms (timm's weights use 1e-6).
      pool: what features are: ``cls``, the normalised class token; ``mean``, the mean of the normalised patch tokens;
        ``cls_mean``, both, one after the other (classifiers of DINOv2); ``norm_of_mean``, the norm of the mean of
        the patch tokens (timm's ``fc_norm``); or ``tokens``, each normalised token for itself ``[.., tokens, width]``.
      class_token: is there one, before the tokens of patches?
      registers: further tokens between them, without positions, that nothing reads in the end.
      norm_pre: are tokens normalised before the blocks?
      act: of the MLPs, one of ``parts.ACTIVATIONS``.
      projection: width of a layer without bias behind the pooling, after which features have length 1; 0: none.
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
    pool: Literal["cls", "mean", "cls_mean", "norm_of_mean", "tokens"] = "cls"
    class_token: bool = True
    registers: int = 0
    norm_pre: bool = False
    act: str = "gelu"
    projection: int = 0
    unroll: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    part: Literal["whole", "stem", "top"] = "whole"

    @nn.compact
    def __call__(self, images: Array) -> tuple[Array, dict[str, Array]]:
        x = images.astype(self.dtype) if self.part == "top" else self._embedded(images)
        body = nn.remat(Block, prevent_cse=self.unroll) if self.remat else Block
        block = body(self.heads, self.mlp_width, self.epsilon, self.act, name="blocks")
        x = stacked(block, x, self.depth, self.unroll)
        if self.part == "stem":
            return x, {}
        features = self._pooled(x).astype(jnp.float32)
        if self.projection:
            features = Dense(self.projection, use_bias=False, name="projection")(features)
            features = features / jnp.linalg.norm(features, axis=-1, keepdims=True)
        return Dense(self.classes, name="head")(features), {"features": features}

    def _embedded(self, images: Array) -> Array:
        x = patches(images.astype(self.dtype), self.patch)
        *lead, count, _ = x.shape
        x, first = Dense(self.width, name="embed")(x), int(self.class_token)
        spread = lambda tokens: jnp.broadcast_to(tokens.astype(self.dtype), (*lead, *tokens.shape))
        if self.class_token:
            x = jnp.concatenate([spread(self.param("cls", nn.initializers.zeros, (1, self.width))), x], -2)
        positions = self.param("pos", nn.initializers.normal(0.02), (first + count, self.width))
        x = x + positions.astype(self.dtype)
        if self.registers:
            registers = self.param("registers", nn.initializers.normal(0.02), (self.registers, self.width))
            x = jnp.concatenate([x[..., :first, :], spread(registers), x[..., first:, :]], -2)
        return LayerNorm(self.epsilon, name="norm_pre")(x) if self.norm_pre else x

    def _pooled(self, x: Array) -> Array:
        norm, prefix = LayerNorm(self.epsilon, name="norm"), self.class_token + self.registers
        if self.pool == "norm_of_mean":
            return norm(x[..., prefix:, :].mean(-2))
        x = norm(x)
        parts = {"cls": lambda: x[..., 0, :], "mean": lambda: x[..., prefix:, :].mean(-2), "tokens": lambda: x}
        if self.pool == "cls_mean":
            return jnp.concatenate([parts["cls"](), parts["mean"]()], -1)
        return parts[self.pool]()

    @property
    def feature_width(self) -> int:
        return self.projection or self.width * (2 if self.pool == "cls_mean" else 1)


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
