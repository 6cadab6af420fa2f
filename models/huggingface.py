"""Published weights of Hugging Face transformers to the parameters of ``models.vit``: ViT, DINOv2.

``save_pretrained`` writes the names of old, in every version so far; a ``state_dict`` of version 5 has newer ones. Both
are read, of a bare model or of one with a classifier.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import files, tables
from .tables import Table
from .vit import ViT

_PARTS = ("query", "key", "value")
_OUTSIDE = {"embed": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
_TOKENS = {"cls": "embeddings.cls_token", "pos": "embeddings.position_embeddings"}
_ATTENTION = {f"attn/{part}": f"attention.attention.{part}" for part in _PARTS} | {"attn/out": "attention.output.dense"}
_ATTENTION_5 = {f"attn/{part}": f"attention.{part[0]}_proj" for part in _PARTS} | {"attn/out": "attention.o_proj"}
_NORMS = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
_MLP = {"mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"}
_DINO = {"norm1": "norm1", "norm2": "norm2", **_MLP}
_SCALES = {"attn/out": "layer_scale1.lambda1", "mlp/fc2": "layer_scale2.lambda1"}
# for what images do not have, and for a layer behind the features that no classifier reads
UNUSED = re.compile(r"(\w+\.)?(pooler\.dense\.(weight|bias)|embeddings\.mask_token)")


def _table(name: str, prefix: str, block: str, layers: dict[str, str], scales: dict[str, str] | None = None) -> Table:
    inside = lambda names: {ours: f"{prefix}{block}.{{i}}.{theirs}" for ours, theirs in names.items()}
    outside = lambda names: {ours: f"{prefix}{theirs}" for ours, theirs in names.items()}
    top = {**outside(_OUTSIDE), "head": "classifier"}
    return Table(name, top, inside(layers), torch=True, tokens=outside(_TOKENS), scales=inside(scales or {}))


def _both(model: str, prefix: str) -> tuple[Table, ...]:
    """Of version 4 and of version 5."""
    name = f"transformers' {model}"
    if model == "DINOv2":
        layers = ({**_DINO, **_ATTENTION}, {**_DINO, **_ATTENTION_5})
        return tuple(_table(name, prefix, "encoder.layer", names, _SCALES) for names in layers)
    old = {**_NORMS, **_ATTENTION, "mlp/fc1": "intermediate.dense", "mlp/fc2": "output.dense"}
    return (
        _table(name, prefix, "encoder.layer", old),
        _table(name, prefix, "layers", {**_NORMS, **_ATTENTION_5, **_MLP}),
    )


VIT = _both("ViT", "vit.")[0]  # what ``ViTForImageClassification`` reads
DINOV2 = _both("DINOv2", "dinov2.")[0]
TABLES = (*_both("ViT", "vit."), *_both("ViT", ""), *_both("DINOv2", "dinov2."), *_both("DINOv2", ""))


def claims(names: Iterable[str]) -> bool:
    """Are these names of such a model?"""
    return any(re.match(r"(vit|deit|dinov2|dinov2_with_registers)\.|embeddings\.|encoder\.", name) for name in names)


def read(path: Path) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """Parameters of a ViT, blocks stacked, with its head if it has one; the side of its patches; what else is said.

    Raises:
      ValueError: the file is missing or damaged; an array is missing, is not one of such a model, has the wrong shape
        or kind, or is not finite.
    """
    table = _table_of(set(files.names_in(path)))
    wanted = lambda found: _names(path, table, found)
    arrays, said = files.read(path, wanted, lambda arrays: _check_shapes(path, table, arrays))
    return tables.read_params(table, arrays), arrays[table.theirs("embed", "kernel")].shape[-1], said


def _table_of(names: set[str]) -> Table:
    """The one that has most of the names."""
    table = max(TABLES, key=lambda table: len(names.intersection(table.expected(1))))
    qkv = tuple(f"attn/{part}" for part in _PARTS)
    biases = {table.theirs(layer, "bias", 0) for layer in qkv}
    return table if names & biases else table._replace(plain=qkv)


def _names(path: Path, table: Table, found: Iterable[str]) -> list[str]:
    names = {name for name in found if not UNUSED.fullmatch(name)}
    if any(name.endswith("distillation_token") for name in names):
        raise ValueError(
            f"{path} is a DeiT with a token for distillation, which is another network: use the weights without one "
            "(facebook/deit-tiny-patch16-224, say, not deit-tiny-distilled-patch16-224)"
        )
    return tables.check_names(path, table, names, "a ViT")


def _check_shapes(path: Path, table: Table, arrays: dict[str, np.ndarray]) -> None:
    conv, pos = arrays[table.theirs("embed", "kernel")], arrays[table.tokens["pos"]]
    if conv.ndim != 4 or pos.ndim != 3 or not all(x.size for x in arrays.values()):
        raise ValueError(
            f"{path} is not a ViT: its patches are embedded by an array {list(conv.shape)}, their positions by one "
            f"{list(pos.shape)}"
        )
    width, channels, patch, _ = conv.shape
    head = table.theirs("head", "bias")
    model = ViT(
        classes=arrays[head].size if head in arrays else 1,
        patch=patch,
        width=width,
        depth=table.depth(arrays),
        heads=1,
        mlp_width=arrays[table.theirs("mlp/fc1", "bias", 0)].size,
    )
    side = max(1, round((pos.shape[1] - 1) ** 0.5)) * patch if pos.shape[1] else patch

    def whole() -> dict[str, Any]:
        params = model.init(jax.random.key(0), jnp.zeros((1, side, side, channels)))["params"]
        return tables.write_params(table, params, patch)

    tables.check_shapes(path, arrays, jax.eval_shape(whole), f"a ViT of width {width}")
