"""What an audit measures: a claim of privacy that holds lies above it, one that does not is found out."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ADAPTER, BASE, CLASSES, KEY, features, jit, logits, loss_fn, nudged
from scipy import stats
from sklearn.metrics import roc_auc_score

from fedlora_jax import audit, training
from fedlora_jax.clients import Sampling
from fedlora_jax.methods.fedit import fedit
from fedlora_jax.wrappers.dp_sgd import dp_sgd

DELTA, TEN = 1e-5, Sampling(10, 10)


def epsilon_of(z, delta=DELTA):
    """Of one Gaussian mechanism, exactly (Balle & Wang, ICML 2018, arXiv 1805.06530, theorem 8)."""
    low, high = 0.0, 100.0
    for _ in range(60):
        e = (low + high) / 2
        spent = stats.norm.cdf(0.5 / z - e * z) - np.exp(e) * stats.norm.cdf(-0.5 / z - e * z)
        low, high = (e, high) if spent > delta else (low, e)
    return high


@pytest.mark.parametrize(("count", "trials"), [(0, 10), (1, 10), (7, 20), (20, 20), (480, 500)])
def test_the_least_probability_is_that_of_clopper_and_pearson(count, trials):
    expected = stats.beta.ppf(0.05, count, trials - count + 1) if count else 0.0
    np.testing.assert_allclose(audit.at_least(count, trials), expected, atol=1e-9)


def test_a_bound_is_as_often_above_the_truth_as_it_may_be():
    """Of a Gaussian mechanism: never above its epsilon in 40 audits (in two, were it tight), and not far below."""
    rng, z = np.random.default_rng(0), 1.0
    found = [audit.epsilon_at_least(rng.normal(1, z, 2000), rng.normal(0, z, 2000), DELTA) for _ in range(40)]
    assert max(found) < epsilon_of(z)
    assert np.median(found) > 1
    assert max(audit.epsilon_at_least(rng.normal(0, z, 200), rng.normal(0, z, 200)) for _ in range(40)) < 0.3


@pytest.fixture(scope="module")
def script():
    """What ``examples/audit.py`` defines."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "examples" / "audit.py")))


@pytest.mark.long
@pytest.mark.parametrize("which", range(3))
def test_a_claim_of_noise_lies_above_what_a_canary_measures_and_one_of_too_little_does_not(script, which):
    """Of a client in a round and in four rounds together, and of an example that is in batches twice."""
    pytest.importorskip("dp_accounting")
    _, z, claimed, one = script.claims()[which]
    exact = epsilon_of(z / (1, 4, 8)[which] ** 0.5)
    np.testing.assert_allclose(claimed, exact, rtol=1e-6)
    assert 0.5 < script.told_apart(one, z, 4000) < claimed
    assert script.told_apart(one, z / 4, 4000) > claimed


@pytest.mark.long
def test_an_image_is_read_off_the_step_of_a_head(script):
    """Of the built-in model, whose example prints what is measured."""
    _, _, guess, plain, private = (line.split("|")[2:4] for line in script.example(8))
    assert plain == [" 100 ", " 1.000 "]
    assert float(private[1]) < float(guess[1]) < 0.8


def test_one_example_is_read_off_the_step_of_a_head_unless_it_is_bounded_and_noised():
    """Its label, and its features, of which the mean of all others is the guess that costs nothing."""
    rng, count = np.random.default_rng(0), 40
    x, y = jnp.asarray(rng.normal(size=(count, 6)) + 0.5, jnp.float32), jnp.asarray(rng.integers(0, CLASSES, count))
    mask, truth = jax.tree.map(jnp.ones_like, ADAPTER), np.asarray(features(BASE, ADAPTER, x), np.float64)
    plain = lambda base, adapter, batch, key: optax.softmax_cross_entropy_with_integer_labels(
        logits(base, adapter, batch[0]), batch[1]
    ).mean()

    def found(method):
        local = training.make_local(method, plain, optax.sgd(0.5))
        one = lambda x, y, key: local(BASE, ADAPTER, mask, ADAPTER, (x[None, None], y[None, None]), key)[0]["head"]
        head = jit(jax.vmap(one))(x, y, jax.random.split(KEY, count))
        kernel, bias = (np.asarray(head[name] - ADAPTER["head"][name]) for name in ("kernel", "bias"))
        labels, like = zip(*map(audit.of_one_example, kernel, bias), strict=True)
        return np.mean(np.asarray(labels) == np.asarray(y)), cosines(np.asarray(like), truth)

    right, near = found(fedit())
    guess = (truth.sum(0) - truth) / (count - 1)
    assert right == 1
    assert near > 0.999 > cosines(guess, truth) + 0.1
    right, near = found(dp_sgd(fedit(), 1, 1, bound=0.5, noise=4.0))
    assert right < 0.6
    assert abs(near) < 0.4


