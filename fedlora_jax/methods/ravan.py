"""Ravan: *Multi-Head Low-Rank Adaptation for Federated Fine-Tuning*, Raje et al., NeurIPS 2025, arXiv 2506.05568.

    W + s sum_h g_h a_h H_h b_h,   a_h [in, k], b_h [k, out] frozen        H_h = sum_c p_c g_ch H_ch,  g_h = 1

Several heads of rank k in place of one of rank h k: as many trained numbers as a core of all has over h, at the same
rank of the update. Clients train the cores H_h [k, k] and one gain g_h for each head, and send the products g_h H_h,
whose mean is exact. Known from the abstract: all but the start. Ours: the bases of all heads together are orthonormal
and random, as Fed-SB's here, cores begin at zero and gains at 1, where they are again after every round; a client of a
smaller rank has the first heads. Of an adapter that has learned the bases are its singular vectors and the cores its
singular values, the largest in the first head; what it lacks of its rank is random.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import lora, product
from fedlora_jax.checks import refuse_outside
from fedlora_jax.lora import Adapter, LoRA
from fedlora_jax.method import About, Dispatch, Method, Traffic, mean
from fedlora_jax.methods.fed_sb import nonzero, orthonormal, projected

ABOUT = About("Ravan", "Raje et al. NeurIPS 2025", "2506.05568", "H, g, head", "g H, head", "yes")


class Heads(NamedTuple):
    """cores: [.., h, k, k] by kernel. gains: [.., h] by kernel. full: what is trained in full."""

    cores: dict[str, Array]
    gains: dict[str, Array]
    full: Adapter


class RavanState(NamedTuple):
    """adapter: cores [.., h, k, k] by name of the kernel, head differences. bases: LoRA leaves, orthonormal, frozen."""

    adapter: Heads
    bases: Adapter


def ravan(heads: int = 2) -> Method:
    """Ravan.

    Args:
      heads: into which the adapter's rank is divided; 1: one core, as Fed-SB's with a gain.

    Raises:
      ValueError: no heads, or (at init) a rank that they do not divide.
    """
    refuse_outside("[1, inf)", heads=heads)

    def init(key, adapter):
        low_rank, full = lora.split(adapter)
        bases, values = turned(low_rank, orthonormal(nonzero(key, low_rank)))
        flat = lora.flatten(bases)
        for name, x in flat.items():
            if x.a.shape[-1] % heads:
                raise ValueError(f"{heads} heads do not divide the rank {x.a.shape[-1]} of {name}: choose a multiple")
        divided = {name: s.reshape(*s.shape[:-1], heads, -1) for name, s in lora.flatten(values).items()}
        cores = {name: s[..., None] * jnp.eye(s.shape[-1], dtype=s.dtype) for name, s in divided.items()}
        gains = {name: jnp.ones(x.shape[:-2], x.dtype) for name, x in cores.items()}
        return RavanState(Heads(cores, gains, full), bases)

    def dispatch(base, state, cohort):
        clients = len(cohort.ids)
        free = lambda x: jnp.ones((clients,) + (1,) * x.ndim, x.dtype)
        live = {name: _live(x, cohort.ranks) for name, x in state.adapter.cores.items()}
        mask = Heads({n: m[..., None, None] for n, m in live.items()}, live, jax.tree.map(free, state.adapter.full))
        rows = jax.tree.map(lambda x, m: x * m, state.adapter, mask)
        bases = jax.tree.map(lambda x: jnp.broadcast_to(x, (clients, *x.shape)), state.bases)
        return Dispatch(base, rows, mask, context=bases)

    def aggregate(base, state, cohort, sent, received):
        new = mean(sendable(received), cohort.weights)
        return state._replace(adapter=Heads(new.cores, jax.tree.map(jnp.ones_like, state.adapter.gains), new.full))

    def traffic(own, cohort):
        flat = lora.flatten(lora.split(own)[0])
        cores = [jnp.zeros((*x.a.shape[:-2], x.a.shape[-1] ** 2 // heads), x.a.dtype) for x in flat.values()]
        return Traffic(up=(cores, lora.split(own)[1]), down=(cores, lora.split(own)[1]))

    return Method(init, dispatch, aggregate, model=with_bases, traffic=traffic)


def sendable(own: Heads) -> Heads:
    """Cores times their gains, and gains of 1."""
    cores = {name: own.gains[name][..., None, None] * x for name, x in own.cores.items()}
    return Heads(cores, jax.tree.map(jnp.ones_like, own.gains), own.full)


def with_bases(own: Heads, bases: Any) -> Adapter:
    """The model of one client: every core between its head's bases, as the product ``(a H) b``."""
    cores = sendable(own).cores

    def put(name: str, x: LoRA) -> LoRA:
        heads, k = cores[name].shape[-3:-1]
        a = x.a.reshape(*x.a.shape[:-1], heads, k)
        inside = jnp.einsum("...ihk,...hkl->...ihl", a, cores[name], precision="highest")
        return LoRA(inside.reshape(x.a.shape), x.b, x.scale)

    return lora.unflatten(lora.flatten(own.full) | {name: put(name, x) for name, x in lora.flatten(bases).items()})


def turned(adapter: Adapter, bases: Adapter) -> tuple[Adapter, Adapter]:
    """Bases of the same spaces in which the cores of every product are diagonal, and these diagonals ``[.., r]``.

    So that heads side by side hold all of it: between them there is nothing.
    """
    svd = jax.tree.map(jnp.linalg.svd, projected(adapter, bases))
    turn = lambda x, r: LoRA(product.matmul(x.a, r.U), product.matmul(r.Vh, x.b), x.scale)
    return lora.tree_map(turn, bases, svd), lora.tree_map(lambda x, r: r.S, bases, svd)


def _live(core: Array, ranks: Array) -> Array:
    """``[C, .., h]`` 1 for a head that lies within a client's rank."""
    heads, k = core.shape[-3:-1]
    live = (jnp.arange(1, heads + 1) * k <= jnp.maximum(ranks, k)[:, None]).astype(core.dtype)
    return live.reshape(len(ranks), *(1,) * (core.ndim - 3), heads)
