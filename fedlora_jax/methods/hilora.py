"""HiLoRA: *HiLoRA: Hierarchical Low-Rank Adaptation for Personalized Federated Learning*, Peng et al., CVPR 2026,
arXiv 2603.02785.

    W_i = W + s (a_r b_r + a_k(i) b_k(i) + a_i b_i)        root (all), cluster k(i), leaf (one client)

    root      sum_i p_i f_i
    cluster   sum_{i in k} p_i f_i + g_c |b_r b_k^T|^2                      root frozen
    leaf      f_i + g_c |b_r b_i^T|^2 + g_l |b_k b_i^T|^2                   root and cluster frozen

Three stages, one tier in each. The server's root and clusters are T_r(sum p_i a_i b_i), all clients' or a cluster's,
with rows of b orthonormal (split ``right``); the root stage ends early when its product changes by less than ``tau``.
Then clients are clustered by the row spaces of their ``b`` (``fedlora_jax.clustering``), averaged over rounds; the
cluster tier and the leaf start at b = 0. Factors and head travel in the first two stages, nothing in the third.

A client carries the tier that moves; the frozen ones stand beside it in the context, at zero before their time, so that
rounds of all stages are one program, and a tier that does not move is the same array as before.

Ours, where the paper is not public: all numbers; stages as shares of the run, the leaf stage taking what is left; the
rotation before averages; all leaves start from one random a; the head belongs to the tier that moves (global, per
cluster, personal) and starts as that of the tier before; the truncations are by subspace iteration where cohorts are
wide; a client that was never drawn in the root stage joins the largest cluster. The global model is the root alone (so
the bias that a round reports is, after the root stage, all that the other tiers add). A client that never took part
finds its cluster by a trial (``Method.onboard``): local steps from the root, whose b (or its change, as members') is
compared with the bases of the clusters' members (the paper: a few probe steps, then the cluster of the largest mean
cos^2); without one it is served the root. With ``newcomers="signature"`` (ours, HyperLoRA's idea on HiLoRA's tiers) it
takes no step: it is served the cluster whose members' signatures are nearest to its own on average. The split makes
steps of a large: a smaller learning rate than FedIT's is in order. When a stage ends, its tier comes down once more, as
it is frozen; ``traffic`` leaves a signature out.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import clustering, lora, personal, product
from fedlora_jax.checks import refuse_outside
from fedlora_jax.lora import Adapter, LoRA
from fedlora_jax.method import About, Dispatch, Method, Onboarding, Traffic, mean, memory_of, per_client
from fedlora_jax.personal import Kept
from fedlora_jax.signatures import Signature

ABOUT = About(
    "HiLoRA", "Peng et al. CVPR 2026", "2603.02785", "a, b of one tier, head", "a, b, head; leaves: nothing",
    "to rank r", "leaf, its head", "who it is (its signature, with newcomers=signature)",
)  # fmt: skip

ROOT, CLUSTER, LEAF = 0, 1, 2


class HiLoRAState(NamedTuple):
    """What the server holds; N clients, K clusters at most."""

    root: Adapter  # with the head of the root stage
    clusters: Adapter  # [K, ...] each with its head
    assignment: Array  # [N] the cluster of each client
    bases: dict[str, Array]  # [N, ..., r, out] of each adapted kernel, the average of a client's b / |b| over rounds
    signatures: Any  # [N, m] signatures, where newcomers are placed by them
    leaf: Adapter  # how the leaf of every client begins: b = 0, one a for all
    key: Array  # of the starts of k-means
    stage: Array  # of the next round
    stage_rounds: Array  # done in this stage
    last: Array  # stage of the last round


class Frozen(NamedTuple):
    """The tiers beside the one that moves, zero where they are not frozen yet: LoRA leaves ``[C, ...]``."""

    root: Adapter
    cluster: Adapter
    leaf: Array  # [C] 1 where it is the leaf that moves


class Own(NamedTuple):
    """What a client keeps. cluster: where its trial sent a client that never took part, -1: nowhere."""

    leaf: Kept
    cluster: Array


class Settings(NamedTuple):
    """The arguments of ``hilora``, as its functions need them."""

    population: int
    lengths: Array  # [3] rounds of each stage, of the last at most
    most: int  # clusters
    tau: float
    g_c: float
    g_l: float
    lam: float
    k_min: int
    k_max: int
    subspace: Literal["b", "change"]
    signature: Signature | None  # where newcomers are placed by theirs


def hilora(
    population: int,
    rounds: int,
    root: float = 0.4,
    cluster: float = 0.4,
    tau: float = 0.01,
    g_c: float = 0.1,
    g_l: float = 0.1,
    lam: float = 0.9,
    k_min: int = 2,
    k_max: int = 12,
    subspace: Literal["b", "change"] = "b",
    newcomers: Literal["trial", "signature"] = "trial",
    signature: Signature | None = None,
) -> Method:
    """HiLoRA.

    Args:
      population: clients, with ids from 0; others never took part.
      rounds: of the run.
      root, cluster: share of the rounds for the first two stages; the third has the rest.
      tau: the root stage ends when |new product - old| <= tau |old|, over all layers together; 0: it does not.
      g_c, g_l: weights of the orthogonality to the root and to the cluster.
      lam: weight of the past in the averages of b; 0: the last b alone.
      k_min, k_max: bounds of the number of clusters, at least 2, and below the population (or 1 and 1: one cluster).
      subspace: cluster by clients' ``b``, or by its ``change`` since it was sent (all start a round from one b, so
        that their b differ little).
      newcomers: how a client that never took part finds its cluster, by a ``trial`` of local steps or by its
        ``signature``.
      signature: one client's, only its shapes are read, and only for ``newcomers="signature"``.

    Raises:
      ValueError: a number out of its range.
    """
    refuse_outside("(0, 1]", root=root)
    refuse_outside("[0, 1]", cluster=cluster)
    refuse_outside("[1, inf)", population=population, rounds=rounds, k_min=k_min, k_max=k_max)
    if root + cluster > 1 + 1e-9:
        raise ValueError(f"root and cluster are shares of the rounds: got {root:g} + {cluster:g}, expected at most 1")
    refuse_outside("[0, inf)", tau=tau, g_c=g_c, g_l=g_l)
    refuse_outside("[0, 1)", lam=lam)
    _check(k_min, k_max, subspace, newcomers, signature)
    lengths = jnp.asarray([max(1, round(root * rounds)), round(cluster * rounds), rounds])
    most = max(1, min(k_max, population - 1))
    told = signature if newcomers == "signature" else None
    s = Settings(population, lengths, most, tau, g_c, g_l, lam, k_min, k_max, subspace, told)
    trial = Onboarding(lambda state: state._replace(stage=jnp.full_like(state.stage, ROOT)), partial(_place, s))
    return Method(
        partial(_init, s),
        partial(_dispatch, s),
        partial(_aggregate, s),
        penalty=partial(_penalty, s),
        init_client=lambda adapter: Own(personal.nothing_yet(adapter), jnp.full((), -1, jnp.int32)),
        remember=_remember,
        model=_model,
        traffic=lambda own, cohort: Traffic(up=own, down=own, missed=own),
        report=partial(_report, s),
        onboard=trial if newcomers == "trial" else None,
    )


def _check(k_min: int, k_max: int, subspace: str, newcomers: str, signature: Signature | None) -> None:
    if not (2 <= k_min <= k_max or k_min == k_max == 1):
        raise ValueError(f"expected 2 <= k_min <= k_max, or 1 and 1 for a single cluster; got {k_min} and {k_max}")
    if subspace not in ("b", "change"):
        raise ValueError(f"subspace must be 'b' or 'change', got {subspace!r}")
    if newcomers not in ("trial", "signature"):
        raise ValueError(f"newcomers must be 'trial' or 'signature', got {newcomers!r}")
    if newcomers == "signature" and not isinstance(signature, Signature):
        raise ValueError(
            f"newcomers are placed by signatures: expected signature=Signature, got {type(signature).__name__}; "
            "see fedlora_jax.signatures"
        )


def _init(s: Settings, key, adapter):
    lora.needs_low_rank(adapter, "tiers")
    fresh, own, key = jax.random.split(key, 3)
    clusters = jax.vmap(lambda key: lora.restart(key, adapter))(jax.random.split(fresh, s.most))
    nobody = jnp.zeros(s.population, jnp.int32)
    bases = {name: jnp.zeros((s.population, *x.b.shape), x.b.dtype) for name, x in _factors(adapter).items()}
    signatures = jnp.zeros((s.population, len(_about(s.signature)))) if s.signature else ()
    zeros = (jnp.zeros((), jnp.int32) for _ in range(3))
    return HiLoRAState(adapter, clusters, nobody, bases, signatures, lora.restart(own, adapter), key, *zeros)


def _dispatch(s: Settings, base, state, cohort):
    first, second = (state.stage == ROOT), (state.stage == CLUSTER)
    mask = lora.rank_mask(state.root, cohort.ranks)
    held = lambda tree: jax.tree.map(jnp.multiply, tree, mask)  # within each client's rank
    memory = memory_of(cohort)
    tried = _by_signature(s, state, cohort.signatures) if s.signature else memory.cluster
    theirs, placed = _cluster_of(state, cohort.ids, tried)

    root = held(state.root)
    cluster = held(jax.tree.map(lambda x: x[theirs], state.clusters))
    # Who has no cluster is sent what a cluster begins as: b = 0 and the root's head.
    cluster = lora.tree_map(
        lambda x, y: LoRA(x.a, jnp.where(per_client(placed, x.b), x.b, 0.0), x.scale),
        cluster,
        root,
        full=lambda x, y: jnp.where(per_client(placed & ~first, x), x, y),
    )
    leaf = held(lora.join(lora.split(state.leaf)[0], lora.split(cluster)[1]))
    leaf = held(personal.own_or(cohort._replace(memory=memory.leaf), leaf, nobody=False))

    moving = jax.tree.map(lambda *xs: jnp.select([first, second], xs[:2], xs[2]), root, cluster, leaf)
    frozen = Frozen(
        _switched(root, ~first), _switched(cluster, ~first & ~second), jnp.full(len(cohort.ids), ~first & ~second)
    )
    return Dispatch(base, moving, mask, frozen)


def _model(carried, frozen):
    flat = lora.flatten(carried)
    tiers = (lora.flatten(frozen.root), lora.flatten(frozen.cluster))
    for name in tiers[0]:
        flat[name] = product.plus(product.plus(flat[name], tiers[0][name]), tiers[1][name])
    return lora.unflatten(flat)


def _penalty(s: Settings, carried, frozen):
    own, *tiers = (_factors(tree) for tree in (carried, frozen.root, frozen.cluster))
    total = jnp.zeros(())
    for g, tier in zip((s.g_c, s.g_l), tiers, strict=True):
        for name, x in own.items():
            total += g * jnp.sum((tier[name].b @ x.b.mT) ** 2)
    return total


def _aggregate(s: Settings, base, state, cohort, sent, received):
    theirs, _ = _cluster_of(state, cohort.ids, jnp.full_like(cohort.ids, -1))
    of_root = partial(_of_root, s, cohort, sent, received)
    of_clusters = partial(_of_clusters, s, cohort.weights, theirs, received)
    of_leaves = lambda state: (state, jnp.zeros((), bool))
    last = state.stage
    state, done = jax.lax.switch(last, (of_root, of_clusters, of_leaves), state)
    after = jnp.where((last == ROOT) & (s.lengths[CLUSTER] > 0), CLUSTER, LEAF)
    return state._replace(
        stage=jnp.where(done, after, last).astype(last.dtype),
        stage_rounds=jnp.where(done, 0, state.stage_rounds + 1),
        last=last,
    )


def _of_root(s: Settings, cohort, sent, received, state):
    """The state after a round of the root stage, and whether it was the last of it; so in the two stages below."""
    p, ids = cohort.weights, cohort.ids
    new = _best(state.root, received, p)
    seen = jnp.where((p > 0) & (ids >= 0), ids, s.population)  # out of range: not written
    seen_of = _directions(s, sent.adapter, received)

    def averaged(rows, b):
        own = clustering.moving_average(rows[jnp.clip(ids, 0, s.population - 1)], b, s.lam)
        return rows.at[seen].set(own, mode="drop")

    bases = jax.tree.map(averaged, state.bases, jax.lax.stop_gradient(seen_of))
    still = s.tau > 0
    done = (state.stage_rounds + 1 >= s.lengths[ROOT]) | (still & (_change(new, state.root) <= s.tau))
    signatures = state.signatures
    if s.signature:
        signatures = signatures.at[seen].set(_about(cohort.signatures), mode="drop")
    state = state._replace(root=new, bases=bases, signatures=signatures)
    return jax.lax.cond(done, partial(_gather, s), lambda state: state, state), done


def _gather(s: Settings, state):
    """Clients in clusters, each of which begins with the root's head."""
    bases = {k: clustering.bases(jax.lax.stop_gradient(x)) for k, x in state.bases.items()}
    q, known = list(bases.values()), _known(state)
    found = clustering.spectral(state.key, clustering.distances(q, q), known, s.k_min, s.k_max)
    heads = jax.tree.map(lambda x: jnp.broadcast_to(x, (s.most, *x.shape)), lora.split(state.root)[1])
    clusters = lora.join(lora.split(state.clusters)[0], heads)
    return state._replace(assignment=found.assignment, clusters=clusters)


