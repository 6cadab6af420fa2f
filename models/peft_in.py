"""Adapters of Hugging Face PEFT that come in: what a folder holds, for our kernels. ``models.peft`` writes them.

Whatever ``adapter_config.json`` says is used, decides nothing of what an adapter computes, or is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedlora_jax import lora
from fedlora_jax.lora import Params

from . import files
from .backbone import Layout, Linear
from .peft import CONFIG, PREFIX, WEIGHTS, Update, bias_of

# what decides how an adapter was trained or is saved, or what is read beside it, and nothing of what it computes
IDLE = {
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules"),
    *("inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "modules_to_save"),
    *("peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"),
}
USED = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora"}
KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # initialisations; others change what they adapt
KINDS = r"base_model\.model\.(.+?)\.(lora_A\.weight|lora_B\.weight|weight|bias)"


class Summary(NamedTuple):
    """What an adapter is without the model that it is of.

    Attributes:
      rank: the largest of our kernels.
      scale: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)``; of some layers it may be another.
      full: whether layers are in it as a whole.
    """

    rank: int
    scale: float
    full: bool


class Found(NamedTuple):
    """An adapter by our names.

    Attributes:
      updates: kernel -> which of the blocks (``None``: it is in none) -> ``(a [in, rank], b [rank, out], scale)``.
      full: parameter -> as a whole.
      labels: the classes that a head in it is for, where it says.
    """

    updates: dict[str, dict[int | None, tuple[np.ndarray, np.ndarray, float]]]
    full: dict[str, np.ndarray]
    labels: tuple[str, ...] | None


def summary(folder: Path) -> Summary:
    """What is known without a model.

    Raises:
      ValueError: it is no folder of an adapter that can be read.
    """
    config, modules, said = _parts(folder)
    updates = _updates(folder, config, modules, said)
    rank = max(max(update.ranks) for update in updates.values())
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    return Summary(rank, scale, any("weight" in kinds for kinds in modules.values()))


def read(folder: Path, layouts: Mapping[str, Layout], params: Params) -> Found:
    """The adapter in a folder.

    Args:
      folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
      layouts: of the model, see ``Backbone``.
      params: of the model.

    Raises:
      ValueError: it is missing or damaged, not of this model, or computes what nothing here does.
    """
    config, modules, said = _parts(folder)
    if not layouts:
        raise ValueError(f"{folder} cannot be read: the model does not say how PyTorch names its layers (layouts)")
    layout = max(layouts.values(), key=lambda layout: len(layout.linears.keys() & modules.keys()))
    if unknown := [name for name in modules if name not in layout.linears and name not in layout.elsewhere]:
        raise ValueError(
            f"{folder} is not of this model: it has {', '.join(unknown[:3])}, among whose linear layers are "
            f"{', '.join(list(layout.linears)[:3])}"
        )
    flat, updates, full = lora.flatten(params), {}, {}
    ours = {module: kinds for module, kinds in modules.items() if module in layout.linears}
    for module, update in _updates(folder, config, ours, said).items():
        linear = layout.linears[module]
        for kernel, part in _for_ours(f"{folder}: {module}", linear, update, flat).items():
            updates.setdefault(kernel, {})[linear.row] = part
    for module, kinds in ours.items():
        if "weight" in kinds:
            full |= _whole(f"{folder}: {module}", layout.linears[module], kinds, flat)
    labels = said.get("classes")
    named = isinstance(labels, list) and all(isinstance(name, str) for name in labels)
    return Found(updates, full, tuple(labels) if named else None)  # type: ignore[arg-type]


def folded(found: Found, params: Params) -> Params:
    """Parameters with an adapter in them."""
    flat = lora.flatten(params) | found.full
    for kernel, rows in found.updates.items():
        flat[kernel] = np.array(flat[kernel])
        for row, (a, b, scale) in rows.items():
            flat[kernel][... if row is None else row] += scale * a @ b
    return lora.unflatten(flat)


def modules_of(folder: Path) -> set[str]:
    """The names of the modules that an adapter has something for; errors as of ``summary``."""
    return set(_parts(folder)[1])


def _parts(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """The configuration; arrays by module and kind; what else is said."""
    config = _config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        why = (
            ", but adapter_model.bin, a pickle, which runs code of its own: load it with peft and save it anew"
            * pickled
        )
        raise ValueError(f"{folder} has no {WEIGHTS}{why}")
    arrays, said = files.read(path, sorted, lambda arrays: None)
    modules: dict[str, dict[str, np.ndarray]] = {}
    for name, x in arrays.items():
        if (match := re.fullmatch(KINDS, name)) is None:
            raise ValueError(f"{path} holds {name}: expected {PREFIX}MODULE.lora_A.weight, .lora_B.weight and the like")
        modules.setdefault(match[1], {})[match[2]] = x
    for module, kinds in modules.items():
        if not ({"lora_A.weight", "lora_B.weight"} == kinds.keys() or {"weight"} <= kinds.keys() <= {"weight", "bias"}):
            raise ValueError(f"{path}: of {module} it has {', '.join(kinds)}: expected lora_A and lora_B, or a layer")
    if not any("lora_A.weight" in kinds for kinds in modules.values()):
        raise ValueError(f"{path} holds no low-rank updates")
    return config, modules, said


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"no adapter in {folder}: expected a folder of PEFT, with {CONFIG} and {WEIGHTS}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path} is of another kind of adapter: peft_type is {got!r}, expected 'LORA'")
    r, alpha = config.get("r"), config.get("lora_alpha")
    if not (_is_rank(r) and _is_factor(alpha)):
        raise ValueError(
            f"{path}: r and lora_alpha are {r!r} and {alpha!r}: expected finite numbers, r above 0 and whole, "
            "lora_alpha not 0"
        )
    for name, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _is_factor)):
        said = config.get(name) or {}
        if not isinstance(said, dict) or not all(map(fits, said.values())):
            raise ValueError(
                f"{path}: {name} is {json.dumps(said)[:60]}: rank_pattern and alpha_pattern must be finite numbers by "
                "the names of modules, ranks above 0 and whole, factors not 0"
            )
    if config.get("init_lora_weights", True) not in KEEPS_BASE:
        raise ValueError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, which changes the weights that it adapts "
            "or is not known to keep them: "
            "convert it to a plain LoRA with peft (path_initial_model_for_weight_conversion of save_pretrained)"
        )
    plain = lambda name, x: x in (None, False, "none") or (hasattr(x, "__len__") and not len(x))
    known = USED | IDLE | {"init_lora_weights"}
    if more := [name for name, x in config.items() if name not in known and not plain(name, x)]:
        raise ValueError(f"{path} sets {more[0]} to {json.dumps(config[more[0]])[:60]}: nothing here computes that")
    return config


def _is_rank(x: Any) -> bool:
    return type(x) is int and x > 0


def _is_factor(x: Any) -> bool:
    return type(x) in (int, float) and 0 < abs(x) <= 1e30  # not nan either


def _updates(folder: Path, config: Mapping[str, Any], modules: Mapping, said: Mapping[str, Any]) -> dict[str, Update]:
    found = {}
    for module, kinds in modules.items():
        if "lora_A.weight" not in kinds:
            continue
        a, b = kinds["lora_A.weight"], kinds["lora_B.weight"]
        try:
            rank = _of_module(config, module, "r", "rank_pattern")
            alpha = _of_module(config, module, "lora_alpha", "alpha_pattern")
            named = _is_target(config.get("target_modules"), module)
        except re.error as error:
            raise ValueError(f"{folder / CONFIG} has a pattern that is no regular expression: {error}") from None
        if a.ndim != 2 or b.ndim != 2 or not len(a) == b.shape[1] == rank:
            raise ValueError(
                f"{folder}: {module} has {list(a.shape)} and {list(b.shape)}: expected [rank, in] and [out, rank] of a "
                f"linear layer and rank {rank}, as {CONFIG} says"
            )
        if not named:
            raise ValueError(f"{folder} has an update of {module}, which target_modules of its {CONFIG} does not name")
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        found[module] = Update(a, b, scale, _ranks(said, module, rank))
    return found


def _ranks(said: Mapping[str, Any], module: str, rank: int) -> list[int]:
    """Of each of our kernels in a layer, where it says; else one for all."""
    parts = said.get("parts")
    own = parts.get(module) if isinstance(parts, dict) else None
    whole = isinstance(own, list) and all(isinstance(n, int) and n >= 0 for n in own) and sum(own) == rank
    return own if whole else [rank]  # type: ignore[return-value]


def _of_module(config: Mapping[str, Any], module: str, usual: str, pattern: str) -> Any:
    """As PEFT finds it: a key is a regular expression of how names of modules end."""
    keys = (key for key in (config.get(pattern) or {}) if re.match(rf"(.*\.)?({key})$", module))
    found = next(keys, None)
    return config[usual] if found is None else config[pattern][found]


def _is_target(targets: Any, module: str) -> bool:
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, module) is not None
    return isinstance(targets, list) and any(f".{module}".endswith(f".{target}") for target in targets)


def _for_ours(what: str, linear: Linear, update: Update, flat: Mapping[str, Any]) -> dict[str, tuple]:
    """The update of one layer of theirs, for each of our kernels in it."""
    a, b = update.a.T, update.b.T if linear.gain is None else update.b.T * linear.gain
    sizes = [flat[kernel].shape[-1] for kernel in linear.kernels]
    n_in = flat[linear.kernels[0]].shape[-2]
    if a.shape[0] != n_in + linear.extra or b.shape[1] != sum(sizes):
        raise ValueError(f"{what} is of a layer {a.shape[0]} -> {b.shape[1]}, expected {n_in} -> {sum(sizes)}")
    if a[n_in:].any():
        raise ValueError(f"{what} reads what the model here does not, the last {linear.extra} of its inputs")
    blocks = np.split(b, np.cumsum(sizes)[:-1], axis=1)
    if len(update.ranks) != len(sizes):
        return {k: (a[:n_in], block, update.scale) for k, block in zip(linear.kernels, blocks, strict=True)}
    made, left = {}, 0
    for kernel, block, rank in zip(linear.kernels, blocks, update.ranks, strict=True):
        own = slice(left, left + rank)
        if np.delete(block, own, 0).any():
            raise ValueError(f"{what} is damaged: its parts of the ranks {update.ranks} are not block by block")
        if rank:
            made[kernel] = (a[:n_in, own], block[own], update.scale)
        left += rank
    return made


def _whole(what: str, linear: Linear, kinds: Mapping[str, np.ndarray], flat: Mapping[str, Any]) -> dict[str, Any]:
    """A layer that was trained as a whole, by our names."""
    kernel = linear.kernels[0]
    if linear.row is not None or len(linear.kernels) > 1:
        raise ValueError(f"{what} is in modules_to_save: of the layers in blocks only low-rank updates are read")
    weight, n_in = kinds["weight"].T, flat[kernel].shape[-2]
    if weight.ndim != 2 or len(weight) != n_in + linear.extra:
        raise ValueError(f"{what} has the weight {list(weight.T.shape)}, expected [classes, {n_in + linear.extra}]")
    if weight[n_in:].any():
        raise ValueError(f"{what} reads what the model here does not, the last {linear.extra} of its inputs")
    if bias_of(kernel) not in flat:
        if "bias" in kinds:
            raise ValueError(f"{what} has a bias, which that of the model has not")
        return {kernel: weight[:n_in]}
    bias = kinds.get("bias", np.zeros(weight.shape[1], np.float32))
    if bias.shape != weight.shape[1:]:
        raise ValueError(f"{what} has a bias {list(bias.shape)}, expected [{weight.shape[1]}]")
    return {kernel: weight[:n_in], bias_of(kernel): bias}
