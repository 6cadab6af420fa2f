"""Weight files: the arrays that are asked for, as float32, and what else a file says; ``.npz`` or ``.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from models.archive import members, read_npz

LABELS = ("classes", "synsets")  # arrays of a .npz file that name the classes which the head tells apart


def read(
    path: Path, wanted: Callable[[Iterable[str]], list[str]], check: Callable[[dict[str, np.ndarray]], None]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays of a file as float32, and what the file says besides.

    Args:
      path: of the file.
      wanted: ``(names in the file) -> names to read``; it refuses a file that lacks one, or holds others.
      check: is shown these arrays as they are stored; it refuses shapes that do not fit.

    Raises:
      ValueError: the file is missing or damaged, or an array is of the wrong kind or not finite.
    """
    if not path.is_file():
        raise ValueError(f"no weight file {path}: give the path of a .npz or .safetensors file")
    if path.suffix == ".npz":
        names = wanted(set(members(path)) - {"meta", *LABELS})
        arrays = read_npz(path, {*names, "meta", *LABELS})
        said = _said(path, arrays)
    elif path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="numpy") as file:  # checks all sizes against the file's
                names = wanted(file.keys())
                arrays = {name: file.get_tensor(name) for name in names}
                said = {name: _parsed(text) for name, text in (file.metadata() or {}).items()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged or truncated: {error}; fetch or write it anew") from None
    else:
        raise ValueError(f"cannot read weights from {path}: expected a .npz or .safetensors file")
    arrays = {name: arrays[name] for name in names}
    check(arrays)
    return {name: _float32(path, name, x) for name, x in arrays.items()}, said


def names_in(path: Path) -> list[str]:
    """Names of the arrays in a file; empty where it cannot be read (``read`` says why)."""
    if path.is_file() and path.suffix == ".npz":
        return [name for name in members(path) if name not in ("meta", *LABELS)]
    if path.is_file() and path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="numpy") as file:
                return list(file.keys())
        except (OSError, SafetensorError):
            return []
    return []


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
