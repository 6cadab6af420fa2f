"""Published weights with timm's names (PyTorch layouts) to the parameters of ``models.vit``.

All arrays of a plain ViT, nothing else, of shapes that fit. Linear weights are ``(out, in)`` there and ``[in, out]``
here; a patch convolution ``(out, 3, p, p)`` becomes a dense kernel on flattened patches; ``qkv`` is packed along
``out``; blocks are stacked along a leading axis; a layer scale goes into the layer before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fedlora_jax.lora import unflatten

from . import files

CONV = "patch_embed.proj.weight"
TOP = (CONV, "patch_embed.proj.bias", "cls_token", "pos_embed", "norm.weight", "norm.bias")
LAYERS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
BLOCK = tuple(f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias"))
# Layers that a network has in all blocks or in none: a layer scale x + gamma * f(x), and the last layer of its f.
SCALES = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}
QKV_BIAS = "attn.qkv.bias"  # absent: zero
HEAD = ("head.weight", "head.bias")
UNUSED = {"mask_token"}  # stands for what masked pre-training hides; no image has it
# Arrays of other networks and what they do there; the first that is found explains a refusal.
OTHERS = {
    r"(text_model|vision_model)\.": "these are names of a transformers model that is no plain ViT",
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


def read(path: Path) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """Parameters of a ViT, blocks stacked, with its head if it has one; the side of its patches; what else is said.

    Raises:
      ValueError: as for ``read_arrays``.
    """
    arrays, said = read_arrays(path)
    conv = arrays[CONV]
    params = {
        # (out, channel, row, column) -> [row * column * channel, out], the order in which the model cuts patches
        "embed": {
            "kernel": conv.transpose(2, 3, 1, 0).reshape(-1, len(conv)),
            "bias": arrays["patch_embed.proj.bias"],
        },
        "cls": arrays["cls_token"][0],
        "pos": _positions(arrays["pos_embed"][0]),
        "blocks": unflatten(_blocks(arrays)),
        "norm": {"scale": arrays["norm.weight"], "bias": arrays["norm.bias"]},
    }
    if "head.bias" in arrays:
        params["head"] = {"kernel": arrays["head.weight"].T, "bias": arrays["head.bias"]}
    return params, conv.shape[-1], said


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a ViT, checked, as float32; and what else the file says.

    Raises:
      ValueError: the file is missing or damaged; an array is missing, is not one of a plain ViT, has the wrong shape or
        kind, or is not finite.
    """
    return files.read(path, lambda found: expected_names(path, found), lambda arrays: _check_shapes(path, arrays))


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


def _blocks(arrays: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    stacked = lambda key: np.stack([arrays[f"blocks.{i}.{key}"] for i in range(depth(arrays))])
    norm = lambda key: {"scale": stacked(f"{key}.weight"), "bias": stacked(f"{key}.bias")}
    scales = {layer: stacked(name) for name, layer in SCALES.items() if f"blocks.0.{name}" in arrays}

    def dense(key: str) -> dict[str, np.ndarray]:
        kernel = stacked(f"{key}.weight").swapaxes(1, 2)
        bias = stacked(f"{key}.bias") if f"blocks.0.{key}.bias" in arrays else np.zeros_like(kernel[:, 0])
        if key in scales:  # gamma * (x @ w + b)
            return {"kernel": kernel * scales[key][:, None], "bias": bias * scales[key]}
        return {"kernel": kernel, "bias": bias}

    qkv = {kind: np.split(x, 3, axis=-1) for kind, x in dense("attn.qkv").items()}
    parts = {
        f"attn/{part}": {kind: x[i] for kind, x in qkv.items()} for i, part in enumerate(("query", "key", "value"))
    }
    return {
        **parts,
        "attn/out": dense("attn.proj"),
        "mlp/fc1": dense("mlp.fc1"),
        "mlp/fc2": dense("mlp.fc2"),
        "norm1": norm("norm1"),
        "norm2": norm("norm2"),
    }


def _positions(positions: np.ndarray) -> np.ndarray:
    """With that of the class token, which is zero where there are positions of patches only (DeiT III)."""
    of_patches = round(len(positions) ** 0.5) ** 2 == len(positions)
    return np.concatenate([np.zeros_like(positions[:1]), positions]) if of_patches else positions
