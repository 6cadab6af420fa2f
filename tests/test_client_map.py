"""Clients in a plane: positions keep distances that a plane can keep, and clusters are found in them."""

import numpy as np
import pytest

from experiments.results import client_map

PLANE = np.random.default_rng(0).normal(size=(7, 2))


def distances(points):
    return np.linalg.norm(points[:, None] - points, axis=-1)


def test_points_of_a_plane_keep_their_distances():
    np.testing.assert_allclose(distances(client_map.positions(distances(PLANE))), distances(PLANE), atol=1e-7)


def test_clients_that_are_all_alike_lie_in_one_place():
    assert not client_map.positions(np.zeros((4, 4))).any()


@pytest.mark.parametrize("clients", [1, 2])
def test_few_clients_have_positions_and_one_cluster(clients):
    apart = 1 - np.eye(clients)
    assert client_map.positions(apart).shape == (clients, 2)
    assert client_map.clusters(apart).tolist() == [0] * clients


def test_groups_that_lie_apart_are_clusters_and_the_largest_comes_first():
    groups = np.array([1, 1, 0, 0, 0, 0, 2, 2, 2])
    points = 10 * np.eye(3)[groups] + 0.1 * np.random.default_rng(1).normal(size=(9, 3))
    assert client_map.clusters(distances(points) / 20).tolist() == [2, 2, 0, 0, 0, 0, 1, 1, 1]


def test_colours_are_domains_or_superclasses_or_classes():
    counts = np.zeros((2, 1, 4), int)
    counts[0, 0], counts[1, 0] = [3, 0, 2, 2], [0, 1, 0, 0]
    holdings = {"classes": list("abcd"), "superclasses": [0, 0, 1, 1]}
    kinds, names = client_map._kinds(counts, holdings)
    assert [names[k] for k in kinds] == ["c ...", "a ..."]
    kinds, names = client_map._kinds(counts, holdings | {"superclasses": None})
    assert [names[k] for k in kinds] == ["a", "b"]
    kinds, names = client_map._kinds(np.stack([counts[:, 0], 2 * counts[:, 0]], 1), {"domains": ["x", "y"]})
    assert [names[k] for k in kinds] == ["y", "y"]


def test_a_run_without_positions_has_no_map():
    holdings = {"counts": np.ones((1, 1, 1)), "seed": 0, "training": 1}
    assert client_map.picture({}, [{"method": "fedit", "seed": 0}], holdings) is None
