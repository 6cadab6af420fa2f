"""What makes logits of features: a linear layer, as models have it, or cosines with its columns.

    logits_c = t cos(f, w_c)        Gidaris and Komodakis, CVPR 2018, arXiv 1804.09501, eq. 5

A zero-shot head is a linear layer that a model with a tower for text makes of the classes' names. Who trains a head is
not said here: what ``--full`` finds is trained and shared, what it leaves out is frozen, and it is personal in methods
whose clients keep it (FedPer, FedRep).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from fedlora_jax import lora
from fedlora_jax.lora import Adapter, Params
from models.backbone import Backbone

TEMPERATURE = 10.0  # where t begins, as in the paper's code


def cosine(backbone: Backbone) -> Backbone:
    """The model with cosines of its features and of its head's columns; a new head begins with random ones.

    Raises:
      ValueError: it has no ``head/kernel`` with a column for each class.
    """
    kernel = lora.flatten(backbone.params).get("head/kernel")
    if kernel is None or kernel.ndim != 2:
        raise ValueError(f"--head cosine needs a model with head/kernel [width, classes]; {backbone.name} has none")
    start = np.asarray(kernel, np.float32)
    if not start.any():
        start = np.random.default_rng(0).normal(size=start.shape).astype(np.float32)
    head = {"kernel": start, "temperature": np.full(1, TEMPERATURE, np.float32)}
    facts = {**backbone.facts, "head": f"{backbone.facts.get('head', 'as the model has it')}; cosines with it"}
    return _with(head, backbone)._replace(facts=facts)


def _with(head: dict[str, np.ndarray], backbone: Backbone) -> Backbone:
    linear = backbone.params["head"]  # of the frozen model: what it makes is not read

    def apply(params: Params, adapter: Adapter, images: Array, *, training: bool = False) -> tuple[Array, Array]:
        body, rest = ({name: x for name, x in tree.items() if name != "head"} for tree in (params, adapter))
        _, features = backbone.apply({**body, "head": linear}, rest, images, training=training)
        own = lora.merge(params["head"], adapter.get("head", {}))
        return own["temperature"] * (_unit(features, -1) @ _unit(own["kernel"], 0)), features

    def cut(blocks: int) -> tuple[Any, Backbone]:
        stem, rest = backbone.cut(blocks)  # type: ignore[misc]
        return stem, _with(head, rest)

    params = {**backbone.params, "head": head}
    return backbone._replace(params=params, apply=apply, cut=backbone.cut and cut, publish=None, layouts={})


def _unit(x: Array, axis: int) -> Array:
    return x / jnp.sqrt(jnp.sum(x * x, axis, keepdims=True) + 1e-12)