def test_an_input_is_found_by_the_step_that_it_gives_unless_it_is_bounded_and_noised():
    """All that is trained tells of it, low-rank factors away from zero and a head; the guess is another example."""
    rng, count = np.random.default_rng(0), 12
    x, y = rng.normal(size=(count, 6)).astype(np.float32), rng.integers(0, CLASSES, count)
    adapter, keys = nudged(ADAPTER), jax.random.split(KEY, count)

    def step(method, x, y, key):
        plain = lambda base, adapter, batch, key: optax.softmax_cross_entropy_with_integer_labels(
            logits(base, adapter, batch[0]), batch[1]
        ).mean()
        local = training.make_local(method, plain, optax.sgd(1.0))
        mask = jax.tree.map(jnp.ones_like, adapter)
        new, _ = local(BASE, adapter, mask, adapter, (x[None, None], y[None, None]), key)
        return jax.tree.map(jnp.subtract, new, adapter)

    def found(y, key, seen):
        update_of = lambda x: step(fedit(), x, y, key)
        return audit.inverted(update_of, seen, jnp.zeros(6), 150, 0.1, smooth=0.0, limits=(-4.0, 4.0))

    search = jit(jax.vmap(found))
    seen = lambda method: jit(jax.vmap(lambda *row: step(method, *row)))(x, y, keys)
    near = lambda method: cosines(np.asarray(search(y, keys, seen(method))), x)
    assert near(fedit()) > 0.7 > abs(cosines(np.roll(x, 1, 0), x)) + 0.4
    assert abs(near(dp_sgd(fedit(), 1, 1, bound=0.5, noise=4.0))) < 0.3


def cosines(a, b):
    """The mean over rows."""
    return np.mean(np.sum(a * b, 1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))


def test_the_area_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    members, others = rng.normal(1, 1, 30).round(1), rng.normal(0, 1, 50).round(1)
    expected = roc_auc_score([1] * 30 + [0] * 50, np.concatenate([members, others]))
    np.testing.assert_allclose(audit.area(members, others), expected)


def test_likelihood_ratios_are_those_of_gaussians_of_the_other_models():
    rng = np.random.default_rng(0)
    members = rng.permutation(np.arange(8) < 4)[:, None] ^ (np.arange(5) % 2 == 0)
    losses = rng.uniform(0.1, 2, (8, 5)) * np.where(members, 0.5, 1)
    x = np.log(np.exp(-losses) / (1 - np.exp(-losses)))
    centre = lambda k, i, kind: np.mean([x[j, i] for j in range(8) if j != k and members[j, i] == kind])
    rest = [x[k, i] - centre(k, i, members[k, i]) for k in range(8) for i in range(5)]
    fits = lambda k, i, kind: stats.norm.logpdf(x[k, i], centre(k, i, kind), np.std(rest))
    ratio = lambda k, i: fits(k, i, True) - fits(k, i, False)
    expected = [[ratio(k, i) for i in range(5)] for k in range(8)]
    np.testing.assert_allclose(audit.likelihood_ratios(losses, members), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="two models that were trained on it"):
        audit.likelihood_ratios(losses[:3], members[:3])


def trained(steps, bound=np.inf, deviation=0.0, models=16, pool=24):
    """``(losses, members)`` of clients who each hold another half of a pool of examples whose labels are noise."""
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(pool, 6)), jnp.float32), jnp.asarray(rng.integers(0, CLASSES, pool))
    members = np.stack([rng.permutation(pool) < pool // 2 for _ in range(models)])
    rows = np.stack([np.flatnonzero(row) for row in members])
    local = training.make_local(fedit(), loss_fn, optax.sgd(0.5))
    mask = jax.tree.map(jnp.ones_like, ADAPTER)

    def one(rows, key):
        batch = {"x": x[rows], "y": y[rows]}
        batches = jax.tree.map(lambda a: jnp.broadcast_to(a, (steps, *a.shape)), batch)
        new, _ = local(BASE, ADAPTER, mask, ADAPTER, batches, key)
        d = jax.tree.map(jnp.subtract, new, ADAPTER)
        short = jnp.minimum(1.0, bound / jnp.maximum(optax.tree.norm(d), 1e-12))
        leaves, tree = jax.tree.flatten(ADAPTER)
        drawn = tree.unflatten([jax.random.normal(jax.random.fold_in(key, i), a.shape) for i, a in enumerate(leaves)])
        sent = jax.tree.map(lambda w, a, e: w + short * a + deviation * e, ADAPTER, d, drawn)
        each = lambda a, b: loss_fn(BASE, sent, {"x": a[None], "y": b[None]}, KEY)
        return jax.vmap(each)(x, y)

    losses = jit(jax.vmap(one))(rows, jax.random.split(jax.random.key(3), models))
    return np.asarray(losses), members


@pytest.mark.long
def test_membership_is_found_in_what_clients_send_unless_noise_covers_it():
    """By a threshold on the loss, and by likelihood ratios. Clipped and noised at a multiplier of 4 an upload tells no
    more than its epsilon allows; without noise it would."""
    areas = lambda scores, members: audit.area(scores[members], scores[~members])
    losses, members = trained(40)
    loss, ratios = areas(-losses, members), areas(audit.likelihood_ratios(losses, members), members)
    most = 0.5 + audit.most_advantage(epsilon_of(4.0, 1e-3), 1e-3)
    assert loss > 0.6
    assert ratios > most
    hidden, members = trained(40, bound=0.5, deviation=2.0)
    for scores in -hidden, audit.likelihood_ratios(hidden, members):
        assert abs(areas(scores, members) - 0.5) < most - 0.5
