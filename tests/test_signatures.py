"""Signatures say what a client's data are, and no more than they should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KEY, array, assert_near, cohort, take
from numpy.linalg import norm

from fedlora_jax import signatures as sig
from fedlora_jax.method import average_client
from fedlora_jax.signatures import Signature


@pytest.mark.long
def test_signatures_describe_valid_examples_only():
    rng = np.random.default_rng(0)
    features, labels, valid = rng.normal(size=(3, 8, 6)), rng.integers(0, 4, (3, 8)), np.arange(8) < [[5], [8], [3]]
    moments = jax.vmap(sig.moments, (0, 0, 0, None))(*map(jnp.asarray, (features, labels, valid)), 4)
    for c in range(3):
        own = features[c][valid[c]]
        np.testing.assert_allclose(moments.mean[c], own.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.exp(moments.log_deviation[c]), own.std(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(moments.histogram[c], np.bincount(labels[c][valid[c]], minlength=4) / valid[c].sum())
    stats = sig.standard(moments)
    for i, x in enumerate((moments.mean, moments.log_deviation)):
        np.testing.assert_allclose(stats.mean[i], np.mean(x, 0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats.deviation[i], np.std(x, 0), rtol=1e-4, atol=1e-5)
    z = sig.signatures(moments, stats, size=7)
    assert [x.shape for x in z] == [(3, 2 * 7), (3, 4), (3, 1)]
    np.testing.assert_allclose(z.labels**2, moments.histogram, atol=1e-6)
    np.testing.assert_allclose(z.amount[:, 0], np.log1p(valid.sum(1)) / 10, rtol=1e-5)
    np.testing.assert_allclose(z.shape.mean(0), 0, atol=1e-5)  # standardised over these clients
    one = sig.signatures(take(moments, slice(1)), stats, size=7)
    assert_near(one, take(z, slice(1)))  # a client's does not depend on who else is described


@pytest.mark.long
def test_views_are_the_whole_and_random_halves_of_it():
    rng = np.random.default_rng(0)
    features, labels = jnp.asarray(rng.normal(size=(40, 6))), jnp.asarray(rng.integers(0, 4, 40))
    valid = jnp.arange(40) < 30
    seen = sig.views(KEY, features, labels, valid, 4, 5)
    assert_near(take(seen, 0), sig.moments(features, labels, valid, 4))
    assert (seen.size == 30).all()
    assert norm(np.ptp(seen.histogram[1:], axis=0)) > 0.05  # they differ
    np.testing.assert_allclose(seen.histogram.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(seen.histogram[1:].mean(0), seen.histogram[0], atol=0.15)
    alone = sig.views(KEY, features, labels, jnp.arange(40) < 1, 4, 5)
    assert all(np.isfinite(x).all() for x in alone)
    np.testing.assert_allclose(alone.mean, np.broadcast_to(features[0], (6, 6)), rtol=1e-5)  # never of nothing


@pytest.mark.long
def test_of_clients_describes_each_by_its_own_rows_and_standardises_over_those_that_train(monkeypatch):
    rng = np.random.default_rng(1)
    features, labels = jnp.asarray(rng.normal(size=(30, 6)), jnp.float32), jnp.asarray(rng.integers(0, 4, 30))
    rows, sizes = jnp.asarray(rng.permutation(30)[:24].reshape(4, 6)), jnp.asarray([6, 4, 5, 3])
    describe = lambda rows=rows, **options: sig.of_clients(
        features, labels, rows, sizes[: len(rows)], 4, KEY, training=3, parts=2, **options
    )
    z = describe()
    assert [x.shape for x in z] == [(4, 3, 2 * sig.SIZE), (4, 3, 4), (4, 3, 1)]
    own = [np.asarray(r[:n]) for r, n in zip(rows, sizes, strict=True)]
    np.testing.assert_allclose(z.shares()[:, 0], [np.bincount(labels[r], minlength=4) / len(r) for r in own], atol=1e-6)
    np.testing.assert_allclose(z.shape[:3, 0].mean(0), 0, atol=1e-5)
    each = [sig.moments(features[r], labels[r], np.ones(len(r), bool), 4) for r in own]
    stats = sig.standard(jax.tree.map(lambda *x: jnp.stack(x), *each[:3]))
    for c, moments in enumerate(each):
        assert_near(take(take(z, c), 0), sig.signatures(moments, stats), 1e-5)
    assert_near(take(z, slice(3)), describe(rows[:3]), 1e-5)  # who never trains changes nobody's
    for at_once in (1, 3):  # three and one are left over
        monkeypatch.setattr(sig, "AT_ONCE", at_once * 3 * 6 * 6)
        sig._of_clients.clear_cache()  # which would not look at it again
        assert_near(describe(), z, 1e-6)
    monkeypatch.undo()
    sig._of_clients.clear_cache()
    with pytest.raises(ValueError, match="a label for each example"):
        sig.of_clients(features, labels[1:], rows, sizes, 4, KEY)


def test_noise_is_clipped_gaussian():
    z = Signature(jnp.full((2000, 3), 50.0), jnp.zeros((2000, 2)), jnp.ones((2000, 1)))
    told = sig.noisy(KEY, z, 0.5, bound=2.0)
    np.testing.assert_allclose([x.mean() for x in told], [2.0, 0.0, 1.0], atol=0.05)
    np.testing.assert_allclose([x.std() for x in told], 0.5, atol=0.03)
    assert sig.label_free(z).flat().shape == (2000, 4)


def test_the_mean_client_has_the_mean_of_the_shares_and_so_has_the_mean_over_rounds():
    """Clients of one class each: the mean of roots, squared, would be half of it or less."""
    rng, one = np.random.default_rng(0), np.eye(3)[[0, 1, 2, 2]]
    cohorts = [rng.permutation(one) for _ in range(3)]
    weights = rng.dirichlet(np.ones(4), 3)
    draw = lambda *shape: jnp.asarray(array(rng.normal(size=shape)))
    told = [Signature(draw(4, 5), jnp.asarray(array(np.sqrt(shares))), draw(4, 1)) for shares in cohorts]
    center = sig.nobody(take(told[0], 0))
    for t in range(3):
        whole = average_client(cohort(weights=weights[t])._replace(signatures=told[t])).signatures
        assert_near(take(whole, 0).labels ** 2, weights[t] @ cohorts[t], 1e-6)
        assert_near(take(whole, 0).shape, weights[t] @ told[t].shape, 1e-5)
        center = sig.mean_so_far(center, told[t], jnp.asarray(weights[t]), jnp.asarray(t))
    expected = np.mean([p @ shares for p, shares in zip(weights, cohorts, strict=True)], 0)
    assert_near(center.labels**2, expected, 1e-6)
    assert_near(center.shape, np.mean([p @ z.shape for p, z in zip(weights, told, strict=True)], 0), 1e-5)


def test_shares_told_with_noise_are_never_negative():
    z = sig.noisy(KEY, Signature(jnp.zeros((50, 4)), jnp.zeros((50, 3)), jnp.zeros((50, 1))), 0.3)
    assert (z.labels < 0).any()
    assert_near(z.shares(), np.maximum(z.labels, 0) ** 2, 0)
    assert_near(sig.mean_client(z, jnp.full(50, 0.02)).shares(), np.mean(np.maximum(z.labels, 0) ** 2, 0), 1e-5)
