"""FedImpro: *FedImpro: Measuring and Improving Client Update in Federated Learning*, Tang et al., ICLR 2024, arXiv
2402.07011.

    minimise  f_c(w) + mean_j -log softmax(W h_j + b)_y_j        h_j ~ N(mu_y, sigma_y^2), y_j as frequent as among all
    mu_k = sum_c n_ck mu_ck / n_k        sigma_k^2 = sum_c n_ck (sigma_ck^2 + mu_ck^2) / n_k - mu_k^2

Clients send, beside their adapters, mean and variance of the features of each class; the upper part of every local
model is trained on features drawn from those of all clients as well. Ours: the split is before the head, so that the
upper part is W and b; a client measures after its local steps, on ``query`` examples that it keeps apart; ``draws``
features are drawn for each client and round, and seen in all of its steps, where the paper draws a batch for each step;
and nothing is added to the statistics (the paper blurs them for privacy). The reported loss is of images alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fedlora_jax import lora
from fedlora_jax.checks import refuse_outside
from fedlora_jax.keys import purpose
from fedlora_jax.lora import Adapter
from fedlora_jax.method import About, Dispatch, MetaGradient, Method, Traffic
from fedlora_jax.methods.fedit import FedITState, fedit
from fedlora_jax.task import Seen

ABOUT = About("FedImpro", "Tang et al. ICLR 2024", "2402.07011", "a, b, head", "a, b, head; moments of features", "no")


class Gaussians(NamedTuple):
    """mean, square: [K, width] of the features of each class. held: [K] how many; 0: of none."""

    mean: Array
    square: Array
    held: Array


class FedImproState(NamedTuple):
    """adapter: as FedIT's. features: of all clients. key: of the draws."""

    adapter: Adapter
    features: Gaussians
    key: Array


class Carried(NamedTuple):
    """own: the client's adapter. features: what it measures."""

    own: Adapter
    features: Gaussians


class Drawn(NamedTuple):
    """h: [n, width] features. y: [n] classes. there: [] 1 where anybody has sent some. head: of the base."""

    h: Array
    y: Array
    there: Array
    head: Any


def fedimpro(draws: int = 64, query: int = 32) -> Method:
    """FedImpro.

    Args:
      draws: features that a client is given in a round.
      query: examples that it keeps apart to measure its own.

    Raises:
      ValueError: none of either, (at init) an adapter without one linear head of kernel and bias, trained in full, or
        (when a round is traced) a loss that does not show features (``fedlora_jax.task.Shown``).
    """
    refuse_outside("[1, inf)", draws=draws, query=query)
    inner = fedit()

    def init(key, adapter):
        kernel = head_of(adapter)["kernel"]
        width, classes = kernel.shape
        none = Gaussians(jnp.zeros((classes, width)), jnp.zeros((classes, width)), jnp.zeros(classes))
        return FedImproState(adapter, none, purpose(key, "features of classes"))

    def dispatch(base, state, cohort):
        sent = inner.dispatch(base, FedITState(state.adapter), cohort)
        rows = lambda x: jnp.broadcast_to(x, (len(cohort.ids), *x.shape))
        known = jax.tree.map(rows, state.features)
        still = jax.tree.map(lambda x: jnp.zeros((len(x), *(1,) * (x.ndim - 1))), known)
        keys = jax.vmap(lambda i: jax.random.fold_in(state.key, i))(cohort.ids)
        head = jax.tree.map(rows, head_of(base, state.adapter))
        h, y = jax.vmap(lambda key: drawn(key, state.features, draws))(keys)
        there = rows((state.features.held.sum() > 0).astype(h.dtype))
        return Dispatch(base, Carried(sent.adapter, known), Carried(sent.mask, still), Drawn(h, y, there, head))

    def objective(task, carried, context):
        loss, own = task(carried.own), head_of(carried.own)
        logits = context.h @ (context.head["kernel"] + own["kernel"]) + context.head["bias"] + own["bias"]
        upper = optax.softmax_cross_entropy_with_integer_labels(logits, context.y).mean()
        return loss + context.there * upper, loss

    def train(tune, judge, start):
        end, trace = tune(start)
        return end._replace(features=of_classes(judge.seen(end))), trace, ()

    def aggregate(base, state, cohort, sent, received):
        only = sent._replace(adapter=sent.adapter.own, mask=sent.mask.own)
        new = inner.aggregate(base, FedITState(state.adapter), cohort, only, received.own)
        features = together(received.features, cohort.weights, state.features)
        return FedImproState(new.adapter, features, purpose(state.key, "round to come"))

    return Method(
        init,
        dispatch,
        aggregate,
        model=lambda carried, context: carried.own,
        aggregated=lambda carried: carried.own,
        objective=objective,
        traffic=lambda own, cohort: Traffic(up=(own, moments(own)), down=(own, moments(own))),
        meta_gradient=MetaGradient(train, lambda steps: steps + 1),
        query=query,
    )


def head_of(tree: Any, adapter: Adapter | None = None) -> dict[str, Array]:
    """``kernel [width, classes]`` and ``bias [classes]`` in ``tree`` of the one linear head that is trained."""
    full = lora.flatten(lora.split(tree if adapter is None else adapter)[1])
    kernels = [name for name, x in full.items() if x.ndim == 2 and name.endswith("kernel")]
    place = kernels[0].removesuffix("kernel") if len(kernels) == 1 else ""
    flat = lora.flatten(tree)
    inside = {name.removeprefix(place) for name in flat if name.startswith(place)}
    if len(kernels) != 1 or inside != {"kernel", "bias"} or f"{place}bias" not in full:
        raise ValueError(
            "features are drawn for one linear head, kernel and bias, trained in full, and the adapter has none: name "
            "it, as in full=('^head/',) of lora.new (--full ^head/ with --head linear)"
        )
    return {"kernel": flat[f"{place}kernel"], "bias": flat[f"{place}bias"]}


def drawn(key: Array, features: Gaussians, count: int) -> tuple[Array, Array]:
    """``[count, width]`` features and their classes, as frequent as examples are; of none of them noise."""
    of_class, of_noise = jax.random.split(key)
    y = jax.random.categorical(of_class, jnp.log(features.held + 1e-12), shape=(count,))
    deviation = jnp.sqrt(jnp.maximum(features.square - features.mean**2, 0))
    noise = jax.random.normal(of_noise, (count, features.mean.shape[1]))
    return features.mean[y] + deviation[y] * noise, y


def of_classes(seen: Seen) -> Gaussians:
    """Moments of each class of a batch; 0 of one that it lacks."""
    there = seen.present[:, None] * seen.one_hot  # [B, K]
    count = there.sum(0)
    mean = lambda x: jnp.einsum("bk,bd->kd", there, x, precision="highest") / jnp.maximum(count, 1.0)[:, None]
    return Gaussians(mean(seen.features), mean(seen.features**2), count)


def together(sent: Gaussians, weights: Array, old: Gaussians) -> Gaussians:
    """Of all clients ``[C, ...]``; a class that nobody has keeps what it had."""
    n = weights[:, None] * sent.held  # [C, K]
    total = n.sum(0)
    q = n / jnp.where(total > 0, total, 1.0)
    mean = lambda x, old: jnp.where(total[:, None] > 0, jnp.einsum("ck,ckd->kd", q, x, precision="highest"), old)
    return Gaussians(mean(sent.mean, old.mean), mean(sent.square, old.square), jnp.where(total > 0, total, old.held))


def moments(own: Adapter) -> list[Array]:
    """Arrays as large as what one client sends of its features."""
    head = head_of(own)
    return [head["kernel"], head["kernel"], head["bias"]]
