"""Published weights to the parameters of ``models.vit``: what is read, and what is known of it besides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedlora_jax.lora import Adapter, Params, flatten, variables

from . import facts, files, huggingface, timm
from .backbone import Backbone, Published, Stem
from .parts import join_blocks, split_blocks
from .vit import TARGETS, ViT, normalise


class Pretrained(NamedTuple):
    """A model with its parameters (on the host) and the normalisation of its images (per channel, of x / 255).

    ``origins`` says where ``mean``, ``std``, ``heads`` and ``epsilon`` come from, and what became of the ``head``.
    """

    model: Any  # linen, of models.vit or models.mixer
    params: dict[str, Any]
    mean: np.ndarray
    std: np.ndarray
    name: str
    origins: Mapping[str, str] = MappingProxyType({})

    def facts(self) -> dict[str, str]:
        """What is used beside the arrays, and where it comes from."""
        values = {"mean": self.mean, "std": self.std}
        values |= {fact: getattr(self.model, fact) for fact in ("heads", "epsilon") if hasattr(self.model, fact)}
        said = {fact: f"{facts.shown(value)} ({self.origins.get(fact, 'given')})" for fact, value in values.items()}
        return {**said, "head": self.origins.get("head", "given")}

    def said(self) -> dict[str, Any]:
        """What a weight file says beside its arrays, so that nothing of it is guessed (``models.facts``)."""
        own = {"heads": "heads", "epsilon": "ln_eps"}
        told = {name: getattr(self.model, fact) for fact, name in own.items() if hasattr(self.model, fact)}
        return {"mean": self.mean.tolist(), "std": self.std.tolist(), **told}


def load_vit(
    path: str | Path,
    classes: int | Sequence[str] | None = None,
    image_size: int | None = None,
    heads: int | None = None,
    *,
    epsilon: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    keep_head: bool = False,
    **options: Any,
) -> Pretrained:
    """Load a ViT from arrays under the names of timm or of Hugging Face transformers; each is used, or refused by name.

    Args:
      path: a ``.npz`` or ``.safetensors`` file, the ``.safetensors.index.json`` of several, or a folder as it was
        published, with ``model.safetensors`` or ``model.safetensors.index.json``. What arrays do not tell (heads,
        epsilon, mean, std, the classes' names) is read from its ``meta`` (JSON) or metadata, or from ``config.json``
        and ``preprocessor_config.json`` beside it; where nothing says it, it is guessed, with a warning
        (``models.facts``).
      classes: the names of the classes to come, or how many there are. The file's head is kept where it is for the same
        names (in another order, if need be); else a new one starts at zero. ``None`` keeps it.
      image_size: side of the images to come; position embeddings are interpolated (bicubic) where it differs from the
        size the model was trained at.
      heads, epsilon, mean, std: of attention, of the layer norms, of images ``x / 255`` per channel; before all files.
      keep_head: keep the file's head although nothing says that it is for these classes.
      **options: of ``ViT`` (``unroll``, ``remat``, ``dtype``).

    Raises:
      ValueError: the file is missing, damaged, or does not hold such a model; heads, epsilon, mean or std are of a
        wrong kind; there is no head to keep; the size is no multiple of the patch.
    """
    source, path = Path(path), files.located(path)
    read = huggingface.read if huggingface.claims(files.names_in(path)) else timm.read
    params, patch, inside = read(path)
    (rows, width), blocks = params["embed"]["kernel"].shape, params["blocks"]
    depth, mlp_width = blocks["mlp"]["fc1"]["bias"].shape
    given = {"mean": mean, "std": std, "heads": heads, "epsilon": epsilon}
    sizes = {("num_hidden_layers",): (depth,), ("intermediate_size",): (mlp_width,)}
    sizes |= {("patch_size",): (patch, [patch, patch])}
    known = facts.find(path, inside, given, width, rows // patch**2, facts.ALIKE | sizes)
    head, kept = start_of_head(path, params.pop("head", None), width, known.labels, classes, keep_head)
    pos = resize_positions(params["pos"], _grid(image_size, patch))
    params |= {"pos": pos, "head": head}
    model = ViT(len(head["bias"]), patch, width, depth, known.heads, mlp_width, known.epsilon, **options)
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    return Pretrained(model, params, known.mean, known.std, files.name_of(source), {**known.origins, "head": kept})


def vit_backbone(
    weights: str | Path,
    classes: int | Sequence[str] | None = None,
    image_size: int | None = None,
    heads: int | None = None,
    epsilon: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    keep_head: bool = False,
    dtype: str = "float32",
) -> Backbone:
    """The ``Backbone`` of a file; arguments and errors as for ``load_vit``."""
    given = {"epsilon": epsilon, "mean": mean, "std": std, "keep_head": keep_head, "dtype": getattr(jnp, dtype)}
    return backbone(load_vit(weights, classes, image_size, heads, **given), TARGETS, to_timm)


def backbone(
    pretrained: Pretrained,
    targets: Mapping[str, Sequence[str]] = TARGETS,
    names: Callable[[Params], dict[str, np.ndarray]] | None = None,
) -> Backbone:
    """A model with its parameters and its sets of kernels, as experiments see it.

    In training the blocks are unrolled, which is faster to differentiate, and only that: a loop over blocks compiles
    faster.

    Args:
      pretrained: the model.
      targets: sets of kernels by name.
      names: ``(params) -> arrays`` of the whole model under published names, in their layouts.
    """
    model, mean, std = pretrained.model, pretrained.mean, pretrained.std
    forms = {training: model.clone(unroll=training) for training in (True, False)}
    seen = lambda x: x if model.part == "top" else normalise(x, mean, std)

    def apply(params: Params, adapter: Adapter, images: Array, *, training: bool = False) -> tuple[Array, Array]:
        logits, out = forms[training].apply(variables(params, adapter), seen(images))  # type: ignore[misc]
        return logits, out["features"]  # type: ignore[index, return-value]

    def cut(blocks: int) -> tuple[Stem, Backbone]:
        (first, before), (last, rest) = split_blocks(model, pretrained.params, blocks)
        tokens = lambda params, x: first.apply({"params": params}, normalise(x, mean, std))[0]  # type: ignore[index]
        whole = names and (lambda params: names(join_blocks(before, params)))  # type: ignore[misc]
        return Stem(before, tokens), backbone(pretrained._replace(model=last, params=rest), targets, whole)

    publish = names and (lambda params: Published(names(params), pretrained.said()))
    return Backbone(pretrained.name, pretrained.params, apply, targets, pretrained.facts(), model.depth, cut, publish)


def to_timm(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Our parameters under timm's names and in PyTorch's layouts: the inverse of ``load_vit``."""
    p = {name: np.asarray(value, np.float32) for name, value in flatten(params).items()}
    patch = round((p["embed/kernel"].shape[0] / 3) ** 0.5)
    # [row * column * channel, out] -> (out, channel, row, column)
    arrays = {
        "patch_embed.proj.weight": p["embed/kernel"].reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1),
        "patch_embed.proj.bias": p["embed/bias"],
        "cls_token": p["cls"][None],
        "pos_embed": p["pos"][None],
        "norm.weight": p["norm/scale"],
        "norm.bias": p["norm/bias"],
        "head.weight": p["head/kernel"].T,
        "head.bias": p["head/bias"],
    }
    for kind in ("kernel", "bias"):
        p[f"blocks/attn/qkv/{kind}"] = np.concatenate(
            [p[f"blocks/attn/{part}/{kind}"] for part in ("query", "key", "value")], -1
        )
    for i in range(len(p["blocks/norm1/scale"])):
        for norm in ("norm1", "norm2"):
            arrays[f"blocks.{i}.{norm}.weight"] = p[f"blocks/{norm}/scale"][i]
            arrays[f"blocks.{i}.{norm}.bias"] = p[f"blocks/{norm}/bias"][i]
        for theirs, ours in {
            "attn.qkv": "attn/qkv",
            "attn.proj": "attn/out",
            "mlp.fc1": "mlp/fc1",
            "mlp.fc2": "mlp/fc2",
        }.items():
            arrays[f"blocks.{i}.{theirs}.weight"] = p[f"blocks/{ours}/kernel"][i].T
            arrays[f"blocks.{i}.{theirs}.bias"] = p[f"blocks/{ours}/bias"][i]
    return {name: np.ascontiguousarray(value) for name, value in arrays.items()}


