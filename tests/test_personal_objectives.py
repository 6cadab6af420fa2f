"""Methods whose clients minimise more than a loss, whose server is a network or several models, and all data pooled."""

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
    OPTIMIZER,
    STEPS,
    assert_near,
    cohort,
    copies,
    jit,
    loss_fn,
    members,
    normalised,
    nudged,
    take,
)
from personal_helpers import SGD, personal, run, task

from fedlora_jax import rounds, training
from fedlora_jax.methods.centralized import centralized, pooled
from fedlora_jax.methods.fedit import FedITState, fedit
from fedlora_jax.methods.ifca import IFCAState, ifca
from fedlora_jax.methods.per_fedavg import per_fedavg
from fedlora_jax.methods.pfedhn import pfedhn
from fedlora_jax.methods.pfedme import pfedme

# --- objectives with inner steps


@pytest.mark.long
def test_pfedme_descends_the_moreau_envelope():
    lam, steps, lr = 3.0, 4, 0.1
    method, w = pfedme(lam, steps, lr, query=BATCH), nudged(ADAPTER, 0)
    c = members(method)
    f = lambda x: task(x, take(c.batches, (0, 0)), KEY)
    theta = w
    for _ in range(steps):
        slope = lambda t, g, w: t - lr * (g + lam * (t - w))
        theta = jax.tree.map(slope, theta, jax.grad(f)(theta), w)
    carried = {"shared": w, "personal": nudged(ADAPTER, 5)}
    grads, loss = jax.grad(lambda x: method.objective(f, x, ()), has_aux=True)(carried)
    assert_near(grads["shared"], jax.tree.map(lambda w, t: lam * (w - t), w, theta), 1e-4)
    assert not any(x.any() for x in jax.tree.leaves(grads["personal"]))
    np.testing.assert_allclose(loss, f(theta), rtol=1e-5)
    envelope = f(theta) + method.objective(f, carried, ())[0]
    assert envelope < f(w)


@pytest.mark.long
def test_pfedme_clients_use_theta_of_their_last_w_and_the_server_takes_part_of_a_step():
    state, c, _ = run(pfedme(5.0, 2, query=BATCH), 1, SGD)
    half, _, _ = run(pfedme(5.0, 2, beta=0.5, query=BATCH), 1, SGD)
    between = jax.tree.map(lambda x, y: (x + y) / 2, ADAPTER, state.adapter)
    assert_near(half.adapter, between, 1e-5)
    rows = personal(pfedme(5.0, 2, query=BATCH), state, c)
    last = jnp.iinfo(jnp.int32).max
    for i in range(CLIENTS):
        own = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(KEY, 0), c.ids[i]), last)
        before, after = (task(x, take(c.queries, i), own) for x in (ADAPTER, take(rows, i)))
        assert after < before


@pytest.mark.long
@pytest.mark.parametrize("order", ["exact", "first_order"])
def test_per_fedavg_has_the_gradient_of_the_loss_after_a_step(x64, order):
    al, w = 0.3, jax.tree.map(lambda x: x.astype(float), nudged(ADAPTER, 0))
    base = jax.tree.map(lambda x: x.astype(float), BASE)
    batch = take(cohort().batches, (0, 0))
    f = lambda x: loss_fn(base, x, batch, KEY)
    method = per_fedavg(al, order)
    grads, loss = jit(jax.grad(lambda x: method.objective(f, x, ()), has_aux=True))(w)
    np.testing.assert_allclose(loss, f(w))
    after = jax.tree.map(lambda x, g: x - al * g, w, jax.grad(f)(w))
    if order == "first_order":
        assert_near(grads, jax.grad(f)(after), 1e-10)
        return
    outcome = jit(lambda x: f(jax.tree.map(lambda x, g: x - al * g, x, jax.grad(f)(x))))
    way = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(3).normal(size=x.shape)), w)
    moved = lambda t: jax.tree.map(lambda x, d: x + t * d, w, way)
    numeric = (outcome(moved(1e-5)) - outcome(moved(-1e-5))) / 2e-5
    along = sum(float(jnp.vdot(x, d)) for x, d in zip(*map(jax.tree.leaves, (grads, way)), strict=True))
    np.testing.assert_allclose(along, numeric, rtol=1e-6)


# --- hypernetwork, clusters, pooled data


@pytest.mark.long
def test_pfedhn_learns_by_the_pullback_of_displacements():
    method, lr = pfedhn(20, lr=0.3, size=3, width=5), 0.3
    state, c = method.init(jax.random.key(1), ADAPTER), normalised(members(method))
    state = state._replace(phi=nudged(state.phi, 2, 0.05))
    new, _, _ = jit(rounds.make_round(method, loss_fn, SGD))(BASE, state, c, KEY)
    sent = method.dispatch(BASE, state, c)
    local = training.make_local(method, loss_fn, SGD)
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(c.ids)
    received, _ = jit(jax.vmap(lambda *row: local(BASE, *row)))(sent.adapter, sent.mask, sent.context, c.batches, keys)

    def weighted(phi):
        x = method.dispatch(BASE, state._replace(phi=phi), c).adapter
        inner = lambda x, s, y: jnp.einsum("c,c...->", c.weights, x * (s - y))
        return sum(jax.tree.leaves(jax.tree.map(inner, x, sent.adapter, received)))

    grads = jit(jax.grad(weighted))(state.phi)
    assert sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)) < 50**2  # nothing is clipped
    assert_near(new.phi, jax.tree.map(lambda t, g: t - lr * g, state.phi, grads), 1e-4)
    away = np.setdiff1d(np.arange(20), c.ids)
    np.testing.assert_array_equal(new.phi.embeddings[away], state.phi.embeddings[away])


