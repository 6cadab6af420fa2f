"""IFCA: *An Efficient Framework for Clustered Federated Learning*, Ghosh et al., NeurIPS 2020, arXiv 2006.04088.

    j_c = argmin_j f_c(w_j)        w_j = sum_{c: j_c = j} p_c w_c / sum_{c: j_c = j} p_c

k adapters are sent, each client trains the one that fits it best, and each becomes the mean of those who chose it; one
that nobody chose keeps its value. k-fold traffic down. Ours: the choice is made on examples kept apart; between rounds
a client keeps its last choice and is served by it, one that never chose by the mean of all; and since a fresh adapter
(b = 0) computes the same whatever ``a`` is, the k > 1 adapters start with a small random ``b``.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import lora
from fedlora_jax.checks import refuse_outside
from fedlora_jax.keys import purpose
from fedlora_jax.lora import Adapter, LoRA
from fedlora_jax.method import About, Dispatch, MetaGradient, Method, Traffic, mean, no_meta_gradient, revived

ABOUT = About(
    "IFCA",
    "Ghosh et al. NeurIPS 2020",
    "2006.04088",
    "a, b, head",
    "a, b, head; k-fold down",
    "no",
    tells="which model fits it",
)


class IFCAState(NamedTuple):
    """models: adapters [k, ...]. shares: [k] weight of the clients that last chose each."""

    models: Adapter
    shares: Array


class Carried(NamedTuple):
    """What a client holds: models [k, ...], chosen [k] one-hot."""

    models: Adapter
    chosen: Array


def ifca(k: int = 2, spread: float = 0.1, query: int = 16) -> Method:
    """IFCA.

    Args:
      k: number of adapters; 1: FedIT.
      spread: deviation of each start's ``b``, for k > 1.
      query: examples a client keeps apart to choose by, for k > 1.

    Raises:
      ValueError: k, or for k > 1 the query or the spread, not above 0.
    """
    refuse_outside("[1, inf)", k=k)
    if k > 1:
        refuse_outside("[1, inf)", query=query)
        refuse_outside("(0, inf)", spread=spread)

    def init(key, adapter):
        return IFCAState(jax.vmap(lambda key: _start(key, adapter, spread))(jax.random.split(key, k)), jnp.ones(k) / k)

    def one_start(key, adapter):
        return IFCAState(jax.tree.map(lambda x: x[None], adapter), jnp.ones(1))

    def dispatch(base, state, cohort):
        clients = len(cohort.ids)
        one = jax.tree.map(lambda x: x[0], state.models)
        mask = jax.tree.map(lambda m: m[:, None], lora.rank_mask(one, cohort.ranks))  # [C, 1, ...]
        models = jax.tree.map(jnp.multiply, state.models, mask)  # [C, k, ...]
        sent = Carried(models, cohort.memory)
        return Dispatch(base, sent, Carried(mask, jnp.zeros((clients, 1))), context=())

    def train(tune, judge, start):
        losses = jax.vmap(lambda chosen: judge(start._replace(chosen=chosen)))(jnp.eye(k))
        start = start._replace(chosen=jax.nn.one_hot(losses.argmin(), k))
        end, trace = tune(start)
        keep = lambda x, y: jnp.where(start.chosen.reshape(k, *(1,) * (x.ndim - 1)) > 0, y, x)  # not even decay
        return start._replace(models=jax.tree.map(keep, start.models, end.models)), trace, ()

    def aggregate(base, state, cohort, sent, received):
        weights = cohort.weights[:, None] * received.chosen  # [C, k]
        total = weights.sum(0)

        def cluster_mean(old, rows, p, total):
            new = revived(old, mean(rows, p / jnp.where(total > 0, total, 1.0)), cohort.ranks, p)
            return jax.tree.map(lambda x, y: jnp.where(total > 0, y, x), old, new)

        models = jax.vmap(cluster_mean, (0, 1, 1, 0))(state.models, received.models, weights, total)
        return IFCAState(models, total)

    def held(mask, context, received):
        its = lambda m: m * received.chosen.reshape(-1, *(1,) * (m.ndim - 1)).astype(m.dtype)  # [k, ...]
        return mask._replace(models=jax.tree.map(its, mask.models))

    def model(carried, context):
        pick = lambda x: jnp.einsum("k,k...->...", carried.chosen.astype(x.dtype), x, precision="highest")
        return jax.tree.map(pick, carried.models)

    return Method(
        init if k > 1 else one_start,
        dispatch,
        aggregate,
        init_client=lambda adapter: jnp.ones(k) / k,
        remember=lambda memory, context, sent, received: received.chosen,
        model=model,
        held=held,
        traffic=lambda own, cohort: Traffic(up=(own, jnp.zeros(())), down=[own] * k),
        meta_gradient=MetaGradient(train, lambda steps: steps + k) if k > 1 else no_meta_gradient,
        query=query if k > 1 else 0,
        report=lambda state: {"largest_cluster": state.shares.max()},
    )


def _start(key: Array, adapter: Adapter, spread: float) -> Adapter:
    fresh, noise = jax.random.split(key)[0], purpose(key, "noise on b")

    def stirred(name: str, x: LoRA) -> LoRA:
        own, start = jax.random.fold_in(noise, sorted(lora.flatten(adapter)).index(name)), lora.flatten(adapter)[name]
        a = jnp.where((start.b != 0).any(), start.a, x.a)  # an adapter that has learned something is kept
        return LoRA(a, start.b + spread * jax.random.normal(own, x.b.shape, x.b.dtype), x.scale)

    flat = lora.flatten(lora.restart(fresh, adapter))
    return lora.unflatten({name: stirred(name, x) if lora.is_lora(x) else x for name, x in flat.items()})
