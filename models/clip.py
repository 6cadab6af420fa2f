"""CLIP: Radford et al., *Learning Transferable Visual Models From Natural Language Supervision*, ICML 2021, arXiv
2103.00020.

    logits = exp(t) f g^T      f: features of an image, g: of texts, both of length 1      (figure 3)

The image tower is a ``models.vit.ViT`` with a norm before the blocks and a projection; the text tower is of the same
blocks, in which a token sees none behind it, and reads the token of the end. With ``g`` of prompts that name the
classes ``exp(t) g^T`` is a linear head, the zero-shot one, to start from (Wortsman et al., *Robust fine-tuning of
zero-shot models*, CVPR 2022, arXiv 2109.01903, section 2).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedlora_jax.lora import Dense

from .parts import LayerNorm, stacked
from .tokenizer import Tokenizer
from .vit import Block, ViT, vit

# width of the features: table 20; H is OpenCLIP's, nano ours
SIZES = {"nano/4": 32, "B/32": 512, "B/16": 512, "L/14": 768, "H/14": 1024}
# of the text tower: tokens, the longest text, width, blocks, heads, width of the MLPs
TEXT = {
    "nano/4": (580, 16, 64, 2, 4, 128),
    "B/32": (49408, 77, 512, 12, 8, 2048),
    "B/16": (49408, 77, 512, 12, 8, 2048),
    "L/14": (49408, 77, 768, 12, 12, 3072),
    "H/14": (49408, 77, 1024, 24, 16, 4096),
}
PROMPT = "a photo of a {}."  # section 3.1.4
TOGETHER = 64  # texts that the text tower sees at once


def clip_image(variant: str, classes: int) -> ViT:
    """The image tower by name, such as ``B/32``, with a linear head."""
    return vit(variant, classes, norm_pre=True, act="quick_gelu", epsilon=1e-5, projection=SIZES[variant])


class Text(nn.Module):
    """``tokens [.., length], ends [..] -> features [.., projection]`` of length 1.

    ``context [n, width]``, if there is one, stands between the first token and the others, as embeddings of n words
    would: Zhou et al., *Learning to Prompt for Vision-Language Models*, IJCV 2022, arXiv 2109.01134, eq. 2.

    Attributes:
      vocabulary, length, width, depth, heads, mlp_width, projection: sizes; ``length`` of the longest text.
      epsilon, act: as in ``models.vit.ViT``.
    """

    vocabulary: int
    length: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    projection: int
    epsilon: float = 1e-5
    act: str = "quick_gelu"

    @nn.compact
    def __call__(self, tokens: Array, ends: Array, context: Array | None = None) -> Array:
        table = self.param("tokens", nn.initializers.normal(0.02), (self.vocabulary, self.width))
        positions = self.param("pos", nn.initializers.normal(0.01), (self.length, self.width))
        x = table[tokens]
        if context is not None:
            own = jnp.broadcast_to(context, (*x.shape[:-2], *context.shape))
            x, ends = jnp.concatenate([x[..., :1, :], own, x[..., 1:, :]], -2), ends + len(context)
        x = x + positions[: x.shape[-2]]
        block = Block(self.heads, self.mlp_width, self.epsilon, self.act, causal=True, name="blocks")
        x = LayerNorm(self.epsilon, name="norm")(stacked(block, x, self.depth, unroll=False))
        x = jnp.take_along_axis(x, ends[..., None, None], -2)[..., 0, :]
        x = Dense(self.projection, use_bias=False, name="projection")(x)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def clip_text(variant: str) -> Text:
    """The text tower by the name of the image tower."""
    return Text(*TEXT[variant], SIZES[variant])


def text_features(model: Text, params: Any, tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """What the text tower makes of texts, ``[texts, projection]``."""
    tokens, ends = tokenizer.encode_all(texts, model.length)

    @jax.jit
    def features(params: Any, *rows: Array) -> Array:
        one = lambda row: model.apply({"params": params}, *row)
        return jax.lax.map(one, rows, batch_size=TOGETHER)  # type: ignore[arg-type]

    return np.asarray(features(params, tokens, ends))


def zero_shot(features: np.ndarray, logit_scale: float) -> dict[str, np.ndarray]:
    """The head that is the text features of the classes, times ``exp(logit_scale)``.

    Args:
      features: ``[prompts, classes, projection]``; those of several prompts are averaged (section 3.1.4).
      logit_scale: t.
    """
    if len(features) > 1:
        mean = features.mean(0)
        features = mean[None] / np.linalg.norm(mean, axis=-1, keepdims=True)
    kernel = np.exp(np.float32(logit_scale)) * features[0].T
    return {"kernel": kernel, "bias": np.zeros(kernel.shape[1], np.float32)}
