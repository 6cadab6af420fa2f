"""HiLoRA: each tier computes the equation it is named for, and stages follow one another in one program."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    ADAPTER,
    BASE,
    CLIENTS,
    KEY,
    OPTIMIZER,
    SIGNATURE,
    array,
    assert_near,
    begin,
    cohort,
    copies,
    dense,
    examples,
    host,
    jit,
    logits,
    loss_fn,
    members,
    normalised,
    nudged,
    replaced,
    take,
    uploads,
)

from fedlora_jax import clustering, lora, rounds, training
from fedlora_jax.method import average_client, models
from fedlora_jax.methods.flexlora import flexlora
from fedlora_jax.methods.hilora import CLUSTER, LEAF, ROOT, hilora
from fedlora_jax.wrappers.fedlc import fedlc
from fedlora_jax.wrappers.over_the_air import over_the_air
from fedlora_jax.wrappers.proximal import proximal

IDS = jnp.arange(CLIENTS)


@functools.cache
def make(total=5, population=CLIENTS, **options):
    return hilora(
        population, total, signature=SIGNATURE, **{"root": 0.4, "cluster": 0.4, "tau": 0.0, "k_max": 3} | options
    )


@functools.cache
def aggregate(method):
    return jit(method.aggregate)


@functools.cache
def dispatch(method):
    return jit(functools.partial(method.dispatch, BASE))


@functools.cache
def history():
    """Five rounds of one program, 2 / 2 / 1: states, memories, losses, dispatches, and how often it was traced."""
    method, traces = make(), []

    def counted(*args):
        traces.append(1)
        return loss_fn(*args)

    fast = jit(rounds.make_round(method, counted, OPTIMIZER))
    state, memory = method.init(KEY, ADAPTER), members(method).memory
    states, memories, infos, first = [state], [memory], [], None
    for t in range(5):
        c = cohort(t)._replace(ids=IDS, memory=memory)
        state, memory, info = fast(BASE, state, c, jax.random.fold_in(KEY, t))
        first = first or len(traces)
        states, memories, infos = [*states, state], [*memories, memory], [*infos, info]
    assert len(traces) == first
    return method, states, memories, infos


def at(state, stage, **changes):
    return state._replace(stage=jnp.asarray(stage, jnp.int32), **changes)


def halfway(stage, method=None, seed=0):
    """A state in which every tier holds something, and the cohort."""
    method = method or make()
    state = begin(method.init, KEY)
    assignment = array(np.arange(len(state.assignment)) % 2)
    state = at(state, stage, root=nudged(ADAPTER, seed), clusters=nudged(state.clusters, seed + 1))
    return method, state._replace(assignment=assignment), normalised(members(method))._replace(ids=IDS)


def factors(adapter):
    return lora.low_rank_leaves(adapter)


def same(x, y):
    return all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (x, y)), strict=True))


@pytest.mark.long
def test_stages_follow_one_another_and_only_one_tier_moves():
    """20 / 20 / 10 of 50, at a tenth of the size; what is frozen is the same bits."""
    _, states, memories, infos = history()
    assert [int(s.stage) for s in states] == [ROOT, ROOT, CLUSTER, CLUSTER, LEAF, LEAF]
    assert [int(i.learned["stage"]) for i in infos] == [ROOT, ROOT, CLUSTER, CLUSTER, LEAF]
    assert [int(i.learned["travels_up"]) for i in infos] == [1, 1, 1, 1, 0]
    for t, (old, new) in enumerate(itertools.pairwise(states)):
        assert same(old.root, new.root) == (t >= 2)
        assert same(lora.split(old.clusters)[0], lora.split(new.clusters)[0]) == (t not in (2, 3))
        assert same(old.bases, new.bases) == (t >= 2)
        assert same(old.assignment, new.assignment) or t == 1
        assert same(memories[t].leaf, memories[t + 1].leaf) == (t < 4)
    start = lora.split(states[2].clusters)[1]  # a cluster's head starts as the root's
    assert same(start, jax.tree.map(lambda x: jnp.stack([x] * 3), lora.split(states[2].root)[1]))


def test_the_root_has_orthonormal_rows_and_the_product_of_its_clients_to_rank_r():
    method, state, c = halfway(ROOT)
    sent = dispatch(method)(state, c)
    received = uploads(sent)
    new = aggregate(method)(BASE, state, c, sent, received)
    for x, y in zip(factors(new.root), factors(received), strict=True):
        rank = x.a.shape[-1]
        assert_near(x.b @ x.b.mT, np.broadcast_to(np.eye(rank), (*x.b.shape[:-2], rank, rank)), 1e-5)
        u, s, vt = np.linalg.svd(np.tensordot(np.float64(c.weights), dense(y), 1), full_matrices=False)
        assert_near(dense(x), (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :], 1e-5)


@pytest.mark.long
def test_a_new_tier_changes_no_logits():
    """Root to cluster, for members and strangers; cluster to leaf."""
    method, states, memories, _ = history()
    seen_by = jit(jax.vmap(lambda adapter: logits(BASE, adapter, examples()["x"])))

    def seen(stage, t, ids=IDS):
        sent = dispatch(method)(at(states[t], stage), members(method)._replace(ids=ids))
        return seen_by(host(models(method, sent)))

    assert_near(seen(CLUSTER, 2), seen(ROOT, 2), 1e-6)
    assert_near(seen(CLUSTER, 2, IDS + 90), seen(ROOT, 2), 1e-6)
    assert_near(seen(LEAF, 4), seen(CLUSTER, 4), 1e-6)
    assert np.abs(seen(CLUSTER, 4) - seen(ROOT, 4)).max() > 1e-3
    assert int(memories[4].leaf.met.sum()) == 0


def test_the_model_is_the_sum_of_the_tiers():
    method, state, c = halfway(LEAF)
    leaf = nudged(copies(ADAPTER), 3)
    c = c._replace(memory=c.memory._replace(leaf=c.memory.leaf._replace(own=leaf, met=jnp.ones(CLIENTS))))
    sent = dispatch(method)(state, c)
    for x, *tiers in zip(*map(factors, (models(method, sent), state.root, state.clusters, leaf)), strict=True):
        root, clusters, own = map(dense, tiers)
        assert_near(dense(x), root + clusters[np.asarray(state.assignment)] + own, 1e-5)
    assert_near(lora.split(models(method, sent))[1], lora.split(leaf)[1], 0)


def test_the_penalty_is_the_overlap_of_rows_of_b():
    """Nothing in the root stage, g_c with the root, g_l with the cluster; its factor a does not matter."""
    method = make(g_c=0.3, g_l=0.7)
    for stage in (ROOT, CLUSTER, LEAF):
        _, state, c = halfway(stage, method)
        sent = dispatch(method)(state, c)
        carried = nudged(sent.adapter, 4)
        for i in range(CLIENTS):
            one = take(carried, i)
            expected = 0.0
            tiers = (state.root, take(state.clusters, state.assignment[i]))[:stage]
            for g, tier in zip((0.3, 0.7), tiers, strict=False):
                for x, y in zip(factors(tier), factors(one), strict=True):
                    expected += g * np.sum((np.float64(x.b) @ np.float64(y.b).swapaxes(-1, -2)) ** 2)
            assert_near(method.penalty(one, take(sent.context, i)), expected, 1e-5)


def test_the_overlap_with_the_root_falls_where_it_is_penalised():
    overlap = {}
    for g in (0.0, 1.0):
        method, state, c = halfway(CLUSTER, make(g_c=g))
        sent = dispatch(method)(state, c)
        local = training.make_local(method, loss_fn, optax.sgd(0.02))
        batches = jax.tree.map(lambda x: jnp.concatenate([x] * 10), take(c.batches, 0))
        end, _ = jit(local)(BASE, *(take(x, 0) for x in (sent.adapter, sent.mask, sent.context)), batches, KEY)
        pairs = zip(factors(state.root), factors(end), strict=True)
        overlap[g] = sum(float(jnp.sum((x.b @ y.b.mT) ** 2)) for x, y in pairs)
    assert overlap[1.0] < 0.8 * overlap[0.0]


def test_clusters_are_truncated_means_of_their_members_and_idle_ones_stay():
    method, state, c = halfway(CLUSTER)
    sent = dispatch(method)(state, c)
    received = uploads(sent)
    new = aggregate(method)(BASE, state, c, sent, received)
    for k, own in ((0, [0, 2]), (1, [1, 3])):
        p = np.float64(c.weights)[own] / np.float64(c.weights)[own].sum()
        for x, y in zip(factors(new.clusters), factors(received), strict=True):
            u, s, vt = np.linalg.svd(np.tensordot(p, dense(take(y, np.asarray(own))), 1), full_matrices=False)
            assert_near(dense(take(x, k)), (u[..., :2] * s[..., None, :2]) @ vt[..., :2, :], 1e-5)
        heads = [lora.split(t)[1] for t in (take(new.clusters, k), received)]
        assert_near(heads[0], jax.tree.map(lambda x, p=p, own=own: np.tensordot(p, x[np.asarray(own)], 1), heads[1]))
    assert same(take(new.clusters, 2), take(state.clusters, 2))
    assert same(new.root, state.root)


@pytest.mark.long
def test_one_cluster_is_flexlora():
    """Of everybody, on a root of zero."""
    method = make(20, root=0.5, cluster=0.5, k_min=1, k_max=1)
    state = method.init(KEY, ADAPTER)
    assert state.clusters["mix"]["kernel"].a.shape[0] == 1
    state = at(state, CLUSTER, clusters=jax.tree.map(lambda x: x[None], ADAPTER))
    inner = flexlora("right")
    expected, memory = inner.init(KEY, ADAPTER), members(method).memory
    fast, slow = (jit(rounds.make_round(m, loss_fn, OPTIMIZER)) for m in (method, inner))
    for t in range(2):
        c = cohort(t)._replace(ids=IDS)
        state, memory, info = fast(BASE, state, c._replace(memory=memory), KEY)
        expected, _, theirs = slow(BASE, expected, c, KEY)
        assert_near(info.loss, theirs.loss)
    tier = take(state.clusters, 0)
    assert_near(lora.split(tier)[1], lora.split(expected.adapter)[1])
    for x, y in zip(factors(tier), factors(expected.adapter), strict=True):
        assert_near(dense(x), dense(y), 1e-5)


@pytest.mark.long
def test_the_root_stage_ends_early_when_its_product_rests():
    method, state, c = halfway(ROOT, make(100, tau=0.01))
    sent = dispatch(method)(state, c)
    resting = aggregate(method)(BASE, state, c, sent, sent.adapter)
    moving = aggregate(method)(BASE, state, c, sent, uploads(sent))
    assert (int(resting.stage), int(moving.stage)) == (CLUSTER, ROOT)
    never = make(100, tau=0.0)
    assert int(aggregate(never)(BASE, state, c, sent, sent.adapter).stage) == ROOT


@pytest.mark.long
def test_a_run_without_cluster_rounds_goes_from_the_root_to_the_leaves():
    method, state, c = halfway(ROOT, make(5, root=0.2, cluster=0.0))
    sent = dispatch(method)(state, c)
    assert int(method.aggregate(BASE, state, c, sent, uploads(sent)).stage) == LEAF


def test_nobody_in_particular_is_served_the_root():
    method, state, c = halfway(CLUSTER)
    one = models(method, dispatch(method)(state, average_client(c)))
    for x, y in zip(factors(one), factors(state.root), strict=True):
        assert_near(dense(take(x, 0)), dense(y), 1e-5)
    assert_near(take(lora.split(one)[1], 0), lora.split(state.root)[1], 0)


@pytest.mark.long
def test_a_trial_takes_the_steps_of_a_root_client():
    method, states, _, _ = history()
    state = states[4]
    strangers = members(method)._replace(ids=IDS + 50)
    memory = jit(rounds.make_onboard(method, loss_fn, OPTIMIZER, chunk=2))(BASE, state, strangers, KEY)
    sent = dispatch(method)(at(state, ROOT), strangers)
    assert_near(take(sent.adapter, 0), state.root, 0)
    local = training.make_local(method, loss_fn, OPTIMIZER)
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(strangers.ids)
    rows = (sent.adapter, sent.mask, sent.context, strangers.batches, keys)
    received, _ = jit(jax.vmap(lambda *row: local(BASE, *row)))(*rows)
    np.testing.assert_array_equal(
        memory.cluster, method.onboard.place(state, strangers.memory, sent.adapter, received).cluster
    )
    assert set(np.asarray(memory.cluster)) <= set(np.asarray(state.assignment))
    alone = flexlora()
    c = cohort()
    assert rounds.make_onboard(alone, loss_fn, OPTIMIZER)(BASE, (), c, KEY) is c.memory


def test_wrappers_pass_the_trial_on():
    method, states, _, _ = history()
    around = fedlc(over_the_air(proximal(method, 0.1), 1e12), 0.1)
    assert around.onboard is not None
    strangers = members(around)._replace(ids=IDS + 50)
    whole = around.init(KEY, ADAPTER)
    state = whole._replace(inner=states[4])
    memory = jit(rounds.make_onboard(around, loss_fn, OPTIMIZER))(BASE, state, strangers, KEY)
    assert jax.tree.structure(memory) == jax.tree.structure(strangers.memory)
    assert (memory.cluster >= 0).all()
    assert proximal(flexlora(), 0.1).onboard is None


@pytest.mark.long
def test_bases_are_averages_over_the_rounds_a_client_took_part_in():
    method, state, c = halfway(ROOT, make(100, population=6))
    c = c._replace(weights=replaced(c.weights, 3, 0.0))
    sent = dispatch(method)(state, c)
    once, again = uploads(sent, 1), uploads(sent, 2)
    new = aggregate(method)(BASE, state, c, sent, once)
    new = aggregate(method)(BASE, new, c, sent, again)
    for name, rows in new.bases.items():
        own = jnp.zeros_like(rows[0])
        for received in (once, again):
            own = clustering.moving_average(own, lora.flatten(received)[name].b[0], 0.9)
        assert_near(rows[0], own, 1e-5)
        assert not rows[3:].any()  # weight 0, and never drawn


def test_clusters_by_change_look_at_b_minus_the_b_that_was_sent():
    method, state, c = halfway(ROOT, make(100, subspace="change"))
    sent = dispatch(method)(state, c)
    received = uploads(sent)
    new = aggregate(method)(BASE, state, c, sent, received)
    x, y = (lora.flatten(t)["mix/kernel"].b for t in (received, sent.adapter))
    assert_near(new.bases["mix/kernel"][1], clustering.moving_average(jnp.zeros_like(x[1]), x[1] - y[1], 0.9), 1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"root": 0.0},
        {"root": 0.7, "cluster": 0.4},
        {"tau": -1.0},
        {"g_c": -0.1},
        {"lam": 1.0},
        {"k_min": 1},
        {"k_min": 4},
        {"subspace": "a"},
        {"newcomers": "nearest"},
        {"population": 0},
        {"total": 0},
    ],
)
def test_hilora_refuses_what_it_cannot_do(wrong):
    with pytest.raises(ValueError, match="got"):
        make(**wrong)


def test_hilora_cannot_place_newcomers_by_signatures_it_does_not_know():
    with pytest.raises(ValueError, match="expected signature=Signature, got NoneType"):
        hilora(4, 5, newcomers="signature")
