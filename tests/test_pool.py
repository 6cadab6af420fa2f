"""A pool of adapters: who serves is as NumPy and SciPy have it; one alone is that adapter, however it is served."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ADAPTER, assert_near, jit, nudged
from scipy import stats

from fedlora_jax import lora, pool

M, SIZES = 5, np.array([6, 4, 7, 3, 5])
DRAW = np.random.default_rng(0)
FEATURES = np.float32(DRAW.normal(size=(25, 4)) + np.repeat(DRAW.normal(size=(M, 4)), SIZES, 0))
ROWS = np.stack([np.arange(7) + start for start in np.cumsum(SIZES) - SIZES]) % 25
ADAPTERS = jax.tree.map(lambda *x: jnp.stack(x), *(nudged(ADAPTER, i) for i in range(M)))
POOL = pool.pooled(ADAPTERS, jnp.asarray(FEATURES), jnp.asarray(ROWS), jnp.asarray(SIZES))
ASKING, VALID = np.float32(DRAW.normal(size=(6, 4))), np.float32([1, 1, 1, 1, 0, 0])
OWN = [np.float64(FEATURES[row[:size]]) for row, size in zip(ROWS, SIZES, strict=True)]


def products(adapter, weights=None):
    """Every product and every array that is trained in full, in float64, or their weighted mean."""
    of = lambda x: x.scale * np.float64(x.a) @ np.float64(x.b) if lora.is_lora(x) else np.float64(x)
    flat = {name: of(x) for name, x in lora.flatten(adapter).items()}
    return flat if weights is None else {name: np.tensordot(weights, x, 1) for name, x in flat.items()}


@pytest.mark.parametrize("count", [1, 3, 9])
def test_retrieval_finds_the_owners_whose_means_are_nearest_in_direction(count):
    means = np.array([x.mean(0) for x in OWN])
    h, mu = ASKING[:4].mean(0) - means.mean(0), means - means.mean(0)
    cos = mu @ h / np.linalg.norm(mu, axis=1) / np.linalg.norm(h)
    expected, found = np.zeros(M), np.argsort(-cos)[:count]
    expected[found] = 1 / len(found)
    assert_near(pool.retrieval(count)(POOL, ASKING, VALID), expected, 1e-6)


def test_likelihoods_are_those_of_gaussians():
    mean, variance = (np.array([getattr(x, of)(0) for x in OWN]) for of in ("mean", "var"))
    whole = np.mean(variance + (mean - mean.mean(0)) ** 2, 0)
    deviation = np.sqrt(0.9 * variance + 0.1 * whole + 1e-6)
    logs = np.array([stats.norm.logpdf(ASKING[:4], m, s).sum(1).mean() for m, s in zip(mean, deviation, strict=True)])
    assert_near(pool.likelihood(POOL, ASKING, VALID), np.exp(logs) / np.exp(logs).sum(), 1e-4)


def test_outputs_are_averaged_and_components_are_as_many_as_they_are_to_be():
    weights, rank = np.float32([0.4, 0.1, 0.0, 0.2, 0.3]), 3
    mixed = jit(pool.served)(ADAPTERS, weights)
    for name, x in products(mixed).items():
        assert_near(x, products(ADAPTERS, weights)[name], 1e-5)
    chosen = jit(lambda w: pool.served(ADAPTERS, w, rank))(weights)
    for name, x in lora.flatten(ADAPTERS).items():
        if not lora.is_lora(x):
            continue
        a, b = np.float64(x.a), np.float64(x.b)
        expected = np.zeros((*a.shape[1:-1], b.shape[-1]))
        for at in np.ndindex(a.shape[1:-2]):
            for m, w in enumerate(weights):
                size = [np.linalg.norm(a[m][at][:, j]) * np.linalg.norm(b[m][at][j]) for j in range(a.shape[-1])]
                for before, j in enumerate(np.argsort(size)[::-1]):
                    share = np.clip(rank * w - before, 0, 1)
                    expected[at] += x.scale * share * np.outer(a[m][at][:, j], b[m][at][j])
        assert_near(products(chosen)[name], expected, 1e-5)


@pytest.mark.parametrize("rank", [None, 2])
def test_one_adapter_alone_is_itself(rank):
    """With as many components as it has."""
    for name, x in products(pool.served(ADAPTERS, np.float32([0, 0, 1, 0, 0]), rank)).items():
        assert_near(x, products(nudged(ADAPTER, 2))[name], 1e-5)
    assert_near(pool.everyone(POOL, ASKING, VALID), np.full(M, 0.2), 1e-7)
    with pytest.raises(ValueError, match="at least 1"):
        pool.retrieval(0)