def _of_clusters(s: Settings, p, theirs, received, state):
    one = lambda row: _best(row[0], received, p * (theirs == row[1]))
    clusters = jax.lax.map(one, (state.clusters, jnp.arange(s.most)))
    return state._replace(clusters=clusters), state.stage_rounds + 1 >= s.lengths[CLUSTER]


def _remember(memory, frozen, sent, received):
    kept = jax.tree.map(lambda x, y: jnp.where(frozen.leaf, y, x), memory.leaf, personal.keep(received))
    return memory._replace(leaf=kept)


def _place(s: Settings, state, memory, sent, received):
    q = {name: clustering.bases(b) for name, b in _directions(s, sent, received).items()}
    names = sorted(q)
    members = [clustering.bases(state.bases[name]) for name in names]
    where = _nearest(s, state, clustering.distances([q[name] for name in names], members))
    return memory._replace(cluster=where.astype(memory.cluster.dtype))


def _by_signature(s: Settings, state: HiLoRAState, signatures: Signature) -> Array:
    return _nearest(s, state, jnp.sum((_about(signatures)[:, None] - state.signatures) ** 2, -1))


def _report(s: Settings, state):
    used = jnp.zeros(s.most).at[state.assignment].max(1.0).sum()
    sends = jnp.where(state.last == LEAF, 0.0, 1.0)
    return {
        "stage": state.last,
        "clusters": jnp.where(state.stage == ROOT, 1.0, used),
        "travels_up": sends,
        "travels_down": sends,
        "travels_missed": jnp.where(state.last == state.stage, 0.0, 1.0),  # the tier that is frozen now
    }


