"""FSLoRA: *Federated Sketching LoRA: A Flexible Framework for Heterogeneous Collaborative Fine-Tuning of LLMs*, Fang et
al., 2025, arXiv 2501.19389.

    client c:  W + s a S_c b,   S_c = (r / k_c) diag(1 on I_c),   I_c random, |I_c| = k_c,   so   E[a S_c b] = a b
    server:    one optimizer step on   sum_c p_c (received_c - sent_c),   zero outside I_c

One set of indices per round, client and layer, for a and b alike; k_c is the client's rank. The columns in it and the
head travel, both ways. (The public code draws different sets for a and b, and by a name test that never matches does
not sketch at all.)
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fedlora_jax import lora
from fedlora_jax.checks import refuse_outside
from fedlora_jax.keys import purpose
from fedlora_jax.lora import Adapter, LoRA
from fedlora_jax.method import About, Cohort, Dispatch, Method, mean

ABOUT = About(
    "FSLoRA",
    "Fang et al. 2025",
    "2501.19389",
    "k columns of a, b; head",
    "k columns of a, b; head",
    "no",
    tells="which columns it holds",
)


class FSLoRAState(NamedTuple):
    """adapter: a [.., in, r], b [.., r, out], head. moments: of the server's optimizer. key: of the sketches."""

    adapter: Adapter
    moments: Any
    key: Array


def fslora(server: Literal["sgd", "adamw"] = "sgd", server_lr: float = 1.0) -> Method:
    """FSLoRA.

    Nobody in particular is dispatched ``a b`` unsketched: the global model.

    Args:
      server: optimizer of the server's step; ``sgd`` at 1 adds the mean change. The public code's is ``adamw``.
      server_lr: its learning rate (3e-4 in the public code).
    """
    makers = {"sgd": optax.sgd, "adamw": optax.adamw}
    if server not in makers:
        raise ValueError(f"server must be 'sgd' or 'adamw', got {server!r}")
    refuse_outside("(0, inf)", server_lr=server_lr)
    optimizer = makers[server](server_lr)

    def init(key, adapter):
        return FSLoRAState(adapter, optimizer.init(adapter), key)

    def dispatch(base, state, cohort):
        key = purpose(state.key, "sketches")
        drawn = {name: sketch(jax.random.fold_in(key, i), x, cohort) for i, (name, x) in enumerate(_low_rank(state))}
        mask = lora.rank_mask(state.adapter, cohort.ranks)
        held = {name: _columns(lora.flatten(mask)[name], d > 0) for name, d in drawn.items()}
        mask = lora.unflatten(lora.flatten(mask) | held)
        rows = jax.tree.map(jnp.multiply, state.adapter, mask)
        return Dispatch(base, rows, mask, context=drawn)

    def aggregate(base, state, cohort, sent, received):
        change = mean(jax.tree.map(jnp.subtract, received, sent.adapter), cohort.weights)
        downhill = jax.tree.map(jnp.negative, change)
        updates, moments = optimizer.update(downhill, state.moments, state.adapter)
        return FSLoRAState(optax.apply_updates(state.adapter, updates), moments, jax.random.split(state.key)[0])

    return Method(init, dispatch, aggregate, model=sketched)


def sketch(key: Array, x: LoRA, cohort: Cohort) -> Array:
    """The diagonals of ``S_c``, ``[C, .., r]``; ones for nobody in particular."""
    *layers, _, rank = x.a.shape

    def one(id_: Array, k: Array) -> Array:
        order = jnp.argsort(jax.random.uniform(jax.random.fold_in(key, id_), (*layers, rank)), -1)
        drawn = jnp.argsort(order, -1) < k
        return jnp.where(id_ < 0, 1.0, drawn * (rank / k)).astype(x.a.dtype)

    return jax.vmap(one)(cohort.ids, cohort.ranks)


def sketched(adapter: Adapter, diagonals: dict[str, Array]) -> Adapter:
    """The model of one client: every product ``a S b``."""
    flat = lora.flatten(adapter)
    inside = {
        name: LoRA(flat[name].a * d[..., None, :], flat[name].b, flat[name].scale) for name, d in diagonals.items()
    }
    return lora.unflatten(flat | inside)


def _low_rank(state: FSLoRAState) -> list[tuple[str, LoRA]]:
    return sorted(lora.flatten(lora.split(state.adapter)[0]).items())


def _columns(mask: LoRA, held: Array) -> LoRA:
    held = held.astype(mask.a.dtype)
    return LoRA(held[..., None, :], held[..., :, None], mask.scale)