def test_pfedhn_sends_strangers_the_adapter_of_the_mean_embedding():
    method = pfedhn(20, size=3, width=5)
    state = method.init(jax.random.key(1), ADAPTER)
    assert_near(method.dispatch(BASE, state, cohort()).adapter, copies(ADAPTER), 0)  # at first everybody's is fresh
    phi = nudged(state.phi, 2)
    state = state._replace(phi=phi)
    strangers = method.dispatch(BASE, state, cohort()._replace(ids=jnp.asarray([-1, 20, 99, 3]))).adapter
    middle = phi._replace(embeddings=jnp.broadcast_to(phi.embeddings.mean(0), phi.embeddings.shape))
    mean = method.dispatch(BASE, state._replace(phi=middle), cohort()).adapter
    for i in range(3):
        assert_near(take(strangers, i), take(mean, 0), 1e-5)
    assert any((x[3] != x[0]).any() for x in jax.tree.leaves(strangers))


@pytest.mark.long
def test_ifca_clients_choose_what_fits_and_clusters_are_means_of_who_chose():
    """A whole round with three models against its steps by hand."""
    method, good = ifca(3, query=BATCH), [nudged(ADAPTER, 0), nudged(ADAPTER, 1)]
    third = nudged(ADAPTER, 2)
    start = jax.tree.map(lambda *xs: jnp.stack(xs), *good, third)
    state, c = IFCAState(start, jnp.ones(3) / 3), normalised(members(method))
    new, chosen, info = jit(rounds.make_round(method, loss_fn, SGD))(BASE, state, c, KEY)
    last, local, ends, choices = jnp.iinfo(jnp.int32).max, training.make_local(fedit(), loss_fn, SGD), [], []
    for i in range(CLIENTS):
        own = jax.random.fold_in(KEY, c.ids[i])
        losses = [task(x, take(c.queries, i), jax.random.fold_in(own, last)) for x in (*good, third)]
        choices.append(int(np.argmin(losses)))
        mask = take(fedit().dispatch(BASE, FedITState(ADAPTER), c).mask, i)
        ends.append(jit(local)(BASE, take(start, choices[i]), mask, (), take(c.batches, i), own)[0])
    assert len(set(choices)) > 1
    np.testing.assert_array_equal(chosen, np.eye(3)[choices])
    for j in range(3):
        mine = [i for i in range(CLIENTS) if choices[i] == j]
        p = np.float64(c.weights)[mine]
        means = lambda *xs, p=p: np.tensordot(p / p.sum(), np.float64(np.stack(xs)), 1)
        expected = jax.tree.map(means, *(ends[i] for i in mine)) if mine else take(start, j)
        assert_near(take(new.models, j), expected)
    served = personal(method, new, c._replace(memory=chosen))
    assert_near(take(served, 0), take(new.models, choices[0]))
    share = max(np.bincount(choices, np.float64(c.weights), 3))
    np.testing.assert_allclose(info.learned["largest_cluster"], share, rtol=1e-5)


def test_a_cluster_that_nobody_chose_keeps_its_model():
    method, c = ifca(3), normalised(members(ifca(3), weights=[1, 2, 3, 0]))
    state = IFCAState(nudged(copies(ADAPTER, 3), 1), jnp.ones(3) / 3)
    sent = method.dispatch(BASE, state, c)
    received = nudged(sent.adapter, 2)._replace(chosen=jnp.eye(3)[jnp.asarray([0, 0, 0, 2])])  # the last has no weight
    new = method.aggregate(BASE, state, c, sent, received)
    for j in (1, 2):
        assert_near(take(new.models, j), take(state.models, j), 0)
    means = jax.tree.map(lambda x: np.tensordot(np.float64(c.weights), np.float64(x[:, 0]), 1), received.models)
    assert_near(take(new.models, 0), means, 1e-5)


def test_centralized_is_one_machine_that_reads_all_batches():
    method, c = centralized(), cohort()
    state, _, info = jit(rounds.make_round(method, loss_fn, OPTIMIZER))(BASE, method.init(KEY, ADAPTER), c, KEY)
    one = pooled(c)
    assert one.batches["x"].shape == (1, CLIENTS * STEPS, BATCH, 6)
    rows = lambda x: sorted(map(tuple, np.asarray(x, float).reshape(-1, 6).tolist()))
    assert rows(one.batches["x"]) == rows(c.batches["x"])  # every example once
    same = [tuple(x) for x in np.asarray(c.batches["x"][0], float).reshape(-1, 6).tolist()]
    first = [tuple(x) for x in np.asarray(one.batches["x"][0, 0], float).tolist()]
    assert sum(x in same for x in first) <= 1  # a batch mixes clients
    mask = take(fedit().dispatch(BASE, FedITState(ADAPTER), c).mask, 0)
    local = training.make_local(fedit(), loss_fn, OPTIMIZER)
    own = jax.random.fold_in(KEY, c.ids[0])
    end, trace = jit(local)(BASE, ADAPTER, mask, (), take(one.batches, 0), own)
    assert_near(state.adapter, end)
    assert_near(info.loss, trace.loss.mean()[None])
    np.testing.assert_array_equal(info.ids, c.ids)
    assert info.aggregation.bias_share < 1e-5


def test_centralized_with_one_client_is_fedit():
    c = cohort(clients=1)
    state, expected = (
        jit(rounds.make_round(m, loss_fn, OPTIMIZER))(BASE, m.init(KEY, ADAPTER), c, KEY)[0]
        for m in (centralized(), fedit())
    )
    assert_near(state, expected)
