"""Bounds are learned from the images of clients that train: those of clients never seen are not looked at."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_bad_input import change

from experiments.cli import parse
from experiments.commands import bounds

OPTIONS = "--partition iid --clients 3 --holdout-clients 2 --minimum 4 --rounds 2 --local-steps 2 --seeds 2"


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    path = tmp_path_factory.mktemp("bounds") / "data.npz"
    change()(path)
    return bounds.Plan(parse(["bounds", *OPTIONS.split(), "--data", str(path)])[1])


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
def test_images_of_unseen_clients_change_no_bound(plan, capsys):
    """What clients never seen hold is turned to its negative, under wrong labels."""
    p, found = plan.problem, plan.execute()
    for s in range(2):  # a seed's own unseen clients; the other seed may train on them
        rows, sizes = p.clients.population.rows[s], p.clients.population.sizes[s]
        unseen = np.concatenate([rows[c, : sizes[c]] for c in (3, 4)])
        x, y, images = np.array(p.train[0]), np.array(p.train[1]), p.images.x.copy()
        x[unseen], y[unseen] = 255 - x[unseen], (y[unseen] + 1) % 3
        images[np.flatnonzero(~p.images.test)[unseen]] = x[unseen]
        plan.problem = p._replace(train=(jnp.asarray(x), jnp.asarray(y)), images=p.images._replace(x=images))
        for name, entry in plan.execute().items():
            assert entry["seeds"][s] == found[name]["seeds"][s], name
    assert "training clients' images pooled" in capsys.readouterr().out
