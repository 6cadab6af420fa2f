"""SDFLoRA: *Selective Decoupled Federated LoRA for Privacy-preserving Fine-tuning*, 2026, arXiv 2601.11219.

    client c:  W + s a_c b_c + s u_c v_c,  all four trained        server:  (a, b) = factors of T_r(sum_c p_c a_c b_c)

Only the global product ``a_c b_c`` and the head are uploaded; the local one, ``u_c v_c``, never leaves its client.
Ranks of the global part may differ; the local rank is one for all. Noise for privacy goes on what is uploaded alone.

Known from a summary; ours are the ranks, the split (``left`` as FlexLoRA, so that directions still empty can be
trained), the form of clipping (each client's whole change of its upload) and a start of all local parts from one seed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fedlora_jax import personal, product
from fedlora_jax.checks import refuse_outside
from fedlora_jax.keys import purpose
from fedlora_jax.lora import Adapter
from fedlora_jax.method import About, Method
from fedlora_jax.methods.fedit import FedITState
from fedlora_jax.methods.flexlora import flexlora
from fedlora_jax.product import Split

ABOUT = About("SDFLoRA", "2026", "2601.11219", "a, b, u, v, head", "a, b, head", "to rank r", "u, v")


class SDFLoRAState(NamedTuple):
    """adapter: the global part and the head. key: of the noise."""

    adapter: Adapter
    key: Array


def sdflora(local_rank: int = 4, split: Split = "left", clip: float = 0.0, noise: float = 0.0) -> Method:
    """SDFLoRA.

    Nobody in particular is dispatched the global part alone.

    Args:
      local_rank: of the local part; 0 makes the method FlexLoRA.
      split: how the server's ``U S V^T`` becomes factors.
      clip: largest norm of a client's change of what it uploads; 0: no bound.
      noise: standard deviation of Gaussian noise on every upload, in units of ``clip``.
    """
    refuse_outside("[0, inf)", local_rank=local_rank, clip=clip, noise=noise)
    if noise and not clip:
        raise ValueError("noise is in units of clip, and clip is 0 (no bound): set both")
    inner = personal.beside(flexlora(split), local_rank)

    def init(key, adapter):
        return SDFLoRAState(inner.init(key, adapter).adapter, key)

    def dispatch(base, state, cohort):
        return inner.dispatch(base, FedITState(state.adapter), cohort)

    def aggregate(base, state, cohort, sent, received):
        key, draw = jax.random.split(state.key)[0], purpose(state.key, "uploads of SDFLoRA")
        uploads = received.shared
        if clip:
            private = lambda id_, start, end, mask: protected(
                jax.random.fold_in(draw, id_), start, end, mask, clip, noise
            )
            uploads = jax.vmap(private)(cohort.ids, sent.adapter.shared, uploads, sent.mask.shared)
        uploads = received._replace(shared=uploads)
        return SDFLoRAState(inner.aggregate(base, FedITState(state.adapter), cohort, sent, uploads).adapter, key)

    return inner._replace(init=init, dispatch=dispatch, aggregate=aggregate)


def protected(key: Array, sent: Adapter, received: Adapter, mask: Adapter, clip: float, noise: float) -> Adapter:
    """One client's upload with its change cut to norm ``clip``, plus noise where the client may move anything."""
    change = jax.tree.map(jnp.subtract, received, sent)
    size = product.safe_sqrt(optax.tree.norm(change, squared=True))
    factor = jnp.minimum(1.0, clip / jnp.maximum(size, 1e-30))
    leaves, treedef = jax.tree.flatten(sent)
    drawn = [jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype) for i, x in enumerate(leaves)]
    blurred = lambda x, d, m, z: x + factor * d + clip * noise * m * z
    return jax.tree.map(blurred, sent, change, mask, treedef.unflatten(drawn))
