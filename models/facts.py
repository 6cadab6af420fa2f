"""What the arrays of a weight file do not say of their network: normalisation, heads, activation, the classes' names.

Who publishes weights keeps these in one of several places. They are looked for in what the caller says, in the file
itself (``meta`` of a ``.npz``, ``__metadata__`` of a ``.safetensors``), in ``config.json`` beside it (timm's or
transformers'), in ``processor_config.json`` or ``preprocessor_config.json``, in the name of the architecture and in
what the format implies, in this order. What stands nowhere is guessed by timm's conventions, with a warning: a wrong
normalisation costs accuracy and breaks nothing.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from .vit import SIZES

# fact: the names it goes by, in our files, timm's and transformers'
NAMES = {
    "mean": ("mean", "image_mean"),
    "std": ("std", "image_std"),
    "heads": ("heads", "num_heads", "num_attention_heads"),
    "epsilon": ("ln_eps", "epsilon", "layer_norm_eps"),
    "act": ("act", "act_layer", "hidden_act"),
    "pool": ("pool", "global_pool"),
}
# what is said of these, and what it is here; an empty text says nothing
WORDS = {
    "act": {
        "gelu": "gelu",
        "gelu(erf)": "gelu",
        "quick_gelu": "quick_gelu",
        **dict.fromkeys(("gelu_tanh", "gelu_new", "gelu_pytorch_tanh"), "gelu_tanh"),
    },
    "pool": {
        **dict.fromkeys(("cls", "token"), "cls"),
        **dict.fromkeys(("avg", "mean"), "mean"),
        "cls_mean": "cls_mean",
        "norm_of_mean": "norm_of_mean",
    },
}
LABELS = ("classes", "label_names", "id2label")
# what a file may say of its network only if it is the network of ``models.vit``
ALIKE = {
    ("prenorm",): (True,),
    ("post_norm",): (False,),
}
WIDTH = ("embed", "embed_dim", "num_features", "hidden_size")
# timm's plain ViTs and image towers of CLIP: what a name says of them; others have an epsilon or layers of their own
ARCHITECTURE = re.compile(r"(?:vit|deit3?)_(tiny|small|base|large|huge)_patch\d+_(clip_(?:quickgelu_)?)?\d+(?:\..*)?")
GUESS, IMPLIED = "guessed", "as its format implies"


class Facts(NamedTuple):
    """What the arrays do not say; ``origins`` has where all but the labels come from."""

    mean: np.ndarray  # [channels], of x / 255
    std: np.ndarray  # [channels]
    heads: int
    epsilon: float
    act: str  # of models.parts.ACTIVATIONS
    pool: str  # as models.vit.ViT has it
    labels: tuple[str, ...] | None  # the class of each output of the head
    origins: dict[str, str]


def find(
    path: Path,
    inside: Mapping[str, Any],
    given: Mapping[str, Any],
    width: int,
    channels: int,
    alike: Mapping[tuple[str, ...], tuple] = ALIKE,
    without: tuple[str, ...] = (),
    implied: Mapping[str, Any] = MappingProxyType({}),
    more: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> Facts:
    """The facts of the network in a weight file.

    Args:
      path: the file.
      inside: what the file says besides its arrays.
      given: what the caller says, by the names of ``Facts``; ``None`` for what he does not.
      width, channels: of the network.
      alike: what a source may say, by its names, if it tells of this network.
      without: facts that such a network does not have; of them ``Facts`` has what means nothing.
      implied: what its format implies, by the names of ``Facts``.
      more: what else says something, more trusted than files beside this one, by where it stands.

    Raises:
      ValueError: a value is of the wrong kind; a file beside it is damaged, or tells of another network; nothing tells
        the number of heads or the activation.
    """
    sources = {"given": given, path.name: inside, **more, **_beside(path.parent), IMPLIED: implied}
    for origin, source in sources.items():
        _check_alike(path, origin, source, width, alike)
    found, origins = {"mean": [0.0], "std": [1.0], "heads": 1, "act": "gelu", "pool": "mean"}, {}
    for fact, names in NAMES.items():
        if fact in without:
            continue
        told = _first(sources, names)
        found[fact], origins[fact] = told or (_guess(path, fact, width, channels), GUESS)
        _check(f"{path.name}: {fact} ({origins[fact]})", fact, found[fact], width, channels)
        said = _first({origin: x for origin, x in sources.items() if origin != "given"}, names)
        if origins[fact] == "given" and said is not None and _differ(found[fact], said[0]):
            warnings.warn(
                f"{path.name}: {fact} {shown(found[fact])} is given, and {said[1]} says {shown(said[0])}: the given "
                "one is used, and a wrong one costs accuracy silently",
                stacklevel=3,
            )
        if fact in WORDS:
            found[fact] = WORDS[fact][found[fact]]
    if guessed := [fact for fact, origin in origins.items() if origin == GUESS]:
        said = ", ".join(f"{fact} {shown(found[fact])}" for fact in guessed)
        options = " ".join(f"--{fact}" for fact in guessed)
        warnings.warn(
            f"{path} does not say its {', '.join(guessed)}, nor does a config.json or preprocessor_config.json beside "
            f"it: {said} is a GUESS, and a wrong one costs accuracy silently; put such a file there or set {options}",
            stacklevel=3,
        )
    mean, std = (np.asarray(found[fact], np.float32) for fact in ("mean", "std"))
    labels, _ = _first(sources, LABELS) or (None, "")
    heads, epsilon = int(found["heads"]), float(found["epsilon"])
    return Facts(mean, std, heads, epsilon, found["act"], found["pool"], _labels(labels), origins)


def shown(value: Any) -> str:
    """Numbers as one writes them on the command line."""
    return ",".join(f"{x:.7g}" for x in np.ravel(value))


def _first(sources: Mapping[str, Mapping[str, Any]], names: tuple[str, ...]) -> tuple[Any, str] | None:
    """The first that a source says under one of the names, and which source."""
    told = ((source[name], origin) for origin, source in sources.items() for name in names if name in source)
    return next(((value, origin) for value, origin in told if value is not None and value != ""), None)


def _differ(given: Any, said: Any) -> bool:
    """Are these other numbers? (What is no number is looked at where it is used.)"""
    try:
        return not np.allclose(np.asarray(given, float), np.asarray(said, float), 1e-3, 1e-9)
    except (TypeError, ValueError):
        return False


def _beside(folder: Path) -> dict[str, Mapping[str, Any]]:
    """What files beside the weights say, most trusted first, by where it stands."""
    config, (processor, where) = json_beside(folder / "config.json"), processor_beside(folder)
    for part in ("pretrained_cfg", "model_args"):  # timm's
        if isinstance(config.get(part), dict):
            config = config | config[part]
    return {
        "config.json": config,
        where: _normalisation(processor, where),
        f"architecture {config.get('architecture')} in config.json": _implied(config.get("architecture")),
    }


def json_beside(path: Path) -> dict[str, Any]:
    """An object in a file beside the weights; empty where there is no such file.

    Raises:
      ValueError: it is damaged, or no object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}, which tells of the weights beside it, cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}, which tells of the weights beside it, holds {_short(content)}; expected an object")
    return content


