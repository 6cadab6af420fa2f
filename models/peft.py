"""Adapters of Hugging Face PEFT: folders with an ``adapter_config.json`` and an ``adapter_model.safetensors``.

Theirs are ``A [rank, in]`` and ``B [out, rank]``, our ``a`` and ``b`` transposed, with the factor ``lora_alpha / r``
(Hu et al., 2021, arXiv 2106.09685, sec. 4.1). Where several of our kernels are one layer there (queries, keys and
values) they are one update of the sum of their ranks: A stacked, B block by block, which is exact.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fedlora_jax import lora
from fedlora_jax.lora import Adapter, Params

from .backbone import Layout, Linear
from .files import ADAPTER

CONFIG, WEIGHTS = ADAPTER, "adapter_model.safetensors"
PREFIX = "base_model.model."


class Update(NamedTuple):
    """A low-rank update of one layer, as PEFT holds it."""

    a: np.ndarray  # [rank, in]
    b: np.ndarray  # [out, rank]
    scale: float
    ranks: list[int]  # of each of our kernels in it


def unheld(layout: Layout, params: Params, adapter: Adapter) -> list[str]:
    """Names of what of an adapter no such folder can hold: what is no layer there, or multiplied by zero there."""
    flat, base = lora.flatten(jax.device_get(adapter)), lora.flatten(params)
    places: dict[str, list[Linear]] = {}
    for linear in layout.linears.values():
        for kernel in linear.kernels:
            places.setdefault(kernel, []).append(linear)

    def is_held(name: str, x: Any) -> bool:
        own = places.get(_kernel(name), [])
        if not lora.is_lora(x):
            others = [kernel for linear in own for kernel in linear.kernels]
            return any(linear.row is None for linear in own) and not any(lora.is_lora(flat.get(k)) for k in others)
        rows = len(x.a) if x.a.ndim > 2 else 1
        cut_off = (x.b[linear.row][:, linear.gain == 0].any() for linear in own if linear.gain is not None)
        return base[name].ndim <= 3 and len(own) == rows and not any(cut_off)

    return [name for name, x in flat.items() if not is_held(name, x)] + [
        module for module, is_in in layout.elsewhere.items() if is_in
    ]


def files_of(layout: Layout, params: Params, adapter: Adapter, said: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a folder that ``peft.PeftModel.from_pretrained`` puts onto the published network.

    Args:
      layout: whose names the modules have.
      params: that the adapter belongs to.
      adapter: of it, without anything ``unheld``; what is trained in full leaves as the layer that it makes.
      said: what else is to be known, for the metadata.
    """
    from safetensors.numpy import save  # not needed to import this

    base, flat = lora.flatten(jax.device_get(params)), lora.flatten(jax.device_get(adapter))
    arrays, updates, full = {}, {}, []
    for module, linear in layout.linears.items():
        names = [name for kernel in linear.kernels for name in (kernel, bias_of(kernel))]
        if (update := _update(linear, base, flat)) is not None:
            updates[module] = update
            arrays |= {f"{module}.lora_A.weight": update.a, f"{module}.lora_B.weight": update.b}
        elif any(name in flat for name in names):
            full.append(module)
            arrays |= {f"{module}.{kind}": x for kind, x in _layer(linear, base, flat).items()}
    arrays = {f"{PREFIX}{name}": np.ascontiguousarray(x, np.float32) for name, x in arrays.items()}
    parts = {module: update.ranks for module, update in updates.items() if len(update.ranks) > 1}
    meta = {name: json.dumps(x) for name, x in {**said, "parts": parts}.items()}
    config = json.dumps(_config(updates, full), indent=2, sort_keys=True)
    return {CONFIG: f"{config}\n".encode(), WEIGHTS: save(arrays, {"format": "pt", **meta})}


def _config(updates: Mapping[str, Update], full: list[str]) -> dict[str, Any]:
    ranks = {module: len(update.a) for module, update in updates.items()}
    alphas = {module: update.scale * ranks[module] for module, update in updates.items()}
    usual = lambda values: Counter(values.values()).most_common(1)[0][0]
    others = lambda values: {module: x for module, x in values.items() if x != usual(values)}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": usual(ranks),
        "lora_alpha": usual(alphas),
        "rank_pattern": others(ranks),
        "alpha_pattern": others(alphas),
        "target_modules": list(updates),
        "modules_to_save": full or None,
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }


def _update(linear: Linear, base: Mapping[str, Any], flat: Mapping[str, Any]) -> Update | None:
    """Of a layer, if any of its kernels has one; columns that are all zero, which a client does not hold, left out."""
    row = slice(None) if linear.row is None else linear.row
    own = {kernel: flat[kernel] for kernel in linear.kernels if lora.is_lora(flat.get(kernel))}
    if not own:
        return None
    scale, columns, blocks, ranks = next(iter(own.values())).scale, [], [], []
    for kernel in linear.kernels:
        if kernel not in own:
            ranks.append(0)
            blocks.append(np.zeros((base[kernel].shape[-1], 0)))
            continue
        a, b = (np.asarray(x, float)[row].T for x in (own[kernel].a, own[kernel].b * (own[kernel].scale / scale)))
        held = (a != 0).any(1) | (b != 0).any(0)
        held[0] |= not held.any()
        columns.append(np.pad(a[held], ((0, 0), (0, linear.extra))))
        blocks.append(b[:, held])
        ranks.append(int(held.sum()))
    a, b = np.concatenate(columns), np.zeros((sum(map(len, blocks)), sum(ranks)))
    top, left = 0, 0
    for block in blocks:
        b[top : top + len(block), left : left + block.shape[1]] = block
        top, left = top + len(block), left + block.shape[1]
    return Update(a, b if linear.gain is None else _over(b, linear.gain), scale, ranks)


def _layer(linear: Linear, base: Mapping[str, Any], flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A layer that is trained in full, outside of the blocks, as it is after training."""
    now = lambda name: np.asarray(base[name], float) + np.asarray(flat.get(name, 0.0), float)
    weight = np.concatenate([now(kernel).T for kernel in linear.kernels])
    made = {"weight": np.pad(weight, ((0, 0), (0, linear.extra)))}
    if all(bias_of(kernel) in base for kernel in linear.kernels):
        made["bias"] = np.concatenate([now(bias_of(kernel)) for kernel in linear.kernels])
    return made if linear.gain is None else {kind: _over(x, linear.gain) for kind, x in made.items()}


def _over(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """``x [out, ...]`` over what multiplies it, where that is not zero (else ``x`` is, see ``unheld``)."""
    gain = np.asarray(gain, float).reshape(-1, *(1,) * (x.ndim - 1))
    return np.divide(x, gain, out=np.zeros_like(x), where=gain != 0)


def bias_of(kernel: str) -> str:
    """The name of a layer's bias, by that of its kernel."""
    return f"{kernel.removesuffix('kernel')}bias"


def _kernel(name: str) -> str:
    return f"{name.removesuffix('bias')}kernel" if name.endswith("bias") else name
