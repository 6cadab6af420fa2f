"""Clients with an adapter of their own beside the shared one: each method against its equation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ADAPTER,
    BASE,
    BATCH,
    CLIENTS,
    KEY,
    SCALE,
    assert_near,
    cohort,
    copies,
    dense,
    host,
    jit,
    logits,
    members,
    normalised,
    nudged,
    remembered,
    take,
    train,
)
from personal_helpers import run, task

from fedlora_jax import lora, personal
from fedlora_jax.lora import LoRA
from fedlora_jax.method import average_client
from fedlora_jax.methods.ditto import ditto
from fedlora_jax.methods.fdlora import fdlora, fused
from fedlora_jax.methods.fedalt import Own, fedalt, mixed, mixers
from fedlora_jax.methods.feddpa import feddpa
from fedlora_jax.methods.fedit import fedit
from fedlora_jax.methods.pf2lora import pf2lora
from fedlora_jax.personal import Pair, together
from fedlora_jax.wrappers.privacy import clip

BATCH_0 = take(cohort().batches, (0, 0))
X, Y = nudged(ADAPTER, 1), nudged(ADAPTER, 2)


def products(adapter):
    """The dense update of every kernel, and what is trained in full."""
    return {k: SCALE * dense(x) if lora.is_lora(x) else np.asarray(x) for k, x in lora.flatten(host(adapter)).items()}


def between(x, y, share):
    return {k: (1 - share) * v + share * products(y)[k] for k, v in products(x).items()}


# --- FedDPA


@pytest.fixture(scope="module")
def plain():
    return run(fedit(), 2)[0]


@pytest.mark.long
def test_feddpa_is_ditto_alone_and_fedit_at_its_other_end(plain):
    """mix = 1: the clients' own, as Ditto's at lam = 0; 0: nothing of it. The server is FedIT's."""
    state, c, _ = run(feddpa(1.0), 2)
    assert_near(state, plain)
    _, d, _ = run(ditto(0.0), 2)
    assert_near(c.memory.own, d.memory.own, 1e-4)
    carried = {"shared": X, "personal": Y}
    for mix in (0.0, 0.3, 1.0):
        assert_near(products(feddpa(mix).model(carried, ())), between(X, Y, mix), 1e-5)


def test_feddpas_local_part_follows_the_mixture_and_the_shared_one_itself():
    method, f = feddpa(0.3), lambda x: task(x, BATCH_0, KEY)
    grads = jit(jax.grad(lambda c: method.objective(f, c, ())[0]))({"shared": X, "personal": Y})
    assert_near(grads["shared"], jit(jax.grad(f))(X))
    model = lambda y: f(personal.mixture(X, y, 0.3))
    assert_near(grads["personal"], jit(jax.grad(model))(Y))
    assert_near(method.objective(f, {"shared": X, "personal": Y}, ())[1], model(Y))


# --- FDLoRA


def test_fdlora_takes_the_share_that_judges_best():
    method, c = fdlora(choices=3, query=BATCH), normalised(members(fdlora(query=BATCH)))
    sent = method.dispatch(BASE, method.init(KEY, nudged(ADAPTER)), c)
    ends = {"shared": X, "personal": Y, "share": jnp.zeros(())}
    for best in (0.0, 0.5, 1.0):
        goal = jax.tree.map(lambda x, y, s=best: (1 - s) * x + s * y, X, Y)
        far = lambda end, goal=goal: personal.squared_distance(fused(end), goal)
        chosen, _, _ = method.meta_gradient.train(lambda start: (start, ()), far, ends)
        assert chosen["share"] == best
        assert_near(fused(chosen), goal, 1e-6)
    assert_near(fused(take(sent.adapter, 0)), nudged(ADAPTER), 1e-6)  # who never took part holds the shared one
    again = remembered(method, c, sent, sent.adapter | {"share": jnp.full(CLIENTS, 0.5)})
    assert_near(method.dispatch(BASE, method.init(KEY, ADAPTER), again).adapter["share"], np.full(CLIENTS, 0.5), 0)


def test_fdloras_server_is_fedits(plain):
    state, _, _ = run(fdlora(query=BATCH), 2)
    assert_near(state, plain)
    with pytest.raises(ValueError, match="at least 2"):
        fdlora(1)


# --- PF2LoRA


@pytest.mark.long
def test_pf2loras_levels_have_their_gradients():
    """The upper one through the client's answer, second derivatives included; finite differences in float32 agree."""
    al, method = 0.3, pf2lora(local_rank=1, al=0.3)
    local = nudged(method.init_client(ADAPTER), 3)
    f = lambda x, y: task(together(Pair(x, y)), BATCH_0, KEY)
    whole = lambda x, y: method.objective(lambda m: task(m, BATCH_0, KEY), Pair(x, y), ())[0]
    slope = jit(jax.grad(f, 1))
    upper, lower = jit(jax.grad(whole, (0, 1)))(X, local)
    assert_near(lower, slope(X, local))
    answer = lambda x: jax.tree.map(lambda y, g: y - al * g, local, slope(x, local))
    way = jax.tree.map(lambda x: np.random.default_rng(4).normal(size=x.shape).astype(np.float32), X)
    along = lambda e: f(*(lambda x: (x, answer(x)))(jax.tree.map(lambda x, d: x + e * d, X, way)))
    told = sum(np.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (upper, way)), strict=True))
    np.testing.assert_allclose(told, (along(1e-2) - along(-1e-2)) / 2e-2, rtol=2e-2)
    first_order = jit(jax.grad(f))(X, answer(X))
    assert max(np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (upper, first_order)), strict=True)) > 1e-3


