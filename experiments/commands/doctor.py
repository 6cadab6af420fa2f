"""``python -m experiments doctor``: what this machine has, what is missing for what, and what would be in the way."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import jax

import fedlora_jax
from experiments.engine import process
from experiments.setup import decoding, memory
from experiments.setup.caches import caches

VERSIONS = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "matplotlib", "scikit-learn")
# Modules that are asked for when they are needed: what for, and the extra of pyproject.toml that brings them
OPTIONAL: Mapping[str, tuple[str, str]] = {
    "tensorflow_datasets": ("--data tfds:NAME", "tfds"),
    "array_record": ("--data tfds:NAME in that format", "tfds"),
    "datasets": ("--data hf:NAME, folders of Hugging Face", "hf"),
    "huggingface_hub": ("--weights hf:OWNER/NAME", "hub"),
    "tensorboardX": ("--track tensorboard", "track"),
    "wandb": ("--track wandb", "track"),
    "mlflow": ("--track mlflow", "track"),
    "psutil": ("bench: CPU time of child processes", "bench"),
    "pytest": ("the tests", "test"),
}
ACCELERATORS = {"/dev/nvidia0": "cuda12", "/dev/accel0": "tpu"}  # a file that is there where one is: the extra for it


def table() -> str:
    """Everything, and at the end what to do about what is wrong."""
    kept = {"programs": caches() / "fedlora-jax", "images": caches() / decoding.FOLDER}
    rows = [
        ["fedlora-jax", f"{fedlora_jax.__version__}, Python {platform.python_version()}, {platform.platform()}"],
        ["versions", ", ".join(map(_version, VERSIONS))],
        ["devices", _devices()],
        ["cores", f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}"],
        ["memory", _size(memory.available()) + " for arrays"],
        *([f"cache of {name}", f"{path}, {_size(_bytes(path))}"] for name, path in kept.items()),
        *([module, _has(module, *what)] for module, what in OPTIONAL.items()),
    ]
    wrong = problems(kept)
    return "\n".join([*(line.rstrip() for line in _left(rows)), "", *(wrong or ["nothing is in the way"])])


def problems(folders: Mapping[str, Path]) -> list[str]:
    """A line for each thing that will hold up a run, with what to do."""
    found = []
    for path, extra in ACCELERATORS.items():
        if Path(path).exists() and jax.default_backend() == "cpu":
            found.append(
                f"warning: {path} is there and jax computes on the CPU: pip install -e '.[{extra}]', and leave "
                "JAX_PLATFORMS out of the environment"
            )
    for name, path in folders.items():
        there = next(p for p in (path, *path.parents) if p.exists())
        if not os.access(there, os.W_OK):
            found.append(f"warning: {name} cannot be kept in {path}: make {there} writable, or set XDG_CACHE_HOME")
    if jax.default_backend() == "cpu" and platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        found.append("warning: GLIBC_TUNABLES is not set: start by python -m experiments, which sets it")
    return found


def _version(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{name} missing"


def _devices() -> str:
    """All of them, alike ones counted, and what is known of the processor."""
    kinds = [device.device_kind for device in jax.devices()]
    counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    name, bits = process.processor()
    wide = f" with vectors of {bits} bits" * (bits is not None)
    return f"{counted} ({jax.default_backend()}); processor: {name or 'unknown'}{wide}"


def _has(module: str, what: str, extra: str) -> str:
    if importlib.util.find_spec(module) is None:
        return f"missing, for {what}: pip install -e '.[{extra}]'"
    return f"there, for {what}"


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0


def _size(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.2f} GiB"


def _left(rows: list[list[str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"{name.ljust(width)}  {value}" for name, value in rows]
