"""FedProto: *FedProto: Federated Prototype Learning across Heterogeneous Clients*, Tan et al., AAAI 2022, arXiv
2105.00243, eq. 3 to 7.

    minimise  f_c + lam sum_k |h_c,k - h_k|^2 / width        h_c,k: the mean feature of class k in c's batch
    h_k = sum_c n_ck h_c,k / sum_c n_ck                      over the clients that have class k

Clients share no weights: they send the mean feature of each class, the server averages each class over those that have
it, and local features are drawn to these. What a client sends it computes after its local steps. Ours: on ``query``
examples that it keeps apart, n_ck their number times the client's weight; the squared distance is a mean over the width
of features, as the public code has it; who never took part has what everybody began with; and clients predict by their
own head. A class that nobody has keeps its prototype.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import lora, personal
from fedlora_jax.checks import refuse_outside
from fedlora_jax.lora import Adapter
from fedlora_jax.method import About, Dispatch, MetaGradient, Method, Traffic
from fedlora_jax.task import Seen

ABOUT = About(
    "FedProto",
    "Tan et al. AAAI 2022",
    "2105.00243",
    "a, b, head",
    "mean features",
    "n/a",
    "a, b, head",
    "its class counts",
)


class Prototypes(NamedTuple):
    """mean: [K, width] of features of each class. held: [K] how many; 0: of none."""

    mean: Array
    held: Array


class FedProtoState(NamedTuple):
    """start: what everybody began with. prototypes: of all clients."""

    start: Adapter
    prototypes: Prototypes


class Carried(NamedTuple):
    """own: the client's adapter. prototypes: what it sends."""

    own: Adapter
    prototypes: Prototypes


def fedproto(lam: float = 1.0, query: int = 32) -> Method:
    """FedProto.

    Args:
      lam: how strongly a client's features are drawn to the global ones.
      query: examples a client keeps apart for its prototypes.

    Raises:
      ValueError: lam below 0, no examples kept apart, (at init) an adapter without a head ``[width, classes]``, or
        (when a round is traced) a loss that does not show features (``fedlora_jax.task.Shown``).
    """
    refuse_outside("[0, inf)", lam=lam)
    refuse_outside("[1, inf)", query=query)

    def init(key, adapter):
        heads = [x for name, x in lora.flatten(lora.split(adapter)[1]).items() if x.ndim == 2 and "kernel" in name]
        if len(heads) != 1:
            raise ValueError(
                f"prototypes are features that one head reads, trained in full, and the adapter has {len(heads)}: name "
                "it, as in full=('^head/',) of lora.new (--full ^head/)"
            )
        width, classes = heads[0].shape
        return FedProtoState(adapter, Prototypes(jnp.zeros((classes, width)), jnp.zeros(classes)))

    def dispatch(base, state, cohort):
        mask = lora.rank_mask(state.start, cohort.ranks)
        rows = jax.tree.map(jnp.multiply, state.start, mask)
        own = jax.tree.map(jnp.multiply, personal.own_or(cohort, rows), mask)
        known = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(cohort.ids), *x.shape)), state.prototypes)
        still = jax.tree.map(lambda x: jnp.zeros((len(x), *(1,) * (x.ndim - 1))), known)
        return Dispatch(base, Carried(own, known), Carried(mask, still), context=known)

    def objective(task, carried, known):
        here = of_classes(task.seen(carried.own))
        both = (here.held > 0) & (known.held > 0)
        far = jnp.where(both, jnp.mean((here.mean - known.mean) ** 2, -1), 0.0)
        loss = task(carried.own)
        return loss + lam * far.sum(), loss

    def train(tune, judge, start):
        end, trace = tune(start)
        return end._replace(prototypes=of_classes(judge.seen(end))), trace, ()

    def aggregate(base, state, cohort, sent, received):
        mine = received.prototypes
        weights = cohort.weights[:, None] * mine.held  # [C, K]
        total = weights.sum(0)
        q = weights / jnp.where(total > 0, total, 1.0)
        new = jnp.einsum("ck,ckd->kd", q, mine.mean, precision="highest")
        old = state.prototypes
        return state._replace(
            prototypes=Prototypes(jnp.where(total[:, None] > 0, new, old.mean), jnp.where(total > 0, total, old.held))
        )

    def traffic(own, cohort):
        head = [x for x in lora.flatten(lora.split(own)[1]).values() if x.ndim == 2]  # as large as the prototypes
        return Traffic(up=(head, jnp.zeros(head[0].shape[-1]) if head else ()), down=head)

    return Method(
        init,
        dispatch,
        aggregate,
        init_client=personal.nothing_yet,
        remember=lambda memory, context, sent, received: personal.keep(received.own),
        model=lambda carried, context: carried.own,
        aggregated=lambda carried: {},
        objective=objective,
        traffic=traffic,
        meta_gradient=MetaGradient(train, lambda steps: 2 * steps + 1),
        query=query,
        uploads="none",
    )


def of_classes(seen: Seen) -> Prototypes:
    """The mean feature of each class of a batch; 0 of one that it lacks."""
    there = seen.present[:, None] * seen.one_hot  # [B, K]
    count = there.sum(0)
    return Prototypes(
        jnp.einsum("bk,bd->kd", there, seen.features, precision="highest") / jnp.maximum(count, 1.0)[:, None], count
    )