def test_pf2loras_common_part_is_fedits_without_a_local_one(plain):
    state, _, _ = run(pf2lora(local_rank=0, al=0.0), 2)
    assert_near(state, plain)


# --- FedALT


@pytest.mark.long
def test_the_rest_of_the_world_is_the_mean_of_all_others():
    """Over two rounds in which other clients take part, against sums that are written out."""
    method = fedalt()
    state, memory = method.init(KEY, nudged(ADAPTER)), copies(method.init_client(ADAPTER), 6)
    last = {}
    for t, ids in enumerate(([0, 1, 2], [1, 3, 4])):
        c = normalised(cohort(t, clients=3))._replace(ids=np.asarray(ids), memory=take(memory, np.asarray(ids)))
        sent = method.dispatch(BASE, state, c)
        for row, i in enumerate(ids):
            others = [x for j, x in last.items() if j != i]
            mean = jax.tree.map(lambda *x: np.mean(x, 0), *others) if others else nudged(ADAPTER)
            assert_near(take(sent.context, row), mean, 1e-5)
            assert_near(take(sent.adapter.update, row), last.get(i, mean), 1e-5)
        received = nudged(sent.adapter, t)
        kept = jax.vmap(method.remember)(c.memory, sent.context, sent.adapter, received)
        memory = jax.tree.map(lambda rows, new, ids=ids: rows.at[np.asarray(ids)].set(new), jnp_tree(memory), kept)
        state = method.aggregate(BASE, state, c, sent, received)
        last |= {i: take(received.update, row) for row, i in enumerate(ids)}
    everybody = jax.tree.map(lambda *x: np.mean(x, 0), *last.values())
    nobody = method.dispatch(BASE, state, average_client(c._replace(memory=take(memory, np.arange(3)))))
    assert_near(take(nobody.adapter.update, 0), everybody, 1e-5)
    assert state.clients == 5


def jnp_tree(tree):
    return jax.tree.map(jnp.asarray, tree)


def test_a_mixer_weighs_both_updates_by_each_input():
    """The layer's output against a sum over updates in float64; at zero both count half."""
    own = Own(X, jax.tree.map(lambda x: x + 1.0 * np.random.default_rng(5).normal(size=x.shape), mixers(X)))
    model = lora.flatten(mixed(own, Y))
    x, name = np.random.default_rng(6).normal(size=(5, 4)), "mix/kernel"
    layer, g = model[name], np.float64(own.mixer["mix/mixer"])
    shares = np.exp(x @ g) / np.exp(x @ g).sum(1, keepdims=True)
    theirs, mine = lora.flatten(Y)[name], lora.flatten(X)[name]
    expected = sum(shares[:, i : i + 1] * (x @ dense(u)) for i, u in enumerate((theirs, mine)))
    by_input = np.float64(lora.by_input(jnp.asarray(x, jnp.float32), own.mixer["mix/mixer"], 4))
    assert_near(((x @ np.float64(layer.a)) * by_input) @ np.float64(layer.b), expected, 1e-5)
    out = lora.Dense(6).apply(
        {"params": {"kernel": jnp.zeros((4, 6)), "bias": jnp.zeros(6)}, "lora": {"kernel": layer, "mixer": g}},
        jnp.asarray(x, jnp.float32),
    )
    assert_near(out, layer.scale * expected, 1e-5)
    even = mixed(Own(X, mixers(X)), X)  # both the same: as one
    assert_near(logits(BASE, even, BATCH_0["x"]), logits(BASE, X, BATCH_0["x"]), 1e-5)


@pytest.mark.long
def test_fedalts_clients_go_on_from_where_they_were_and_train_their_mixers():
    method = fedalt()
    c = normalised(members(method))
    state = method.init(KEY, nudged(ADAPTER))
    sent = method.dispatch(BASE, state, c)
    received, _ = train(method, sent, c, KEY)
    c = remembered(method, c, sent, received)
    again = method.dispatch(BASE, method.aggregate(BASE, state, c, sent, received), c).adapter
    assert_near(again, received, 0)
    state, c, _ = run(method, 2)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(c.memory.own.mixer))
    with pytest.raises(ValueError, match="low-rank"):
        method.init(KEY, {"head": jnp.zeros(3)})
    with pytest.raises(ValueError, match="send no adapters"):
        clip(method)


def test_a_dense_layer_without_a_mixer_is_as_it_was():
    x, layer = jnp.ones((3, 4)), LoRA(jnp.ones((4, 2)), jnp.ones((2, 6)), 0.5)
    out = lora.Dense(6, use_bias=False).apply({"params": {"kernel": jnp.zeros((4, 6))}, "lora": {"kernel": layer}}, x)
    assert_near(out, np.full((3, 6), 4.0), 1e-6)
