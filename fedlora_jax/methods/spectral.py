"""SpecTraL: *Spectral Transformation for Layer-wise Global Rank Discovery in Federated LoRA for Vision Transformers*,
Ramesh and Dass, ECML PKDD 2026, after public code (github.com/DASS-Lab-Group/SpecTraL).

    M = sum_c p_c a_c b_c = U S V^T        (a, b) = (U_p, S_p V_p^T),  p = |{i: S_i > theta}|        theta: ScreeNOT

FLoRIST without a number to tune: what stands out of the spectrum of the stacked updates is kept, layer by layer. The
threshold is that of Donoho, Gavish and Romanov, *ScreeNOT*, Annals of Statistics 2023, arXiv 2009.12297, of the core
[q, q], q = C r: singular values beyond the largest k are taken for noise, those k replaced by what their fall continues
as ("i"), and theta is where for the resolvent phi of what results y (phi^2)' / phi^2 = -4. Columns that are dropped
begin anew, ``a`` at random and ``b = 0``. Ours: k, which the code leaves to its default (here at most the rank and half
of q), and the library's draw of ``a``.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import lora, product
from fedlora_jax.lora import Adapter, LoRA
from fedlora_jax.method import About, Method, mean
from fedlora_jax.methods.fedit import fedit
from fedlora_jax.methods.florist import mean_rank

ABOUT = About("SpecTraL", "Ramesh and Dass ECML PKDD 2026", "-", "a, b, head", "a, b, head", "to what stands out")

HALVINGS = 40  # of the interval in which theta lies


class SpecTraLState(NamedTuple):
    """adapter: as FlexLoRA's. key: of columns that begin anew."""

    adapter: Adapter
    key: Array


def spectral() -> Method:
    """SpecTraL. It has no options. The ``rank`` of the round's report is how many columns of a layer are left."""
    inner = fedit()

    def dispatch(base, state, cohort):
        return inner.dispatch(base, state, cohort)

    def aggregate(base, state, cohort, sent, received):
        key, draw = jax.random.split(state.key)

        def kept(old: LoRA, x: LoRA) -> LoRA:
            rank, whole = old.a.shape[-1], product.total(x, cohort.weights)
            most = min(whole.a.shape[-1], whole.a.shape[-2], whole.b.shape[-1])
            y = product.truncate(whole, most, split="left")
            sizes = jnp.sqrt(jnp.sum(y.b**2, -1))
            stands = sizes > screenot(sizes, min(rank, max((most - 2) // 2, 1)))[..., None]
            return LoRA(y.a[..., :rank], jnp.where(stands[..., None], y.b, 0.0)[..., :rank, :], x.scale)

        new = lora.tree_map(kept, state.adapter, received, full=lambda old, x: mean(x, cohort.weights))
        fresh = lora.restart(draw, new)
        return SpecTraLState(lora.tree_map(product.continued, new, fresh, full=lambda x, y: x), key)

    return inner._replace(
        init=lambda key, adapter: SpecTraLState(adapter, key), dispatch=dispatch, aggregate=aggregate, report=mean_rank
    )


def screenot(sizes: Array, k: int) -> Array:
    """``[...]`` the threshold of singular values ``sizes [..., q]`` of a square matrix, from the largest; 0 of zeros.

    Args:
      sizes: in falling order.
      k: how many at most are signal.
    """
    q = sizes.shape[-1]
    last = min(2 * k, q - 1)
    step = sizes[..., k : k + 1] - sizes[..., last : last + 1] if q > k else jnp.zeros_like(sizes[..., :1])
    edge = sizes[..., min(k, q - 1)][..., None]
    rise = (1 - (jnp.arange(k) / k) ** (2 / 3)) / (2 ** (2 / 3) - 1)
    noise = jnp.concatenate([edge + rise * step, sizes[..., k:]], -1)
    top = jnp.maximum(noise.max(-1), 1e-30)
    noise = noise / top[..., None]  # scales of float32 do not matter

    def slope(y: Array) -> Array:
        """``y (phi^2)' / phi^2``, from minus infinity at the largest singular value to -2 far away."""
        y, squares = y[..., None], noise**2
        phi = jnp.mean(y / (y**2 - squares), -1)
        fall = -jnp.mean((y**2 + squares) / (y**2 - squares) ** 2, -1)
        return 2 * y[..., 0] * fall / phi

    def halved(_, ends):
        low, high = ends
        middle = (low + high) / 2
        below = slope(middle) < -4
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low, high = jax.lax.fori_loop(0, HALVINGS, halved, (jnp.full_like(top, 1 + 1e-5), jnp.full_like(top, 10.0)))
    return jnp.where(sizes[..., 0] > 0, (low + high) / 2 * top, 0.0)
