"""Families of models by name: a new one is one file that makes a ``Backbone``, and one line here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedlora_jax.lora import Params

from . import clip, clip_files, files, mixer, pretrained_mixer, two_towers, vit
from .backbone import Backbone
from .pretrained import vit_backbone
from .pretrained_clip import clip_backbone
from .pretrained_mixer import mixer_backbone


class Family(NamedTuple):
    """A way of making a ``Backbone`` of a weight file.

    Attributes:
      make: ``(weights, classes, image_size, ...) -> Backbone``, given what it asks for by name.
      claims: are the arrays of a file, by their names, those of such a model? The first family that says so has it.
      reads: the formats of weights, for people.
      sizes: the published ones by name -> the side of their images; ``nano`` is ours.
      shapes: ``(size, side) -> params`` as shapes, with a head for one class.
      targets: sets of kernels by name, as its backbones have them.
      text_shapes, text_targets: the same two of a model that has a text tower in it as well (``--head text``).
    """

    make: Callable[..., Backbone]
    claims: Callable[[Iterable[str]], bool]
    reads: Sequence[str] = ()
    sizes: Mapping[str, int] = MappingProxyType({})
    shapes: Callable[[str, int], Params] | None = None
    targets: Mapping[str, Sequence[str]] = MappingProxyType({})
    text_shapes: Callable[[str, int], Params] | None = None
    text_targets: Mapping[str, Sequence[str]] = MappingProxyType({})


def _shapes(factory: Callable[[str, int], Any]) -> Callable[[str, int], Params]:
    """Of a linen model that is made by ``(size, classes)``."""

    def shapes(size: str, side: int) -> Params:
        image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        return jax.eval_shape(factory(size, 1).init, jax.eval_shape(jax.random.key, 0), image)["params"]

    return shapes


def _both_towers(size: str, side: int) -> Params:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    text = jax.eval_shape(clip.clip_text(size).init, jax.eval_shape(jax.random.key, 0), *tokens)["params"]
    return {**_shapes(clip.clip_image)(size, side), two_towers.TEXT: text}


FAMILIES = {
    "clip": Family(
        clip_backbone,
        clip_files.claims,
        ("transformers' CLIPModel", "OpenCLIP"),
        {**dict.fromkeys(clip.SIZES, 224), "nano/4": 16},
        _shapes(clip.clip_image),
        vit.TARGETS,
        _both_towers,
        two_towers.TARGETS,
    ),
    "mixer": Family(
        mixer_backbone,
        pretrained_mixer.claims,
        ("timm", "the original .npz (big_vision)"),
        {"nano/4": 16, "S/32": 224, "S/16": 224, "B/32": 224, "B/16": 224, "L/16": 224, "H/14": 224},
        _shapes(mixer.mixer),
        mixer.TARGETS,
    ),
    "vit": Family(
        vit_backbone,
        lambda names: True,  # the last: it says what is wrong with a file of nobody's
        ("timm", "transformers' ViT, DeiT and DINOv2", "the original .npz (vision_transformer, big_vision)"),
        {"nano/4": 16, "Ti/16": 224, "S/16": 224, "S/14": 224, "B/32": 224, "B/16": 224, "L/16": 224, "H/14": 224},
        _shapes(vit.vit),
        vit.TARGETS,
    ),
}


def of(weights: str | Path) -> str:
    """The family that the names in a file tell."""
    found = files.names_in(files.located(weights))
    return next(name for name, family in FAMILIES.items() if family.claims(found))


def find(name: str | None, weights: str | Path) -> Callable[..., Backbone]:
    """The function of a family; of no name, of the one that the names in the file tell.

    Raises:
      ValueError: there is none of that name.
    """
    if name is not None and name not in FAMILIES:
        names = ", ".join(FAMILIES)
        raise ValueError(f"no family of models {name!r}: expected {names}, or FILE.py:FUNCTION of your own")
    return FAMILIES[name or of(weights)].make


def size_of(name: str, params: Params) -> str | None:
    """The published size that parameters of a family have, whatever their images and classes; ``None``: its own."""
    family = FAMILIES[name]
    body = lambda params: {key: x for key, x in params.items() if key not in ("pos", "head")}
    same = lambda size: jax.tree.map(jnp.shape, body(family.shapes(size, family.sizes[size]))) == own  # type: ignore
    own = jax.tree.map(jnp.shape, body(params))
    return next((size for size in family.sizes if family.shapes and same(size)), None)
