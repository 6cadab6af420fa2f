"""Weight files of ViTs, in every format whose names are known: the network that is in one, every array of it used."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import files, huggingface, original, tables, timm
from .backbone import Layout
from .tables import Table
from .vit import ViT

TABLES = (*timm.TABLES, *huggingface.TABLES, *original.TABLES)
# an array that stands for what masked pre-training hides, which no image has, and a layer that no classifier reads
UNUSED = re.compile(rf"mask_token|{huggingface.UNUSED}")
HINTS = {**timm.OTHERS, **huggingface.OTHERS, **original.OTHERS}


class Read(NamedTuple):
    """A network as it was read.

    Attributes:
      model: its sizes, and what the names of its arrays say; one class and one head where these do not.
      params: its parameters; ``head`` where it has one.
      said: what the file says besides.
      implied: facts of ``models.facts`` that its format implies, where nothing says otherwise.
      layouts: as in ``Backbone``.
      table: whose names these are.
    """

    model: ViT
    params: dict[str, Any]
    said: dict[str, Any]
    implied: Mapping[str, Any]
    layouts: Mapping[str, Layout]
    table: Table


def read(path: Path) -> Read:
    """A ViT, blocks stacked.

    Raises:
      ValueError: the file is missing or damaged; an array is missing, is not one of a ViT that ``models.vit`` computes,
        has the wrong shape or kind, or is not finite.
    """
    names = {name for name in files.names_in(path) if not UNUSED.fullmatch(name)}
    format = tables.closest(TABLES, names)
    table, made = tables.fitted(format, names), []

    def wanted(found: Any) -> list[str]:
        return tables.check_names(path, table, {x for x in found if not UNUSED.fullmatch(x)}, "a ViT", HINTS)

    arrays, said = files.read(path, wanted, lambda arrays: made.append(_network(path, table, arrays)))
    table, model = made[0]
    params = tables.read_params(table, arrays)
    layouts = _layouts(format, table, model, arrays)
    return Read(model, _own_positions(params), said, _implied(format, model), layouts, format)


def _network(path: Path, table: Table, arrays: Mapping[str, np.ndarray]) -> tuple[Table, ViT]:
    """The network that a few of its arrays tell the size of, if all of them fit; its table with the number of heads."""
    if empty := next((name for name, x in arrays.items() if not x.size), None):
        raise ValueError(f"{path}: {empty} has the shape {list(arrays[empty].shape)}, nothing in it; fetch it anew")
    conv, pos = arrays[table.theirs("embed", "kernel")], arrays[table.tokens["pos"]]
    query = None if table.torch else arrays[table.theirs("attn/query", "kernel", 0)]
    if conv.ndim != 4 or pos.ndim != 3 or not (query is None or (query.ndim == 3 and query[0].size == len(query))):
        raise ValueError(
            f"{path} is not a ViT: its patches are embedded by an array {list(conv.shape)}, their positions by one "
            f"{list(pos.shape)}" + ("" if query is None else f", its queries by one {list(query.shape)}")
        )
    patch, channels, width = (conv.shape[3], *conv.shape[1::-1]) if table.torch else conv.shape[1:]
    table = table if query is None else table._replace(heads=query.shape[1])
    head = arrays[table.theirs("head", "bias")].size if "head" in table.top else 1
    model = ViT(
        classes=head,
        patch=patch,
        width=width,
        depth=table.depth(arrays),
        heads=table.heads or 1,
        mlp_width=arrays[table.theirs("mlp/fc1", "bias", 0)].size,
        pool=_pool(table, arrays, width),
        class_token="cls" in table.tokens,
        registers=arrays[table.tokens["registers"]].shape[1] if "registers" in table.tokens else 0,
        norm_pre="norm_pre" in table.top,
    )
    side = _grid(path, table.tokens["pos"], pos.shape[1], model) * patch

    def whole() -> dict[str, Any]:
        params = model.init(jax.random.key(0), jnp.zeros((1, side, side, channels)))["params"]
        return tables.write_params(table, params, patch)

    expected = jax.eval_shape(whole) | {table.tokens["pos"]: jax.ShapeDtypeStruct((1, pos.shape[1], width), pos.dtype)}
    tables.check_shapes(path, arrays, expected, f"a ViT of width {width}")
    return table, model


def _pool(table: Table, arrays: Mapping[str, np.ndarray], width: int) -> Any:
    """What the head reads, as far as arrays tell."""
    if table.top["norm"] == "fc_norm":
        return "norm_of_mean"
    if table.name == huggingface.DINOV2.name and "head" in table.top:
        return "cls_mean" if arrays[table.theirs("head", "kernel")].shape[1:] == (2 * width,) else "cls"
    return "cls" if "cls" in table.tokens else "mean"


def _grid(path: Path, name: str, count: int, model: ViT) -> int:
    """The side of the grid of patches that so many positions are of, with or without those of tokens before them."""
    first = int(model.class_token)
    for others in (first, 0, first + model.registers):
        side = math.isqrt(max(0, count - others))
        if side and side**2 == count - others:
            return side
    before = first + model.registers
    others = f"with or without those of the {before} tokens before them" if before else "as it has no class token"
    raise ValueError(f"{path}: {name} holds {count} position embeddings, expected those of a square grid, {others}")


def _own_positions(params: dict[str, Any]) -> dict[str, Any]:
    """With positions of the class token and of the patches; where the former has none it is zero (DeiT III)."""
    pos, first, registers = params["pos"], int("cls" in params), params.get("registers", ())
    if math.isqrt(len(pos)) ** 2 == len(pos) and first:
        pos = np.concatenate([np.zeros_like(pos[:1]), pos])
    elif len(registers) and math.isqrt(len(pos) - first) ** 2 != len(pos) - first:
        params = {**params, "registers": registers + pos[first : first + len(registers)]}
        pos = np.concatenate([pos[:first], pos[first + len(registers) :]])
    return {**params, "pos": pos}


def _layouts(format: Table, table: Table, model: ViT, arrays: Mapping[str, np.ndarray]) -> dict[str, Layout]:
    """The network as PyTorch sees it, if it does."""
    depth = model.depth
    rows = lambda template: np.stack([arrays[template.format(i=i)] for i in range(depth)])
    gains = {layer: rows(template) for layer, template in table.scales.items()}
    if format in timm.TABLES:
        return {"timm": Layout(tables.linears(format, depth, gains), timm.BASE)}  # with a head, if new
    # a classifier of DINOv2 also reads the mean of the patches, which that of a bare model of ours does not
    extra = model.width if gains and model.pool == "cls" else 0
    return huggingface.layouts(table, depth, gains, extra) if format in huggingface.TABLES else {}


def _implied(table: Table, model: ViT) -> dict[str, Any]:
    if table in original.TABLES:
        shown = original.SHOWN if table is original.ORIGINAL else {}
        return {**original.COMPUTED, **shown, "heads": model.heads, "pool": model.pool}
    return {"pool": model.pool} | ({} if model.norm_pre else {"act": "gelu"})
