"""FedALT: *Federated Fine-Tuning through Adaptive Local Training with Rest-of-World LoRA*, Bian et al., AAAI 2026,
arXiv 2503.11880.

    client c:  x W + s g_0(x) (x A_c) B_c + s g_1(x) (x a_c) b_c        g(x) = softmax(x G_c) of each layer and token
    frozen:    (A_c, B_c) = sum_{i != c} (a_i, b_i) / (N - 1)           trained: a_c, b_c, G_c, from where c left them

Nobody starts from a mean: a client goes on with its own update, and what the others have learned stands beside it, in
proportions that its mixer takes from each input (``lora.by_input``). Factors travel up, and the mean of the others'
down; mixers stay. As in the public code every client counts alike. Ours: mixers begin at zero, where both count half;
what is trained in full is the client's own and travels too; and who never took part holds the mean of all others as its
own. The server keeps the sum of what each client last sent, and takes a client's own from it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import lora, personal
from fedlora_jax.lora import Adapter, LoRA
from fedlora_jax.method import About, Cohort, Dispatch, Method, mean, memory_of, per_client

ABOUT = About(
    "FedALT",
    "Bian et al. AAAI 2026",
    "2503.11880",
    "a, b, G, head",
    "a, b, head",
    "n/a",
    "a, b, G, head",
    "its own model",
)


class FedALTState(NamedTuple):
    """start: what everybody began with. total: sum over clients of what each last sent. clients: [] how many."""

    start: Adapter
    total: Adapter
    clients: Array


class Own(NamedTuple):
    """What a client trains and keeps. update: its own adapter. mixer: [.., in, 2] of each adapted kernel, by name."""

    update: Adapter
    mixer: Any


def fedalt() -> Method:
    """FedALT. It has no options. The server's mean is of what clients sent last, whenever that was."""

    def init(key, adapter):
        lora.needs_low_rank(adapter, "mixers")
        return FedALTState(adapter, jax.tree.map(jnp.zeros_like, adapter), jnp.zeros(()))

    def dispatch(base, state, cohort):
        others, mask = rest_of_world(state, cohort), lora.rank_mask(state.start, cohort.ranks)
        rows = jax.tree.map(jnp.multiply, others, mask)
        flat = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(cohort.ids), *x.shape)), mixers(state.start))
        own = personal.own_or(cohort, Own(rows, flat), nobody=False)
        own = own._replace(update=jax.tree.map(jnp.multiply, own.update, mask))
        free = jax.tree.map(lambda x: jnp.ones((len(x), *(1,) * (x.ndim - 1)), x.dtype), flat)
        return Dispatch(base, own, Own(mask, free), context=rows)

    def aggregate(base, state, cohort, sent, received):
        there, kept = (cohort.weights > 0).astype(jnp.float32), memory_of(cohort)
        change = jax.tree.map(jnp.subtract, received.update, kept.own.update)
        total = jax.tree.map(jnp.add, state.total, mean(change, there))
        return FedALTState(state.start, total, state.clients + jnp.sum(there * (1 - kept.met)))

    return Method(
        init,
        dispatch,
        aggregate,
        init_client=lambda adapter: personal.nothing_yet(Own(adapter, mixers(adapter))),
        remember=lambda memory, context, sent, received: personal.keep(received),
        model=mixed,
        aggregated=lambda own: own.update,
        upload_mask=lambda mask: Own(mask.update, jax.tree.map(jnp.zeros_like, mask.mixer)),
        uploads="none",  # clients take what they sent from a sum, and no wrapper may make something else of it
    )


def rest_of_world(state: FedALTState, cohort: Cohort) -> Adapter:
    """``[C, ...]`` the mean of what all others last sent; where nobody did, what everybody began with."""
    kept, somebody = memory_of(cohort), (cohort.ids >= 0).astype(jnp.float32)
    mine = somebody * (kept.met > 0)
    others = state.clients - mine
    known, count = others > 0, jnp.maximum(others, 1.0)

    def one(total: Array, own: Array, start: Array) -> Array:
        left = (total - per_client(mine, own) * own) / per_client(count, own)
        return jnp.where(per_client(known, own) > 0, left, start)

    return jax.tree.map(one, state.total, kept.own.update, state.start)


def mixers(adapter: Adapter) -> dict[str, Array]:
    """Zeros ``[.., in, 2]`` for every adapted kernel, by the name of the mixer beside it."""
    flat = {name: x for name, x in lora.flatten(adapter).items() if lora.is_lora(x)}
    return {_beside(name): jnp.zeros((*x.a.shape[:-1], 2), x.a.dtype) for name, x in flat.items()}


def mixed(own: Own, others: Adapter) -> Adapter:
    """The client's model: both updates side by side, and what mixes them."""
    flat, theirs = lora.flatten(own.update), lora.flatten(others)
    put = lambda x, y: LoRA(jnp.concatenate([y.a, x.a], -1), jnp.concatenate([y.b, x.b], -2), x.scale)
    both = {name: put(x, theirs[name]) if lora.is_lora(x) else x for name, x in flat.items()}
    return lora.unflatten(both | own.mixer)


def _beside(kernel: str) -> str:
    return "/".join([*kernel.split("/")[:-1], "mixer"])
