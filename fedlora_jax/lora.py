"""Low-rank adaptation (LoRA) as plain pytrees, and the one layer that reads them.

Source: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, 2021, arXiv 2106.09685, eq. 3.

We write ``x @ W + s * (x @ a) @ b`` with ``a [in, rank]`` and ``b [rank, out]``. Papers write ``W + s B A`` for the
transpose: their A is our ``a.T``, their B is our ``b.T``.

An *adapter* is a nested dict at the same paths as ``params`` whose leaves are either

* ``LoRA``: a low-rank update of that kernel, or
* an array: the difference to a parameter that is trained in full (the head, usually).

What a method gives the model to compute with (``Method.model``) may also hold arrays at paths that ``params`` lacks:
switches of the forward pass, such as ``blocks/gate``, which the model finds in the ``lora`` collection; a ``mixer``
beside a ``kernel`` is one (``by_input``).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct, traverse_util
from flax.core import FrozenDict
from jax import Array

from fedlora_jax.keys import stable_hash
from fedlora_jax.matmul import low_rank, matmul

Params = Any  # nested dict of arrays
Adapter = Any  # nested dict of LoRA leaves and arrays
BLOCK = 256  # clients summed one after another

KERNEL = "(^|/)kernel$"  # what linen calls the matrices of its layers


@struct.dataclass
class LoRA:
    """One low-rank update ``scale * a @ b``; leading axes (layers, clients) are batch axes.

    ``scale`` is static: it is part of the tree structure, so trees with different scales cannot be mixed.
    """

    a: Array  # [..., in, rank]
    b: Array  # [..., rank, out]
    scale: float = struct.field(pytree_node=False, default=1.0)


def is_lora(x: Any) -> bool:
    """Is it one low-rank update? For ``is_leaf`` of ``jax.tree.map``."""
    return isinstance(x, LoRA)


class Dense(nn.Module):
    """``nn.Dense`` that adds the low-rank update found at its kernel's path in the ``lora`` collection, if any."""

    features: int
    use_bias: bool = True
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        y = matmul(x, kernel.astype(x.dtype))
        if self.has_variable("lora", "kernel"):
            lora = self.get_variable("lora", "kernel")
            kept = self.get_variable("lora", "dropout")(x) if self.has_variable("lora", "dropout") else x
            # (x a) b, never x (a b): the kernel stays shared by all clients under vmap.
            a, b = lora.a.astype(x.dtype), lora.scale * lora.b.astype(x.dtype)
            mixer = self.get_variable("lora", "mixer") if self.has_variable("lora", "mixer") else None
            y += low_rank(kept, a, b) if mixer is None else ((kept @ a) * by_input(x, mixer, a.shape[-1])) @ b
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros_init(), (self.features,)).astype(x.dtype)
        return y


