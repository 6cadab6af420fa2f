"""Clusters that were planted are found; what the distance and the average promise holds."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_near, jit

from fedlora_jax import clustering
from fedlora_jax.decomposition import solve

CLIENTS, OUT, R = 100, 768, 8
spectral = jit(clustering.spectral, static_argnums=(3, 4))


def planted(k, within, between, clients=CLIENTS, seed=0, layers=2):
    """``b [N, layers, r, out]`` whose expected distances are ``within`` a cluster and ``between`` two of them.

    Rows are a common part, a part of the cluster and a part of the client, so d = 1 - (shares of what two have in
    common)^2 up to chance.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(clients) % k)
    orthonormal = lambda: np.linalg.qr(rng.normal(size=(OUT, R)))[0].T
    everybody, common = (1 - between) ** 0.5, (1 - within) ** 0.5 - (1 - between) ** 0.5
    rows = []
    for _ in range(layers):
        shared, own = orthonormal(), np.stack([orthonormal() for _ in range(k)])
        alone = np.stack([orthonormal() for _ in range(clients)])
        rest = 1 - everybody - common
        rows.append(everybody**0.5 * shared + common**0.5 * own[labels] + rest**0.5 * alone)
    return jnp.asarray(np.stack(rows, 1), jnp.float32), labels


def same(found, planted):
    """Are two labellings one partition?"""
    return len(set(zip(found.tolist(), planted.tolist(), strict=True))) == len(set(found.tolist())) == len(set(planted))


@jit
def distance_of(b):
    q = clustering.bases(b)
    return clustering.distances([q], [q])


@pytest.mark.parametrize("k", [4, 6, 10])
@pytest.mark.parametrize(("within", "between"), [(0.11, 0.59), (0.5, 0.8), (0.8, 0.92), (0.92, 0.96)])
def test_planted_clusters_are_found(k, within, between):
    b, labels = planted(k, within, between)
    d = distance_of(b)
    alike = labels[:, None] == labels
    np.testing.assert_allclose(np.asarray(d)[alike & ~np.eye(CLIENTS, dtype=bool)].mean(), within, atol=0.02)
    np.testing.assert_allclose(np.asarray(d)[~alike].mean(), between, atol=0.02)
    found = spectral(jax.random.key(1), d, jnp.ones(CLIENTS, bool), 2, 12)
    assert found.number == k
    assert same(found.assignment, labels)


def test_the_distance_is_that_of_principal_angles_and_knows_no_gauge():
    rng = np.random.default_rng(0)
    b = rng.normal(size=(5, 3, 4, 20))
    turned = rng.normal(size=(5, 3, 4, 4)) @ b
    by_hand = np.zeros((5, 5))
    for i in range(5):
        for j in range(5):
            for layer in range(3):
                q, p = (np.linalg.qr(x[layer].T)[0] for x in (b[i], b[j]))
                by_hand[i, j] += (1 - np.linalg.norm(q.T @ p) ** 2 / 4) / 3
    d = distance_of(jnp.asarray(b, jnp.float32))
    np.testing.assert_allclose(d, by_hand, atol=2e-6)
    np.testing.assert_allclose(distance_of(jnp.asarray(turned, jnp.float32)), d, atol=2e-5)


def test_bases_are_orthonormal_and_leave_out_what_is_not_there():
    rng = np.random.default_rng(0)
    b = rng.normal(size=(3, 4, 20)) * np.array([1, 0.1, 1e-2, 5e-3])[:, None]
    b[1, 2:] = 0  # a client of rank 2, padded
    b[2] = 0  # one that has sent nothing
    q = clustering.bases(jnp.asarray(b, jnp.float32))
    for x, y, rank in zip(b, np.asarray(q, np.float64), (4, 2, 0), strict=True):
        values = np.linalg.svd(y, compute_uv=False)
        np.testing.assert_allclose(values, [1.0] * rank + [0.0] * (4 - rank), atol=1e-5)
        assert_near(x @ y.T @ y, x, 1e-5)
    d = clustering.distances([q], [q])
    np.testing.assert_allclose(np.diag(d), [0, 0, 1], atol=1e-5)


def test_an_aligned_average_does_not_shrink_and_a_raw_one_does():
    """The same subspace every round, in another rotation each time."""
    rng = np.random.default_rng(0)
    start = np.linalg.qr(rng.normal(size=(30, 4)))[0].T
    averages = {True: jnp.zeros((4, 30)), False: jnp.zeros((4, 30))}
    for _ in range(20):
        b = jnp.asarray(np.linalg.qr(rng.normal(size=(4, 4)))[0] @ start, jnp.float32)
        averages = {align: clustering.moving_average(x, b, 0.9, align=align) for align, x in averages.items()}
    expected = (1 - 0.9**20) / 4**0.5  # of a constant: b has norm 2, so b / |b| has singular values of 1/2
    values = {align: np.linalg.svd(x, compute_uv=False) for align, x in averages.items()}
    np.testing.assert_allclose(values[True], expected, rtol=1e-5)
    assert values[False].max() < 0.75 * expected
    assert_near(clustering.moving_average(averages[True], 3 * b, 0.0), averages[True] / (2 * expected), 1e-5)


