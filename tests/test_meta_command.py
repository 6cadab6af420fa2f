"""``python -m experiments meta``: what it learns is served by other runs, and what has nothing to learn is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_near
from input_helpers import PLAIN, change

from experiments.cli import parse
from experiments.commands import compare, meta_train
from fedlora_jax.rounds import Run

COMMON = "--partition iid --clients 3 --holdout-clients 1 --minimum 4 --rounds 2 --local-steps 1 --batch 4"
FROZEN, ONE = "hyperlora:mode=frozen", ("--unroll", 1, "--seeds", "7,", "--meta-lr", 1e-4)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    path = tmp_path_factory.mktemp("meta") / "data.npz"
    change()(path)
    return [*COMMON.split(), *PLAIN, "--data", str(path)]


def plan(command, method, *options):
    return parse([command, "--method", method, *map(str, options)])


def start_of(found):
    """Its meta-step, and what that begins with."""
    step, start = meta_train.make(found.config, found.problem, found.method)
    return step, jax.jit(start)(found.problem.everyone())


@pytest.mark.long
def test_a_learned_theta_is_served_by_other_runs(options, tmp_path):
    found = meta_train.Plan(plan("meta", FROZEN, *options, *ONE, "--out", tmp_path / "meta")[1])
    before = jax.device_get(start_of(found)[1].theta)
    path = found.execute()
    learned = np.load(path)
    assert any(np.abs(x - y).max() > 1e-5 for x, y in zip(learned.values(), jax.tree.leaves(before), strict=True))
    assert len(json.loads((tmp_path / "meta" / "meta.json").read_text())["loss"]) == 2
    command, config = plan("run", FROZEN, *options, "--seeds", "1", "--theta", path, "--out", tmp_path / "run")
    served = compare.Plan(command, config).trials[FROZEN]
    start = jax.jit(served.programs.start)(served.problem.adapters, served.problem.keys).state.theta
    for x, y in zip(jax.tree.leaves(start), learned.values(), strict=True):
        np.testing.assert_array_equal(x[0], y)


@pytest.mark.long
def test_a_step_lowers_the_loss_after_the_same_rounds_and_moves_the_run_on(options, tmp_path):
    found = meta_train.Plan(plan("meta", FROZEN, *options, *ONE, "--out", tmp_path)[1])
    (step, old), seeds = start_of(found), found.problem.everyone()
    # One step as the command takes it: the program that it has compiled.
    many = jax.jit(lambda learning, seeds: jax.lax.scan(lambda x, _: step(x, seeds), learning, length=1))
    new, (before,) = many(old, seeds)
    again, (after,) = many(old._replace(theta=new.theta), seeds)
    assert before - 0.1 < after < before - 1e-5
    assert new.runs.round == again.runs.round == old.runs.round + 1


@pytest.mark.long
def test_federations_begin_anew_in_turn_and_a_step_is_their_mean(options, tmp_path):
    """Of two federations, with episodes of four rounds; the mean of what each alone gives."""
    more = ("--unroll", 1, "--seeds", "7,8", "--episode", 4, "--meta-lr", 1e-4, "--rounds", 9, "--out", tmp_path)
    found = meta_train.Plan(plan("meta", FROZEN, *options, *more)[1])
    (step, learning), seeds = start_of(found), found.problem.everyone()
    step, rounds = jax.jit(step), []
    for _ in range(9):
        learning, loss = step(learning, seeds)
        rounds.append(learning.runs.round.tolist())
    assert rounds == [[1, 1], [2, 2], [3, 1], [4, 2], [1, 3], [2, 4], [3, 1], [4, 2], [1, 3]]
    alone = lambda i: jax.tree.map(lambda x: x[jnp.array([i, i])], (learning.runs, seeds))
    found = []
    for runs, own in (alone(0), alone(1), (learning.runs, seeds)):
        new, loss = step(learning._replace(runs=runs), own)
        found.append((loss, optax.tree_utils.tree_get(new.moments, "mu")))
    one, two, both = found
    assert one[0] != two[0]
    assert_near(both, jax.tree.map(lambda x, y: (x + y) / 2, one, two), 1e-6)


def test_one_steep_meta_gradient_does_not_end_what_theta_learns():
    """Ordinary gradients, and the same with one of another direction, 10,000 times as long."""
    tx = meta_train.meta_optimizer(0.01)

    def path(steep):
        theta, seen = jnp.zeros(20), []
        moments = tx.init(theta)
        for i in range(100):
            slope = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (20,)) / 10 + 0.05
            slope = 1e4 * slope[::-1] if steep and i == 50 else slope
            updates, moments = tx.update(slope, moments)
            theta = optax.apply_updates(theta, updates)
            seen.append(np.asarray(theta))
        return np.stack(seen)

    without, with_it = path(False), path(True)
    way = lambda path: np.linalg.norm(path[-1] - path[70])
    assert np.any(with_it[50] != without[50])
    assert way(with_it) > 0.5 * way(without)  # Adam alone: a sixteenth


@pytest.mark.long
def test_images_that_judge_a_step_are_in_no_batch_of_its_rounds(options, tmp_path):
    """Three rounds of two of three clients, over many keys."""
    more = ("--unroll", 3, "--clients-per-round", 2, "--batch", 6, "--local-steps", 4, "--out", tmp_path)
    found = meta_train.Plan(plan("meta", FROZEN, *options, *more)[1])
    p, run = found.problem, Run(None, (), jnp.zeros((), int))
    seed = jax.tree.map(lambda x: x[0], p.everyone())
    p = p._replace(train=(jnp.arange(len(p.train[1])), p.train[1]))  # images by number
    ahead = jax.jit(lambda key: meta_train.ahead(found.config, p, seed, run, key))
    for key in jax.random.split(jax.random.key(0), 50):
        cohorts, (apart, _) = ahead(key)
        for client, judged in zip(cohorts.ids[-1], np.asarray(apart), strict=True):
            trained = np.asarray(cohorts.batches[0])[np.asarray(cohorts.ids == client)]
            assert trained.size
            assert not np.isin(judged, trained).any()


@pytest.mark.parametrize(
    ("method", "said"), [("fedit", "no theta"), ("hyperlora", "learns in its rounds already"), ("fedx", "unknown")]
)
def test_what_cannot_be_meta_trained_is_refused(method, said, options, tmp_path):
    with pytest.raises(ValueError, match=said):
        meta_train.Plan(plan("meta", method, *options, "--out", tmp_path / "out")[1])
    assert not (tmp_path / "out").exists()


def test_clients_of_one_image_are_refused_as_they_have_none_to_keep_apart(options, tmp_path):
    with pytest.raises(ValueError, match="--minimum must be at least 2, got 1"):
        meta_train.Plan(plan("meta", FROZEN, *options, "--minimum", 1, "--out", tmp_path / "out")[1])
