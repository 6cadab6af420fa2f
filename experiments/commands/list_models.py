"""``python -m experiments models``: which models there are, by shapes alone; and what a weight file is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax

from experiments.commands.list_methods import DIGITS, SIDE, lines
from experiments.config import Config
from experiments.options import check_fields
from experiments.requests import Models
from experiments.setup import backbone as backbones
from experiments.setup import user_code
from fedlora_jax import lora
from fedlora_jax.lora import Params
from models import families
from models.backbone import Backbone
from models.families import FAMILIES
from models.two_towers import TEXT


def table(options: Models) -> str:
    """All families, or one model: of the file, or one of the user's own.

    Raises:
      ValueError: an option is wrong, or the file is not one that can be used, with what is missing and unexpected.
    """
    check_fields(options)
    own = user_code.is_own(options.model or "")
    return _model(options) if options.file is not None or own else _families(options)


def _families(options: Models) -> str:
    if options.model is not None:
        families.find(options.model, "")  # refuses a name that is none
    parts = ["weights are read from .safetensors (also in shards, or a folder of Hugging Face) and .npz files"]
    parts.append(f"sets: numbers in an adapter of rank {options.rank}; parameters: without the head")
    for name, family in FAMILIES.items():
        with_text = family.text_shapes, family.text_targets
        shapes, targets = with_text if options.head == "text" else (family.shapes, family.targets)
        if shapes is None or options.model not in (None, name):
            continue
        sets, rows = _sets(targets, options.targets), []
        for size, usual in family.sizes.items():
            side = options.image_size or usual
            try:
                params = shapes(size, side)
            except ValueError:  # which cannot be cut into its patches
                rows.append((size, f"{side} x {side}", "-", *("-" for _ in sets)))
                continue
            adapters = [_adapter(params, patterns, options.rank) for patterns in sets.values()]
            count = _count(_without("head", params))
            rows.append((size, f"{side} x {side}", f"{count:,}", *(_number(x) for x in adapters)))
        parts += ["", f"{name}: reads the names of {', '.join(family.reads)}"]
        parts += [f"  {own} = {', '.join(patterns)}" for own, patterns in targets.items()]
        parts += ["", *lines(("size", "images", "parameters", *sets), rows)]
    return "\n".join(parts)


def _model(options: Models) -> str:
    config = Config(model=options.model, weights=options.file or Config.weights, head=options.head)
    own = user_code.is_own(options.model or "")
    backbone = backbones.read(config, DIGITS, options.image_size or (SIDE if own else None))
    family = options.model or families.of(backbones.weights_of(config)[0])
    size = None if own else families.size_of(family, _without(TEXT, backbone.params)) or "of a size of its own"
    body, rows, notes = _count(_without("head", backbone.params)), [], []
    elsewhere = {} if own or options.head else FAMILIES[family].text_targets
    if wanted := [name for name in options.targets if name in elsewhere and name not in backbone.targets]:
        raise ValueError(f"--targets {wanted[0]} is a set of a model with its text tower in it: add --head text")
    for name, patterns in _sets(backbone.targets, options.targets).items():
        adapter = _adapter(backbone.params, patterns, options.rank)
        found = [f"{kernel} {list(x.shape)}" for kernel, x in _kernels(backbone, patterns).items()]
        share = "" if adapter is None else f"{100 * _count(adapter) / body:.2g} %"
        rows.append((name, _number(adapter), share, found[0]))
        rows += [("", "", "", more) for more in found[1:]]
        notes += [] if adapter is not None else [f"{name}: {_refusal(backbone.params, patterns, options.rank)}"]
    about = " ".join(filter(None, (family, size, f"in {backbone.depth} blocks" if backbone.depth else None)))
    facts = [f"  {fact}: {value}" for fact, value in backbone.facts.items()]
    header = ("set", f"rank {options.rank}", "of all", "kernels [blocks, in, out]")
    title = f"{backbone.name}: {about}, {body:,} parameters without a head"
    return "\n".join([title, *facts, "", *lines(header, rows), *notes])


def _sets(named: Mapping[str, Sequence[str]], given: Sequence[str]) -> dict[str, Sequence[str]]:
    """Sets of kernels by name; where some are asked for, only these."""
    return {target: named.get(target, (target,)) for target in given} or dict(named)


def _kernels(backbone: Backbone, patterns: Sequence[str]) -> dict[str, Any]:
    flat = lora.flatten(backbone.params)
    return {name: flat[name] for name in lora.adapted(backbone.params, tuple(patterns))}


def _adapter(params: Params, patterns: Sequence[str], rank: int) -> Any:
    """The shapes of an adapter of these kernels; ``None`` where there are none, or they are smaller than the rank."""
    try:
        return _shaped(params, patterns, rank)
    except ValueError:
        return None


def _refusal(params: Params, patterns: Sequence[str], rank: int) -> str:
    """Why there is no such adapter."""
    try:
        _shaped(params, patterns, rank)
    except ValueError as error:
        return str(error)
    return ""


def _shaped(params: Params, patterns: Sequence[str], rank: int) -> Any:
    new = partial(lora.new, rank=rank, targets=tuple(patterns))
    return jax.eval_shape(new, jax.eval_shape(jax.random.key, 0), params)


def _without(part: str, params: Params) -> Params:
    return {name: x for name, x in params.items() if name != part}


def _count(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def _number(adapter: Any) -> str:
    return "-" if adapter is None else f"{_count(adapter):,}"
