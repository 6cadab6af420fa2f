"""What an audit measures: a claim of privacy that holds lies above it, one that does not is found out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ADAPTER, BASE, CLASSES, KEY, cohort, features, jit, logits, loss_fn, normalised
from scipy import stats
from sklearn.metrics import roc_auc_score

from fedlora_jax import accountant, audit, training
from fedlora_jax.clients import Sampling
from fedlora_jax.methods.fedit import fedit
from fedlora_jax.wrappers import innermost
from fedlora_jax.wrappers.dp_sgd import dp_sgd
from fedlora_jax.wrappers.privacy import dp

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


def canaries(z, bound, there, rounds=1, trials=2000):
    """How far the server's model went where a canary's updates point, in all rounds together; ``[trials]``, in parts of
    one of them."""
    method, c = dp(fedit(), TEN, rounds, bound, z, delta=DELTA), normalised(cohort(clients=10, weights=[1] * 10))
    size = float(sum(x.size for x in jax.tree.leaves(ADAPTER)))
    step = 3 * bound / size**0.5  # longer than it may be: it is clipped

    def one(key):
        state = method.init(key, ADAPTER)
        for _ in range(rounds):
            sent = method.dispatch(BASE, state, c)
            moved = jax.tree.map(lambda x: x.at[0].add(step * there), sent.adapter)
            state = method.aggregate(BASE, state, c, sent, moved)
        new = innermost(state).adapter
        return sum(jnp.sum(x - y) for x, y in zip(*map(jax.tree.leaves, (new, ADAPTER)), strict=True))

    along = jit(jax.vmap(one))(jax.random.split(jax.random.fold_in(KEY, int(there)), trials))
    return np.asarray(along) * 10 / (bound * size**0.5)


@pytest.mark.long
def test_a_claim_of_noise_lies_above_what_a_canary_measures_and_one_of_too_little_does_not():
    """A round of noise multiplier 2, and of a quarter of it under the same claim."""
    pytest.importorskip("dp_accounting")
    z, bound, claimed = 2.0, 0.5, accountant.epsilons(2.0, TEN, 1, DELTA)[-1]
    np.testing.assert_allclose(claimed, epsilon_of(2.0), rtol=1e-6)
    audited = lambda z: audit.epsilon_at_least(*(canaries(z, bound, there) for there in (True, False)), DELTA)
    honest = audited(z)
    assert 0 < honest < claimed
    assert audited(z / 4) > claimed


@pytest.mark.long
def test_several_rounds_together_tell_no_more_than_is_claimed_of_all_and_more_where_noise_is_too_little():
    """Four rounds of noise multiplier 4 are one of 2; those of 1 tell more."""
    pytest.importorskip("dp_accounting")
    all_of = accountant.epsilons(4.0, TEN, 4, DELTA)[-1]
    np.testing.assert_allclose(all_of, epsilon_of(2.0), rtol=1e-6)
    audited = lambda z: audit.epsilon_at_least(*(canaries(z, 0.5, there, 4) for there in (True, False)), DELTA)
    assert 0 < audited(4.0) < all_of
    assert audited(1.0) > all_of


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