def processor_beside(folder: Path) -> tuple[dict[str, Any], str]:
    """What the image processor of transformers says, and where it stands: what version 5 saves of images and text
    together goes first, as it does there.

    Raises:
      ValueError: a file is damaged.
    """
    both, alone = "processor_config.json", "preprocessor_config.json"
    inside = json_beside(folder / both).get("image_processor")
    return (inside, both) if isinstance(inside, dict) else (json_beside(folder / alone), alone)


def _normalisation(processor: dict[str, Any], where: str) -> dict[str, Any]:
    """Of transformers' image processor, whose own scale need not be 1 / 255."""
    if not processor:
        return {}
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    if not _is_number(factor) or abs(255 * factor - 1) > 1e-3:
        raise ValueError(
            f"{where} multiplies images by {_short(factor)}, expected 1 / 255: set mean and std "
            "(--mean, --std) and move it away"
        )
    if processor.get("do_normalize", True):
        return processor
    return {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}


def _implied(architecture: Any) -> dict[str, Any]:
    match = ARCHITECTURE.fullmatch(architecture) if isinstance(architecture, str) else None
    if match is None:
        return {}
    size = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H"}[match[1]]
    width, _, heads, _ = SIZES[size]
    if not match[2]:
        return {"heads": heads, "epsilon": 1e-6, "embed_dim": width}
    return {"heads": heads, "epsilon": 1e-5, "embed_dim": width, "act": "quick_gelu" if "quick" in match[2] else "gelu"}


