"""Learning rates over local steps, over rounds, and over both: the optimizer of each round."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ADAPTER, BASE, BATCH, KEY, assert_near, cohort, examples, jit, logits, loss_fn, population, take

from fedlora_jax import meta, rounds
from fedlora_jax.methods.fedit import fedit

STEPS, PEOPLE, DATA = 5, population(), examples(0, 28)
SAMPLING = {"steps": STEPS, "batch": BATCH, "smallest": 3}
over_steps = lambda round: optax.sgd(lambda step: jnp.where(STEPS * round + step < 2 * STEPS, 0.1, 0.0))


def rate(round):
    return 0.1 / (1.0 + round)


def test_a_rate_that_ends_after_ten_local_steps_ends_with_the_second_round_of_five():
    round_fn = rounds.make_round(fedit(), loss_fn, over_steps)
    step = rounds.make_step(round_fn, participants=3, **SAMPLING)
    run = rounds.start(fedit(), KEY, ADAPTER, 5)
    _, info = jit(rounds.scan_rounds(step, 4))(BASE, DATA, PEOPLE, run, KEY)
    assert (info.moved[:2] > 0).all()
    assert not info.moved[2:].any()
    assert not info.aggregation.update[2:].any()


def test_without_rounds_a_schedule_runs_over_the_local_steps_of_each():
    """A rate that ends after two of five steps: as two steps at a constant rate, in every round."""
    ends = optax.sgd(lambda step: jnp.where(step < 2, 0.1, 0.0))
    c, state = cohort(steps=STEPS), fedit().init(KEY, ADAPTER)
    two = c._replace(batches=jax.tree.map(lambda x: x[:, :2], c.batches))
    new, _, _ = jit(rounds.make_round(fedit(), loss_fn, ends))(BASE, state, c, KEY)
    expected, _, _ = jit(rounds.make_round(fedit(), loss_fn, optax.sgd(0.1)))(BASE, state, two, KEY)
    assert_near(new, expected, 1e-6)


@pytest.fixture(scope="module")
def by_hand():
    """Three rounds, each with a constant rate of its own."""
    run = rounds.start(fedit(), KEY, ADAPTER, 5)
    for t in range(3):
        round_fn = rounds.make_round(fedit(), loss_fn, optax.sgd(rate(t)))
        run, _ = jit(rounds.make_step(round_fn, participants=3, **SAMPLING))(BASE, DATA, PEOPLE, run, KEY)
    return run


@pytest.mark.long
def test_a_rate_follows_rounds_in_one_program(by_hand):
    round_fn = rounds.make_round(fedit(), loss_fn, lambda round: optax.sgd(rate(round)))
    step = rounds.make_step(round_fn, participants=3, **SAMPLING)
    run, _ = jit(rounds.scan_rounds(step, 3))(BASE, DATA, PEOPLE, rounds.start(fedit(), KEY, ADAPTER, 5), KEY)
    assert_near(run.state, by_hand.state, 1e-6)
    host = rounds.make_host_step(jit(rounds.make_cohort_step(round_fn, **SAMPLING)), participants=3)
    run = rounds.start_on_host(fedit(), KEY, ADAPTER, 5)
    for _ in range(3):
        run, _ = host(BASE, DATA, jax.device_get(PEOPLE), run, KEY)
    assert_near(run.state, by_hand.state, 1e-6)


@pytest.mark.long
def test_evaluation_and_unrolled_rounds_take_the_rate_of_their_round():
    metric = lambda base, adapter, x: logits(base, adapter, x["x"])
    follow, c, own = lambda round: optax.sgd(rate(round)), cohort(steps=2), cohort().queries
    state = fedit().init(KEY, ADAPTER)
    at = jit(rounds.make_evaluate(fedit(), metric, loss_fn, follow))(BASE, state, c, own, KEY, 7).after
    expected = jit(rounds.make_evaluate(fedit(), metric, loss_fn, optax.sgd(rate(7))))(BASE, state, c, own, KEY).after
    assert_near(at, expected, 1e-6)

    cohorts = jax.tree.map(lambda x: np.stack([x]), c)
    loss, _ = jit(meta.outcome(fedit(), loss_fn, follow))(BASE, state, cohorts, own, KEY, 7)
    constant, _ = jit(meta.outcome(fedit(), loss_fn, optax.sgd(rate(7))))(BASE, state, cohorts, own, KEY)
    np.testing.assert_allclose(loss, constant, rtol=1e-6)


def test_an_optimizer_that_follows_rounds_is_told_the_round():
    with pytest.raises(ValueError, match=r"follows rounds: say which one this is \(round=0"):
        rounds.make_round(fedit(), loss_fn, over_steps)(BASE, fedit().init(KEY, ADAPTER), take(cohort(), [0]), KEY)
