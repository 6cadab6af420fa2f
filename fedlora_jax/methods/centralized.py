"""Centralised: what one machine would do with the data of the whole cohort.

    w <- w after C T local steps of B examples, drawn from all batches of the cohort

The upper bound: as many examples as the federation reads in a round, in batches of the same size that mix all clients,
one after the other, with one optimizer that starts afresh every round. No client's weight p_c counts, only how many
examples it brings, and no client is anybody: the largest rank trains. The data travel, which no count of ours includes.
With one client it is FedIT.
"""

from __future__ import annotations

import jax

from fedlora_jax import batches
from fedlora_jax.method import About, Cohort, Method, Traffic, average_client
from fedlora_jax.methods.fedit import fedit

ABOUT = About("Centralised", "upper bound", "-", "a, b, head", "data", "yes", tells="all of its data")


def centralized() -> Method:
    """Centralised: FedIT on the pooled batches of a cohort. It has no options."""

    return fedit()._replace(pool=pooled, traffic=lambda own, cohort: Traffic(up=(), down=()), uploads="none")


def pooled(cohort: Cohort) -> Cohort:
    """One client that holds the batches ``[1, C T, B, ...]`` (and queries) of all, step by step over all clients."""
    return average_client(cohort)._replace(
        ids=cohort.ids[:1],
        ranks=cohort.ranks.max(keepdims=True),
        batches=batches.pooled(cohort.batches),
        queries=jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), cohort.queries),
    )
