"""Weight files of CLIPs, under names of transformers or of OpenCLIP: the towers in one, every array of them used."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import files, tables
from .backbone import Layout
from .clip import Text
from .tables import QKV, Table
from .vit import ViT


class Format(NamedTuple):
    """The names of both towers."""

    image: Table
    text: Table
    told: tuple[str, ...]  # what names of the text tower begin with


_HF = {"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"}
_HF |= {"attn/out": "self_attn.out_proj", **{part: f"self_attn.{part[5]}_proj" for part in QKV}}
_OPEN = {"norm1": "ln_1", "norm2": "ln_2", "mlp/fc1": "mlp.c_fc", "mlp/fc2": "mlp.c_proj"}
_OPEN |= {"attn/qkv": "attn.in_proj_{kind}", "attn/out": "attn.out_proj"}
HEAD = {"head": "classifier"}  # in files of our own: neither format has one


def _table(name: str, top: dict[str, str], blocks: str, layers: dict[str, str], same: dict[str, str]) -> Table:
    inside = {ours: f"{blocks}.{{i}}.{theirs}" for ours, theirs in layers.items()}
    packed = {"attn/qkv": QKV} if "attn/qkv" in layers else {}
    plain = tuple(layer for layer in ("embed",) if layer in top)
    return Table(name, top, inside, torch=True, same=same, packed=packed, plain=plain)


_HF_IMAGE = {"embed": "embeddings.patch_embedding", "norm_pre": "pre_layrnorm", "norm": "post_layernorm"}
HUGGING_FACE = Format(
    _table(
        "transformers' CLIP",
        {**{ours: f"vision_model.{x}" for ours, x in _HF_IMAGE.items()}, "projection": "visual_projection", **HEAD},
        "vision_model.encoder.layers",
        _HF,
        {
            "cls": "vision_model.embeddings.class_embedding",
            "pos": "vision_model.embeddings.position_embedding.weight",
            "logit_scale": "logit_scale",
        },
    ),
    _table(
        "transformers' CLIP",
        {"norm": "text_model.final_layer_norm", "projection": "text_projection"},
        "text_model.encoder.layers",
        _HF,
        {
            "tokens": "text_model.embeddings.token_embedding.weight",
            "pos": "text_model.embeddings.position_embedding.weight",
        },
    ),
    ("text_model.", "text_projection"),
)
OPEN_CLIP = Format(
    _table(
        "OpenCLIP's",
        {"embed": "visual.conv1", "norm_pre": "visual.ln_pre", "norm": "visual.ln_post", **HEAD},
        "visual.transformer.resblocks",
        _OPEN,
        {
            "cls": "visual.class_embedding",
            "pos": "visual.positional_embedding",
            "projection/kernel": "visual.proj",
            "logit_scale": "logit_scale",
        },
    ),
    _table(
        "OpenCLIP's",
        {"norm": "ln_final"},
        "transformer.resblocks",
        _OPEN,
        {
            "tokens": "token_embedding.weight",
            "pos": "positional_embedding",
            "projection/kernel": "text_projection",
        },
    ),
    ("transformer.", "token_embedding", "positional_embedding", "ln_final", "text_projection"),
)
UNUSED = re.compile(r"(vision|text)_model\.embeddings\.position_ids|attn_mask")  # they count, or hide what is behind
OTHERS = {
    r"logit_bias|vision_model\.head\.|visual\.attn_pool|.*MAPHead": "SigLIP: pooled by attention, scored by a sigmoid",
    r"visual\.(layer\d|attnpool|conv[23]|bn\d)": "its image tower is a ResNet",
    r"visual\.trunk\.": "its image tower is timm's",
    r"text\.": "its text tower is of another kind",
}


BASE = "transformers.CLIPModel.from_pretrained(MODEL)"


def layouts(format: Format, image: ViT, text: Text, adapted: Iterable[str]) -> tuple[Layout, Layout] | None:
    """Both towers as PyTorch sees them, without a head, which nobody there has; OpenCLIP packs its attention: ``None``.

    Args:
      format: whose names these are.
      image, text: the towers.
      adapted: modules of an adapter that comes in.
    """
    if format.image.name != HUGGING_FACE.image.name:
        return None
    bare = format.image._replace(top={ours: x for ours, x in format.image.top.items() if ours != "head"})
    ours, theirs = tables.linears(bare, image.depth), tables.linears(format.text, text.depth)
    return Layout(ours, BASE, {x: x in adapted for x in theirs}), Layout(theirs, BASE, dict.fromkeys(ours, False))


def claims(names: Iterable[str]) -> bool:
    """Are these names of a CLIP (or of SigLIP, which is refused by name)?"""
    return any(re.match(r"(text_model|vision_model|visual)\.|logit_scale$", name) for name in names)


def read(path: Path) -> tuple[Format, ViT, Text, dict[str, np.ndarray], dict[str, Any]]:
    """The towers that a file has, their arrays, and what it says besides."""
    names = {name for name in files.names_in(path) if not UNUSED.fullmatch(name)}
    image = tables.closest((HUGGING_FACE.image, OPEN_CLIP.image), names)
    format, made = HUGGING_FACE if image == HUGGING_FACE.image else OPEN_CLIP, []
    format = format._replace(image=tables.fitted(format.image, names))

    def wanted(found: Iterable[str]) -> list[str]:
        found = {name for name in found if not UNUSED.fullmatch(name)}
        text = {name for name in found if name.startswith(format.told)}
        own = tables.check_names(path, format.image, found - text, "a CLIP", OTHERS)
        return [*own, *tables.check_names(path, format.text, text, "the text tower of a CLIP", OTHERS)]

    arrays, inside = files.read(path, wanted, lambda arrays: made.append(_towers(path, format, arrays)))
    return format, *made[0], arrays, inside


def _towers(path: Path, format: Format, arrays: Mapping[str, np.ndarray]) -> tuple[ViT, Text]:
    """The networks that a few arrays tell the size of, if all of them fit."""
    image, text = format.image, format.text
    conv, pos = arrays[image.theirs("embed", "kernel")], arrays[image.same["pos"]]
    tokens, places = (arrays[text.same[name]] for name in ("tokens", "pos"))
    if conv.ndim != 4 or {x.ndim for x in (pos, tokens, places)} != {2} or not all(x.size for x in arrays.values()):
        raise ValueError(
            f"{path} is not a CLIP: it embeds patches by an array {list(conv.shape)}, their positions by one "
            f"{list(pos.shape)}, tokens of text by {list(tokens.shape)}, their positions by {list(places.shape)}"
        )
    hidden = lambda table: arrays[table.theirs("mlp/fc1", "bias", 0)].size
    projection = next(arrays[name].shape for name in ("visual_projection.weight", "visual.proj") if name in arrays)
    projection = projection[0] if "projection" in image.top else projection[-1]
    classes = arrays[image.theirs("head", "bias")].size if "head" in image.top else 1
    kind = {"norm_pre": True, "projection": projection}
    model = ViT(classes, conv.shape[-1], len(conv), image.depth(arrays), 1, hidden(image), **kind)
    tower = Text(len(tokens), len(places), places.shape[1], text.depth(arrays), 1, hidden(text), projection)
    side = max(1, round((len(pos) - 1) ** 0.5)) * model.patch
    scale = jnp.zeros(arrays["logit_scale"].shape if arrays["logit_scale"].size == 1 else ())

    def whole() -> dict[str, Any]:
        key, one = jax.random.key(0), jnp.zeros((1,), jnp.int32)
        params = model.init(key, jnp.zeros((1, side, side, conv.shape[1])))["params"]
        params = {**params, "cls": params["cls"][0], "logit_scale": scale}
        own = tower.init(key, one[None], one)["params"]
        return tables.write_params(image, params, model.patch) | tables.write_params(text, own, 1)

    tables.check_shapes(path, arrays, jax.eval_shape(whole), f"a CLIP of width {model.width} and {tower.width}")
    return model, tower
