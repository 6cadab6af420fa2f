"""Fed-HeLLo: *Efficient Federated Foundation Model Fine-Tuning with Heterogeneous LoRA Allocation*, Zhang et al., 2025,
arXiv 2506.12213.

    client c:  the whole network, L_c of its L layers trained, drawn each round with odds o_l
    server:    every layer += the plain mean of its change over the clients that trained it

The odds are a fixed shape over depth, or follow the Fisher information of layers in three groups, 1 : 2 : 3, formed
anew every so many rounds. Trained layers and the head travel up, everything down. (The public code trains the head and
never uploads it.)

Ours: the Fisher information is stood in for by the mean squared change of a layer's entries over the clients that
trained it, which the server has anyway; before the first one arrives odds are even.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import keys, layers, lora
from fedlora_jax.checks import refuse_outside
from fedlora_jax.lora import Adapter
from fedlora_jax.method import About, Method, Traffic, broadcast, mean_of_holders, uniform

ABOUT = About(
    "Fed-HeLLo",
    "Zhang et al. 2025",
    "2506.12213",
    "a, b of chosen layers; head",
    "chosen layers, head",
    "no",
    "budget",
    "which layers it holds",
)

_BOTTLENECK = (3, 3, 3, 2, 2, 1, 1, 1, 2, 3, 3, 3)  # of 27, for twelve layers


class FedHeLLoState(NamedTuple):
    """adapter: as FedIT's. log_odds: [L] of the draws. scores: [L] Fisher information. round: done. key: of draws.
    deal: key that gives every client its budget."""

    adapter: Adapter
    log_odds: Array
    scores: Array
    round: Array
    key: Array
    deal: Array


def fed_hello(
    odds: Literal["bottleneck", "uniform", "fisher"] = "bottleneck", depths: str = "1.0,0.75,0.5", regroup: int = 50
) -> Method:
    """Fed-HeLLo.

    Args:
      odds: of a layer to be drawn.
      depths: shares of the layers that may be trained, dealt to clients at random and for good, each to equally many
        (``layers.budgets``).
      regroup: rounds between two groupings, of ``fisher``.
    """
    if odds not in ("bottleneck", "uniform", "fisher"):
        raise ValueError(f"odds must be 'bottleneck', 'uniform' or 'fisher', got {odds!r}")
    refuse_outside("[1, inf)", regroup=regroup)
    shares = layers.shares(depths)

    def init(key, adapter):
        depth = layers.depth(adapter)
        log_odds = bottleneck(depth) if odds == "bottleneck" else jnp.zeros(depth)
        deal = keys.purpose(key, "depth")
        return FedHeLLoState(adapter, log_odds, jnp.zeros(depth), jnp.zeros((), jnp.int32), key, deal)

    def dispatch(base, state, cohort):
        count = layers.budgets(shares, state.deal, cohort.ids, state.log_odds.shape[0])
        chosen = layers.draw(state.key, cohort.ids, count, state.log_odds)
        sent = broadcast(base, state.adapter, cohort)
        return sent._replace(mask=layers.only(sent.mask, chosen))

    def aggregate(base, state, cohort, sent, received):
        p = uniform(cohort)
        adapter = mean_of_holders(state.adapter, received, sent.mask, p)
        log_odds, scores = state.log_odds, state.scores
        if odds == "fisher":
            scores = fisher(sent.adapter, received, sent.mask, p, scores)
            log_odds = jnp.where(state.round % regroup == 0, groups(scores), log_odds)
        key = jax.random.split(state.key)[0]
        return FedHeLLoState(adapter, log_odds, scores, state.round + 1, key, state.deal)

    def traffic(own, cohort):
        return Traffic(up=layers.average_share(own, shares), down=own)

    return Method(init, dispatch, aggregate, traffic=traffic)


def bottleneck(depth: int) -> Array:
    """``[depth]`` log odds: the twelve published ones, at the same relative depths."""
    return jnp.log(jnp.asarray([float(_BOTTLENECK[int((i + 0.5) * 12 / depth)]) for i in range(depth)]))


def groups(scores: Array) -> Array:
    """``[L]`` log odds 1, 2 and 3 for the lowest, middle and highest third of the scores; even where all are zero."""
    place = jnp.argsort(jnp.argsort(scores))
    return jnp.where(scores.any(), jnp.log(1.0 + place * 3 // scores.shape[0]), 0.0)


def fisher(sent: Adapter, received: Adapter, mask: Adapter, p: Array, old: Array) -> Array:
    """``[L]`` mean squared change of a layer's entries over clients that trained it; the old score elsewhere."""
    total, entries = jnp.zeros_like(old), jnp.zeros_like(old)
    stack = lambda tree: jax.tree.leaves(lora.split(tree)[0][layers.STACK])
    for x, y, m in zip(stack(sent), stack(received), stack(mask), strict=True):
        beyond = tuple(range(2, x.ndim))
        m = jnp.broadcast_to(m, x.shape)
        total += p @ jnp.sum((y - x) ** 2, beyond)
        entries += p @ jnp.sum(m, beyond)
    return jnp.where(entries > 0, total / jnp.where(entries > 0, entries, 1.0), old)
