"""Whose layers go by which names: one table for each format of published weights, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fedlora_jax.lora import flatten, unflatten

from .backbone import Layout, Linear

NONE: Mapping[str, Any] = MappingProxyType({})
QKV = ("attn/query", "attn/key", "attn/value")
BARE = ("projection",)  # our layers that have no bias anywhere


class Table(NamedTuple):
    """The names of one format.

    Attributes:
      name: of the format.
      top: our layer -> theirs, outside of the blocks.
      block: our layer inside ``blocks`` -> theirs, with ``{i}`` for the number of the block (and ``{kind}``, where that
        is no part of its own).
      torch: are matrices ``(out, in)`` and convolutions ``(out, in, p, p)``, joined by dots? Else they are as in flax.
      conv: our layer that is a convolution there, of patches.
      tokens: our array that is no layer -> theirs, which has a leading axis of 1.
      same: our array that is no layer -> theirs, which is the same.
      packed: their layer in ``blocks`` -> ours, of which it holds the outputs one after another.
      plain: our layers that have no bias there; ours is zero.
      scales: our layer in ``blocks`` -> their array ``[out]`` that multiplies what it puts out; ours goes into it.
      heads: of attention, where its arrays have an axis for them; else 0.
      may: what a network of this format may be without: layers or arrays of ours, or ``LAYER/bias``, ``LAYER/scale``.
    """

    name: str
    top: Mapping[str, str]
    block: Mapping[str, str]
    torch: bool
    conv: str = "embed"
    tokens: Mapping[str, str] = NONE
    same: Mapping[str, str] = NONE
    packed: Mapping[str, tuple[str, ...]] = NONE
    plain: tuple[str, ...] = ()
    scales: Mapping[str, str] = NONE
    heads: int = 0
    may: tuple[str, ...] = ("head",)

    def kinds(self, layer: str) -> dict[str, str]:
        """Our parameters of a layer -> how they are called there."""
        weight = "scale" if layer.rpartition("/")[2].startswith("norm") else "kernel"
        bias = {} if layer in self.plain or layer in BARE else {"bias": "bias"}
        return {weight: "weight" if self.torch else weight} | bias

    def theirs(self, layer: str, kind: str, i: int | None = None) -> str:
        template, kind = self.top[layer] if i is None else self.block[layer], self.kinds(layer)[kind]
        whole = template if "{kind}" in template else f"{template}{'.' if self.torch else '/'}{{kind}}"
        return whole.format(i=i, kind=kind)

    def depth(self, names: Iterable[str]) -> int:
        """Number of blocks that names are of."""
        first = next(iter(self.block.values()))
        pattern = re.compile(re.escape(first).partition(re.escape("{i}"))[0] + r"(\d+)[./]")
        return len({m[1] for name in names if (m := pattern.match(name))})

    def expected(self, depth: int) -> list[str]:
        """All names of a network of so many blocks."""
        ours = (*self.top, *self.block, *self.tokens, *self.same, *(f"{layer}/scale" for layer in self.scales))
        return [name for one in ours for name in self.names_of(one, depth)]

    def names_of(self, ours: str, depth: int) -> list[str]:
        """Their names of one of our layers or arrays, or of ``LAYER/bias`` or ``LAYER/scale`` alone."""
        if ours in self.tokens or ours in self.same:
            return [(self.tokens if ours in self.tokens else self.same)[ours]]
        layer, _, kind = (ours, "", "") if ours in self.top or ours in self.block else ours.rpartition("/")
        if kind == "scale":
            return [self.scales[layer].format(i=i) for i in range(depth)]
        kinds = self.kinds(layer) if not kind else {kind: kind} if kind in self.kinds(layer) else {}
        rows: Iterable[int | None] = range(depth) if layer in self.block else (None,)
        return [self.theirs(layer, kind, i) for i in rows for kind in kinds]


def fitted(table: Table, names: Iterable[str]) -> Table:
    """The table without what a network may lack and this one, of arrays of these names, does."""
    names = set(names)
    gone = {ours for ours in table.may if names.isdisjoint(table.names_of(ours, table.depth(names)))}
    kept = lambda some, end="": {ours: theirs for ours, theirs in some.items() if f"{ours}{end}" not in gone}
    unbiased = [ours.removesuffix("/bias") for ours in gone if ours.endswith("/bias")]
    return table._replace(
        top=kept(table.top),
        block=kept(table.block),
        tokens=kept(table.tokens),
        same=kept(table.same),
        scales=kept(table.scales, "/scale"),
        plain=(*table.plain, *(layer for layer in unbiased if layer not in table.plain)),
        may=tuple(ours for ours in table.may if ours not in gone),
    )


def closest(some: Sequence[Table], names: Iterable[str]) -> Table:
    """The table that has most of the names, of several the one that lacks the fewest; the first if all have none."""
    names = set(names)

    def fit(table: Table) -> tuple[int, int]:
        expected = set(fitted(table, names).expected(1))
        return len(expected & names), -len(expected - names) if expected & names else 0

    return max(some, key=fit)


def read_params(table: Table, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Our parameters, blocks stacked along a leading axis, of arrays under their names."""
    depth = table.depth(arrays)
    flat = {name: arrays[theirs][0] for name, theirs in table.tokens.items()}
    flat |= {name: arrays[theirs] for name, theirs in table.same.items()}
    for layer in table.top:
        for kind in table.kinds(layer):
            flat[f"{layer}/{kind}"] = _ours(table, layer, kind, arrays[table.theirs(layer, kind)])
    for layer in table.block:
        for kind in table.kinds(layer):
            rows = np.stack([_ours(table, layer, kind, arrays[table.theirs(layer, kind, i)]) for i in range(depth)])
            parts = table.packed.get(layer, (layer,))
            for part, x in zip(parts, np.split(rows, len(parts), -1), strict=True):
                flat[f"blocks/{part}/{kind}"] = x
    for layer in table.plain:
        place = "blocks/" if layer in table.block else ""
        for part in table.packed.get(layer, (layer,)):
            flat[f"{place}{part}/bias"] = np.zeros_like(flat[f"{place}{part}/kernel"][..., 0, :])
    for layer, template in table.scales.items():  # gamma * (x @ w + b)
        gamma = np.stack([arrays[template.format(i=i)] for i in range(depth)])
        flat[f"blocks/{layer}/kernel"] = flat[f"blocks/{layer}/kernel"] * gamma[:, None]
        flat[f"blocks/{layer}/bias"] = flat[f"blocks/{layer}/bias"] * gamma
    return unflatten(flat)


