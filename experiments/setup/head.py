"""What makes logits of features: a linear layer, as models have it, or cosines with its columns.

    logits_c = t cos(f, w_c)        Gidaris and Komodakis, CVPR 2018, arXiv 1804.09501, eq. 5

A linear layer starts as a model has it, or from what the classes' names or the clients' images say:

    logits_c = (2 f^T m_c - |m_c|^2) / s = (|f|^2 - |f - m_c|^2) / s
    m_c = sum_k n_kc m_kc / sum_k n_kc        m_kc: the mean feature of the n_kc images of class c on client k

(Snell et al., NeurIPS 2017, arXiv 1703.05175, section 2.4), as clients would send them (Tan et al., *FedProto*, AAAI
2022, arXiv 2105.00243, eq. 6). The s is ours: the mean of ``|f - m_c|^2`` over the images of the clients, without which
logits grow with the width of features, and training diverges. A zero-shot head is what a model with a tower for text
makes of the classes' names. Before it may stand a gate:

    logits = W^T h,  h = |f| u / |u|,  u = f * softmax(B tanh(A f))       (Lu et al., *FedCLIP*, 2023, arXiv 2302.13485)

(biases left out here); ours: B starts at zero, and so the model as it is without a gate. Who trains a head is not said
here: what ``--full`` finds is trained and shared, what it leaves out is frozen, and it is personal in methods whose
clients keep it (FedPer, FedRep).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedlora_jax import lora
from fedlora_jax.lora import Adapter, Params
from models.backbone import Backbone

TEMPERATURE = 10.0  # where t begins, as in the paper's code
PARTS = ("head/kernel", "head/bias")


def _linear(backbone: Backbone, asked: str) -> dict[str, Any]:
    """All parameters by name, of a model with a linear layer ``head``."""
    flat = lora.flatten(backbone.params)
    if not all(name in flat for name in PARTS) or flat[PARTS[0]].ndim != 2:
        raise ValueError(
            f"--head {asked} needs a model with head/kernel [width, classes] and head/bias; {backbone.name} has none"
        )
    return flat


def emptied(backbone: Backbone) -> Backbone:
    """The model with a head of zeros, where another one is to start from.

    Raises:
      ValueError: it has no linear layer ``head``.
    """
    flat = _linear(backbone, "prototype")
    flat |= {name: np.zeros_like(flat[name]) for name in PARTS}
    facts = {**backbone.facts, "head": "prototypes: mean features of each class over the training clients"}
    return backbone._replace(params=lora.unflatten(flat), facts=facts)


def refuse_frozen(full: Sequence[str], params: Params) -> None:
    """Prototypes are other ones for each seed, as its clients are, and only what is trained is."""
    if not set(PARTS) <= set(lora.select(params, full)):
        raise ValueError(
            f"--head prototype starts a head that is trained, and --full {','.join(full) or repr('')} leaves it "
            "frozen: name it there (^head/)"
        )


def prototypes(features: np.ndarray, labels: np.ndarray, clients: Sequence[np.ndarray], classes: int) -> Params:
    """The linear layer of the nearest mean; of a class that nobody has, the mean of all images.

    Args:
      features: ``[n, width]``.
      labels: ``[n]``.
      clients: rows of each that trains.
      classes: how many there are.
    """
    sums, counts, squares = np.zeros((classes, features.shape[1])), np.zeros(classes), 0.0
    for rows in clients:
        own = np.asarray(features[rows], float)
        np.add.at(sums, labels[rows], own)
        np.add.at(counts, labels[rows], 1)
        squares += (own**2).sum()
    means = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], sums.sum(0) / counts.sum())
    within = squares - counts @ (means**2).sum(1)  # sum of |f - m_c|^2
    spread = within / counts.sum() if within > 1e-6 * squares else 1.0
    return {"kernel": np.float32(2 * means.T / spread), "bias": np.float32(-(means**2).sum(1) / spread)}


def started(adapters: Adapter, heads: Sequence[Params]) -> Adapter:
    """Adapters ``[seeds, ...]`` whose heads are these, one of each seed."""
    return {**adapters, "head": {kind: jnp.stack([head[kind] for head in heads]) for kind in heads[0]}}


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
    return _with(head, _cosines, backbone)._replace(facts=facts)


def gated(backbone: Backbone) -> Backbone:
    """The model with a gate on its features before its head, ``head/gate``.

    Raises:
      ValueError: it has no linear layer ``head``.
    """
    flat = _linear(backbone, "gate")
    width, draw = len(flat[PARTS[0]]), np.random.default_rng(0).uniform
    layer = lambda kernel: {"kernel": np.asarray(kernel, np.float32), "bias": np.zeros(width, np.float32)}
    drawn = draw(-1, 1, (width, width)) / width**0.5
    head = {**backbone.params["head"], "gate": {"fc1": layer(drawn), "fc2": layer(np.zeros((width, width)))}}
    facts = {**backbone.facts, "head": f"{backbone.facts.get('head', 'as the model has it')}; behind a gate"}
    return _with(head, _behind_a_gate, backbone)._replace(facts=facts)


def _behind_a_gate(own: Params, features: Array) -> Array:
    dense = lambda x, layer: x @ layer["kernel"] + layer["bias"]
    gate = jax.nn.softmax(dense(jnp.tanh(dense(features, own["gate"]["fc1"])), own["gate"]["fc2"]))
    length = jnp.linalg.norm(features, axis=-1, keepdims=True)
    return dense(length * _unit(gate.shape[-1] * gate * features, -1), own)


def _cosines(own: Params, features: Array) -> Array:
    return own["temperature"] * (_unit(features, -1) @ _unit(own["kernel"], 0))


def _with(head: Params, logits: Callable[[Params, Array], Array], backbone: Backbone) -> Backbone:
    """The model with another head, and what makes logits of its parameters and features."""
    linear = backbone.params["head"]  # of the frozen model: what it makes is not read

    def apply(params: Params, adapter: Adapter, images: Array, *, training: bool = False) -> tuple[Array, Array]:
        body, rest = ({name: x for name, x in tree.items() if name != "head"} for tree in (params, adapter))
        _, features = backbone.apply({**body, "head": linear}, rest, images, training=training)
        return logits(lora.merge(params["head"], adapter.get("head", {})), features), features

    def cut(blocks: int) -> tuple[Any, Backbone]:
        stem, rest = backbone.cut(blocks)  # type: ignore[misc]
        return stem, _with(head, logits, rest)

    params = {**backbone.params, "head": head}
    return backbone._replace(params=params, apply=apply, cut=backbone.cut and cut, publish=None, layouts={})


def _unit(x: Array, axis: int) -> Array:
    return x / jnp.sqrt(jnp.sum(x * x, axis, keepdims=True) + 1e-12)
