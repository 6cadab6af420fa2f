"""Published weights of CLIP to the towers of ``models.clip``: what is read, what is known of it besides, and a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedlora_jax.lora import Params

from . import bridge as bridging
from . import clip, clip_files, facts, files, peft_in, tables, tokenizer, two_towers
from . import prompts as reading
from .backbone import Backbone, Layout, Published
from .clip import PROMPT, Text
from .clip_files import Format
from .positions import resized
from .pretrained import Pretrained, backbone, start_of_head
from .two_towers import Told
from .vit import TARGETS, ViT

SECTIONS = {"image": "vision_config", "text": "text_config"}
# of transformers' CLIPVisionConfig and CLIPTextConfig, which need not write what is as usual
IMPLIED = {"image": {"heads": 12}, "text": {"heads": 8}}
USUAL = {"act": "quick_gelu", "epsilon": 1e-5}
Head = Literal["zero_shot", "linear", "text", "transport"]
TOWERS = ("text", "transport")  # heads for which the text tower reads in every step
OPEN_CONFIG = "open_clip_config.json"
OPEN_KNOWN = {  # entries of OpenCLIP's configuration that the arrays, or these towers, are as
    "image": ("image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "patch_dropout"),
    "text": ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"),
}


class Clip(NamedTuple):
    """Both towers of a file: the image tower with a head, and the text tower with its parameters (on the host).

    ``text_layouts`` are of the text tower as PyTorch sees it, where ``head`` is of ``TOWERS``.
    """

    image: Pretrained
    text: Text
    text_params: dict[str, Any]
    logit_scale: np.ndarray
    format: Format
    text_layouts: Mapping[str, Layout] = MappingProxyType({})


def load_clip(
    path: str | Path,
    classes: int | Sequence[str] | None = None,
    image_size: int | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    keep_head: bool = False,
    head: Head = "zero_shot",
    prompts: Sequence[str] = (),
    class_names: Sequence[str] = (),
    usual: Sequence[str] = (PROMPT,),
    adapter: str | Path | None = None,
    **options: Any,
) -> Clip:
    """Load a CLIP from arrays under names of transformers or of OpenCLIP; each is used, or refused by name.

    Args:
      path: as for ``models.pretrained.load_vit``. Heads, epsilon and activation of both towers are in ``config.json``
        or ``open_clip_config.json`` beside it, the vocabulary in ``vocab.json`` and ``merges.txt`` or
        ``tokenizer.json``.
      classes, image_size, mean, std, keep_head: as for ``load_vit``; a head is in files of our own alone.
      head: where the file has none for these classes: ``zero_shot``, that of prompts with their names; or ``linear``,
        zero, to be learned; or one of ``TOWERS``, none, as the text tower takes its place (``clip_backbone``).
      prompts: with ``{}`` for the name of a class; features of several are averaged. None: ``usual``.
      class_names: what prompts call the classes, in their order. None: as they are called, with a space for ``_``.
      usual: prompts where nothing else is asked for.
      adapter: a folder of PEFT that a run starts from; what it has of the text tower is put into that tower, which then
        reads the prompts.
      **options: of ``ViT`` (``unroll``, ``remat``, ``dtype``).

    Raises:
      ValueError: the file is missing, damaged, or does not hold such a model; nothing says heads or activation; a
        zero-shot head is asked for without names or without a vocabulary, or prompts where no such head is made.
    """
    source, path = Path(path), files.located(path)
    format, model, text, arrays, inside = clip_files.read(path)
    params, text_params = (tables.read_params(table, arrays) for table in (format.image, format.text))
    scale, said = params.pop("logit_scale").reshape(()), _said(path, format, inside)
    sizes = lambda model: {("num_hidden_layers",): (model.depth,), ("intermediate_size",): (model.mlp_width,)}
    given = {"mean": mean, "std": std}
    known = facts.find(path, inside, given, model.width, 3, sizes(model), ("pool",), said.implied("image"), said.image)
    of_text = facts.find(
        path, {}, {}, text.width, 3, sizes(text), ("mean", "std", "pool"), said.implied("text"), said.text
    )
    told = {"epsilon": of_text.epsilon, "heads": of_text.heads, "act": of_text.act}
    text = text.clone(**told)
    layouts, text_layouts, text_params = _with_adapter(format, model, text, text_params, adapter, head in TOWERS)
    there = params.pop("head", None)
    there = None if head in TOWERS else there
    kernels, kept = start_of_head(path, there, model.projection, known.labels, classes, keep_head)
    if head == "zero_shot" and not kept.startswith("kept"):
        kernels = _zero_shot(path, reading.texts(classes, prompts or usual, class_names), text, text_params, scale)
        kept = f"zero-shot, {reading.said(prompts or usual, class_names)}"
    elif head in TOWERS:
        kept = "the text tower"
    elif prompts or class_names:
        raise ValueError(
            "--prompts and --class-names are of a zero-shot head, and the head is "
            + ("linear" if head == "linear" else kept)
            + ": leave them out"
        )
    params = {**params, "cls": params["cls"][None], "head": kernels}
    antialias = format.image.name != clip_files.HUGGING_FACE.image.name
    params["pos"] = resized(params["pos"], image_size, model.patch, antialias=antialias)
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    of = {"classes": len(kernels["bias"]), "heads": known.heads, "epsilon": known.epsilon, "act": known.act}
    model = model.clone(**of, **options)
    about = {"text": {"heads": text.heads, "ln_eps": text.epsilon, "act": text.act}}
    origins = {**known.origins, "head": kept}
    image = Pretrained(model, params, known.mean, known.std, files.name_of(source), origins, about, layouts)
    return Clip(image, text, text_params, scale, format, text_layouts)


def clip_backbone(
    weights: str | Path,
    classes: int | Sequence[str] | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    keep_head: bool = False,
    head: Head = "zero_shot",
    prompts: Sequence[str] = (),
    context: str | None = None,
    class_names: Sequence[str] = (),
    usual: Sequence[str] = (PROMPT,),
    bridge: str | None = None,
    adapter: str | Path | None = None,
    dtype: str = "float32",
) -> Backbone:
    """The ``Backbone`` of a file, its image tower with a head, or both towers (``models.two_towers``).

    Arguments and errors are those of ``load_clip``, and

    Args:
      context: of ``TOWERS``, vectors to be learned before the words of every prompt: how many, or the words that they
        begin as; prompts are ``"{}."`` then, where nothing else is asked for. ``None``: there are none.
      bridge: of ``TOWERS``, adapters between the towers, see ``models.bridge.asked``. ``None``: there are none.
    """
    for option, value in {"context": context, "bridge": bridge}.items():
        if value is not None and head not in TOWERS:
            raise ValueError(f"--{option} is of --head text, and the head is {head}: leave it out")
    if head == "transport" and context is None:
        raise ValueError("--head transport is of two prompts that are learned: give --context")
    prompts = prompts or (usual if context is None else ("{}.",)) if head in TOWERS else prompts
    given = {"mean": mean, "std": std, "keep_head": keep_head, "head": head}
    given |= {"prompts": prompts, "class_names": class_names, "usual": usual, "adapter": adapter}
    made = load_clip(weights, classes, image_size, **given, dtype=getattr(jnp, dtype))

    def names(params: Params) -> dict[str, np.ndarray]:
        if np.any(params["embed"]["bias"]):
            raise ValueError("embed/bias was trained, and no CLIP has one: leave it out of --full")
        own = {**params, "cls": params["cls"][0], "logit_scale": made.logit_scale}
        if head in TOWERS:
            scale = params["head"]["logit_scale"].reshape(made.logit_scale.shape)
            own = {name: x for name, x in own.items() if name not in ("text", "head")} | {"logit_scale": scale}
        table = made.format.image._replace(top={**made.format.image.top, **clip_files.HEAD})
        arrays = tables.write_params(table, own, made.image.model.patch)
        arrays |= tables.write_params(made.format.text, params.get("text", made.text_params), 1)
        return {name: np.array(x, np.float32, order="C") for name, x in arrays.items()}

    def publish(params: Params) -> Published:
        return Published(names(params), made.image.said(), tokenizer.files_in(files.located(Path(weights)).parent))

    if head not in TOWERS:
        return backbone(made.image, TARGETS, publish)
    if head == "transport":
        made = made._replace(image=made.image._replace(model=made.image.model.clone(pool="tokens")))
    made, middle = _bridged(made, bridge)
    image, said = backbone(made.image, TARGETS, publish), reading.said_of_text(prompts, class_names, context)
    said += ", once shared and once each client's own, by transport" * (head == "transport")
    said += f"; adapters {bridge} in both towers" * (bridge is not None)
    image = image._replace(facts={**image.facts, "head": said})
    texts, contexts = reading.texts(classes, prompts, class_names), 1 + (head == "transport")
    return _with_text(files.located(Path(weights)), image, made, texts, context, contexts, middle)


def _bridged(made: Clip, bridge: str | None) -> tuple[Clip, Params]:
    """The towers with adapters, and the parameters of what these share, by name."""
    if bridge is None:
        return made, {}
    found = bridging.asked(bridge, min(made.image.model.depth, made.text.depth))

    def grown(tower: Params, seed: int) -> Params:
        return {**tower, "blocks": {**tower["blocks"], bridging.BRIDGE: bridging.drawn(found, tower, seed)}}

    image = made.image._replace(params=grown(made.image.params, 1))
    shared = {bridging.BRIDGE: bridging.middle(found, 0)}
    return made._replace(image=image, text_params=grown(made.text_params, 2)), shared


def _with_text(
    path: Path,
    image: Backbone,
    made: Clip,
    texts: list[list[str]],
    context: str | None,
    contexts: int,
    middle: Params,
) -> Backbone:
    """Both towers; the text tower reads, for every template, the text of each class, behind one or two contexts."""
    words, text = reading.tokenizer_of(path, made.text, "a text tower"), made.text
    start = {"logit_scale": np.reshape(np.float32(made.logit_scale), 1)}
    params = {"text": jax.tree.map(lambda x: np.asarray(x, np.float32), made.text_params), "head": start, **middle}
    if context is not None:
        names, own = (two_towers.SHARED, two_towers.LOCAL), reading.contexts_of(context, text, made.text_params, words)
        start |= dict(zip(names[:contexts], own, strict=False))
        params["text"][two_towers.OWN] = {"kernel": np.zeros_like(own[0])}
    tokens, ends = reading.tokens(texts, words, text.length - len(start.get(two_towers.SHARED, ())))
    return two_towers.two_towers(image, text, Told(tokens, ends, len(texts)), params, made.text_layouts)


class Said(NamedTuple):
    """What files beside the weights say of each tower, by where it stands."""

    image: Mapping[str, Mapping[str, Any]]
    text: Mapping[str, Mapping[str, Any]]
    usual: bool = False  # what a configuration of transformers need not write

    def implied(self, tower: str) -> dict[str, Any]:
        return {**USUAL, **IMPLIED[tower]} if self.usual else {}


def _said(path: Path, format: Format, inside: Mapping[str, Any]) -> Said:
    if isinstance(inside.get("text"), dict):  # a file of ours
        return Said({}, {path.name: inside["text"]})
    opened, config = (facts.json_beside(path.parent / name) for name in (OPEN_CONFIG, "config.json"))
    if opened and (format.image.name == clip_files.OPEN_CLIP.image.name or not config):
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


def _with_adapter(
    format: Format, image: ViT, text: Text, text_params: dict[str, Any], adapter: str | Path | None, both_train: bool
) -> tuple[dict[str, Layout], dict[str, Layout], dict[str, Any]]:
    """Both towers as PyTorch sees them, and the text tower, where it is not trained, with what an adapter has of it."""
    adapted = set() if adapter is None else peft_in.modules_of(Path(adapter))
    both = clip_files.layouts(format, image, text, adapted)
    if both is None:
        return {}, {}, text_params
    if adapter is not None and any(both[0].elsewhere.values()) and not both_train:
        found = peft_in.read(Path(adapter), {"transformers": both[1]}, text_params)
        text_params = peft_in.folded(found, text_params)
    return {"transformers": both[0]}, {"transformers": both[1]}, text_params


def _zero_shot(path: Path, texts: list[list[str]], text: Text, params: Any, scale: np.ndarray) -> dict[str, np.ndarray]:
    words = reading.tokenizer_of(path, text, "a zero-shot head of the classes' names")
    reading.tokens(texts, words, text.length)
    features = clip.text_features(text, params, words, [text for own in texts for text in own])
    return clip.zero_shot(features.reshape(len(texts), len(texts[0]), -1), float(scale))
