"""A newcomer is served by the cluster of the clients that are like it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ADAPTER, BASE, KEY, SIGNATURE, begin, jit, members, normalised, nudged, take

from fedlora_jax import lora
from fedlora_jax.method import models
from fedlora_jax.methods.hilora import CLUSTER, hilora
from fedlora_jax.signatures import Signature

N = 12


def are_equal(x, y):
    return all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (x, y)), strict=True))


def make(**options):
    return hilora(N + 2, 10, signature=SIGNATURE, **{"root": 0.1, "cluster": 0.4, "tau": 0.0, "k_max": 6} | options)


def planted(clients=N, **options):
    """Clients of two groups, whose b lie in two orthogonal subspaces: the end of the root stage, and uploads."""
    method = make(**options)
    state = begin(method.init, KEY)
    c = normalised(members(method, clients=clients))._replace(ids=jnp.arange(clients))
    sent = jit(method.dispatch)(BASE, state, c)
    labels, rng = np.arange(clients) % 3 // 2, np.random.default_rng(0)

    def b_of(x):
        whole = np.linalg.qr(rng.normal(size=(*x.b.shape[1:-2], x.b.shape[-1], x.b.shape[-1])))[0]
        own = np.stack([whole[..., :2, :], whole[..., 2:4, :]])[labels]
        turn = rng.normal(size=(*x.b.shape[:-1], x.b.shape[-2]))
        return lora.LoRA(x.a, jnp.asarray(turn @ own + 0.03 * rng.normal(size=x.b.shape), jnp.float32), x.scale)

    return method, state, c, sent, lora.tree_map(b_of, sent.adapter), labels


@pytest.mark.long
def test_clients_are_clustered_by_b_at_the_switch_and_newcomers_find_their_cluster():
    method, state, c, sent, received, labels = planted()
    new = jit(method.aggregate)(BASE, state, c, sent, received)
    found = np.asarray(new.assignment)
    assert int(new.stage) == CLUSTER
    assert len(set(zip(found[:12].tolist(), labels.tolist(), strict=True))) == len(set(found[:12])) == 2
    assert found[12] == found[13] == np.bincount(found[:12]).argmax()  # never drawn: with the largest
    assert method.report(new)["clusters"] == 2

    place = jit(method.onboard.place)
    memory = place(new, c.memory, sent.adapter, received)
    np.testing.assert_array_equal(memory.cluster, found[:12])
    np.testing.assert_array_equal(place(state, c.memory, sent.adapter, received).cluster, -1)  # no clusters yet
    new = new._replace(clusters=nudged(new.clusters, 5))
    strangers = c._replace(ids=c.ids + 50, memory=memory)
    sent_to = jit(lambda state, c: models(method, method.dispatch(BASE, state, c)))
    assert are_equal(sent_to(new, strangers), sent_to(new, c))


@pytest.mark.long
def test_newcomers_are_placed_by_their_signatures_where_that_is_asked_for():
    """Against distances in NumPy: members' signatures are noise about one of two points, newcomers' as well."""
    method, state, c, sent, received, labels = planted(newcomers="signature")
    assert method.onboard is None
    rng = np.random.default_rng(1)
    about = lambda groups: Signature(
        *(jnp.asarray(rng.normal(size=(2, len(x)))[groups] + 0.3 * rng.normal(size=(12, len(x)))) for x in SIGNATURE)
    )
    c = c._replace(signatures=about(labels))
    new = jit(method.aggregate)(BASE, state, c, sent, received)
    new = new._replace(clusters=nudged(new.clusters, 5))
    strangers = c._replace(ids=c.ids + 50, signatures=about(labels[::-1]))

    weigh = lambda z: np.concatenate([np.asarray(z.shape) / np.sqrt(z.shape.shape[1]), np.asarray(z.labels)], 1)
    own, theirs = weigh(c.signatures), weigh(strangers.signatures)
    square = ((theirs[:, None] - own) ** 2).sum(-1)
    of = [square[:, np.asarray(new.assignment[:12]) == k].mean(1) for k in np.unique(new.assignment)]
    expected = np.unique(new.assignment)[np.argmin(of, 0)]
    assert len(set(expected)) == 2
    placed = c._replace(memory=c.memory._replace(cluster=jnp.asarray(expected, jnp.int32)), ids=c.ids + 50)
    by_trial = make()
    found, wanted = (
        models(m, m.dispatch(BASE, s, x))
        for m, s, x in ((method, new, strangers), (by_trial, new._replace(signatures=()), placed))
    )
    assert are_equal(found, wanted)
    before = models(method, method.dispatch(BASE, state, strangers))
    assert are_equal(take(before, 0), take(before, 1)), "all are served the root before there are clusters"


@pytest.mark.long
@pytest.mark.parametrize("subspace", ["b", "change"])
def test_copies_of_members_land_where_the_members_are(subspace):
    """They do in their trial what members did in the last round, from a root whose b is much larger than a change."""
    method, state, c, _, planted_b, labels = planted(subspace=subspace)
    state = state._replace(root=nudged(ADAPTER, 3, 3.0))
    uploads = lambda sent: lora.tree_map(lambda x, y: x.replace(b=x.b + 0.3 * y.b), sent.adapter, planted_b)
    sent = jit(method.dispatch)(BASE, state, c)
    new = jit(method.aggregate)(BASE, state, c, sent, uploads(sent))
    found = np.asarray(new.assignment)[:N]
    if subspace == "change":
        assert len(set(zip(found.tolist(), labels.tolist(), strict=True))) == len(set(found)) == 2

    assert method.onboard is not None
    trial = jit(lambda new, c: method.dispatch(BASE, method.onboard.start(new), c))(new, c._replace(ids=c.ids + 50))
    received = uploads(trial if subspace == "change" else sent)  # the same change, or the very same b
    memory = jit(method.onboard.place)(new, c.memory, trial.adapter, received)
    np.testing.assert_array_equal(memory.cluster, found)
