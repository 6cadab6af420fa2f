"""``python -m experiments meta``: what it learns is served by other runs, and what has nothing to learn is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
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


@pytest.mark.long
def test_a_learned_theta_is_served_by_other_runs(options, tmp_path):
    found = meta_train.Plan(plan("meta", FROZEN, *options, *ONE, "--out", tmp_path / "meta")[1])
    before = jax.device_get(jax.jit(found.method.init)(found.problem.keys[0], found.seed.adapter).theta)
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
    step, start = meta_train.make(found.config, found.problem, found.method)
    seed, old = found.seed, jax.jit(start)(found.seed)
    # One step as the command takes it: the program that it has compiled.
    many = jax.jit(lambda learning, seed: jax.lax.scan(lambda x, _: step(x, seed), learning, length=1))
    new, (before,) = many(old, seed)
    theta = new.run.state.theta
    again, (after,) = many(old._replace(run=old.run._replace(state=old.run.state._replace(theta=theta))), seed)
    assert before - 0.1 < after < before - 1e-5
    assert new.run.round == again.run.round == old.run.round + 1


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
    p = p._replace(train=(jnp.arange(len(p.train[1])), p.train[1]))  # images by number
    ahead = jax.jit(lambda key: meta_train.ahead(found.config, p, found.seed, run, key))
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