def _check_alike(path: Path, origin: str, source: Mapping[str, Any], width: int, alike: Mapping) -> None:
    for names, expected in (*alike.items(), (WIDTH, (width,))):
        for name in names:
            if source.get(name) not in (None, *expected):
                said = " or ".join(repr(value) for value in expected if value != "")
                raise ValueError(
                    f"{path} would be another network: {name} is {_short(source[name])} ({origin}), expected {said}; "
                    "if the file with that entry is not of these weights, move it away"
                )


def _guess(path: Path, fact: str, width: int, channels: int) -> Any:
    if fact == "act":
        raise ValueError(
            f"{path} does not say whether its activation is gelu or quick_gelu, and its arrays do not tell: put its "
            "config.json beside it (or one of timm that names its architecture)"
        )
    if fact == "heads" and width % 64:
        raise ValueError(
            f"{path} does not say how many attention heads its width of {width} is cut into, and timm's heads of 64 do "
            "not fit: set heads (--heads), or put its config.json beside it"
        )
    return {"mean": [0.5] * channels, "std": [0.5] * channels, "heads": width // 64, "epsilon": 1e-6}[fact]


def _check(what: str, fact: str, value: Any, width: int, channels: int) -> None:
    numbers, x = _is_row(value, channels), float(value) if _is_number(value) else math.nan
    if fact in WORDS:
        if not isinstance(value, str) or value not in WORDS[fact]:
            raise ValueError(
                f"{what} is {_short(value)}, which would be another network: expected {' or '.join(WORDS[fact])}; if "
                "the file with that entry is not of these weights, move it away"
            )
        return
    fine, expected = {
        "mean": (numbers and all(0 <= y <= 1 for y in value), f"{channels} numbers from 0 to 1, of x / 255"),
        "std": (numbers and all(0 < y <= 1 for y in value), f"{channels} numbers above 0, at most 1, of x / 255"),
        "heads": (
            isinstance(value, Integral) and _is_number(value) and int(value) > 0 and width % int(value) == 0,
            f"a number of heads that the width {width} can be cut into",
        ),
        "epsilon": (0 < x < 0.1, "a number above 0, below 0.1"),
    }[fact]
    if not fine:
        raise ValueError(f"{what} is {_short(value)}, expected {expected}; set {fact} (--{fact})")


def _is_number(x: Any) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool) and abs(x) < 1e9  # type: ignore[operator]


def _is_row(value: Any, length: int) -> bool:
    return isinstance(value, list | tuple | np.ndarray) and len(value) == length and all(map(_is_number, value))


def _labels(value: Any) -> tuple[str, ...] | None:
    """Names in the order of the head's outputs; ``None`` for what is no names."""
    if isinstance(value, dict):  # transformers: {"0": name, ...}
        value = [value.get(str(i)) for i in range(len(value))]
    return tuple(value) if isinstance(value, list) and all(isinstance(x, str) for x in value) else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