def write_params(table: Table, params: Mapping[str, Any], patch: int) -> dict[str, Any]:
    """The inverse of ``read_params``, of NumPy or traced arrays, for weights that leave (or to know their shapes).

    A scale is one, as it is in our layer already; a bias of a ``plain`` layer must be zero, and is left out; so is what
    the parameters lack.
    """
    flat = flatten(params)
    arrays = {theirs: flat[name][None] for name, theirs in table.tokens.items() if name in flat}
    arrays |= {theirs: flat[name] for name, theirs in table.same.items() if name in flat}
    for layer in table.top:
        for kind in table.kinds(layer):
            if f"{layer}/{kind}" in flat:
                arrays[table.theirs(layer, kind)] = _theirs(table, layer, kind, flat[f"{layer}/{kind}"], patch)
    for layer in table.block:
        for kind in table.kinds(layer):
            parts = [flat[f"blocks/{part}/{kind}"] for part in table.packed.get(layer, (layer,))]
            for i, x in enumerate(parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1)):
                arrays[table.theirs(layer, kind, i)] = _theirs(table, layer, kind, x, patch)
                if kind == "bias" and layer in table.scales:
                    arrays[table.scales[layer].format(i=i)] = jnp.ones_like(x)
    return arrays


def _ours(table: Table, layer: str, kind: str, x: np.ndarray) -> np.ndarray:
    if kind == "kernel" and layer == table.conv:  # ours is a dense layer on patches, row by row
        x = x.transpose(2, 3, 1, 0) if table.torch else x
        return x.reshape(-1, x.shape[-1])
    if table.heads and layer in QKV:
        return x.reshape(-1) if kind == "bias" else x.reshape(len(x), -1)
    if table.heads and layer == "attn/out" and kind == "kernel":
        return x.reshape(-1, x.shape[-1])
    return x.T if kind == "kernel" and table.torch else x


