"""Published weights to the parameters of ``models.vit``: what is read, and what is known of it besides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedlora_jax.lora import Adapter, Params, variables

from . import facts, files, huggingface, tables, timm, vit_files
from .backbone import Backbone, Layout, Published, Stem
from .parts import join_blocks, split_blocks
from .positions import resized
from .tables import Table
from .vit import TARGETS, ViT, normalise

LARGEST = 1000  # prompts


class Pretrained(NamedTuple):
    """A model with its parameters (on the host) and the normalisation of its images (per channel, of x / 255).

    ``origins`` says where ``mean``, ``std``, ``heads`` and ``epsilon`` come from, and what became of the ``head``;
    ``also`` is what else a weight file has to say of it, ``layouts`` is as in ``Backbone``; ``table`` has its names,
    where these are transformers'.
    """

    model: Any  # linen, of models.vit or models.mixer
    params: dict[str, Any]
    mean: np.ndarray
    std: np.ndarray
    name: str
    origins: Mapping[str, str] = MappingProxyType({})
    also: Mapping[str, Any] = MappingProxyType({})
    layouts: Mapping[str, Layout] = MappingProxyType({})
    table: Table | None = None

    def facts(self) -> dict[str, str]:
        """What is used beside the arrays, and where it comes from."""
        values = {"mean": self.mean, "std": self.std}
        values |= {fact: getattr(self.model, fact) for fact in ("heads", "epsilon") if hasattr(self.model, fact)}
        said = {fact: f"{facts.shown(value)} ({self.origins.get(fact, 'given')})" for fact, value in values.items()}
        said |= {fact: f"{value} ({self.origins.get(fact, 'given')})" for fact, value in self._unusual().items()}
        return {**said, "head": self.origins.get("head", "given")}

    def said(self) -> dict[str, Any]:
        """What a weight file says beside its arrays, so that nothing of it is guessed (``models.facts``)."""
        own = {"heads": "heads", "epsilon": "ln_eps"}
        told = {name: getattr(self.model, fact) for fact, name in own.items() if hasattr(self.model, fact)}
        return {"mean": self.mean.tolist(), "std": self.std.tolist(), **told, **self._unusual(), **self.also}

    def _unusual(self) -> dict[str, str]:
        """What is not as in most, or where both are usual."""
        usual = {"act": "gelu"}
        if isinstance(self.model, ViT):
            usual = {"act": None if self.model.norm_pre else "gelu", "pool": "cls"}
        return {fact: getattr(self.model, fact) for fact in usual if getattr(self.model, fact) != usual[fact]}


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
    """Load a ViT from arrays under names of timm, transformers or the original; each is used, or refused by name.

    Args:
      path: a ``.npz`` or ``.safetensors`` file, the ``.safetensors.index.json`` of several, or a folder as it was
        published, with ``model.safetensors`` or ``model.safetensors.index.json``. What arrays do not tell (heads,
        epsilon, activation, pooling, mean, std, the classes' names) is read from its ``meta`` (JSON) or metadata, or
        from ``config.json`` and ``preprocessor_config.json`` (or ``processor_config.json``) beside it; where nothing
        says it, it is guessed, with a warning (``models.facts``).
      classes: the names of the classes to come, or how many there are. The file's head is kept where it is for the same
        names (in another order, if need be); else a new one starts at zero. ``None`` keeps it.
      image_size: side of the images to come; position embeddings are interpolated where it differs from the size the
        model was trained at, as by the library that the names are of (``models.positions``).
      heads, epsilon, mean, std: of attention, of the layer norms, of images ``x / 255`` per channel; before all files.
      keep_head: keep the file's head although nothing says that it is for these classes.
      **options: of ``ViT`` (``unroll``, ``remat``, ``dtype``).

    Raises:
      ValueError: the file is missing, damaged, or does not hold such a model; heads, epsilon, mean or std are of a
        wrong kind; there is no head to keep; the size is no multiple of the patch.
    """
    source, path = Path(path), files.located(path)
    read = vit_files.read(path)
    model, params = read.model, read.params
    given = {"mean": mean, "std": std, "heads": heads, "epsilon": epsilon}
    alike = {**facts.ALIKE, **_sizes(read)}
    channels = len(params["embed"]["kernel"]) // model.patch**2
    known = facts.find(path, read.said, given, model.width, channels, alike, implied=read.implied)
    head, kept = start_of_head(path, params.pop("head", None), model.feature_width, known.labels, classes, keep_head)
    antialias = read.table not in huggingface.TABLES or model.registers > 0
    pos = resized(params["pos"], image_size, model.patch, int(model.class_token), antialias)
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), {**params, "pos": pos, "head": head})
    of = {"classes": len(head["bias"]), "heads": known.heads, "epsilon": known.epsilon, "act": known.act}
    model = model.clone(**of, pool=_pool(path, model, known), **options)
    origins = {**known.origins, "head": kept}
    named = {"layouts": read.layouts, "table": read.table if read.table in huggingface.TABLES else None}
    return Pretrained(model, params, known.mean, known.std, files.name_of(source), origins, **named)


def _sizes(read: vit_files.Read) -> dict[tuple[str, ...], tuple]:
    """What sources say of sizes that are known, if they are of this network."""
    model = read.model
    sizes = {("num_hidden_layers",): (model.depth,), ("intermediate_size",): (model.mlp_width,)}
    sizes |= {("patch_size",): (model.patch, [model.patch, model.patch])}
    side = math.isqrt(len(read.params["pos"]) - model.class_token) * model.patch  # not of 2 x 8 patches
    sizes |= {("image_size", "img_size"): (side, [side, side])}
    sizes |= {("reg_tokens", "num_register_tokens"): (model.registers,)}
    return sizes | ({facts.NAMES["heads"]: (model.heads,)} if "heads" in read.implied else {})


def _pool(path: Path, model: ViT, known: facts.Facts) -> str:
    """As it is said; of a norm whose name says so, the norm of the mean; of a class token only where there is one."""
    if model.pool == "norm_of_mean" and known.pool == "mean":
        return "norm_of_mean"
    wrong = {
        "no class token": known.pool in ("cls", "cls_mean") and not model.class_token,
        "no norm of the tokens' mean (fc_norm)": known.pool == "norm_of_mean" != model.pool,
        "a head that reads the class token alone": known.pool == "cls_mean" != model.pool,
        "a head that reads the class token and the mean": model.pool == "cls_mean" != known.pool,
    }
    if why := [has for has, is_so in wrong.items() if is_so]:
        raise ValueError(
            f"{path} would be another network: its features are said to be {known.pool!r} ({known.origins['pool']}), "
            f"and it has {why[0]}"
        )
    return known.pool


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
    context: str | None = None,
) -> Backbone:
    """The ``Backbone`` of a file; arguments and errors as for ``load_vit``.

    Args:
      context: how many prompts to put beside the tokens of an image, as ``prompted`` does.
    """
    given = {"epsilon": epsilon, "mean": mean, "std": std, "keep_head": keep_head, "dtype": getattr(jnp, dtype)}
    vit = load_vit(weights, classes, image_size, heads, **given)
    if len(vit.mean) != 3:
        raise ValueError(
            f"{weights} is of images of {len(vit.mean)} channel(s), and those here have 3: red, green, blue"
        )
    if context is not None:
        return backbone(prompted(vit, context), TARGETS)
    if vit.table is not None and vit.model.pool in ("cls", "cls_mean"):
        names = classes if isinstance(classes, Sequence) else map(str, range(vit.model.classes))
        return backbone(vit, TARGETS, partial(huggingface.published, vit.table, vit, tuple(names)))
    return backbone(vit, TARGETS, lambda params: Published(to_timm(params, vit.model.pool), vit.said()))


def prompted(vit: Pretrained, context: str) -> Pretrained:
    """The model with prompts to be learned among its tokens: Jia et al., *Visual Prompt Tuning*, ECCV 2022, arXiv
    2203.12119, eq. 4 and 5 (VPT-shallow).

    They stand where registers do, behind the class token and without positions, and nothing reads them in the end:
    ``registers`` of the parameters, drawn as these are.

    Raises:
      ValueError: no count.
    """
    if not context.isdecimal() or not 1 <= int(context) <= LARGEST:
        raise ValueError(f"--context {context}: a model without text takes 1 to {LARGEST} prompts, as in --context 8")
    model, rng = vit.model, np.random.default_rng(0)
    drawn = np.asarray(0.02 * rng.normal(size=(int(context), model.width)), np.float32)
    own = vit.params.get("registers", drawn[:0])
    params = {**vit.params, "registers": np.concatenate([own, drawn])}
    origins = {**vit.origins, "prompts": f"{context}, drawn: registers"}
    more = model.clone(registers=model.registers + int(context))
    return vit._replace(model=more, params=params, origins=origins, layouts={}, table=None)


def backbone(
    pretrained: Pretrained,
    targets: Mapping[str, Sequence[str]] = TARGETS,
    publish: Callable[[Params], Published] | None = None,
) -> Backbone:
    """A model with its parameters and its sets of kernels, as experiments see it.

    In training the blocks are unrolled, which is faster to differentiate, and only that: a loop over blocks compiles
    faster.

    Args:
      pretrained: the model.
      targets: sets of kernels by name.
      publish: of the whole model, see ``Backbone``.
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
        whole = publish and (lambda params: publish(join_blocks(before, params)))  # type: ignore[misc]
        layouts = {name: tables.last_blocks(x, model.depth - blocks) for name, x in pretrained.layouts.items()}
        top = pretrained._replace(model=last, params=rest, layouts=layouts)
        return Stem(before, tokens), backbone(top, targets, whole)

    return Backbone(
        pretrained.name,
        pretrained.params,
        apply,
        targets,
        pretrained.facts(),
        model.depth,
        cut,
        publish,
        pretrained.layouts,
    )


def to_timm(params: dict[str, Any], pool: str = "cls") -> dict[str, np.ndarray]:
    """Our parameters under timm's names and in PyTorch's layouts: the inverse of ``load_vit``."""
    table = timm.TIMM_OF_MEAN if pool == "norm_of_mean" else timm.TIMM
    if "norm_pre" in params and not np.any(params["embed"]["bias"]):
        table = timm.TIMM_PRE
    if "registers" in params and "cls" in params:  # there only patches have positions
        params = {**params, "cls": params["cls"] + params["pos"][:1], "pos": params["pos"][1:]}
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    patch = round((len(params["embed"]["kernel"]) / 3) ** 0.5)
    scaled = table._replace(scales={})
    return {name: np.ascontiguousarray(x) for name, x in tables.write_params(scaled, params, patch).items()}


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
