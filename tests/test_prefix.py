"""What the frozen blocks below the adapted ones compute is the same, stored once per image or anew in each step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_near, nudged
from test_bad_input import change

from experiments.config import Config, check
from experiments.setup import backbone, memory, problem
from models.backbone import Stem


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("prefix") / "data.npz"
    change()(path)
    few = Config(data=str(path), partition="iid", clients=3, holdout_clients=0, minimum=2, seeds=(0,))
    return dataclasses.replace(few, adapt_last=2)


def build(config, prefix):
    return problem.build(dataclasses.replace(config, prefix=prefix))


@pytest.mark.long
def test_stored_and_anew_give_the_same_losses_gradients_and_predictions(config):
    stored, anew = build(config, "stored"), build(config, "anew")
    assert stored.train[0].dtype == np.float32
    assert anew.train[0].dtype == np.uint8
    assert jax.tree.structure(stored.adapters) == jax.tree.structure(anew.adapters)
    adapter = nudged(jax.tree.map(lambda x: x[0], stored.adapters), size=0.05)
    found = []
    for p in (stored, anew):
        batch = tuple(x[:5] for x in p.train)
        loss, slope = jax.jit(jax.value_and_grad(p.loss_fn, 1))(p.base, adapter, batch, jax.random.key(0))
        right = jax.jit(p.correct_fn)(p.base, adapter, p.test[:2])
        found.append((loss, slope, right))
    assert_near(found[1], found[0], 1e-5)
    assert any(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(found[0][1]))


def test_it_is_stored_where_it_takes_a_quarter_of_memory_at_most(config, monkeypatch):
    images = np.zeros((10, 8, 8, 3), np.uint8)
    stem = Stem({}, lambda params, x: jnp.zeros((len(x), 5, 4)))
    takes = 10 * 5 * 4 * 4
    for have, stored in ((4 * takes, True), (4 * takes - 1, False), (None, True)):
        monkeypatch.setattr(memory, "available", lambda have=have: have)
        assert backbone.is_stored(config, stem, images) is stored
    assert backbone.is_stored(dataclasses.replace(config, prefix="stored"), stem, images)


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="--prefix must be one of auto, stored, anew; got kept"):
        check(Config(prefix="kept"))
