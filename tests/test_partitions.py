"""Partitions are disjoint, cover everything and keep their minimum, or say why they cannot."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.setup import data
from fedlora_jax import partition

KINDS = st.sampled_from(
    [
        "iid",
        "dirichlet:0.1",
        "dirichlet:0.5",
        "dirichlet(5)",
        "classes:2",
        "classes:3",
        "superclass_dirichlet:3",
        "domain",
        "domain_dirichlet:0.5",
    ]
)


def labelled(seed: int, n: int, classes: int = 5, domains: int = 3):
    rng = np.random.default_rng(seed)
    return rng.integers(0, classes, n), rng.integers(0, domains, n), rng


@settings(max_examples=60, deadline=None)
@given(kind=KINDS, seed=st.integers(0, 10**6), clients=st.integers(3, 12), minimum=st.integers(1, 4))
def test_disjoint_covering_and_never_below_the_minimum(kind, seed, clients, minimum):
    labels, domains, rng = labelled(seed, 400)
    try:
        parts = partition.split(kind, labels, domains, clients, rng, minimum, labels // 2)
    except ValueError as error:  # a strong skew may not fit; then it must say so, and not return something worse
        message = str(error)
        parts = None
    if parts is None:
        assert "fewer than" in message
        assert "dirichlet" in kind
        return
    assert len(parts) == clients
    assert min(map(len, parts)) >= minimum
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(400))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), clients=st.integers(3, 12))
def test_each_kind_means_what_it_says(seed, clients):
    labels, domains, rng = labelled(seed, 600)
    for part in partition.split("classes:2", labels, domains, clients, rng):
        assert len(np.unique(labels[part])) == 2
    for part in partition.split("superclass_dirichlet:3", labels, None, clients, rng, superclasses=labels // 2):
        assert 1 <= len(np.unique(labels[part] // 2)) <= 2
    for j, part in enumerate(partition.split("domain", labels, domains, clients, rng)):
        assert set(domains[part]) == {j % 3}
    sizes = [len(part) for part in partition.split("iid", labels, domains, clients, rng)]
    assert max(sizes) - min(sizes) <= 1


def test_a_smaller_alpha_is_a_stronger_skew():
    labels, domains, rng = labelled(0, 5000)

    def skew(alpha):
        parts = partition.split(f"dirichlet:{alpha}", labels, domains, 10, rng)
        shares = np.stack([np.bincount(labels[part], minlength=5) / len(part) for part in parts])
        return np.abs(shares - 0.2).mean()

    assert skew(0.1) > 1.2 * skew(1.0) > 1.44 * skew(100.0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), kind=KINDS)
def test_test_sets_follow_the_training_sets(seed, kind):
    labels, domains, rng = labelled(seed, 900)
    train, test = np.arange(600), np.arange(600, 900)
    cells = domains * 5 + labels
    try:
        parts = partition.split(kind, labels[train], domains[train], 6, rng, superclasses=labels[train] // 2)
    except ValueError:
        return
    tests = partition.matching_tests(parts, cells[train], cells[test], rng)
    dealt = np.concatenate(tests)
    assert len(np.unique(dealt)) == len(dealt)  # disjoint
    held = set(cells[train])
    assert sorted(dealt) == [i for i in range(300) if cells[test][i] in held]  # all that somebody trains on
    for part, own in zip(parts, tests, strict=True):
        assert set(cells[test][own]) <= set(cells[train][part])
        expected = 0.5 * len(part)
        assert abs(len(own) - expected) < 15 + 0.3 * expected


def test_the_splits_of_personalised_learning_at_their_published_size():
    """100 classes in 20 superclasses, 100 clients."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(100), 60)
    parts = partition.split("classes:10", labels, None, 100, rng)
    owners = np.stack([np.bincount(labels[part], minlength=100) for part in parts])
    assert ((owners > 0).sum(0) == 10).all()  # Patho(10): six images of each of ten classes
    assert set(owners.ravel()) == {0, 6}
    parts = partition.split("superclass_dirichlet:3", labels, None, 100, rng, 10, labels // 5)
    held = np.stack([np.bincount(labels[part] // 5, minlength=20) > 0 for part in parts])
    assert set(held.sum(1)) == {1, 2}
    assert held.sum(0).min() >= 4  # dealt in passes: about 7.5 owners each
    parts = partition.split("dirichlet:0.3", labels, None, 100, rng, 10)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(6000))


def test_the_superclasses_of_cifar_are_known_by_name():
    names = [label for labels in data.CIFAR100.values() for label in labels.split()]
    assert len(set(names)) == 100
    assert len(data.CIFAR100) == 20
    order = np.random.default_rng(0).permutation(100)
    arrays = {"x": np.zeros((200, 2, 2, 3), np.uint8), "y": np.tile(np.arange(100), 2)}
    arrays |= {"classes": np.array(names)[order], "split": np.repeat([0, 1], 100)}
    images = data._checked("made up", arrays, 0.2)
    np.testing.assert_array_equal(images.superclass, order // 5)
    assert data._checked("made up", arrays | {"superclass": np.arange(100) % 7}, 0.2).superclass.max() == 6
    assert data.load("digits").superclass is None
    with pytest.raises(ValueError, match=r"superclass is int64 \[3\]; expected integers \[100\]"):
        data._checked("made up", arrays | {"superclass": np.arange(3)}, 0.2)


def test_the_same_seed_gives_the_same_partition():
    labels, domains, _ = labelled(0, 300)
    one, two = (partition.split("dirichlet:0.5", labels, domains, 5, np.random.default_rng(7)) for _ in range(2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("banana", "unknown partition"),
        ("dirichlet", "lacks its number"),
        ("iid:3", "takes no number"),
        ("dirichlet:0", "above 0"),
        ("classes:1.5", "whole number"),
        ("dirichlet:1e", "not a number"),
    ],
)
def test_texts_that_make_no_partition(text, reason):
    with pytest.raises(ValueError, match=reason):
        partition.parse(text)


def test_three_ways_to_write_one_partition():
    expected = partition.Partition("domain_dirichlet", 0.5)
    assert {partition.parse(t) for t in ("domain_dirichlet:0.5", "domain x dirichlet(0.5)", "domain dirichlet:.5")} == {
        expected
    }


def test_what_cannot_be_met_is_refused_with_names_and_numbers():
    labels, domains, rng = labelled(0, 60)
    with pytest.raises(ValueError, match="61 clients"):
        partition.split("iid", labels, domains, 61, rng)
    with pytest.raises(ValueError, match=r"alpha 0\.01 over 10 clients .*fewer than 5 examples in 100 tries"):
        partition.split("dirichlet:0.01", labels, domains, 10, rng, minimum=5)
    with pytest.raises(ValueError, match="belong to superclasses"):
        partition.split("superclass_dirichlet:3", labels, domains, 4, rng)
    with pytest.raises(ValueError, match="2 clients with one or two of 5 superclasses"):
        partition.split("superclass_dirichlet:3", labels, domains, 2, rng, superclasses=labels)
    with pytest.raises(ValueError, match="needs data with domains"):
        partition.split("domain", labels, None, 4, rng)
    with pytest.raises(ValueError, match="a client for each of 3 domains"):
        partition.split("domain", labels, domains, 2, rng)
    with pytest.raises(ValueError, match="cannot cover 5 classes"):
        partition.split("classes:1", labels, domains, 3, rng)
    with pytest.raises(ValueError, match="more classes than there are"):
        partition.split("classes:6", labels, domains, 3, rng)