def test_the_gap_after_the_first_eigenvalue_is_never_chosen():
    values = jnp.asarray([0.0, 0.8, 0.85, 0.95, 0.96, 0.97, 0.98])
    eigengap = jit(clustering.eigengap, static_argnums=(2, 3))
    k, gap = eigengap(values, jnp.asarray(7), 2, 6)
    assert k == 3
    np.testing.assert_allclose(gap, 0.1, rtol=1e-5)
    assert eigengap(values, jnp.asarray(2), 2, 6)[0] == 1  # two clients: no gap to look at
    d = distance_of(planted(1, 0.5, 0.6)[0])  # no clusters at all
    assert 2 <= spectral(jax.random.key(0), d, jnp.ones(CLIENTS, bool), 2, 12).number <= 12


def test_clients_without_a_basis_do_not_disturb_the_others():
    b, labels = planted(4, 0.3, 0.7, clients=20)
    known = np.arange(20) % 5 > 0
    d = distance_of(jnp.where(known[:, None, None, None], b, 0.0))
    found = spectral(jax.random.key(1), d, jnp.asarray(known), 2, 12)
    assert found.number == 4
    assert same(found.assignment[known], labels[known])
    sizes = np.bincount(np.asarray(found.assignment)[known])
    assert set(np.asarray(found.assignment)[~known]) == {sizes.argmax()}


def test_a_cluster_of_one_joins_the_nearest():
    d = np.full((7, 7), 0.9)
    for group in ([0, 1, 2], [3, 4, 5]):
        d[np.ix_(group, group)] = 0.1
    d[6, 3:6] = d[3:6, 6] = 0.7
    np.fill_diagonal(d, 0)
    merge = jit(clustering.merge_single, static_argnums=3)
    labels = merge(jnp.asarray([0, 0, 0, 1, 1, 1, 2]), jnp.asarray(d), jnp.ones(7, bool), 4)
    np.testing.assert_array_equal(labels, [0, 0, 0, 1, 1, 1, 1])
    found = spectral(jax.random.key(0), jnp.asarray(d), jnp.ones(7, bool), 2, 6)
    assert np.bincount(found.assignment).min(initial=9, where=np.bincount(found.assignment) > 0) > 1


def test_newcomers_go_to_the_cluster_of_the_nearest_members():
    b, labels = planted(4, 0.3, 0.7, clients=40)
    q = clustering.bases(b)
    known = jnp.arange(40) < 30
    d = clustering.distances([q[30:]], [q])
    np.testing.assert_array_equal(clustering.nearest(d, jnp.asarray(labels), known, 6), labels[30:])


@pytest.mark.parametrize(("low", "high"), [(1, 3), (0, 0), (4, 3)])
def test_ranges_of_k_that_make_no_sense(low, high):
    with pytest.raises(ValueError, match=f"from {low} to {high}"):
        clustering.spectral(jax.random.key(0), jnp.zeros((5, 5)), jnp.ones(5, bool), low, high)
    one = spectral(jax.random.key(0), jnp.zeros((5, 5)), jnp.ones(5, bool), 1, 1)
    np.testing.assert_array_equal(one.assignment, 0)


def test_lapack_is_given_one_matrix_at_a_time():
    """Batches of several kernels at once hang for ever on a CPU of two cores (jaxlib 0.10.2)."""

    def server(b: list) -> list:
        q = jax.vmap(lambda b: [clustering.bases(x) for x in b])(b)
        kept = [clustering.moving_average(jnp.ones_like(x), x, 0.5) for x in b]
        d = clustering.distances(q, q)
        solved = jax.vmap(solve)(*(jnp.ones((5, 3, 2, 2)),) * 2)  # of several seeds, or rates of a sweep
        return [*q, *kept, solved, clustering.spectral(jax.random.key(0), d, jnp.ones(len(d), bool), 2, 3).assignment]

    text = jax.jit(server).lower([jnp.ones((5, 3, 2, 4)), jnp.ones((5, 3, 2, 6))]).as_text()
    batched = re.findall(r'@lapack_\w+.*num_batch_dims = "(\d+)"', text)
    assert len(batched) >= 4  # eigh, svd, what solves, and eigh of another size
    assert set(batched) == {"0"}