def by_input(x: Array, mixer: Array, rank: int) -> Array:
    """``[..., rank]`` how much each column of an update counts that is several updates side by side, of equal rank.

    Args:
      x: ``[..., in]``, inputs of the layer.
      mixer: ``[in, updates]``; their shares are ``softmax(x mixer)``.
      rank: of all together.
    """
    share = jax.nn.softmax(x @ mixer.astype(x.dtype))
    return jnp.repeat(share, rank // mixer.shape[-1], -1)


def new(
    key: Array,
    params: Params,
    rank: int,
    *,
    targets: str | Sequence[str],
    full: str | Sequence[str] = (),
    scale: float = 1.0,
    kernel: str = KERNEL,
) -> Adapter:
    """A fresh adapter: ``a`` uniform in +-1/sqrt(in) (as PEFT), ``b = 0``, full differences 0.

    Args:
      key: typed PRNG key; each kernel folds in its own name, so adding a target changes no other.
      params: the frozen parameters; kernels are ``[..., in, out]``, leading axes are layers.
      rank: number of columns of ``a``; at most ``min(in, out)`` of every target.
      targets: regular expression(s), searched in slash-joined names such as ``blocks/attn/query/kernel``; of what they
        find the kernels are adapted.
      full: regular expression(s) of the parameters to train in full.
      scale: static factor ``s`` of the update, one for all clients and ranks.
      kernel: regular expression of the names of kernels. Shapes do not tell: stacked biases are ``[layers, out]``.

    Raises:
      ValueError: ``params`` are no nested dicts, an expression matches nothing (of ``targets``: no kernel), a parameter
        is adapted as well as trained in full, a target is not a matrix, or the rank does not fit.
    """
    refuse_unnamed(params)
    flat = flatten(params)
    adapter: dict[str, Any] = {name: jnp.zeros_like(flat[name]) for name in select(params, full)}
    kernels = adapted(params, targets, kernel)
    if both := [name for name in kernels if name in adapter]:
        raise ValueError(
            f"{', '.join(both)} would be adapted (targets {targets!r}) and trained in full ({full!r}): a parameter is "
            "one or the other, make the expressions narrower"
        )
    for name in kernels:
        shape = flat[name].shape
        if len(shape) < 2:
            raise ValueError(f"target {name!r} has shape {shape}; low-rank adaptation needs a kernel [..., in, out]")
        if not 1 <= rank <= min(shape[-2:]):
            raise ValueError(
                f"rank {rank} does not fit {name!r} of shape {shape}: choose a rank from 1 to {min(shape[-2:])}"
            )
        *layers, n_in, n_out = shape
        adapter[name] = LoRA(jnp.zeros((*layers, n_in, rank)), jnp.zeros((*layers, rank, n_out)), scale)
    return restart(key, unflatten(adapter))


def refuse_unnamed(params: Params, where: str = "params") -> None:
    """Refuse parameters that are not nested dicts of arrays with string keys, with what to pass in their place.

    Raises:
      ValueError: says where, what is there, and what to do.
    """
    if any(base.__module__.startswith("flax.nnx") for base in type(params).__mro__):
        raise ValueError(
            f"{where} is {type(params).__name__} of NNX: expected nested dicts of arrays: pass "
            "nnx.to_pure_dict(nnx.state(model, nnx.Param)), and nnx.merge(graphdef, params, rest) is the model again"
        )
    if isinstance(params, (list, tuple)):
        raise ValueError(
            f"{where} is a {type(params).__name__}: expected nested dicts of arrays: pass "
            "{str(i): x for i, x in enumerate(layers)}"
        )
    if not isinstance(params, (dict, FrozenDict)):
        if not hasattr(params, "shape") or not hasattr(params, "dtype") or where == "params":
            raise ValueError(f"{where} is {type(params).__name__}: expected nested dicts of arrays")
        return
    for key, value in params.items():
        if not isinstance(key, str):
            raise ValueError(
                f"{where} has the key {key!r}: expected nested dicts with string keys: pass {{{str(key)!r}: ...}} (of "
                "an NNX model nnx.restore_int_paths(params) has integers again)"
            )
        if "/" in key:
            raise ValueError(
                f"{where} has the key {key!r}: a slash joins names, {key.split('/')[0]!r} should hold a dict"
            )
        refuse_unnamed(value, f"{where}/{key}")


def restart(key: Array, adapter: Adapter) -> Adapter:
    """The adapter with every ``a`` drawn anew and every ``b`` at zero; full differences stay."""

    def draw(name: str, x: LoRA) -> LoRA:
        a = jax.random.uniform(jax.random.fold_in(key, stable_hash(name)), x.a.shape, x.a.dtype, -1.0, 1.0)
        return LoRA(a / math.sqrt(x.a.shape[-2]), jnp.zeros_like(x.b), x.scale)

    flat = flatten(adapter)
    return unflatten({name: draw(name, x) if is_lora(x) else x for name, x in flat.items()})


def select(params: Params, patterns: str | Sequence[str]) -> list[str]:
    """Names of the parameters in which any of ``patterns`` is found; a pattern that finds none is an error."""
    names = list(flatten(params))
    chosen: set[str] = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        try:
            found = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        if not found:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:5]
            raise ValueError(f"no parameter matches {pattern!r}; near names: {', '.join(near)}")
        chosen |= found
    return [name for name in names if name in chosen]


def adapted(params: Params, targets: str | Sequence[str], kernel: str = KERNEL) -> list[str]:
    """Names of the kernels in which any of ``targets`` is found, as ``new`` adapts them."""
    kernels = {name for name in flatten(params) if re.search(kernel, name)}
    for pattern in (targets,) if isinstance(targets, str) else targets:
        found = select(params, pattern)
        if not kernels.intersection(found):
            raise ValueError(
                f"target {pattern!r} finds no kernel, only {', '.join(found[:5])}: low-rank updates are for kernels "
                f"[..., in, out], whose names match {kernel!r} (an argument of lora.new); train others in full"
            )
    return [name for name in select(params, targets) if name in kernels]


def variables(base: Params, adapter: Adapter) -> dict[str, Params]:
    """The linen variables of ``base`` with ``adapter``: full differences added, the rest in ``lora``."""
    names, flat = flatten(base).keys(), flatten(adapter)
    full = {name: x for name, x in flat.items() if name in names and not is_lora(x)}
    rest = {name: x for name, x in flat.items() if name not in full}
    return {"params": add(base, unflatten(full)), "lora": unflatten(rest)}


def merge(base: Params, adapter: Adapter) -> Params:
    """``base`` with the whole adapter folded in, for export and for tests (forms ``in x out``; leaves switches out)."""
    names, flat = flatten(base).keys(), flatten(adapter)
    return add(base, unflatten({k: delta(x) if is_lora(x) else x for k, x in flat.items() if k in names}))


