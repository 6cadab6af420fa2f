"""MLP-Mixer whose dense layers read LoRA adapters: Tolstikhin et al., *MLP-Mixer: An all-MLP Architecture for Vision*,
NeurIPS 2021, arXiv 2105.01601.

    u = x + (W2 gelu(W1 LN(x)^T))^T        mixes tokens, for each channel            (eq. 1)
    y = u + W4 gelu(W3 LN(u))              mixes channels, for each token

All blocks are one stack, as in ``models.vit``; features are the mean of the normalised tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from fedlora_jax.lora import Dense

from .parts import LayerNorm, Mlp, patches, stacked, switched

SIZES = {  # width, depth, width of the token MLPs, of the channel MLPs: table 1; nano is ours
    "nano": (64, 4, 32, 128),
    "S": (512, 8, 256, 2048),
    "B": (768, 12, 384, 3072),
    "L": (1024, 24, 512, 4096),
    "H": (1280, 32, 640, 5120),
}

FC2 = ("(mlp_tokens|mlp_channels)/fc2/kernel",)
TARGETS = {
    "default": FC2,
    "out_fc2": FC2,  # LoRA-FAIR: the last layers of both
    "tokens": ("mlp_tokens/(fc1|fc2)/kernel",),
    "channels": ("mlp_channels/(fc1|fc2)/kernel",),
    "all": ("(mlp_tokens|mlp_channels)/(fc1|fc2)/kernel",),
}


class Block(nn.Module):
    tokens_width: int
    channels_width: int
    epsilon: float
    act: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        norm = partial(LayerNorm, self.epsilon)
        mixed = Mlp(self.tokens_width, self.act, name="mlp_tokens")(norm(name="norm1")(x).swapaxes(-1, -2))
        h = x + mixed.swapaxes(-1, -2)
        h = h + Mlp(self.channels_width, self.act, name="mlp_channels")(norm(name="norm2")(h))
        return switched(self, x, h)


class Mixer(nn.Module):
    """``images [.., height, width, 3] -> (logits [.., classes], {"features": [.., width]})``.

    Attributes:
      classes, patch, width, depth, tokens_width, channels_width: sizes. The number of patches is that of the first
        images: weights of the token MLPs have its size, so all images must be of one size.
      epsilon: of the layer norms.
      act: of the MLPs, one of ``parts.ACTIVATIONS``.
      unroll, dtype, part: as in ``models.vit.ViT``.
    """

    classes: int
    patch: int
    width: int
    depth: int
    tokens_width: int
    channels_width: int
    epsilon: float = 1e-6
    act: str = "gelu"
    unroll: bool = False
    dtype: Any = jnp.float32
    part: Literal["whole", "stem", "top"] = "whole"

    @nn.compact
    def __call__(self, images: Array) -> tuple[Array, dict[str, Array]]:
        x = images.astype(self.dtype)
        if self.part != "top":
            x = Dense(self.width, name="embed")(patches(x, self.patch))
        block = Block(self.tokens_width, self.channels_width, self.epsilon, self.act, name="blocks")
        x = stacked(block, x, self.depth, self.unroll)
        if self.part == "stem":
            return x, {}
        features = LayerNorm(self.epsilon, name="norm")(x).mean(-2).astype(jnp.float32)
        return Dense(self.classes, name="head")(features), {"features": features}


def mixer(variant: str, classes: int, **options: Any) -> Mixer:
    """A Mixer by name, such as ``B/16``: a size of ``SIZES``, a slash, the patch size."""
    size, _, patch = variant.partition("/")
    if size not in SIZES or not patch.isdigit():
        raise ValueError(
            f"unknown Mixer {variant!r}: expected SIZE/PATCH with SIZE one of {', '.join(SIZES)}, e.g. B/16"
        )
    return Mixer(classes, int(patch), *SIZES[size], **options)
