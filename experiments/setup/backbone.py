"""The model of a run: loaded, looked at before anything compiles, and applied frozen to all images."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.config import Config
from experiments.setup import data, head, hugging_face_data, memory, tfds, user_code
from experiments.setup.on_disk import OnDisk
from experiments.setup.resizing import Resizing
from experiments.setup.resizing import read as read_resizing
from fedlora_jax import dropout, lora
from fedlora_jax.lora import Adapter, Params
from models import families, hub, peft_in, prompts, resizing
from models.backbone import NO_ADAPTER, Backbone, Stem, checked
from models.families import FAMILIES

FORWARD = 256  # images that a frozen model sees at once
KEPT = 0.25  # of the memory there is, at most, for what the stem makes of all images
NANO = Path(__file__).parents[1] / "data" / "nano_glyphs.npz"
BUILT_IN_NAME = "nano"
# by family; made by ``setup.pretrain`` and ``setup.pretrain_clip``
BUILT_IN = {"vit": NANO, "mixer": NANO.with_name("nano_mixer.npz"), "clip": NANO.with_name("nano_clip")}
# What HyperLoRA has learned through rounds of that ViT on the digits (docs/hyperlora.md has the command)
THETA = NANO.with_name("nano_theta.npz")
TEMPLATES = "templates.txt"  # in a folder of images
OF_TEXT = ("zero_shot", "text", "transport")  # heads of models that read text


def load(config: Config, classes: Sequence[str], side: int | None) -> Backbone:
    """The model of ``--model`` with ``--weights``; of a weight file stderr says what is used beside its arrays.

    Raises:
      ValueError: the weights cannot be read, or an own function does not return a backbone.
    """
    backbone = read(config, classes, side)
    if config.weights != BUILT_IN_NAME and not user_code.is_own(config.model or ""):
        facts = "; ".join(f"{fact} {value}" for fact, value in backbone.facts.items())
        print(f"weights {backbone.name}: {facts}", file=sys.stderr)
    return backbone


def weights_of(config: Config) -> tuple[str | Path, str]:
    """The weight file, or a folder with it: as it is given, built in for a family, or fetched; then its name for good.

    Raises:
      ValueError: none is built in for the family, or it cannot be fetched.
    """
    if hub.is_name(config.weights):
        return hub.fetched(config.weights)
    if config.weights != BUILT_IN_NAME or user_code.is_own(config.model or ""):
        return config.weights, ""
    if config.model in FAMILIES and config.model not in BUILT_IN:
        raise ValueError(f"no weights are built in for --model {config.model}: give --weights")
    return BUILT_IN.get(config.model or "vit", NANO), ""


def theta_of(config: Config) -> str | None:
    """The file of ``--theta``, which may be the built-in one; ``None``: a method learns from nothing."""
    return str(THETA) if config.theta == BUILT_IN_NAME else config.theta


def read(config: Config, classes: Sequence[str], side: int | None) -> Backbone:
    """As ``load``, which also says what is used; here stderr has warnings alone."""
    built_in, own = config.weights == BUILT_IN_NAME, user_code.is_own(config.model or "")
    weights, on_hub = weights_of(config)
    chosen = config.model or str(weights)
    if own:
        function, digest = user_code.load(chosen, "a model")
    else:
        function, digest = families.find(config.model, weights), ""
    optional = {name: getattr(config, name) for name in ("mean", "std", "heads", "epsilon", "keep_head", "dtype")}
    if config.adapter is not None and peft_in.summary(Path(config.adapter)).full:
        optional["keep_head"] = False  # it is the adapter's head that is kept
    optional |= {} if own and built_in else {"weights": weights}
    if config.head in OF_TEXT or (config.head == "linear" and "head" in inspect.signature(function).parameters):
        optional["head"] = config.head
    if config.head == "gate" and "head" in inspect.signature(function).parameters:
        optional["head"] = "zero_shot"
    if config.prompts is not None:
        optional["prompts"] = prompts.templates(config.prompts)
    optional |= {name: x for name in ("context", "bridge") if (x := getattr(config, name)) is not None}
    if config.class_names:
        optional["class_names"] = config.class_names
    asked = inspect.signature(function).parameters
    for name, value in optional.items():
        if name in asked:
            continue
        others = [family for family, made in FAMILIES.items() if name in inspect.signature(made.make).parameters]
        instead = f", or --model {' or '.join(others)}" * (built_in and config.model is None and bool(others))
        if name == "head" and value in OF_TEXT:
            wanted = f"use linear, cosine or prototype{instead}"
            raise ValueError(f"{chosen} reads no text to make --head {value} of: {wanted}")
        if value != getattr(Config, name):
            got = ",".join(map(str, value)) if isinstance(value, tuple) else value
            raise ValueError(f"{chosen} does not take --{name.replace('_', '-')}: leave it out{instead}, got {got}")
    families_alone = {"adapter": config.adapter} | ({"usual": templates_of(config.data)} if "usual" in asked else {})
    known = {"classes": classes, "image_size": side} | optional | ({} if own else families_alone)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given = {name: value for name, value in known.items() if name in asked}
        made = user_code.call(chosen, function, known) if own else function(**given)
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    backbone = checked(made, chosen)
    others = {"cosine": head.cosine, "prototype": head.emptied, "gate": head.gated}
    if config.head in others:
        backbone = others[config.head](backbone)
    if own:
        backbone = backbone._replace(facts={**backbone.facts, "model": f"{config.model} ({digest})"})
    if on_hub:
        name = backbone.name if own else on_hub.partition("@")[0].rpartition("/")[2]
        backbone = backbone._replace(name=name, facts={**backbone.facts, "hub": on_hub})
    return backbone


def called(source: str) -> str:
    """The name of a data set in ``--data``: of a source, or of a file or folder."""
    if source.startswith(tfds.PREFIX):
        return re.split("[/:]", source.removeprefix(tfds.PREFIX))[0]
    if source.startswith(hugging_face_data.PREFIX):
        return source.removeprefix(hugging_face_data.PREFIX).partition(":")[0].rpartition("/")[2]
    return Path(source).stem


def templates_of(source: str) -> tuple[str, ...]:
    """What a folder of images says in its ``templates.txt``, one a line; of other data those published for its name.

    Raises:
      ValueError: the file has none, or a line without ``{}``.
    """
    path = Path(source) / TEMPLATES
    if not path.is_file():
        return prompts.of_data(called(source))
    lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    found = tuple(line.strip() for line in lines if line.strip())
    if wrong := [line for line in found if "{}" not in line] or ([] if found else [""]):
        raise ValueError(
            f"{path} has the line {wrong[0]!r}: expected templates, one a line, each with {{}} for the name of a "
            "class, as in a photo of a {}."
        )
    return found


def in_order(config: Config, before: Sequence[str], now: Sequence[str]) -> Config:
    """What options say class by class in the data's order, for classes of which the novel ones now stand last.

    Raises:
      ValueError: it cannot be told class by class.
    """
    if tuple(before) == tuple(now):
        return config
    what = f"--novel {','.join(config.novel)} puts these classes behind all others"
    if config.keep_head:
        raise ValueError(
            f"--keep-head takes the weights' outputs in the data's order, and {what}: leave one of them out"
        )
    if config.class_names:
        prompts.refuse_other_count(before, config.class_names)
    by_class = dict(zip(before, config.class_names, strict=False))
    return dataclasses.replace(config, class_names=tuple(by_class[name] for name in now if by_class))


def sizing(config: Config) -> tuple[int | Resizing | None, dict[str, str]]:
    """How images are made as large as ``--image-size``: as options say, else files beside the weights; and what a run
    says of it, where it is not what it would be by itself.

    Raises:
      ValueError: neither says what is known; or there is no size to come to.
    """
    given, side = {"resize": config.resize, "resample": config.resample}, config.image_size
    asked = [f"--{name}" for name, value in given.items() if value is not None]
    if asked and side is None:
        raise ValueError(f"{asked[0]} says how images become as large as --image-size: give that too")
    if asked and not data.is_decoded(config.data):
        print(f"note: {asked[0]} has no part in arrays of images, such as {config.data}", file=sys.stderr)
    if side is None or not data.is_decoded(config.data):
        return side, {}
    built_in = config.weights == BUILT_IN_NAME or user_code.is_own(config.model or "")
    told, where = ({}, "") if built_in else resizing.beside(weights_of(config)[0])
    said = {name: value or told.get(name) for name, value in given.items()}
    if not any(said.values()):
        return side, {}
    resize, resample = said["resize"] or "crop", said["resample"] or "bicubic"
    return read_resizing(resize, resample, side), {"resized": f"{resize} {resample} ({'given' if asked else where})"}


def cut(backbone: Backbone, last: int | None) -> tuple[Stem | None, Backbone]:
    """What comes before the last blocks, where these alone are adapted, and the rest."""
    if last is None or last == backbone.depth > 0:
        return None, backbone
    if backbone.cut is None:
        raise ValueError(f"--adapt-last {last}: {backbone.name} has no blocks to count; leave it out")
    return backbone.cut(last)


def kept_as(dtype: str, params: Params, full: Sequence[str]) -> Params:
    """The frozen parameters in another precision; those that are trained in full stay as they are."""
    if dtype == Config.base_dtype:
        return params
    trained = set(lora.select(params, full))
    return lora.unflatten(
        {name: x if name in trained else x.astype(jnp.dtype(dtype)) for name, x in lora.flatten(params).items()}
    )


def refuse_too_large(backbone: Backbone, classes: int, count: int, side: int) -> None:
    """Refuse a model that does not fit the data, or whose largest array, of ``count`` images, memory cannot hold."""
    image = image_of(side)
    batch = jax.ShapeDtypeStruct((min(FORWARD, count), *image.shape), image.dtype)
    apply = lambda params, x: backbone.apply(params, NO_ADAPTER, x, training=False)
    try:
        logits, features = jax.eval_shape(apply, backbone.params, batch)
        made = f"logits {logits.dtype}{list(logits.shape)} and features {features.dtype}{list(features.shape)}"
    except Exception as error:  # of somebody's own code, which may raise anything
        raise ValueError(
            f"{backbone.name} cannot be applied to {len(batch)} images of {side} x {side}: {type(error).__name__}: "
            f"{' '.join(str(error).split())}; expected apply(params, adapter, images, *, training=False) -> (logits, "
            "features)"
        ) from error
    fits = logits.shape == (len(batch), classes) and features.ndim == 2 and len(features) == len(batch)
    if not (fits and all(jnp.issubdtype(x.dtype, jnp.floating) for x in (logits, features))):
        raise ValueError(
            f"{backbone.name} makes {made} of {len(batch)} images of {classes} classes: expected floats "
            f"[{len(batch)}, {classes}] and [{len(batch)}, width]"
        )
    memory.refuse_more_than_there_is(
        memory.largest(apply, backbone.params, batch),
        f"{backbone.name} on {batch.shape[0]} images of {side} x {side} makes an array that would",
        "use a smaller --image-size or model",
    )


def refuse_without_dropout(backbone: Backbone, new: Callable[[Array], Adapter], side: int) -> None:
    """Refuse a model whose layers do not look for dropout beside their adapters: it would be without effect."""

    def logits(params: Params, key: Array, image: Array) -> Array:
        return backbone.apply(params, dropout.switched_on(new(key), key, 0.5), image[None], training=True)[0]

    drawn = lambda f, *arguments: str(jax.make_jaxpr(f)(*arguments)).count("random_bits")
    key = jax.eval_shape(jax.random.key, 0)
    if drawn(logits, backbone.params, key, image_of(side)) == drawn(new, key):
        raise ValueError(
            f"{backbone.name} has no layer that drops inputs of its adapter: leave --dropout out, or build the model "
            "of fedlora_jax.Dense and compute with lora.variables(params, adapter)"
        )


def image_of(side: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((side, side, 3), jnp.uint8)


def is_stored(config: Config, stem: Stem, x: np.ndarray | OnDisk) -> bool:
    """Is what the stem makes of all images ``x [n, H, W, 3]`` computed once and kept?"""
    if config.prefix != "auto" or config.augment:
        return config.prefix == "stored"
    have = memory.available()
    return have is None or memory.bytes_of(shape_of_tokens(stem, x)) <= KEPT * have


def shape_of_tokens(stem: Stem, x: np.ndarray | OnDisk) -> jax.ShapeDtypeStruct:
    """Of what the stem makes of images."""
    return jax.eval_shape(stem.apply, stem.params, jax.ShapeDtypeStruct(x.shape, x.dtype))  # type: ignore[return-value]


def tokens_of(stem: Stem, x: np.ndarray | OnDisk, new: Callable[..., Any] = np.empty) -> Any:
    """What the stem makes of images, ``[n, ...]``, in an array that ``new(shape, dtype)`` makes."""
    return _applied(stem.apply, stem.params, x, new)


def frozen_features(backbone: Backbone, x: np.ndarray | OnDisk) -> np.ndarray:
    """What the frozen model makes of images, ``[n, width]``."""
    return _applied(lambda params, x: backbone.apply(params, NO_ADAPTER, x, training=False)[1], backbone.params, x)


def refuse_not_finite(backbone: Backbone, features: np.ndarray, x: np.ndarray | OnDisk) -> None:
    """Refuse a model that makes no numbers of images: of all by its ``features``, of the first by its logits too."""
    first = jax.jit(lambda params, x: backbone.apply(params, NO_ADAPTER, x, training=False)[0])(backbone.params, x[:1])
    for what, made in (("features", features), ("logits", np.asarray(first))):
        if bad := int((~np.isfinite(made).all(-1)).sum()):
            raise ValueError(
                f"{backbone.name} makes {what} that are nan or infinite of {bad} of {len(made)} images: look for a "
                "division by 0, a logarithm of 0, or weights that are not finite"
            )


def _applied(
    apply: Callable[[Params, Array], Array], params: Any, x: np.ndarray | OnDisk, new: Callable[..., Any] = np.empty
) -> Any:
    """The output for all images, in batches of one size (so one compilation: the last one starts earlier)."""
    params, apply = jax.device_put(params), jax.jit(apply)
    size, out = min(FORWARD, len(x)), None
    for start in (min(i, len(x) - size) for i in range(0, len(x), size)):
        part = np.asarray(apply(params, x[start : start + size]))
        out = new((len(x), *part.shape[1:]), part.dtype) if out is None else out
        out[start : start + size] = part
    return out
