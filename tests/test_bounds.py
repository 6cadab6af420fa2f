"""Bounds are learned from the images of clients that train: those of clients never seen are not looked at."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.cli import parse
from experiments.commands import bounds
from experiments.setup import data, digit_clients
from experiments.setup.backbone import NANO
from models.pretrained import load_vit
from models.vit import normalise

OPTIONS = "--partition iid --clients 3 --holdout-clients 2 --minimum 4 --rounds 3 --seeds 2 --keep-head"


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """On a few of the digits, which the model that is built in was made for."""
    path, images = tmp_path_factory.mktemp("bounds") / "data.npz", data.load("digits")
    some = np.arange(0, len(images.y), 31)
    names = {"classes": np.array(images.classes), "domains": np.array(images.domains)}
    split = images.test[some].astype(int)
    np.savez(path, x=np.asarray(images.x)[some], y=images.y[some], domain=images.domain[some], split=split, **names)
    return bounds.Plan(parse(["bounds", *OPTIONS.split(), "--data", str(path)])[1])


@pytest.fixture(scope="module")
def found(plan):
    return plan.execute()


@pytest.mark.long
def test_everything_pooled_is_what_training_clients_hold_seed_by_seed(plan):
    p = plan.problem
    held = bounds.pooled(p, 3)
    for s in range(2):
        rows, sizes = np.asarray(p.clients.population.rows[s]), np.asarray(p.clients.population.sizes[s])
        own = [set(row[:size].tolist()) for row, size in zip(rows, sizes, strict=True)]
        assert set(held.rows[s, : held.sizes[s]].tolist()) == set.union(*own[:3])
        assert held.sizes[s] == sizes[:3].sum()
        assert not set(held.rows[s].tolist()) & set.union(*own[3:])  # nor in the padding


@pytest.mark.long
def test_bounds_start_from_the_frozen_model(plan, found):
    """Zero-shot is counted once more by plain prediction; tuning on everything beats it."""
    images, nano = plan.problem.images, load_vit(NANO)
    logits, _ = nano.model.apply({"params": nano.params}, normalise(images.x[images.test], nano.mean, nano.std))
    right = np.asarray(logits).argmax(-1) == images.y[images.test]
    domains = images.domain[images.test]
    expected = np.mean([right[domains == d].mean() for d in np.unique(domains)])
    np.testing.assert_allclose(found["zero_shot"]["seeds"], [expected] * 2)
    assert found["zero_shot"]["mean"] < found["centralised"]["mean"]
    assert set(found) == {"zero_shot", "linear_probe", "local_only", "centralised"}


@pytest.mark.long
def test_images_of_unseen_clients_change_no_bound(plan, found, capsys):
    """What clients never seen hold is turned to its negative, under wrong labels."""
    p, s = plan.problem, 1  # of the second seed; the first may train on them
    rows, sizes = p.clients.population.rows[s], p.clients.population.sizes[s]
    unseen = np.concatenate([rows[c, : sizes[c]] for c in (3, 4)])
    x, y, images = np.array(p.train[0]), np.array(p.train[1]), p.images.x.copy()
    x[unseen], y[unseen] = 255 - x[unseen], (y[unseen] + 1) % 10
    images[np.flatnonzero(~p.images.test)[unseen]] = x[unseen]
    plan.problem = p._replace(train=(jnp.asarray(x), jnp.asarray(y)), images=p.images._replace(x=images))
    for name, entry in plan.execute().items():
        assert entry["seeds"][s] == found[name]["seeds"][s], name
    assert "training clients' images pooled" in capsys.readouterr().out


def test_an_oracle_by_group_pools_those_who_are_alike_and_is_asked_about_their_images(monkeypatch):
    monkeypatch.setattr(digit_clients.read, "__defaults__", (12,))
    options = "--data digits:concept --partition column:client --clients 9 --holdout-clients 3 --seeds 2"
    p = bounds.Plan(parse(["bounds", *options.split()])[1]).problem
    groups = bounds.grouped(p, 9)
    value = p.images.columns.read("group")
    train, tests = value[~p.images.test], value[p.images.test]
    for s in range(2):
        rows, sizes = np.asarray(p.clients.population.rows[s]), np.asarray(p.clients.population.sizes[s])
        training = set(np.concatenate([row[:n] for row, n in zip(rows[:9], sizes[:9], strict=True)]).tolist())
        for g in range(4):
            own = groups.held.rows[s, g, : groups.held.sizes[s, g]]
            assert set(own.tolist()) == training & set(np.flatnonzero(train == g).tolist())
    says = lambda own: np.full(len(tests), train[own.rows[0, 0]])  # which group's model was asked
    np.testing.assert_array_equal(groups.right(1, says), tests)
