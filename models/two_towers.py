"""CLIP with both of its towers: the logits of an image are what the text tower makes of the classes' prompts.

    logits_c = exp(t) f^T g_c        g_c = sum_p g_pc / |sum_p g_pc|,  g_pc: of prompt p with the name of class c

(Radford et al., ICML 2021, arXiv 2103.00020, figure 3 and section 3.1.4). The image tower's parameters are as in
``models.vit``, the text tower's stand under ``text``. Of what makes logits of features, ``head``, ``logit_scale [1]``
is t, and ``context [n, width]``, where there is one, n vectors to be learned before the words of every prompt: Guo et
al., *PromptFL*, IEEE TMC 2023, arXiv 2208.11625. To these ``text/own/kernel [n, width]`` is added, which is zero: a
low-rank update of it is a term of each client's own (Cui et al., *FedPGP*, ICML 2024, arXiv 2405.09771). With
``local [n, width]`` there are two prompts, and a logit is what it costs to bring them and an image's patches together
(``models.transport``). Adapters between the towers: ``models.bridge``. Texts depend on no image: they are computed once
for a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from fedlora_jax import lora
from fedlora_jax.lora import Adapter, Params

from . import transport
from .backbone import Backbone, Layout, Published, Stem
from .bridge import BRIDGE, joined
from .clip import Text
from .vit import TARGETS as IMAGE

TEXT, HEAD, OWN = "text", "head", "own"
SHARED, LOCAL = "context", "local"  # learned vectors: of all clients, and, where logits are transport, of each


def _targets() -> Mapping[str, Sequence[str]]:
    """Every set of the image tower's kernels: of both towers by its own name, of one behind the name of that."""
    only = lambda tower, patterns: tuple(f"^{tower}blocks/{pattern}" for pattern in patterns)
    sets: dict[str, Sequence[str]] = {"default": only("", IMAGE["default"])}
    sets |= {name: patterns for name, patterns in IMAGE.items() if name != "default"}
    for tower, start in (("image", ""), ("text", f"{TEXT}/")):
        sets |= {f"{tower}_{name}": only(start, patterns) for name, patterns in IMAGE.items() if name != "default"}
    return MappingProxyType(sets)


TARGETS = _targets()


class Told(NamedTuple):
    """What the text tower reads: of every prompt the tokens of one text for each class, prompt by prompt."""

    tokens: np.ndarray  # [prompts * classes, length]
    ends: np.ndarray  # [prompts * classes]
    prompts: int


def two_towers(
    image: Backbone,
    text: Text,
    told: Told,
    params: Mapping[str, Any],
    layouts: Mapping[str, Layout],
) -> Backbone:
    """The backbone of both towers.

    Args:
      image: its image tower, whose features count (with ``local`` those of all tokens, the first of the class); how
        it is published is taken for both.
      text: its text tower.
      told: what that reads.
      params: ``text``, and ``head`` with ``logit_scale`` and perhaps ``context``, to which ``local`` may come; and
        perhaps ``bridge``.
      layouts: of the text tower as PyTorch sees it, for adapters that leave or come in; kernels by their names in it.
    """
    head = image.params[HEAD]  # of the image tower alone: its logits are not read
    transported = LOCAL in params[HEAD]

    def of_classes(params: Params, adapter: Adapter, name: str = SHARED) -> Array:
        context = _merged(params, adapter, HEAD, name)
        if name == SHARED and context is not None:
            context = context + _merged(params, adapter, TEXT, OWN)["kernel"]
        tower = joined(params[TEXT], params, adapter)
        variables = lora.variables(tower, adapter.get(TEXT, {}))
        g: Array = text.apply(variables, told.tokens, told.ends, context)  # type: ignore[assignment]
        g = g.reshape(told.prompts, -1, g.shape[-1]).sum(0)
        return g / jnp.linalg.norm(g, axis=-1, keepdims=True)

    def apply(params: Params, adapter: Adapter, images: Array, *, training: bool = False) -> tuple[Array, Array]:
        ours = (TEXT, HEAD, BRIDGE)
        body, rest = ({name: x for name, x in tree.items() if name not in ours} for tree in (params, adapter))
        body = joined({**body, HEAD: head}, params, adapter)
        _, features = image.apply(body, rest, images, training=training)
        scale = jnp.exp(_merged(params, adapter, HEAD, "logit_scale"))
        if not transported:
            return scale * (features @ of_classes(params, adapter).T), features
        texts = jnp.stack([of_classes(params, adapter, name) for name in (SHARED, LOCAL)])
        return scale * transport.similarity(features[:, 1:], texts), features[:, 0]

    def cut(blocks: int) -> tuple[Stem, Backbone]:
        if blocks < len(params.get(BRIDGE, {}).get("bias", ())):
            raise ValueError(f"--adapt-last {blocks}: more blocks than these have adapters, see --bridge")
        stem, rest = image.cut(blocks)  # type: ignore[misc]
        return stem, two_towers(rest, text, told, params, layouts)

    def publish(params: Params) -> Published:
        return image.publish(params)  # type: ignore[misc]

    kept = SHARED not in params[HEAD] and BRIDGE not in params  # no published form has a place for such
    found = {name: _joined(x, layouts[name]) for name, x in image.layouts.items() if name in layouts}
    return image._replace(
        params={**{name: x for name, x in image.params.items() if name != HEAD}, **params},
        apply=apply,
        targets=TARGETS,
        cut=image.cut and cut,
        publish=publish if kept and image.publish is not None else None,
        layouts=found if kept else {},
        texts=None if transported else of_classes,
    )


def _merged(params: Params, adapter: Adapter, part: str, name: str) -> Any:
    """One entry with its update; ``None`` where there is none."""
    if name not in params[part]:
        return None
    own = adapter.get(part, {})
    return lora.merge({name: params[part][name]}, {name: own[name]} if name in own else {})[name]


def _joined(image: Layout, text: Layout) -> Layout:
    """Both towers of one network."""
    under = lambda linear: linear._replace(kernels=tuple(f"{TEXT}/{kernel}" for kernel in linear.kernels))
    own = {module: under(linear) for module, linear in text.linears.items()}
    return Layout({**image.linears, **own}, image.base)
