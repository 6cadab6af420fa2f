"""A small random ViT under timm's names, the same network written from its definition, and files that hold it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

FACTS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "heads": 3, "ln_eps": 1e-3}


def timm_arrays(seed: int = 0, **changes: np.ndarray | None) -> dict[str, np.ndarray]:
    """A random ViT of width 12, 2 blocks, patch 2, 4 x 4 images, in timm's names and layouts (``None``: left out)."""
    draw = np.random.default_rng(seed).normal
    arrays = {
        "patch_embed.proj.weight": draw(size=(12, 3, 2, 2)),
        "patch_embed.proj.bias": draw(size=12),
        "cls_token": draw(size=(1, 1, 12)),
        "pos_embed": draw(size=(1, 5, 12)),
        "norm.weight": draw(size=12),
        "norm.bias": draw(size=12),
        "head.weight": draw(size=(5, 12)),
        "head.bias": draw(size=5),
    }
    sizes = {"attn.qkv": (36, 12), "attn.proj": (12, 12), "mlp.fc1": (20, 12), "mlp.fc2": (12, 20)}
    for i in range(2):
        for name, shape in sizes.items():
            arrays |= {f"blocks.{i}.{name}.weight": draw(size=shape), f"blocks.{i}.{name}.bias": draw(size=shape[0])}
        for name in ("norm1", "norm2"):
            arrays |= {f"blocks.{i}.{name}.weight": draw(size=12), f"blocks.{i}.{name}.bias": draw(size=12)}
    kept = {name: x for name, x in (arrays | changes).items() if x is not None}
    return {name: np.ascontiguousarray(x, x.dtype if x.dtype.kind != "f" else np.float32) for name, x in kept.items()}


def reference_forward(arrays: dict[str, np.ndarray], image: np.ndarray, facts: dict[str, Any]) -> np.ndarray:
    """Its logits in float64 NumPy for one uint8 image [4, 4, 3]; LayerScale, absent biases, registers, a norm before
    the blocks, positions of patches alone and the mean of tokens as timm's ``VisionTransformer`` has them."""
    from scipy.special import erf

    w, heads = {name: x.astype(np.float64) for name, x in arrays.items()}, facts["heads"]
    image = (image / 255 - np.array(facts["mean"])) / np.array(facts["std"])

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + facts["ln_eps"])
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    dense = lambda x, name: x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)
    act = {
        "gelu": lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2))),
        "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
        "gelu_tanh": lambda x: x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    }[facts.get("act", "gelu")]
    patches = []
    for row in range(2):
        for column in range(2):
            piece = image[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].transpose(2, 0, 1)
            patches.append(np.einsum("ocij,cij->o", w["patch_embed.proj.weight"], piece))
    patches = np.stack(patches) + w.get("patch_embed.proj.bias", 0)
    before = [w[name][0] for name in ("cls_token", "reg_token") if name in w]
    first = sum(map(len, before))
    if len(w["pos_embed"][0]) == 4:
        x = np.concatenate([*before, patches + w["pos_embed"][0]])
    else:
        x = np.concatenate([*before, patches]) + w["pos_embed"][0]
    x = norm(x, "norm_pre") if "norm_pre.weight" in w else x
    for i in range(2):
        q, k, v = np.split(dense(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv"), 3, -1)
        out = []
        for h in range(heads):
            s = slice(h * 12 // heads, (h + 1) * 12 // heads)
            scores = np.exp(q[:, s] @ k[:, s].T / np.sqrt(12 / heads))
            out.append(scores / scores.sum(-1, keepdims=True) @ v[:, s])
        x = x + w.get(f"blocks.{i}.ls1.gamma", 1) * dense(np.concatenate(out, -1), f"blocks.{i}.attn.proj")
        hidden = dense(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        x = x + w.get(f"blocks.{i}.ls2.gamma", 1) * dense(act(hidden), f"blocks.{i}.mlp.fc2")
    if "fc_norm.weight" in w:
        return dense(norm(x[first:].mean(0), "fc_norm"), "head")
    x = norm(x, "norm")
    if facts.get("pool") == "cls_mean":
        return dense(np.concatenate([x[0], x[first:].mean(0)]), "head")
    return dense(x[0] if facts.get("pool", "cls") == "cls" and "cls_token" in w else x[first:].mean(0), "head")


def write(
    path: Path, arrays: dict[str, np.ndarray] | None = None, inside: Any = FACTS, **beside: dict[str, Any]
) -> Path:
    """A weight file that says ``inside`` of itself, and .json files beside it."""
    arrays = timm_arrays() if arrays is None else arrays
    if path.suffix == ".npz":
        np.savez(path, **arrays, **({"meta": np.array(json.dumps(inside))} if inside else {}))
    else:
        save_file(arrays, path, metadata={name: json.dumps(value) for name, value in (inside or {}).items()})
    for name, content in beside.items():
        (path.parent / f"{name}.json").write_text(json.dumps(content))
    return path