def delta(lora: LoRA) -> Array:
    """``scale * a @ b``, dense ``[..., in, out]``."""
    return lora.scale * jnp.matmul(lora.a, lora.b, precision="highest")


def zero_deltas(adapter: Adapter) -> Params:
    """Zeros ``[..., in, out]`` at the path of each adapted kernel: where a dense residual starts."""
    return tree_map(lambda x: jnp.zeros_like(delta(x)), split(adapter)[0])


def add(base: Params, differences: Params) -> Params:
    """``base`` plus differences at some of its paths; all other leaves are the very same arrays."""
    flat = flatten(base)
    for name, difference in flatten(differences).items():
        flat[name] = flat[name] + difference
    return unflatten(flat)


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of a nested dict (``LoRA`` is one) by slash-joined name, such as ``blocks/attn/query/kernel``."""
    return dict(traverse_util.flatten_dict(tree, sep="/"))  # type: ignore[arg-type]


def unflatten(flat: dict[str, Any]) -> Any:
    """The tree of ``{"blocks/attn/kernel": leaf, ...}``; the inverse of ``flatten``."""
    return traverse_util.unflatten_dict(flat, sep="/")


def split(adapter: Adapter) -> tuple[Adapter, Adapter]:
    """The adapter's low-rank leaves and its full differences, as two trees."""
    flat = flatten(adapter)
    low_rank = {name: x for name, x in flat.items() if is_lora(x)}
    full = {name: x for name, x in flat.items() if not is_lora(x)}
    return unflatten(low_rank), unflatten(full)


def join(low_rank: Adapter, full: Adapter) -> Adapter:
    """The adapter of both parts, which ``split`` takes apart."""
    return unflatten(flatten(low_rank) | flatten(full))


def tree_map(f: Callable, *adapters: Adapter, full: Callable | None = None) -> Adapter:
    """Map ``f`` over ``LoRA`` leaves and ``full`` over the others (``None``: keep the first tree's)."""
    full = full or (lambda x, *rest: x)
    return jax.tree.map(lambda *xs: (f if is_lora(xs[0]) else full)(*xs), *adapters, is_leaf=is_lora)


def low_rank_leaves(adapter: Adapter) -> list[LoRA]:
    """All low-rank updates of an adapter, without what is trained in full."""
    return [x for x in jax.tree.leaves(adapter, is_leaf=is_lora) if is_lora(x)]


def mean(stacked: Any, weights: Array) -> Any:
    """``sum_c p_c x_c`` of every array of a stacked tree (on an adapter: the mean of the *factors*).

    Many clients are summed in blocks, and then the blocks: one long float32 sum of 10,000 is off by 3e-6, this by 2e-7.
    """
    total = lambda p, x: jnp.einsum("c,c...->...", p, x, precision="highest")

    def one(x: Array) -> Array:
        p = weights.astype(x.dtype)
        whole = len(p) // BLOCK * BLOCK
        if whole == 0:
            return total(p, x)
        blocks = (y[:whole].reshape(-1, BLOCK, *y.shape[1:]) for y in (p, x))
        return jax.vmap(total)(*blocks).sum(0) + total(p[whole:], x[whole:])

    return jax.tree.map(one, stacked)


def needs_low_rank(adapter: Adapter, what: str) -> None:
    """Refuse an adapter that trains everything in full, for a method that does ``what`` with the rest."""
    if not low_rank_leaves(adapter):
        raise ValueError(f"{what} are of low-rank updates, and the adapter has none: see targets in lora.new")


def max_rank(adapter: Adapter) -> int:
    """The largest rank of its low-rank updates; 0 where there are none."""
    return max((x.a.shape[-1] for x in low_rank_leaves(adapter)), default=0)


def first_columns(adapter: Adapter, rank: int) -> Adapter:
    """The adapter a client of a smaller rank holds: the first ``rank`` columns of ``a`` and rows of ``b``."""
    return tree_map(lambda x: LoRA(x.a[..., :rank], x.b[..., :rank, :], x.scale), adapter)


def rank_mask(adapter: Adapter, ranks: Array) -> Adapter:
    """0/1 masks for clients of several ranks, ``[C, ...]``, broadcastable against stacked adapters.

    Args:
      adapter: one adapter, without the client axis.
      ranks: ``[C]`` integers; client ``c`` may move the first ``ranks[c]`` columns of ``a`` and rows of ``b``.
    """

    def low_rank(x: LoRA) -> LoRA:
        live = (jnp.arange(x.a.shape[-1]) < ranks[:, None]).astype(x.a.dtype)  # [C, rank]
        lead = (live.shape[0],) + (1,) * (x.a.ndim - 2)
        return LoRA(live.reshape(*lead, 1, -1), live.reshape(*lead, -1, 1), x.scale)

    return tree_map(low_rank, adapter, full=lambda x: jnp.ones((ranks.shape[0],) + (1,) * x.ndim, x.dtype))
