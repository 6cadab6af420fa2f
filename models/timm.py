"""The arrays of a plain ViT under timm's names, from a file: all of them, nothing else, of shapes that fit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from models.archive import members, read_npz

CONV = "patch_embed.proj.weight"
TOP = (CONV, "patch_embed.proj.bias", "cls_token", "pos_embed", "norm.weight", "norm.bias")
LAYERS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
BLOCK = tuple(f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias"))
# Layers that a network has in all blocks or in none: a layer scale x + gamma * f(x), and the last layer of its f.
SCALES = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}
QKV_BIAS = "attn.qkv.bias"  # absent: zero
HEAD = ("head.weight", "head.bias")
LABELS = ("classes", "synsets")  # arrays of a .npz file that name the classes which the head tells apart
UNUSED = {"mask_token"}  # stands for what masked pre-training hides; no image has it
# Arrays of other networks and what they do there; the first that is found explains a refusal.
OTHERS = {
    r"(embeddings|encoder|vit|deit|dinov2|vision_model)\.": "these are names of transformers, expected timm's",
    r".*(q_norm|k_norm)\.": "queries and keys are normalised",
    r"norm_pre\.": "tokens are normalised before the blocks",
    r"fc_norm\.": "the mean of the tokens is normalised and read, not the class token",
    r"reg_token": "there are further tokens, registers",
    r"dist_token|head_dist\.": "there is a further token, for distillation, with a head of its own",
    r"pre_logits\.": "there is a layer between features and head",
    r"patch_embed\.": "patches are embedded by more than one convolution",
    r"attn_pool\.": "tokens are pooled by attention",
    r".*(rope|freqs|rel_pos|relative_position)": "positions are rotary or relative",
    r"blocks\.\d+\.(attn|mlp)\.norm\.": "layers of a block are normalised inside",
}


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a ViT, checked, as float32; and what else the file says.

    Raises:
      ValueError: the file is missing or damaged; an array is missing, is not one of a plain ViT, has the wrong shape or
        kind, or is not finite.
    """
    if not path.is_file():
        raise ValueError(f"no weight file {path}: give the path of a .npz or .safetensors file")
    if path.suffix == ".npz":
        names = expected_names(path, set(members(path)) - {"meta", *LABELS})
        arrays = read_npz(path, {*names, "meta", *LABELS})
        said = _said(path, arrays)
    elif path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="numpy") as file:  # checks all sizes against the file's
                names = expected_names(path, file.keys())
                arrays = {name: file.get_tensor(name) for name in names}
                said = {name: _parsed(text) for name, text in (file.metadata() or {}).items()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged or truncated: {error}; fetch or write it anew") from None
    else:
        raise ValueError(f"cannot read weights from {path}: expected a .npz or .safetensors file")
    arrays = {name: arrays[name] for name in names}
    _check_shapes(path, arrays)
    return {name: _float32(path, name, x) for name, x in arrays.items()}, said


def depth(names: Iterable[str]) -> int:
    """Number of blocks, at least 1."""
    return max(1, len({name.split(".")[1] for name in names if name.startswith("blocks.")}))


def expected_names(path: Path, found: Iterable[str]) -> list[str]:
    """The arrays that such a network has; refused are files that lack one, or hold others."""
    names = set(found) - UNUSED
    own = lambda *parts: {f"blocks.{i}.{part}" for i in range(depth(names)) for part in parts}
    optional = [own(QKV_BIAS), *map(own, SCALES), set(HEAD)]
    needed = {*TOP, *own(*BLOCK)}.difference(*optional).union(*(group for group in optional if group & names))
    missing, extra = sorted(needed - names), sorted(names - needed)
    if CONV in missing or (missing and not extra):
        lacks, has = CONV if CONV in missing else missing[0], ", ".join(sorted(names)[:3]) or "nothing"
        raise ValueError(f"{path} is not a ViT with timm names: it lacks {lacks!r} and has {has}, ...{_why(extra)}")
    if extra:
        more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
        raise ValueError(
            f"{path} is another network than a plain ViT: it has {', '.join(extra[:3])}{more}{_why(extra)}; "
            "nothing here computes that, and without it the features are others"
        )
    return sorted(needed)


def _why(names: list[str]) -> str:
    known = (why for name in names for pattern, why in OTHERS.items() if re.match(pattern, name))
    return f" ({why})" if (why := next(known, None)) else ""


def _said(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """What an entry ``meta`` and arrays of names say."""
    named = [arrays[name].tolist() for name in LABELS if name in arrays]
    labels = {"classes": named[0]} if named else {}
    if "meta" not in arrays:
        return labels
    text = arrays["meta"]
    meta = _parsed(text.item()) if text.shape == () and text.dtype.kind == "U" else None
    if not isinstance(meta, dict):
        raise ValueError(f"{path}: meta is {text.dtype} {list(text.shape)}, {str(text)[:40]!r}; expected a JSON object")
    return labels | meta


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _check_shapes(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """All fit together; the patch convolution, a norm, a hidden layer and the head say how large the network is."""
    conv, width = arrays[CONV], max(1, arrays["norm.weight"].size)
    channels, patch = conv.shape[1::2] if conv.ndim == 4 else (3, 16)
    hidden, outputs = (arrays[name].size if name in arrays else 0 for name in ("blocks.0.mlp.fc1.bias", "head.bias"))
    weights = {
        "patch_embed.proj": (width, channels, patch, patch),
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (hidden, width),
        "mlp.fc2": (width, hidden),
        "head": (outputs, width),
    }
    tokens = {"cls_token": (1, 1, width), "pos_embed": (1, arrays["pos_embed"].size // width, width)}
    for name, x in arrays.items():
        layer, _, kind = re.sub(r"^blocks\.\d+\.", "", name).rpartition(".")
        shape = tokens.get(name) or weights.get(layer, (width,))
        expected = shape[:1] if kind == "bias" else shape
        if x.shape != expected or not x.size:
            raise ValueError(
                f"{path} does not fit a ViT of width {width}: {name} has the shape {list(x.shape)}, expected "
                f"{list(expected)}; fetch or write it anew"
            )


def _float32(path: Path, name: str, x: np.ndarray) -> np.ndarray:
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 2:
        raise ValueError(
            f"{path}: {name} is {x.dtype}, expected floats of 16, 32 or 64 bits: write it without quantising"
        )
    with np.errstate(over="ignore"):
        x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise ValueError(f"{path}: {name} holds numbers that are not finite as float32; fetch or write it anew")
    return x