def _theirs(table: Table, layer: str, kind: str, x: Any, patch: int) -> Any:
    if kind == "kernel" and layer == table.conv:
        x = jnp.reshape(x, (patch, patch, -1, x.shape[-1]))
        return jnp.transpose(x, (3, 2, 0, 1)) if table.torch else x
    if table.heads and layer in QKV:
        return jnp.reshape(x, (*x.shape[:-1], table.heads, -1))
    if table.heads and layer == "attn/out" and kind == "kernel":
        return jnp.reshape(x, (table.heads, -1, x.shape[-1]))
    return jnp.swapaxes(x, 0, 1) if kind == "kernel" and table.torch else x


def linears(table: Table, depth: int, gains: Mapping[str, np.ndarray] = NONE, extra: int = 0) -> dict[str, Linear]:
    """The linear layers of a network of so many blocks, by the names of their modules.

    Args:
      table: whose names these are.
      depth: blocks.
      gains: our layer in ``blocks`` -> ``[depth, out]``, what its output is multiplied by there.
      extra: inputs that the head has there behind ours.
    """
    dense = lambda layers: [layer for layer in layers if "kernel" in table.kinds(layer) and layer != table.conv]
    found = {table.top[layer]: Linear((f"{layer}/kernel",), extra=extra) for layer in dense(table.top)}
    for i in range(depth):
        for layer in dense(table.block):
            kernels = tuple(f"blocks/{part}/kernel" for part in table.packed.get(layer, (layer,)))
            gain = gains[layer][i] if layer in gains else None
            found[table.block[layer].format(i=i)] = Linear(kernels, i, gain)
    return found


def last_blocks(layout: Layout, first: int) -> Layout:
    """What a model that was cut before block ``first`` has of a layout."""
    kept = {name: x for name, x in layout.linears.items() if x.row is None or x.row >= first}
    moved = {name: x if x.row is None else x._replace(row=x.row - first) for name, x in kept.items()}
    return layout._replace(linears=moved)


def check_names(
    path: Path, table: Table, found: Iterable[str], what: str, hints: Mapping[str, str] = NONE
) -> list[str]:
    """The names to read of a file; refused are files that lack one, or hold others.

    Args:
      path: the file.
      table: fitted to its names.
      found: its names.
      what: it should be, for messages.
      hints: what names of other networks stand for, by regular expressions; the first that is found explains a refusal.

    Raises:
      ValueError: names the first that are missing and unexpected.
    """
    names = set(found)
    needed = set(table.expected(max(1, table.depth(names))))
    missing, extra = sorted(needed - names), sorted(names - needed)
    if not missing and not extra:
        return sorted(needed)
    say = lambda verb, some: f"{verb} {', '.join(some[:3])}{f' and {len(some) - 3} more' * (len(some) > 3)}"
    why = next((f" ({why})" for name in extra for pattern, why in hints.items() if re.match(pattern, name)), "")
    if missing:
        has = f" and {say('has', extra)}" if extra else ""
        raise ValueError(f"{path} is not {what} with {table.name} names: it {say('lacks', missing)}{has}{why}")
    raise ValueError(
        f"{path} is another network than {what} with {table.name} names: it {say('has', extra)}{why}; nothing here "
        "computes that, and without it the features are others"
    )


def check_shapes(path: Path, arrays: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Refuse arrays that do not fit together; named is the first."""
    for name, x in arrays.items():
        if x.shape != expected[name].shape or not x.size:
            raise ValueError(
                f"{path} does not fit {what}: {name} has the shape {list(x.shape)}, expected "
                f"{list(expected[name].shape)}; fetch or write it anew"
            )