def _directions(s: Settings, sent: Adapter, received: Adapter) -> dict[str, Array]:
    """What a client's subspace is taken of, by kernel."""
    before, after = _factors(sent), _factors(received)
    return {name: x.b - before[name].b if s.subspace == "change" else x.b for name, x in after.items()}


def _nearest(s: Settings, state: HiLoRAState, d: Array) -> Array:
    """``[M]`` the cluster that is nearest to each of M newcomers by their distances ``d [M, N]``; -1: there is none."""
    where = clustering.nearest(d, state.assignment, _known(state), s.most)
    return jnp.where(state.stage == ROOT, -1, where)


def _about(signature: Signature) -> Array:
    """``[..., m]`` where a client's features lie and what its labels are, each with the same say in distances."""
    return jnp.concatenate([signature.shape / signature.shape.shape[-1] ** 0.5, signature.labels], -1)


def _best(old: Adapter, received: Adapter, weights: Array) -> Adapter:
    """``T_r`` of the mean of products over the clients that have weight, and their mean head; ``old`` if nobody has."""
    total = weights.sum()
    p = weights / jnp.where(total > 0, total, 1.0)

    def truncated(old: LoRA, x: LoRA) -> LoRA:
        rank = old.a.shape[-1]
        return product.truncate(product.total(x, p), rank, split="right", spare=max(8, rank))

    new = lambda old: lora.tree_map(truncated, old, received, full=lambda old, x: mean(x, p))
    return jax.lax.cond(total > 0, new, lambda old: old, old)  # idle clusters cost nothing


