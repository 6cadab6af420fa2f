"""What clients keep for themselves between rounds, and a model of their own beside the one they share.

Ours in all methods that use it: a client that never took part is served what the server sends to everybody, and the
average client (``method.average_client``) holds the mean of what those who took part keep. FedSA-LoRA and FedVLM do
not: there it begins with what everybody began with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import lora, product
from fedlora_jax.lora import Adapter, LoRA
from fedlora_jax.method import Cohort, Method, Traffic, memory_of, per_client


class Kept(NamedTuple):
    """What one client keeps. Zero before it took part, so that the mean over clients is own / met."""

    own: Any  # [...]
    met: Array  # [] 1 for a client that took part, 0 for others


def nothing_yet(like: Any) -> Kept:
    """Of a client that never took part."""
    return Kept(jax.tree.map(jnp.zeros_like, like), jnp.zeros(()))


def keep(own: Any) -> Kept:
    """The memory of a client that has something of its own from now on."""
    return Kept(own, jnp.ones(()))


def own_or(cohort: Cohort, rows: Any, *, nobody: bool = True) -> Any:
    """What each client keeps ``[C, ...]``, and its row of ``rows`` where it keeps nothing.

    Args:
      cohort: with memory ``Kept`` of the structure of ``rows``.
      rows: ``[C, ...]``.
      nobody: does the average client hold the mean of what clients keep? If not, it gets its row.

    Raises:
      ValueError: the cohort has no such memory.
    """
    kept = cohort.memory
    if not isinstance(kept, Kept):
        raise ValueError(
            f"clients of this method keep something between rounds, the cohort's memory is {type(kept).__name__}: "
            "start from rounds.start, which has a row of memory for each client"
        )
    has = kept.met > 0 if nobody else (kept.met > 0) & (cohort.ids >= 0)
    met = jnp.where(has, kept.met, 1.0)
    pick = lambda x, row: jnp.where(per_client(has, x), x / per_client(met, x), row)
    return jax.tree.map(pick, kept.own, rows)


def keeping(inner: Method, divide: Callable[[Adapter], tuple[Adapter, Adapter]]) -> Method:
    """``inner``, of whose adapter a part stays with each client: it is trained, and neither sent nor averaged.

    Args:
      inner: a method whose state is its ``adapter`` and whose clients keep nothing.
      divide: ``(adapter) -> (what is shared, what stays)``, which ``lora.join`` puts together again.
    """

    def dispatch(base, state, cohort):
        sent = inner.dispatch(base, state, cohort)
        (shared, rows), (_, mask) = divide(sent.adapter), divide(sent.mask)
        own = jax.tree.map(jnp.multiply, own_or(cohort, rows), mask)
        return sent._replace(adapter=lora.join(shared, own))

    def aggregate(base, state, cohort, sent, received):
        new = inner.aggregate(base, state, cohort, sent, received)
        return new._replace(adapter=lora.join(divide(new.adapter)[0], divide(state.adapter)[1]))

    def upload_mask(mask):
        shared, own = divide(mask)
        return lora.join(shared, jax.tree.map(jnp.zeros_like, own))

    return inner._replace(
        dispatch=dispatch,
        aggregate=aggregate,
        init_client=lambda adapter: nothing_yet(divide(adapter)[1]),
        remember=lambda memory, context, sent, received: keep(divide(received)[1]),
        upload_mask=upload_mask,
        traffic=lambda own, cohort: Traffic(up=divide(own)[0], down=divide(own)[0]),
    )


def needs_head(adapter: Adapter, what: str) -> None:
    """Refuse an adapter that trains nothing in full, for a method that does ``what`` with it."""
    if not jax.tree.leaves(lora.split(adapter)[1]):
        raise ValueError(
            f"{what} need something that is trained in full, which stays with clients, and the adapter has nothing: "
            "name it, as in full=('^head/',) of lora.new (--full ^head/)"
        )


def side_by_side(inner: Method) -> Method:
    """``inner``, whose clients carry and keep a second model, which is the one they use.

    They carry ``{"shared": inner's, "personal": their own}``; the average client's model is the shared one. How the two
    are trained is up to the method's ``objective``; until it has one nothing but the personal model is.
    """

    def pair(shared: Adapter, personal: Adapter) -> Adapter:
        return {"shared": shared, "personal": personal}

    def dispatch(base, state, cohort):
        sent = inner.dispatch(base, state, cohort)
        own = jax.tree.map(jnp.multiply, own_or(cohort, sent.adapter, nobody=False), sent.mask)
        return sent._replace(adapter=pair(sent.adapter, own), mask=pair(sent.mask, sent.mask))

    def aggregate(base, state, cohort, sent, received):
        only = sent._replace(adapter=sent.adapter["shared"], mask=sent.mask["shared"])
        return inner.aggregate(base, state, cohort, only, received["shared"])

    return inner._replace(
        dispatch=dispatch,
        aggregate=aggregate,
        init_client=nothing_yet,
        remember=lambda memory, context, sent, received: keep(received["personal"]),
        model=lambda carried, context: carried["personal"],
        aggregated=lambda carried: carried["shared"],
        upload_mask=lambda mask: pair(mask["shared"], jax.tree.map(jnp.zeros_like, mask["personal"])),
    )


class Pair(NamedTuple):
    """What a client of ``beside`` trains. shared: the inner method's. local: LoRA leaves of the local rank."""

    shared: Adapter
    local: Adapter


def beside(inner: Method, local_rank: int) -> Method:
    """``inner``, whose clients add a low-rank update of their own, which never leaves them.

    The local part of all starts from one seed; nobody in particular is dispatched the shared part alone.
    """

    def init(key, adapter):
        for x in lora.low_rank_leaves(adapter):
            if local_rank > min(x.a.shape[-2], x.b.shape[-1]):
                raise ValueError(f"local_rank {local_rank} does not fit a kernel [{x.a.shape[-2]}, {x.b.shape[-1]}]")
        return inner.init(key, adapter)

    def init_client(adapter):
        empty = lambda x: LoRA(_columns(x.a, -1, local_rank), _columns(x.b, -2, local_rank), x.scale)
        return lora.restart(jax.random.key(0), lora.tree_map(empty, lora.split(adapter)[0]))

    def dispatch(base, state, cohort):
        sent = inner.dispatch(base, state, cohort)
        somebody = cohort.ids >= 0
        switch = lambda x: x * per_client(somebody, x)
        local = lora.tree_map(lambda x: LoRA(x.a, switch(x.b), x.scale), memory_of(cohort))
        free = jax.tree.map(lambda x: jnp.ones((x.shape[0],) + (1,) * (x.ndim - 1), x.dtype), local)
        return sent._replace(adapter=Pair(sent.adapter, local), mask=Pair(sent.mask, free), context=())

    def aggregate(base, state, cohort, sent, received):
        only = sent._replace(adapter=sent.adapter.shared, mask=sent.mask.shared)
        return inner.aggregate(base, state, cohort, only, received.shared)

    return inner._replace(
        init=init,
        dispatch=dispatch,
        aggregate=aggregate,
        init_client=init_client,
        remember=lambda memory, context, sent, received: received.local,
        model=together,
        aggregated=lambda pair: pair.shared,
        upload_mask=lambda mask: Pair(mask.shared, jax.tree.map(jnp.zeros_like, mask.local)),
    )


def together(pair: Pair, context: Any = ()) -> Adapter:
    """The client's model: both products side by side."""
    shared = lora.flatten(pair.shared)
    both = {name: product.plus(shared[name], x) for name, x in lora.flatten(pair.local).items()}
    return lora.unflatten(shared | both)


def mixture(x: Adapter, y: Adapter, share: Array | float) -> Adapter:
    """``(1 - share) x + share y``: of products side by side, of twice the rank, and of what is trained in full."""
    weigh = lambda x, p: LoRA(p * x.a, x.b, x.scale)
    low_rank = lambda x, y: product.plus(weigh(x, 1 - share), weigh(y, share))
    return lora.tree_map(low_rank, x, y, full=lambda x, y: (1 - share) * x + share * y)


def _columns(x: Array, axis: int, count: int) -> Array:
    shape = list(x.shape)
    shape[axis] = count
    return jnp.zeros(shape, x.dtype)


def within(progress: Array | float, share: float | Array) -> Array | bool:
    """Is a local step, begun at ``progress`` (``t / T``), one of the first ``share`` of all, whatever rounding says?"""
    return progress + 1e-6 < share


def squared_distance(x: Adapter, y: Adapter) -> Array:
    """``|x - y|^2`` over all arrays together."""
    return sum((jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (x, y)), strict=True)), jnp.zeros(()))