def start_of_head(
    path: Path,
    there: dict[str, np.ndarray] | None,
    width: int,
    labels: tuple[str, ...] | None,
    classes: int | Sequence[str] | None,
    keep: bool,
) -> tuple[dict[str, np.ndarray], str]:
    """The head to start from, and which it is.

    Args:
      path: of the file, for messages.
      there: the head in it, ``kernel [width, outputs]`` and ``bias``; ``None`` where it has none.
      width: of the features.
      labels: the names that the file's outputs stand for, where something says so.
      classes: the names of the classes to come, or how many; ``None``: as there.
      keep: the file's, whatever its names are.

    Raises:
      ValueError: it cannot be kept.
    """
    outputs = 0 if there is None else there["bias"].size
    names = None if classes is None or isinstance(classes, int) else list(classes)
    count = outputs if classes is None else classes if isinstance(classes, int) else len(classes)
    if not count or (keep and count != outputs):
        has = f"a head for {outputs} classes" if outputs else "no head"
        raise ValueError(
            f"{path} has {has} and cannot keep it for {count or 'classes unknown'}: leave keep_head (--keep-head) out "
            "for a new one" + " and say how many classes there are" * (not count)
        )
    kept = lambda order: {"kernel": there["kernel"][:, order], "bias": there["bias"][order]}  # type: ignore[index]
    if names and labels and len(labels) == outputs and len(set(names)) == count and sorted(labels) == sorted(names):
        order = [labels.index(name) for name in names]
        return kept(order), "kept, for these classes" + (" in another order" if order != sorted(order) else "")
    if keep or classes is None:
        return kept(slice(None)), "kept, as asked"
    new = {"kernel": np.zeros((width, count)), "bias": np.zeros(count)}
    if not outputs:
        return new, "new, the file has none"
    if outputs != count or labels:
        return new, f"new, the file's is for {outputs} other classes"
    return new, "new, the file does not say for which classes its own is; --keep-head keeps it"


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
