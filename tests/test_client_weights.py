"""How much each client counts: by its examples, or as it is told; and what part of all that is."""

import jax
import numpy as np
import pytest
from helpers import population

from experiments.config import Config, check
from experiments.setup import problem

IDS = np.asarray([3, 1, 4])
ALIKE = np.ones(5, np.float32)


@pytest.mark.parametrize("weights", [(), ALIKE, np.float32([5, 1, 0.5, 2, 1.5])])
def test_a_cohort_knows_its_weights_and_their_part_of_all(weights):
    clients = population()._replace(weights=weights)
    by = clients.sizes if isinstance(weights, tuple) else weights
    few = clients.members(IDS)
    for c in (clients.cohort(IDS, ()), few.cohort(np.arange(3), ()), few.members([0, 1, 2]).cohort(np.arange(3), ())):
        np.testing.assert_array_equal(c.weights, np.float32(by[IDS]))
        np.testing.assert_allclose(c.shares, by[IDS] / by.sum(), rtol=1e-6)


def test_parts_are_those_of_the_clients_that_train():
    """Where others, who never do, are in the same arrays."""
    training = jax.tree.map(lambda x: x[:4], population())
    np.testing.assert_allclose(training.cohort(np.arange(4), ()).shares.sum(), 1, rtol=1e-6)


@pytest.mark.parametrize(("asked", "expected"), [("counts", [5, 9, 3]), ("uniform", [1, 1, 1])])
def test_on_the_command_line_clients_count_by_their_images_or_alike(asked, expected):
    """Of two seeds, side by side; the last client never trains."""
    config = Config(clients=3, holdout_clients=1, seeds=(0, 1), weights_of_clients=asked)
    parts = [np.arange(n) for n in (5, 9, 3, 7)]
    features, labels = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32), np.arange(9) % 3
    clients = problem._stack(config, [(parts, parts, np.full(4, 2))] * 2, features, labels, 3)
    one = jax.tree.map(lambda x: x[1], clients).training(3).cohort(np.arange(3), ())
    np.testing.assert_array_equal(one.weights, expected)
    np.testing.assert_allclose(one.shares, np.asarray(expected) / sum(expected), rtol=1e-6)
    with pytest.raises(ValueError, match="counts, uniform; got equal"):
        check(Config(weights_of_clients="equal"))
