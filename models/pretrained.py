"""Published weights with timm names (PyTorch layouts) to the parameters of ``models.vit``.

Linear weights are ``(out, in)`` there and ``[in, out]`` here; a patch convolution ``(out, 3, p, p)`` becomes a dense
kernel on flattened patches; ``qkv`` is packed along ``out``; blocks are stacked along a leading axis.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fedlora_jax.lora import unflatten
from models.vit import ViT


class Pretrained(NamedTuple):
    """A model with its parameters (on the host) and the normalisation of its images (per channel, of x / 255)."""

    model: ViT
    params: dict[str, Any]
    mean: np.ndarray
    std: np.ndarray
    name: str


def load_vit(
    path: str | Path,
    classes: int | None = None,
    image_size: int | None = None,
    heads: int | None = None,
    **options: Any,
) -> Pretrained:
    """Load a ViT from a ``.npz`` or ``.safetensors`` file of timm-named arrays.

    Args:
      path: the file. An entry ``meta`` (JSON: heads, ln_eps, mean, std), where there is one, overrides timm's
        conventions (heads of width 64, eps 1e-6, mean = std = 0.5).
      classes: keep the file's head if it has this many outputs, else start a new one at zero; ``None`` keeps it.
      image_size: side of the images to come; position embeddings are interpolated (bicubic) where it differs from the
        size the model was trained at.
      heads: number of attention heads, where neither the file nor timm's convention tells.
      **options: of ``ViT`` (``unroll``, ``remat``, ``dtype``).

    Raises:
      ValueError: the file is missing, damaged, or does not hold such a model; the size is no multiple of the patch.
    """
    arrays, meta = read_arrays(path)
    try:
        return _build(arrays, meta, Path(path).stem, classes, image_size, heads, options)
    except KeyError as error:
        some = ", ".join(sorted(arrays)[:3])
        raise ValueError(
            f"{path} is not a ViT with timm names: it lacks {error.args[0]!r} and has {some}, ..."
        ) from None
    except (IndexError, TypeError) as error:
        raise ValueError(f"{path} does not hold the arrays of a ViT: {error}") from None


def read_arrays(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All arrays of a weight file, and its ``meta`` entry."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no weight file {path}: give the path of a .npz or .safetensors file")
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"cannot read weights from {path}: expected a .npz or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            arrays = load_file(path)
        else:
            with path.open("rb") as file:
                arrays = dict(np.load(file, allow_pickle=False))
    except (OSError, ValueError, EOFError, KeyError, SafetensorError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from None
    meta = json.loads(str(arrays.pop("meta"))) if "meta" in arrays else {}
    return arrays, meta


def _build(arrays, meta, name, classes, image_size, heads, options) -> Pretrained:
    conv = arrays["patch_embed.proj.weight"]
    width, channels, patch, _ = conv.shape
    depth = 1 + max(int(key.split(".")[1]) for key in arrays if key.startswith("blocks."))
    heads = heads or int(meta.get("heads", width // 64))
    if heads < 1 or width % heads:
        raise ValueError(f"{name}: width {width} cannot be cut into {heads} heads")

    stacked = lambda key: np.stack([arrays[f"blocks.{i}.{key}"] for i in range(depth)])
    dense = lambda key: {"kernel": stacked(f"{key}.weight").swapaxes(1, 2), "bias": stacked(f"{key}.bias")}
    norm = lambda key: {"scale": stacked(f"{key}.weight"), "bias": stacked(f"{key}.bias")}
    qkv = dense("attn.qkv")
    parts = {f"attn/{part}/{k}": x for k in qkv for part, x in zip(
        ("query", "key", "value"), np.split(qkv[k], 3, axis=-1), strict=True)}  # fmt: skip
    blocks = {
        **parts,
        "attn/out": dense("attn.proj"),
        "mlp/fc1": dense("mlp.fc1"),
        "mlp/fc2": dense("mlp.fc2"),
        "norm1": norm("norm1"),
        "norm2": norm("norm2"),
    }
    params = {
        # (out, channel, row, column) -> [row * column * channel, out], the order in which the model cuts patches
        "embed": {"kernel": conv.transpose(2, 3, 1, 0).reshape(-1, width), "bias": arrays["patch_embed.proj.bias"]},
        "cls": arrays["cls_token"][0],
        "pos": resize_positions(arrays["pos_embed"][0], _grid(image_size, patch)),
        "blocks": unflatten(blocks),
        "norm": {"scale": arrays["norm.weight"], "bias": arrays["norm.bias"]},
        "head": _head(arrays, classes, width),
    }
    model = ViT(
        classes=params["head"]["bias"].shape[0],
        patch=patch,
        width=width,
        depth=depth,
        heads=heads,
        mlp_width=params["blocks"]["mlp"]["fc1"]["bias"].shape[-1],
        epsilon=float(meta.get("ln_eps", 1e-6)),
        **options,
    )
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    side = patch * round((params["pos"].shape[0] - 1) ** 0.5)
    _check(model, params, (side, side, channels), name)
    mean, std = (np.asarray(meta.get(key, [0.5] * channels), np.float32) for key in ("mean", "std"))
    return Pretrained(model, params, mean, std, name)


def _head(arrays: dict[str, np.ndarray], classes: int | None, width: int) -> dict[str, np.ndarray]:
    if "head.weight" in arrays and classes in (None, arrays["head.weight"].shape[0]):
        return {"kernel": arrays["head.weight"].T, "bias": arrays["head.bias"]}
    if classes is None:
        raise ValueError("the weight file has no head: say how many classes there are")
    return {"kernel": np.zeros((width, classes)), "bias": np.zeros(classes)}


def _grid(image_size: int | None, patch: int) -> int | None:
    if image_size is not None and image_size % patch:
        raise ValueError(
            f"images of side {image_size} cannot be cut into patches of {patch}: use a multiple of {patch}"
        )
    return None if image_size is None else image_size // patch


def resize_positions(positions: np.ndarray, grid: int | None) -> np.ndarray:
    """Position embeddings ``[1 + g * g, width]`` (class token first) for a ``grid x grid`` of patches, bicubic."""
    old = round((len(positions) - 1) ** 0.5)
    if old * old != len(positions) - 1:
        raise ValueError(f"{len(positions)} position embeddings are not a class token and a square grid")
    if grid is None or grid == old:
        return positions
    square = jnp.asarray(positions[1:], jnp.float32).reshape(old, old, -1)
    resized = jax.image.resize(square, (grid, grid, square.shape[-1]), "bicubic")
    return np.concatenate([positions[:1], np.asarray(resized).reshape(grid * grid, -1)])


def _check(model: ViT, params: dict[str, Any], image: tuple[int, ...], name: str) -> None:
    """Every array has the shape the model would create."""
    init = lambda key, x: model.init(key, x)["params"]
    expected = jax.eval_shape(init, jax.eval_shape(jax.random.key, 0), jax.ShapeDtypeStruct((1, *image), jnp.float32))
    shapes = lambda tree: {jax.tree_util.keystr(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    got, want = shapes(params), shapes(expected)
    wrong = [f"{key}: got {got.get(key)}, expected {want[key]}" for key in want if got.get(key) != want[key]]
    if wrong:
        raise ValueError(f"{name} does not fit a ViT of width {model.width}: {'; '.join(wrong[:3])}")
