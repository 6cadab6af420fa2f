"""Whose layers go by which names: one table for each format of published weights, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fedlora_jax.lora import flatten, unflatten


class Table(NamedTuple):
    """The names of one format.

    Attributes:
      name: of the format.
      top: our layer -> theirs, outside of the blocks.
      block: our layer inside ``blocks`` -> theirs, with ``{i}`` for the number of the block.
      torch: are matrices ``(out, in)`` and convolutions ``(out, in, p, p)``, joined by dots? Else they are as in flax.
      conv: our layer that is a convolution there, of patches.
      tokens: our array that is no layer -> theirs, which has a leading axis of 1.
      plain: our layers in ``blocks`` that have no bias there; ours is zero.
      scales: our layer in ``blocks`` -> their array ``[out]`` that multiplies what it puts out; ours goes into it.
    """

    name: str
    top: Mapping[str, str]
    block: Mapping[str, str]
    torch: bool
    conv: str = "embed"
    tokens: Mapping[str, str] = MappingProxyType({})
    plain: tuple[str, ...] = ()
    scales: Mapping[str, str] = MappingProxyType({})

    def kinds(self, layer: str) -> dict[str, str]:
        """Our parameters of a layer -> how they are called there."""
        weight = "scale" if layer.rpartition("/")[2].startswith("norm") else "kernel"
        return {weight: "weight" if self.torch else weight} | ({} if layer in self.plain else {"bias": "bias"})

    def theirs(self, layer: str, kind: str, i: int | None = None) -> str:
        template = self.top[layer] if i is None else self.block[layer].format(i=i)
        return f"{template}{'.' if self.torch else '/'}{self.kinds(layer)[kind]}"

    def depth(self, names: Iterable[str]) -> int:
        """Number of blocks that names are of."""
        first = next(iter(self.block.values()))
        pattern = re.escape(first).replace(re.escape("{i}"), r"(\d+)")
        return 1 + max((int(m[1]) for name in names if (m := re.match(pattern, name))), default=-1)

    def expected(self, depth: int) -> list[str]:
        """All names of a network of so many blocks."""
        tops = [self.theirs(layer, kind) for layer in self.top for kind in self.kinds(layer)]
        blocks = [(layer, kind) for layer in self.block for kind in self.kinds(layer)]
        scales = [template.format(i=i) for i in range(depth) for template in self.scales.values()]
        layers = tops + [self.theirs(layer, kind, i) for i in range(depth) for layer, kind in blocks]
        return [*layers, *self.tokens.values(), *scales]


def read_params(table: Table, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Our parameters, blocks stacked along a leading axis, of arrays under their names."""

    def ours(layer: str, kind: str, x: np.ndarray) -> np.ndarray:
        if kind == "kernel" and layer == table.conv:  # ours is a dense layer on patches, row by row
            x = x.transpose(2, 3, 1, 0) if table.torch else x
            return x.reshape(-1, x.shape[-1])
        return x.T if kind == "kernel" and table.torch else x

    depth = table.depth(arrays)
    flat = {name: arrays[theirs][0] for name, theirs in table.tokens.items()}
    for layer in table.top:
        for kind in table.kinds(layer):
            if (name := table.theirs(layer, kind)) in arrays:
                flat[f"{layer}/{kind}"] = ours(layer, kind, arrays[name])
    for layer in table.block:
        for kind in table.kinds(layer):
            rows = [arrays[table.theirs(layer, kind, i)] for i in range(depth)]
            flat[f"blocks/{layer}/{kind}"] = np.stack([ours(layer, kind, x) for x in rows])
    for layer in table.plain:
        flat[f"blocks/{layer}/bias"] = np.zeros_like(flat[f"blocks/{layer}/kernel"][:, 0])
    for layer, template in table.scales.items():  # gamma * (x @ w + b)
        gamma = np.stack([arrays[template.format(i=i)] for i in range(depth)])
        flat[f"blocks/{layer}/kernel"] = flat[f"blocks/{layer}/kernel"] * gamma[:, None]
        flat[f"blocks/{layer}/bias"] = flat[f"blocks/{layer}/bias"] * gamma
    return unflatten(flat)


def write_params(table: Table, params: Mapping[str, Any], patch: int) -> dict[str, Any]:
    """The inverse of ``read_params``, of NumPy or traced arrays, for weights that leave (or to know their shapes).

    A scale is one, as it is in our layer already; a bias of a ``plain`` layer must be zero, and is left out.
    """
    flat, arrays = flatten(params), {}
    for name, theirs in table.tokens.items():
        arrays[theirs] = flat[name][None]

    def put(name: str, layer: str, kind: str, x: Any) -> None:
        if kind == "kernel" and layer == table.conv:
            x = jnp.reshape(x, (patch, patch, -1, x.shape[-1]))
            x = jnp.transpose(x, (3, 2, 0, 1)) if table.torch else x
        elif kind == "kernel" and table.torch:
            x = jnp.swapaxes(x, 0, 1)
        arrays[name] = x

    for layer in table.top:
        for kind in table.kinds(layer):
            if f"{layer}/{kind}" in flat:
                put(table.theirs(layer, kind), layer, kind, flat[f"{layer}/{kind}"])
    for layer in table.block:
        for kind in table.kinds(layer):
            for i, x in enumerate(flat[f"blocks/{layer}/{kind}"]):
                put(table.theirs(layer, kind, i), layer, kind, x)
                if kind == "bias" and layer in table.scales:
                    arrays[table.scales[layer].format(i=i)] = jnp.ones_like(x)
    return arrays


def check_names(path: Path, table: Table, found: Iterable[str], what: str, optional: Iterable[str] = ("head",)) -> list:
    """The names to read of a file; refused are files that lack one, or hold others.

    Raises:
      ValueError: names the first that are missing and unexpected.
    """
    names, may = set(found), {table.theirs(layer, kind) for layer in optional for kind in table.kinds(layer)}
    needed = set(table.expected(max(1, table.depth(names)))) - (set() if names & may else may)
    missing, extra = sorted(needed - names), sorted(names - needed)
    if not missing and not extra:
        return sorted(needed)
    say = lambda verb, some: f"{verb} {', '.join(some[:3])}{f' and {len(some) - 3} more' * (len(some) > 3)}"
    parts = [say(verb, some) for verb, some in (("lacks", missing), ("has", extra)) if some]
    raise ValueError(f"{path} is not {what} with {table.name} names: it {' and '.join(parts)}")


def check_shapes(path: Path, arrays: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Refuse arrays that do not fit together; named is the first."""
    for name, x in arrays.items():
        if x.shape != expected[name].shape or not x.size:
            raise ValueError(
                f"{path} does not fit {what}: {name} has the shape {list(x.shape)}, expected "
                f"{list(expected[name].shape)}; fetch or write it anew"
            )
