"""The adapter that a run starts from (``--adapter``): a folder of PEFT, fitted to the model and to the options."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.config import Config
from fedlora_jax import lora
from fedlora_jax.lora import Adapter, LoRA
from models import peft_in
from models.backbone import Backbone
from models.peft import CONFIG, WEIGHTS
from models.pretrained import start_of_head

HEAD = ("head/kernel", "head/bias")


class Start(NamedTuple):
    """Low-rank updates by the names of their kernels.

    Attributes:
      updates: ``LoRA`` leaves, whose ranks are those of each kernel.
      held: ``[..., rank]`` 1 where a column is the adapter's, 0 where its layer has fewer, which then start afresh.
      record: what identifies it, and what became of its head.
    """

    updates: dict[str, LoRA]
    held: dict[str, np.ndarray]
    record: dict[str, str]

    def onto(self, fresh: Adapter) -> Adapter:
        """Where training starts: a fresh adapter of the same kernels with these updates."""
        if not self.updates:
            return fresh
        flat = lora.flatten(fresh)
        for name, x in self.updates.items():
            held = jnp.asarray(self.held[name])[..., None, :]
            a = jnp.where(held, x.a, flat[name].a[..., : x.a.shape[-1]])
            flat[name] = LoRA(a, jnp.asarray(x.b), x.scale)
        return lora.unflatten(flat)


def options(folder: str) -> dict[str, Any]:
    """What an adapter decides of the options, where they are not given.

    Raises:
      ValueError: it cannot be read.
    """
    found = peft_in.summary(Path(folder))
    return {"rank": (found.rank,), "scale": found.scale}


def begins(config: Config, whole: Backbone, top: Backbone, classes: tuple[str, ...]) -> tuple[Config, Backbone, Start]:
    """Options whose targets are the adapter's kernels, the model with the adapter's head, and the updates.

    Of no adapter all as it is, and nothing to begin with.

    Args:
      config: the options.
      whole: the model.
      top: of it, what is left to adapt.
      classes: the names of the classes.

    Raises:
      ValueError: the adapter cannot be read, is of another model or of other blocks, or the options say otherwise.
    """
    if config.adapter is None:
        return config, top, Start({}, {}, {})
    folder = Path(config.adapter)
    if config.head == "cosine":
        raise ValueError(
            f"--adapter {folder} is of a model as PyTorch has it, and none there has the head of --head cosine: leave "
            "one of them out"
        )
    found, said = peft_in.read(folder, whole.layouts, whole.params), peft_in.summary(folder)
    updates, held = {}, {}
    for kernel, rows in found.updates.items():
        _refuse_other_blocks(folder, kernel, list(rows), *(lora.flatten(x.params)[kernel].shape for x in (whole, top)))
        updates[kernel], held[kernel] = _stacked([rows[row] for row in sorted(rows, key=lambda row: row or 0)])
        if None in rows:
            x, held[kernel] = updates[kernel], held[kernel][0]
            updates[kernel] = LoRA(x.a[0], x.b[0], x.scale)
    if not updates:
        raise ValueError(f"{folder} adapts no layer that is trained here: merge it into the weights")
    rank = max(x.a.shape[-1] for x in updates.values())
    _refuse_other_options(config, top, list(updates), rank, said.scale)
    head, params = "not in the adapter", lora.flatten(top.params)
    if HEAD[0] in found.full:
        there = {name.rpartition("/")[2]: found.full.pop(name) for name in HEAD}
        new, head = start_of_head(folder, there, len(there["kernel"]), found.labels, classes, config.keep_head)
        head = "left out, --head prototype starts from another" if config.head == "prototype" else head
        params |= {f"head/{kind}": x for kind, x in new.items()} if head.startswith("kept") else {}
    if shapes := [name for name, x in found.full.items() if x.shape != params[name].shape]:
        raise ValueError(f"{folder} does not fit this model: {shapes[0]} has the shape {found.full[shapes[0]].shape}")
    print(
        f"adapter {folder}: of rank {rank}, scale {said.scale:g}, in {', '.join(updates)}; head {head}", file=sys.stderr
    )
    if min(config.rank) < rank:
        print(
            f"note: --rank {','.join(map(str, config.rank))}: clients of less than {rank} are sent a part of the "
            "adapter, as their method cuts it: they do not start from all that it has learned",
            file=sys.stderr,
        )
    digest = hashlib.sha256(b"".join((folder / name).read_bytes() for name in (CONFIG, WEIGHTS))).hexdigest()[:16]
    start = Start(updates, held, {"adapter": digest, "adapter_head": head})
    exactly = tuple(f"^{re.escape(kernel)}$" for kernel in updates)
    top = top._replace(params=lora.unflatten(params | found.full))
    return dataclasses.replace(config, targets=exactly), top, start


def _refuse_other_blocks(folder: Path, kernel: str, rows: list, whole: tuple[int, ...], top: tuple[int, ...]) -> None:
    """All blocks that are adapted have an update, and no others do; of shapes ``[blocks, in, out]`` of a kernel."""
    if None in rows:
        return
    first, last = whole[0] - top[0], whole[0]
    if sorted(rows) == list(range(first, last)):
        return
    some = sorted(rows)
    if some == list(range(some[0], last)):
        then = f"use --adapt-last {last - some[0]}" if some[0] else "leave --adapt-last out"
    else:
        then = "only the last blocks of a model can be adapted alone; merge it into the weights"
    raise ValueError(
        f"{folder} adapts {kernel} in blocks {','.join(map(str, some))} of {last}, the run those from {first}: {then}"
    )


def _stacked(rows: list[tuple[np.ndarray, np.ndarray, float]]) -> tuple[LoRA, np.ndarray]:
    """One update of all blocks, at their largest rank, and which of its columns are of the adapter."""
    rank, scale = max(a.shape[1] for a, _, _ in rows), rows[0][2]
    wide = lambda x, axis: np.pad(x, [(0, rank - x.shape[i] if i == axis else 0) for i in (0, 1)])
    a = np.stack([wide(a, 1) for a, _, _ in rows])
    b = np.stack([wide(b * (own / scale), 0) for _, b, own in rows])
    held = np.stack([np.arange(rank) < a.shape[1] for a, _, _ in rows])
    return LoRA(np.float32(a), np.float32(b), scale), held  # type: ignore[arg-type]


def _refuse_other_options(config: Config, top: Backbone, kernels: list[str], rank: int, scale: float) -> None:
    if max(config.rank) != rank:
        raise ValueError(
            f"--rank {','.join(map(str, config.rank))} is not that of --adapter {config.adapter}, {rank}: leave it out"
        )
    if not math.isclose(config.factor, scale):
        typed, got = ("--scale", config.factor) if config.alpha is None else ("--alpha", config.alpha)
        own = scale if config.alpha is None else scale * rank
        raise ValueError(f"{typed} {got:g} is not that of --adapter {config.adapter}, {own:g}: leave it out")
    if config.targets == Config().targets:
        return
    asked = lora.adapted(top.params, top.patterns(config.targets))
    if set(asked) != set(kernels):
        raise ValueError(
            f"--targets {','.join(config.targets)} finds {', '.join(asked)}, --adapter {config.adapter} has "
            f"{', '.join(kernels)}: leave --targets out"
        )
