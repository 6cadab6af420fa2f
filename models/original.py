"""Names of the original ViT, in flax: of google-research/vision_transformer (ViT, AugReg) and of big_vision.

Both store ``.npz`` files, of arrays whose attention has an axis of heads, and both compute ``nn.gelu``, which is the
approximation by tanh, and norms with flax' epsilon; the first shows images as ``x / 127.5 - 1``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from .tables import QKV, Table

COMPUTED: Mapping[str, Any] = MappingProxyType({"act": "gelu_tanh", "epsilon": 1e-6})
SHOWN: Mapping[str, Any] = MappingProxyType({"mean": [0.5] * 3, "std": [0.5] * 3})


def _table(name: str, prefix: str, pos: str, numbers: tuple[int, int, int, int]) -> Table:
    block = f"{prefix}Transformer/encoderblock_{{i}}"
    norm1, attention, norm2, mlp = numbers
    projections = {part: f"{block}/MultiHeadDotProductAttention_{attention}/{part[5:]}" for part in (*QKV, "attn/out")}
    return Table(
        name,
        {
            "embed": f"{prefix}embedding",
            "norm": f"{prefix}Transformer/encoder_norm",
            "head": f"{prefix}head",
        },
        {
            "norm1": f"{block}/LayerNorm_{norm1}",
            **projections,
            "norm2": f"{block}/LayerNorm_{norm2}",
            "mlp/fc1": f"{block}/MlpBlock_{mlp}/Dense_0",
            "mlp/fc2": f"{block}/MlpBlock_{mlp}/Dense_1",
        },
        torch=False,
        tokens={"cls": f"{prefix}cls", "pos": f"{prefix}{pos}"},
        may=("head", "cls"),
    )


ORIGINAL = _table("the original", "", "Transformer/posembed_input/pos_embedding", (0, 1, 2, 3))
BIG_VISION = tuple(_table("big_vision's", prefix, "pos_embedding", (0, 0, 1, 0)) for prefix in ("params/", ""))
TABLES = (ORIGINAL, *BIG_VISION)
OTHERS = {
    r"(params/)?pre_logits/": "there is a layer between features and head",
    r".*MAPHead": "tokens are pooled by attention",
    r"(params/)?Transformer/encoderblock/": "blocks are stacked in the file: write one array for each",
    r"(params/)?(conv_root|block\d|root_block)": "patches are those of a ResNet",
    r"(params/)?(img|txt)/": "these are the towers of image and text",
}
