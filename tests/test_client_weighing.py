"""Wrappers by which clients count otherwise than by their examples: each against its equation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ADAPTER, CLIENTS, KEY, LOCAL_LR, assert_near, cohort, jit, normalised, nudged
from wrapper_helpers import adapter_of, aggregated, flat, uploads

from fedlora_jax import rounds
from fedlora_jax.batches import Padded
from fedlora_jax.methods.fedit import fedit
from fedlora_jax.wrappers.fairness import afl, qffl
from fedlora_jax.wrappers.fednova import fednova, times_counted

W = flat(nudged(ADAPTER, 0))
STEPS, ROUNDS = 8, 60
TAKEN, WEIGHTS = np.array([1, 8, 2, 4]), np.array([0.1, 0.4, 0.3, 0.2])
CENTRES = np.random.default_rng(0).normal(size=CLIENTS)


def settled(wrap, lr=0.05, count=ROUNDS, losses=lambda w, x: 0.5 * (w - x) ** 2, taken=TAKEN):
    """Where rounds end up whose clients descend to one number each, from far away."""
    adapter = {"head": jnp.zeros(1)}
    present = np.arange(STEPS)[:, None] < taken[:, None, None]
    examples = np.broadcast_to(CENTRES[:, None, None], (CLIENTS, STEPS, 1)).astype(np.float32)
    loss_fn = lambda base, model, batch, key: batch.mean(losses(model["head"], batch.examples))
    method = wrap(fedit())
    round_fn = jit(rounds.make_round(method, loss_fn, optax.sgd(lr)))
    state, c = method.init(KEY, adapter), cohort()._replace(weights=WEIGHTS, ids=np.arange(CLIENTS), queries=())
    c = c._replace(batches=Padded(examples, present))
    for t in range(count):
        state, _, info = round_fn({}, state, c, jax.random.fold_in(KEY, t))
    return float(adapter_of(state)[0]), info


# --- FedNova


def test_unequal_steps_pull_the_mean_of_models_away_and_not_that_of_updates_per_step():
    """Of squares the weighted mean is least. A round of FedAvg stays where its fixed point is, FedNova's near it."""
    best = WEIGHTS @ CENTRES
    shrunk = 1 - 0.95**TAKEN  # of the way to its centre that a client goes
    plain, _ = settled(lambda inner: inner, count=150)
    np.testing.assert_allclose(plain, WEIGHTS * shrunk @ CENTRES / (WEIGHTS @ shrunk), atol=1e-4)
    per_step = WEIGHTS * shrunk / TAKEN
    nova, _ = settled(fednova, count=150)
    np.testing.assert_allclose(nova, per_step @ CENTRES / per_step.sum(), atol=1e-4)
    assert abs(nova - best) < 0.3 * abs(plain - best)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fednova_counts_gradients_as_momentum_does(momentum):
    for steps in (1, 2, 7):
        w, trace, gradients = 0.0, 0.0, np.ones(steps)
        for g in gradients:
            trace = momentum * trace + g
            w += trace
        np.testing.assert_allclose(times_counted(jnp.asarray(steps), momentum), w, rtol=1e-5)


def test_equal_steps_are_the_inner_method():
    _, expected = aggregated(fedit(), uploads(), normalised(cohort()))
    _, state = aggregated(fednova(fedit(), 0.9), uploads(), normalised(cohort()))
    assert_near(state, expected, 1e-6)


# --- q-FFL and AFL


def test_q_fedavg_by_hand():
    """Algorithm 2 with L = 1 / eta, in float64; q = 0 is the plain mean."""
    c = normalised(cohort())
    loss, p = np.float64(c.losses)[:, 0], np.float64(c.weights)
    for q in (0.0, 0.5, 2.0):
        _, state = aggregated(qffl(fedit(), LOCAL_LR, q), uploads(), c)
        gap = (W - flat(uploads(), clients=True)) / LOCAL_LR  # L (w - w_k)
        delta = p @ (loss[:, None] ** q * gap)
        h = p @ (q * loss ** (q - 1) * (gap**2).sum(1) + loss**q / LOCAL_LR)
        assert_near(adapter_of(state), W - delta / h, 1e-5)
    _, plain = aggregated(fedit(), uploads(), c)
    _, state = aggregated(qffl(fedit(), LOCAL_LR, 0.0), uploads(), c)
    assert_near(state, plain, 1e-6)
    _, state = aggregated(qffl(fedit(), LOCAL_LR, 2.0, curvature=0.0), uploads(), c)
    assert_near(adapter_of(state), p * loss**2 / (p @ loss**2) @ flat(uploads(), clients=True), 1e-5)


def test_fairness_brings_the_worst_client_nearer():
    """Of squares: the larger q the nearer to the middle of the range, and AFL goes there."""
    plain, _ = settled(lambda inner: inner, taken=np.full(CLIENTS, STEPS))
    worst = lambda w: np.abs(w - CENTRES).max()
    fair = [settled(lambda m, q=q: qffl(m, 0.05, q), count=300, taken=np.full(CLIENTS, STEPS))[0] for q in (1.0, 5.0)]
    agnostic, info = settled(lambda m: afl(m, CLIENTS, 0.3), count=300, taken=np.full(CLIENTS, STEPS))
    assert worst(plain) > worst(fair[0]) > worst(fair[1])
    middle = (CENTRES.max() + CENTRES.min()) / 2
    assert worst(agnostic) < worst(fair[1])
    np.testing.assert_allclose(agnostic, middle, atol=0.1)
    assert info.learned["largest_weight"] < 0.99


def test_afl_weighs_by_lam_and_takes_a_multiplicative_step():
    method = afl(fedit(), 16, 0.5)
    c = normalised(cohort())
    state = method.init(KEY, nudged(ADAPTER, 0))
    lam = np.random.default_rng(1).dirichlet(np.ones(16))
    state = state._replace(own=jnp.asarray(lam, jnp.float32))
    _, new = aggregated(method, uploads(), c, state)
    own = lam[c.ids] / lam[c.ids].sum()
    assert_near(adapter_of(new), own @ flat(uploads(), clients=True), 1e-5)
    grown = lam.copy()
    grown[c.ids] *= np.exp(0.5 * np.float64(c.losses)[:, 0])
    assert_near(new.own, grown / grown.sum(), 1e-5)


@pytest.mark.parametrize("make", [lambda m: qffl(m, LOCAL_LR), lambda m: afl(m, 100)])
def test_a_loss_that_is_not_finite_leaves_its_client_out(make):
    c = normalised(cohort(weights=[1, 2, 3, 4]))
    broken = c.losses.copy()
    broken[1] = np.nan
    _, state = aggregated(make(fedit()), uploads(), c._replace(losses=broken))
    _, without = aggregated(make(fedit()), uploads(), c._replace(weights=c.weights * [1, 0, 1, 1]))
    assert_near(state, without, 1e-6)


def test_who_has_no_losses_is_told_so():
    c = normalised(cohort())._replace(losses=())
    with pytest.raises(ValueError, match="make_round gives them"):
        aggregated(qffl(fedit(), LOCAL_LR), uploads(), c)
    for make in (lambda: qffl(fedit(), 0.0), lambda: qffl(fedit(), 0.1, -1.0), lambda: afl(fedit(), 0)):
        with pytest.raises(ValueError, match=r"must be (above 0|at least)"):
            make()
    with pytest.raises(ValueError, match="below 1"):
        fednova(fedit(), 1.0)
