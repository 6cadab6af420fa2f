"""FedIT: *Towards Building the Federated GPT: Federated Instruction Tuning*, Zhang et al., 2023, arXiv 2305.05644.

    a = sum_c p_c a_c        b = sum_c p_c b_c

The mean of products is not the product of means: the server misses E = sum_c p_c (a_c - abar)(b_c - bbar).
Both factors and the head travel, both ways; nothing stays with a client. Under several ranks the smaller factors
count as zero-padded. Ours: columns that nobody in a cohort holds keep their a, so that they can be trained again.
"""

from __future__ import annotations

from typing import NamedTuple

from fedlora_jax.lora import Adapter
from fedlora_jax.method import About, Method, broadcast, mean, revived

ABOUT = About("FedIT", "Zhang et al. 2023", "2305.05644", "a, b, head", "a, b, head", "no")


class FedITState(NamedTuple):
    """adapter: a [.., in, rank], b [.., rank, out], head differences."""

    adapter: Adapter


def fedit() -> Method:
    """FedIT: the mean of the factors. It has no options."""

    def init(key, adapter):
        return FedITState(adapter)

    def dispatch(base, state, cohort):
        return broadcast(base, state.adapter, cohort)

    def aggregate(base, state, cohort, sent, received):
        new = mean(received, cohort.weights)
        return FedITState(revived(state.adapter, new, cohort.ranks, cohort.weights))

    return Method(init, dispatch, aggregate)
