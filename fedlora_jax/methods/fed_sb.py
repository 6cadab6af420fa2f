"""Fed-SB: *A Silver Bullet for Extreme Communication Efficiency and Performance in (Private) Federated LoRA
Fine-Tuning*, Singhal et al., 2025, arXiv 2502.15436 (on LoRA-SB, arXiv 2411.19557).

    W + s a R b,   a [in, r], b [r, out] orthonormal and frozen        R = sum_c p_c R_c   [r, r],  exact

Clients train and exchange the core R and the head alone: r^2 numbers per kernel.

The paper's start is the SVD of the first full update, ``a = U_r``, ``R = S_r``, ``b = V_r^T``. In a federation that
update has to come from somewhere: ``first_update`` is one round before the first, in which clients upload factors
of their own gradient step (ours). Without it, as on the command line, the bases are random and R starts at zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import lora, product
from fedlora_jax.batches import mean_over_steps
from fedlora_jax.lora import Adapter, LoRA, Params
from fedlora_jax.method import About, Dispatch, Method, Traffic, mean

ABOUT = About("Fed-SB", "Singhal et al. 2025", "2502.15436", "R, head", "R, head", "yes")


class FedSBState(NamedTuple):
    """adapter: R [.., r, r] at each adapted kernel, head differences. bases: LoRA leaves, orthonormal and frozen."""

    adapter: Adapter
    bases: Adapter


def fed_sb(update: Adapter | None = None) -> Method:
    """Fed-SB.

    Args:
      update: where to start, an adapter with the first update as its products, see ``first_update``.
    """

    def init(key, adapter):
        low_rank, full = lora.split(adapter)
        first = low_rank if update is None else lora.split(update)[0]
        if jax.tree.map(jnp.shape, first) != jax.tree.map(jnp.shape, low_rank):
            raise ValueError("update has not the shapes of the adapter: make it from an adapter of the same rank")
        bases = orthonormal(nonzero(key, low_rank) if update is None else first)
        return FedSBState(lora.unflatten(lora.flatten(projected(first, bases)) | lora.flatten(full)), bases)

    def dispatch(base, state, cohort):
        clients = len(cohort.ids)
        free = lambda x: jnp.ones((clients,) + (1,) * x.ndim, x.dtype)
        square = lora.tree_map(lambda m: m.a * m.b, lora.rank_mask(state.bases, cohort.ranks))  # [C, .., r, r]
        mask = lora.unflatten(lora.flatten(jax.tree.map(free, state.adapter)) | lora.flatten(square))
        rows = jax.tree.map(jnp.multiply, state.adapter, mask)
        bases = jax.tree.map(lambda x: jnp.broadcast_to(x, (clients, *x.shape)), state.bases)
        return Dispatch(base, rows, mask, context=bases)

    def aggregate(base, state, cohort, sent, received):
        return state._replace(adapter=mean(received, cohort.weights))

    def traffic(own, cohort):
        uploaded = lora.tree_map(lambda x: product.matmul(x.b, x.b.mT), own)  # as large as R
        return Traffic(up=uploaded, down=uploaded)

    return Method(init, dispatch, aggregate, model=with_bases, traffic=traffic)


def with_bases(adapter: Adapter, bases: Adapter) -> Adapter:
    """The model of one client: every core between its bases, as the product ``(a R) b``."""
    flat = lora.flatten(adapter)
    inside = {k: LoRA(product.matmul(x.a, flat[k]), x.b, x.scale) for k, x in lora.flatten(bases).items()}
    return lora.unflatten(flat | inside)


def orthonormal(update: Adapter) -> Adapter:
    """``(U_r, V_r^T)`` of every product."""
    rank = lambda x: x.a.shape[-1]
    half = lambda x, split: product.truncate(x, rank(x), split=split)
    return lora.tree_map(lambda x: LoRA(half(x, "left").a, half(x, "right").b, x.scale), update)


def projected(update: Adapter, bases: Adapter) -> Adapter:
    """The cores ``R`` with which ``a R b`` is nearest to every product."""
    core = lambda x, q: product.matmul(product.matmul(q.a.mT, x.a), product.matmul(x.b, q.b.mT))
    return lora.tree_map(core, update, bases)


def nonzero(key: Array, adapter: Adapter) -> Adapter:
    """The adapter with every row of ``b`` that is zero drawn at random too."""

    def draw(i: int, x: LoRA) -> LoRA:
        b = jax.random.normal(jax.random.fold_in(key, i), x.b.shape, x.b.dtype)
        return LoRA(x.a, jnp.where((x.b != 0).any(-1, keepdims=True), x.b, b), x.scale)

    return lora.unflatten({name: draw(i, x) for i, (name, x) in enumerate(sorted(lora.flatten(adapter).items()))})


def first_update(
    loss_fn: Callable, base: Params, adapter: Adapter, batches: Any, weights: Array, lr: float, key: Array
) -> Adapter:
    """The cohort's first step of full fine-tuning, ``-lr sum_c p_c grad f_c(W)``, to the adapter's rank.

    Every client uploads the best rank-r factors of its own step, the server those of their sum.

    Args:
      loss_fn: ``(base, adapter, batch, key) -> scalar`` as of ``make_round``.
      adapter: fresh (its products are zero): shapes, rank and scale.
      batches: ``[C, T, B, ...]``; a client's gradient is the mean over its T batches.
      weights: ``[C]``.
      lr: of the step; it decides how large R starts.
    """
    low_rank, _ = lora.split(adapter)
    best = lambda g, x: product.best(-lr * g, x.a.shape[-1], x.scale)

    def client(own: Any) -> Adapter:
        one = lambda kernels, batch: loss_fn(lora.add(base, kernels), adapter, batch, key)
        mean_loss = lambda kernels: mean_over_steps(own, jax.lax.map(lambda batch: one(kernels, batch), own))
        return jax.tree.map(best, jax.grad(mean_loss)(lora.zero_deltas(adapter)), low_rank)

    uploads = jax.lax.map(client, batches)  # one after another: a dense gradient is as large as the kernels
    p = weights / weights.sum()
    return lora.tree_map(lambda x: product.truncate(product.total(x, p), x.a.shape[-1]), uploads)
