"""Weight files: the arrays that are asked for, as float32, and what else a file says.

Files are ``.npz`` or ``.safetensors``, the latter also in shards with an index.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from .archive import members, read_npz

LABELS = ("classes", "synsets")  # arrays of a .npz file that name the classes which the head tells apart
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # in a folder as they are published
OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")  # the same, of OpenCLIP
ADAPTER = "adapter_config.json"  # in a folder of PEFT
EXPECTED = "floats of 16, 32 or 64 bits: write it without quantising"
PICKLES = (".bin", ".pth", ".pt", ".ckpt")


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
    if (path / ADAPTER).is_file():
        raise ValueError(
            f"{path} is an adapter of PEFT, and no model: give it as --adapter, with the weights of its model as "
            "--weights"
        )
    if not path.is_file():
        raise ValueError(
            f"no weight file {path}: give the path of a .npz or .safetensors file, or of a folder with {SINGLE} or "
            f"{INDEX}"
        )
    if path.suffix == ".npz":
        names = wanted(set(members(path)) - {"meta", *LABELS})
        arrays = read_npz(path, {*names, "meta", *LABELS})
        said = _said(path, arrays)
    elif _is_safetensors(path):
        where = _where(path)
        names, arrays, said = wanted(where), {}, {}
        for shard in sorted({where[name] for name in names}):
            with _opened(shard) as file:
                arrays |= {name: _tensor(file, shard, name) for name in names if where[name] == shard}
                said |= {name: _parsed(text) for name, text in (file.metadata() or {}).items()}
    else:
        pickled = f", and this is a pickle, which runs code of its own; convert it: {_converting(path)}"
        raise ValueError(
            f"cannot read weights from {path}: expected a .npz or .safetensors file{pickled * (path.suffix in PICKLES)}"
        )
    arrays = {name: arrays[name] for name in names}
    check(arrays)
    return {name: _float32(path, name, x) for name, x in arrays.items()}, said


def names_in(path: Path) -> list[str]:
    """Names of the arrays in a file; empty where it cannot be read (``read`` says why)."""
    if path.is_file() and path.suffix == ".npz":
        return [name for name in members(path) if name not in ("meta", *LABELS)]
    if path.is_file() and _is_safetensors(path):
        try:
            return list(_where(path))
        except ValueError:
            return []
    return []


def located(path: str | Path) -> Path:
    """The file itself, or that in a folder as they are published; where there is none, the path as it is."""
    path = Path(path)
    if not path.is_dir():
        return path
    pickles = (f"{stem}pytorch_model{suffix}" for stem in ("", "open_clip_") for suffix in PICKLES)
    found = (path / name for name in (SINGLE, INDEX, *OPEN_CLIP, *pickles))
    return next((file for file in found if file.is_file()), path)


def name_of(path: Path) -> str:
    """Of a model, by the path that was given: a folder's has no suffix to leave out."""
    if path.is_dir():
        return path.resolve().name
    return path.name.removesuffix(".safetensors.index.json").removesuffix(path.suffix)


def _is_safetensors(path: Path) -> bool:
    return path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        from safetensors import SafetensorError, safe_open  # not needed for a .npz file, nor to import this
    except ImportError:
        raise ValueError(f"reading {path} needs the package safetensors: pip install safetensors") from None
    try:
        with safe_open(path, framework="numpy") as file:  # checks all sizes against the file's
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged or truncated: {error}; fetch or write it anew") from None


def _tensor(file: Any, path: Path, name: str) -> np.ndarray:
    try:
        return file.get_tensor(name)
    except (AttributeError, TypeError):  # a type that NumPy has no name for, such as float8
        kind = file.get_slice(name).get_dtype()
        raise ValueError(f"{path}: {name} is {kind}, expected {EXPECTED}") from None


def _where(path: Path) -> dict[str, Path]:
    """Which file each array is in: this one, or the shards that an index names."""
    if path.suffix == ".safetensors":
        with _opened(path) as file:
            return dict.fromkeys(file.keys(), path)
    try:
        shards = json.loads(path.read_bytes())["weight_map"]
        where = {name: path.parent / Path(shard).name for name, shard in shards.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is damaged: expected an object weight_map of names and files") from None
    for shard in sorted(set(where.values())):
        if not shard.is_file():
            raise ValueError(f"{path} names {shard.name}, which is not beside it: fetch it too")
        with _opened(shard) as file:
            held = set(file.keys())
        if lost := sorted(name for name, file in where.items() if file == shard and name not in held):
            raise ValueError(f"{path} says that {lost[0]} is in {shard.name}, which lacks it: fetch both anew")
    return where


def _converting(path: Path) -> str:
    code = (
        "import sys, torch, safetensors.torch as s; w = torch.load(sys.argv[1], 'cpu', weights_only=True); "
        "s.save_file({k: v.clone().contiguous() for k, v in w.get('model', w).items()}, sys.argv[2])"
    )
    return f'python -c "{code}" {shlex.quote(str(path))} {shlex.quote(str(path.parent / SINGLE))}'


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
        raise ValueError(f"{path}: {name} is {x.dtype}, expected {EXPECTED}")
    with np.errstate(over="ignore"):
        x = x.astype(np.float32)
    if not np.isfinite(x).all():
        raise ValueError(f"{path}: {name} holds numbers that are not finite as float32; fetch or write it anew")
    return x
