"""Without a server: graphs, weights and gossip averages against NumPy, and where they are FedIT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ADAPTER, BASE, CLIENTS, KEY, SCALE, assert_near, cohort, dense, host, normalised, nudged, take

from fedlora_jax import lora
from fedlora_jax.methods.adf_lora import adf_lora
from fedlora_jax.methods.fedit import FedITState, fedit
from fedlora_jax.methods.flexlora import flexlora
from fedlora_jax.methods.gossip import GossipState, disagreement, gossip, mixing, neighbours

N = 9


def network(method, seed=0):
    """A state in which all clients hold something else, and a cohort of some of them."""
    state = GossipState(jax.tree.map(jnp.asarray, nudged(method.init(KEY, ADAPTER).adapters, seed)))
    return state, normalised(cohort())._replace(ids=np.array([1, 2, 4, 7]), weights=np.array([1.0, 1, 1, 0]))


@pytest.mark.parametrize(("graph", "degrees"), [("ring", 2), ("full", 8), ("random", 4), ("grid", None)])
def test_graphs_are_connected_and_have_the_degrees_that_they_say(graph, degrees):
    edges = neighbours(graph, N)
    assert (edges == edges.T).all()
    assert not np.diag(edges).any()
    reached = np.linalg.matrix_power(np.eye(N) + edges, N)
    assert (reached > 0).all()
    if graph == "grid":  # 3 x 3
        assert sorted(edges.sum(1)) == [2, 2, 2, 2, 3, 3, 3, 3, 4]
    elif graph == "random":
        assert edges.sum(1).max() <= degrees
    else:
        assert (edges.sum(1) == degrees).all()


def test_weights_sum_to_one_both_ways_whoever_is_there():
    edges, rng = neighbours("random", N, seed=3), np.random.default_rng(0)
    for _ in range(3):
        there = (rng.uniform(size=N) < 0.6).astype(float)
        m, d = np.float64(mixing(edges, jnp.asarray(there))), (edges * there[:, None] * there).sum(1)
        for i, j in np.argwhere(edges):
            np.testing.assert_allclose(m[i, j], there[i] * there[j] / (1 + max(d[i], d[j])), rtol=1e-6)
        assert_near(m.sum(0), np.ones(N), 1e-6)
        assert_near(m, m.T, 1e-6)
        assert (np.diag(m) > 0).all()
        assert all(m[i, i] == 1 for i in np.flatnonzero(there == 0))


@pytest.mark.long
@pytest.mark.parametrize("space", ["factors", "products"])
def test_who_is_there_takes_its_neighbours_mean_and_all_others_stay(space):
    method = gossip(N, "ring", space)
    state, c = network(method)
    sent = host(method.dispatch(BASE, state, c))
    assert_near(take(sent.adapter, 1), take(state.adapters, 2), 0)
    received = nudged(sent.adapter, 3)
    new = host(method.aggregate(BASE, state, c, sent, received)).adapters
    for i in (0, 3, 5, 6, 7, 8):  # 7 has no weight
        assert_near(take(new, i), take(state.adapters, i), 2e-5 if space == "products" else 1e-6)
    assert_near(
        take(new, 4), take(received, 2), 2e-5 if space == "products" else 1e-6
    )  # none of its neighbours is there
    pair = [lora.flatten(take(received, i)) for i in (0, 1)]  # 1 and 2 are each other's only neighbours
    for name in ("blocks/kernel", "mix/kernel"):
        x, y = (p[name] for p in pair)
        for i in (1, 2):
            z = lora.flatten(take(new, i))[name]
            if space == "factors":
                assert_near(z.a, (x.a + y.a) / 2, 1e-6)
                assert_near(z.b, (x.b + y.b) / 2, 1e-6)
            else:
                u, s, v = np.linalg.svd((dense(x) + dense(y)) / 2, full_matrices=False)
                assert_near(dense(z), (u[..., :2] * s[..., None, :2]) @ v[..., :2, :], 1e-4)
    assert_near(
        take(new, 1)["head"],
        jax.tree.map(lambda x, y: (x + y) / 2, *(p["head"] for p in map(lora.unflatten, pair))),
        1e-6,
    )
    assert_near(nobodys(method, GossipState(new)), jax.tree.map(lambda x: np.mean(x, 0), new), 1e-5)


def nobodys(method, state):
    return take(method.dispatch(BASE, state, normalised(cohort())._replace(ids=np.full(CLIENTS, -1))).adapter, 0)


@pytest.mark.long
@pytest.mark.parametrize(("space", "like"), [("factors", fedit), ("products", flexlora)])
def test_where_all_are_neighbours_a_round_is_that_of_a_server(space, like):
    method = gossip(CLIENTS, "full", space)
    c = normalised(cohort(weights=np.ones(CLIENTS)))._replace(ids=np.arange(CLIENTS))
    state = method.init(KEY, nudged(ADAPTER))
    sent = method.dispatch(BASE, state, c)
    received = nudged(sent.adapter, 2)
    new = method.aggregate(BASE, state, c, sent, received)
    expected = like().aggregate(BASE, FedITState(nudged(ADAPTER)), c, sent, received).adapter
    for i in range(CLIENTS):
        weights = [
            {k: SCALE * dense(x) if lora.is_lora(x) else x for k, x in lora.flatten(host(a)).items()}
            for a in (take(new.adapters, i), expected)
        ]
        assert_near(*weights, 1e-4)
    assert disagreement(new.adapters) < (1e-5 if space == "factors" else 1.0)


@pytest.mark.long
def test_gossip_alone_brings_clients_together():
    """Nobody moves: the mean stays, and what they disagree by shrinks as the second eigenvalue says."""
    method = gossip(N, "ring")
    state, c = network(method)
    c = normalised(cohort(clients=N))._replace(ids=np.arange(N))
    second = np.sort(np.abs(np.linalg.eigvalsh(np.float64(mixing(neighbours("ring", N), jnp.ones(N))))))[-2]
    mean = jax.tree.map(lambda x: np.mean(np.float64(x), 0), host(state.adapters))
    apart = [float(disagreement(state.adapters))]
    for _ in range(3):
        sent = method.dispatch(BASE, state, c)
        state = method.aggregate(BASE, state, c, sent, sent.adapter)
        apart.append(float(method.report(state)["disagreement"]))
        assert apart[-1] <= 1.001 * second * apart[-2] * 1.1
    assert_near(jax.tree.map(lambda x: np.mean(np.float64(x), 0), host(state.adapters)), mean, 1e-5)


@pytest.mark.long
def test_adf_lora_trains_one_factor_and_mixes_both():
    method, plain = adf_lora(N), gossip(N)
    state, c = network(plain)
    state = method.init(KEY, ADAPTER)._replace(clients=state)
    for moving, still in ("b", "a"), ("a", "b"):
        sent = host(method.dispatch(BASE, state, c))
        for m in lora.low_rank_leaves(sent.mask):
            assert np.all(getattr(m, moving) == 1)
            assert not np.any(getattr(m, still))
        received = nudged(sent.adapter, 4)
        new = method.aggregate(BASE, state, c, sent, received)
        assert_near(new.clients, plain.aggregate(BASE, state.clients, c, sent, received), 0)
        state = new
    assert state.round == 2


def test_networks_that_cannot_be_are_refused():
    for make, message in (
        (lambda: gossip(1), "at least 2"),
        (lambda: gossip(N, "star"), "graph must be one of ring, grid, random, full"),
        (lambda: gossip(N, space="logits"), "space must be one of factors, products"),
        (lambda: gossip(N, "random", degree=3), "degree must be even"),
        (lambda: adf_lora(4, "random", degree=4), "below 4 clients"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
