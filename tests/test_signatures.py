"""Signatures say what a client's data are, and no more than they should."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import KEY, assert_near, take
from numpy.linalg import norm

from fedlora_jax import signatures as sig
from fedlora_jax.signatures import Signature


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


def test_noise_is_clipped_gaussian():
    z = Signature(jnp.full((2000, 3), 50.0), jnp.zeros((2000, 2)), jnp.ones((2000, 1)))
    told = sig.noisy(KEY, z, 0.5, bound=2.0)
    np.testing.assert_allclose([x.mean() for x in told], [2.0, 0.0, 1.0], atol=0.05)
    np.testing.assert_allclose([x.std() for x in told], 0.5, atol=0.03)
    assert sig.label_free(z).flat().shape == (2000, 4)