def _change(new: Adapter, old: Adapter) -> Array:
    """|new product - old| / |old| over all layers together."""
    pairs = [(x, y) for x, y in zip(lora.low_rank_leaves(new), lora.low_rank_leaves(old), strict=True)]
    square = lambda products: sum(jnp.sum(product.norm(x) ** 2) for x in products)
    moved, size = square([product.difference(x, y) for x, y in pairs]), square([y for _, y in pairs])
    return jax.lax.stop_gradient(product.safe_sqrt(moved / jnp.maximum(size, 1e-30)))


def _cluster_of(state: HiLoRAState, ids: Array, tried: Array) -> tuple[Array, Array]:
    """``[C]`` each client's cluster, and whether it has one: members by their id, others where their trial sent them.

    Nobody in particular (id -1) has none.
    """
    population = state.assignment.shape[0]
    member = (ids >= 0) & (ids < population)
    cluster = jnp.where(member, state.assignment[jnp.clip(ids, 0, population - 1)], tried)
    return jnp.maximum(cluster, 0), member | ((ids >= population) & (tried >= 0))


def _known(state: HiLoRAState) -> Array:
    """``[N]`` who was drawn in the root stage."""
    some = next(iter(state.bases.values()))
    return jnp.any(some != 0, tuple(range(1, some.ndim)))


def _factors(adapter: Adapter) -> dict[str, LoRA]:
    return lora.flatten(lora.split(adapter)[0])


def _switched(adapter: Adapter, on: Array) -> Adapter:
    """The low-rank part, ``b`` at zero where ``on`` is not."""
    return lora.tree_map(lambda x: LoRA(x.a, jnp.where(on, x.b, 0.0), x.scale), lora.split(adapter)[0])
