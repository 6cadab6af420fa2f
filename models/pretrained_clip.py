"""Published weights of CLIP to the towers of ``models.clip``: names of Hugging Face transformers, and of OpenCLIP."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedlora_jax.lora import Params

from . import bpe, clip, facts, files, tables
from .backbone import Backbone
from .clip import PROMPT, Text
from .pretrained import Pretrained, backbone, resize, start_of_head
from .tables import QKV, Table
from .vit import TARGETS, ViT


class Format(NamedTuple):
    """The names of both towers."""

    image: Table
    text: Table
    told: tuple[str, ...]  # what names of the text tower begin with


_HF = {"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"}
_HF |= {"attn/out": "self_attn.out_proj", **{part: f"self_attn.{part[5]}_proj" for part in QKV}}
_OPEN = {"norm1": "ln_1", "norm2": "ln_2", "mlp/fc1": "mlp.c_fc", "mlp/fc2": "mlp.c_proj"}
_OPEN |= {"attn/qkv": "attn.in_proj_{kind}", "attn/out": "attn.out_proj"}
_HEAD = {"head": "classifier"}  # in files of our own: neither format has one


def _table(name: str, top: dict[str, str], blocks: str, layers: dict[str, str], same: dict[str, str]) -> Table:
    inside = {ours: f"{blocks}.{{i}}.{theirs}" for ours, theirs in layers.items()}
    packed = {"attn/qkv": QKV} if "attn/qkv" in layers else {}
    plain = tuple(layer for layer in ("embed",) if layer in top)
    return Table(name, top, inside, torch=True, same=same, packed=packed, plain=plain)


_HF_IMAGE = {"embed": "embeddings.patch_embedding", "norm_pre": "pre_layrnorm", "norm": "post_layernorm"}
HUGGING_FACE = Format(
    _table(
        "transformers' CLIP",
        {**{ours: f"vision_model.{x}" for ours, x in _HF_IMAGE.items()}, "projection": "visual_projection", **_HEAD},
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
        {"embed": "visual.conv1", "norm_pre": "visual.ln_pre", "norm": "visual.ln_post", **_HEAD},
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
SECTIONS = {"image": "vision_config", "text": "text_config"}
# of transformers' CLIPVisionConfig and CLIPTextConfig, which need not write what is as usual
IMPLIED = {"image": {"heads": 12}, "text": {"heads": 8}}
USUAL = {"act": "quick_gelu", "epsilon": 1e-5}
OPEN_CONFIG = "open_clip_config.json"
OPEN_KNOWN = {  # entries of OpenCLIP's configuration that the arrays, or these towers, are as
    "image": ("image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "patch_dropout"),
    "text": ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"),
}


class Clip(NamedTuple):
    """Both towers of a file: the image tower with a head, and the text tower with its parameters (on the host)."""

    image: Pretrained
    text: Text
    text_params: dict[str, Any]
    logit_scale: np.ndarray
    format: Format


def claims(names: Iterable[str]) -> bool:
    """Are these names of a CLIP (or of SigLIP, which is refused by name)?"""
    return any(re.match(r"(text_model|vision_model|visual)\.|logit_scale$", name) for name in names)


def load_clip(
    path: str | Path,
    classes: int | Sequence[str] | None = None,
    image_size: int | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    keep_head: bool = False,
    head: Literal["zero_shot", "linear"] = "zero_shot",
    prompt: str = PROMPT,
    **options: Any,
) -> Clip:
    """Load a CLIP from arrays under names of transformers or of OpenCLIP; each is used, or refused by name.

    Args:
      path: as for ``models.pretrained.load_vit``. Heads, epsilon and activation of both towers are in ``config.json``
        or ``open_clip_config.json`` beside it, the vocabulary in ``vocab.json`` and ``merges.txt`` or
        ``tokenizer.json``.
      classes, image_size, mean, std, keep_head: as for ``load_vit``; a head is in files of our own alone.
      head: where the file has none for these classes: ``zero_shot``, that of prompts with their names; or ``linear``,
        zero, to be learned.
      prompt: with ``{}`` for the name of a class, in which ``_`` is a space.
      **options: of ``ViT`` (``unroll``, ``remat``, ``dtype``).

    Raises:
      ValueError: the file is missing, damaged, or does not hold such a model; nothing says heads or activation; a
        zero-shot head is asked for without names or without a vocabulary.
    """
    source, path = Path(path), files.located(path)
    format, model, text, arrays, inside = _read(path)
    params, text_params = (tables.read_params(table, arrays) for table in (format.image, format.text))
    scale, said = params.pop("logit_scale").reshape(()), _said(path, inside)
    sizes = lambda model: {("num_hidden_layers",): (model.depth,), ("intermediate_size",): (model.mlp_width,)}
    given = {"mean": mean, "std": std}
    known = facts.find(path, inside, given, model.width, 3, sizes(model), ("pool",), said.implied("image"), said.image)
    of_text = facts.find(
        path, {}, {}, text.width, 3, sizes(text), ("mean", "std", "pool"), said.implied("text"), said.text
    )
    told = {"epsilon": of_text.epsilon, "heads": of_text.heads, "act": of_text.act}
    text = text.clone(**told)
    kernels, kept = start_of_head(path, params.pop("head", None), model.projection, known.labels, classes, keep_head)
    if head == "zero_shot" and not kept.startswith("kept"):
        kernels = _zero_shot(path, classes, prompt, text, text_params, scale)
        kept = f"zero-shot, {prompt!r} with the classes' names"
    params = {**params, "cls": params["cls"][None], "head": kernels}
    params["pos"] = resize(params["pos"], image_size, model.patch)
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    of = {"classes": len(kernels["bias"]), "heads": known.heads, "epsilon": known.epsilon, "act": known.act}
    model = model.clone(**of, **options)
    about = {"text": {"heads": text.heads, "ln_eps": text.epsilon, "act": text.act}}
    origins = {**known.origins, "head": kept}
    image = Pretrained(model, params, known.mean, known.std, files.name_of(source), origins, about)
    return Clip(image, text, text_params, scale, format)


def clip_backbone(
    weights: str | Path,
    classes: int | Sequence[str] | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    keep_head: bool = False,
    head: Literal["zero_shot", "linear"] = "zero_shot",
    prompt: str = PROMPT,
    dtype: str = "float32",
) -> Backbone:
    """The ``Backbone`` of a file, its image tower with a head; arguments and errors as for ``load_clip``."""
    given = {"mean": mean, "std": std, "keep_head": keep_head, "head": head, "prompt": prompt}
    made = load_clip(weights, classes, image_size, **given, dtype=getattr(jnp, dtype))

    def names(params: Params) -> dict[str, np.ndarray]:
        own = {**params, "cls": params["cls"][0], "logit_scale": made.logit_scale}
        table = made.format.image._replace(top={**made.format.image.top, **_HEAD})
        arrays = tables.write_params(table, own, made.image.model.patch)
        arrays |= tables.write_params(made.format.text, made.text_params, 1)
        return {name: np.array(x, np.float32, order="C") for name, x in arrays.items()}

    return backbone(made.image, TARGETS, names)


class Said(NamedTuple):
    """What files beside the weights say of each tower, by where it stands."""

    image: dict[str, Mapping[str, Any]]
    text: dict[str, Mapping[str, Any]]
    usual: bool = False  # what a configuration of transformers need not write

    def implied(self, tower: str) -> dict[str, Any]:
        return {**USUAL, **IMPLIED[tower]} if self.usual else {}


def _said(path: Path, inside: Mapping[str, Any]) -> Said:
    if isinstance(inside.get("text"), dict):  # a file of ours
        return Said({}, {path.name: inside["text"]})
    opened, config = (facts.json_beside(path.parent / name) for name in (OPEN_CONFIG, "config.json"))
    if opened:
        return _said_by_open_clip(path.parent / OPEN_CONFIG, opened)
    parts = [{**_part(config, name), **_part(config, f"{name}_dict")} for name in SECTIONS.values()]
    image, text = ({f"{name} in config.json": x} for name, x in zip(SECTIONS.values(), parts, strict=True))
    return Said(image, text, config.get("model_type") == "clip")


def _said_by_open_clip(path: Path, config: Mapping[str, Any]) -> Said:
    model, shown = _part(config, "model_cfg"), _part(config, "preprocess_cfg")
    parts = {"image": _part(model, "vision_cfg"), "text": _part(model, "text_cfg")}
    for tower, part in parts.items():
        if unknown := [name for name, x in part.items() if name not in OPEN_KNOWN[tower] and x not in (None, False)]:
            raise ValueError(
                f"{path} tells of another network: {unknown[0]} is {part[unknown[0]]!r}, which nothing computes"
            )
    quick = model.get("quick_gelu", False)  # of both towers; OpenCLIP's own default
    both = {"epsilon": 1e-5, "act": "quick_gelu" if quick else "gelu"}
    width, head = parts["image"].get("width"), parts["image"].get("head_width", 64)
    heads = width // head if isinstance(width, int) and isinstance(head, int) and head > 0 else None
    image = {**both, "hidden_size": width, "num_hidden_layers": parts["image"].get("layers"), "heads": heads}
    image |= {name: shown[name] for name in ("mean", "std") if name in shown}
    text = {**both, "hidden_size": parts["text"].get("width"), "heads": parts["text"].get("heads")}
    return Said({path.name: image}, {path.name: text})


def _part(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = config.get(name)
    return part if isinstance(part, dict) else {}


def _read(path: Path) -> tuple[Format, ViT, Text, dict[str, np.ndarray], dict[str, Any]]:
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
    tower = Text(*tokens.shape[:1], *places.shape, text.depth(arrays), 1, hidden(text), projection)
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


def _zero_shot(
    path: Path, classes: int | Sequence[str] | None, prompt: str, text: Text, params: Any, scale: np.ndarray
) -> dict[str, np.ndarray]:
    if classes is None or isinstance(classes, int):
        raise ValueError(f"a zero-shot head is made of the classes' names, got {classes}: give them, or head='linear'")
    if "{}" not in prompt:
        raise ValueError(f"the prompt {prompt!r} has no {{}} for the name of a class")
    tokenizer = bpe.find(path.parent)
    if tokenizer is None:
        raise ValueError(
            f"{path} has no vocabulary beside it, which a zero-shot head of the classes' names needs: put "
            f"{bpe.VOCABULARY} and {bpe.MERGES}, or {bpe.BOTH}, there"
        )
    if max(tokenizer.ids.values()) >= text.vocabulary:
        raise ValueError(
            f"the vocabulary beside {path} has {len(tokenizer.ids)} tokens, its text tower {text.vocabulary}: they are "
            "not of one model"
        )
    texts = [prompt.replace("{}", name.replace("_", " ")) for name in classes]
    return clip.zero_shot(clip.text_features(text, params, tokenizer, texts), float(scale))
