"""The embedded digits of many clients: each differs from others in what its kind says, and in nothing else."""

import colorsys

import numpy as np
import pytest

from experiments.config import Config
from experiments.setup import data, digit_clients, problem
from experiments.setup.digit_clients import KINDS, NAMINGS, TEST, TRAIN, read
from experiments.setup.digits import digits

COUNT = 12


@pytest.fixture(scope="module")
def made():
    return {kind: read(f"digits:{kind}", COUNT) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_every_client_has_its_images_and_no_scan_is_seen_in_training_and_testing(made, kind):
    own = made[kind]
    client, source = (own["columns"].read(name) for name in ("client", "source"))
    assert (np.bincount(client) == TRAIN + TEST).all()
    assert (np.bincount(client[own["split"] == 0]) == TRAIN).all()
    assert not set(source[own["split"] == 0]) & set(source[own["split"] == 1])
    assert own["x"].dtype == np.uint8
    assert own["x"].shape == (COUNT * (TRAIN + TEST), 16, 16, 3)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mixed"])
def test_classes_are_alike(made, kind):
    own = made[kind]
    client = own["columns"].read("client")
    for part, count in ((0, TRAIN), (1, TEST)):
        counts = [np.bincount(own["y"][(client == c) & (own["split"] == part)], minlength=10) for c in range(COUNT)]
        assert (np.array(counts) == count // 10).all()


def test_ways_of_naming_swap_three_pairs_and_agree_within_a_group(made):
    own = made["concept"]
    truth = digits()["y"][own["columns"].read("source")]
    group = own["columns"].read("group")
    for g in range(NAMINGS):
        called = {(int(a), int(b)) for a, b in zip(truth[group == g], own["y"][group == g], strict=True)}
        assert len(called) == 10
        assert sum(a != b for a, b in called) == (6 if g else 0)
        assert called == {(b, a) for a, b in called}


def test_a_group_of_angles_is_an_eighth_of_the_circle(made):
    """Mean images of each digit, turned back by the middle of the client's eighth, are most like upright ones."""
    from scipy import ndimage

    own = made["rotation"]
    group = own["columns"].read("group")
    assert len(set(group)) > 3
    upright = read("digits:domain", 1)  # of ink
    ink = lambda x: 255 - x.astype(float).mean((0, 3))

    def likeness(g, eighth):
        one = lambda digit: np.corrcoef(
            ndimage.rotate(
                ink(own["x"][(group == g) & (own["y"] == digit)]), 45 * eighth + 22.5, reshape=False, order=1
            ).ravel(),
            ink(upright["x"][upright["y"] == digit]).ravel(),
        )[0, 1]
        return np.mean([one(digit) for digit in range(10)])

    for g in set(group):
        assert max(range(8), key=lambda eighth, g=g: likeness(g, eighth)) == g


def test_a_group_is_an_eighth_of_the_hues_contrasts_or_blurs(made):
    """Each read off the images by another measure: colour of the corners, darkness of the stroke, sharpness."""
    images = lambda kind: (made[kind]["x"].astype(float) / 255, made[kind]["columns"].read("group"))
    x, group = images("hue")
    hues = [colorsys.rgb_to_hsv(*rgb)[0] for rgb in x[:, 0, 0]]
    assert np.mean(np.floor(8 * np.array(hues)) == group) > 0.95
    x, group = images("contrast")
    stroke = x[:, 0, 0].mean(-1) - x.mean(-1).min((1, 2)), x[:, 0, 0].mean(-1) - x.mean(-1).max((1, 2))
    assert ((stroke[0] > -stroke[1]) == (group >= 4)).mean() > 0.95  # negatives have the light stroke
    wide = np.abs(group - 3.5)
    spread = x.mean(-1).std((1, 2))
    assert np.corrcoef(wide, spread)[0, 1] > 0.9
    x, group = images("blur")
    edges = np.abs(np.diff(x.mean(-1), axis=1)).max((1, 2))
    assert np.corrcoef(group, edges)[0, 1] < -0.8


def test_shares_of_classes_differ_where_they_should(made):
    own = made["mixed"]
    client = own["columns"].read("client")
    largest = [np.bincount(own["y"][client == c]).max() / (TRAIN + TEST) for c in range(COUNT)]
    assert np.mean(largest) > 0.25


def test_unknown_kinds_are_refused_and_known_ones_are_data(monkeypatch):
    with pytest.raises(ValueError, match=r"no digits 'shear': expected digits:domain, .*or digits"):
        data.load("digits:shear")
    monkeypatch.setattr(digit_clients.read, "__defaults__", (COUNT,))
    images = data.load("digits:concept")
    assert images.columns.names == ("client", "group", "source")
    assert len(images.x) == COUNT * (TRAIN + TEST)


@pytest.mark.long
def test_an_oracle_tells_groups_apart_and_nothing_else(monkeypatch):
    monkeypatch.setattr(digit_clients.read, "__defaults__", (COUNT,))
    options = {"data": "digits:concept", "partition": "column:client", "clients": 8, "holdout_clients": 4}
    p = problem.build(Config(signature="group", seeds=(0,), **options))
    z = np.asarray(p.clients.population.signatures.shape)[0]  # [clients, views, m]
    rows = np.asarray(p.clients.population.rows)[0, :, 0]
    group = read("digits:concept", COUNT)["columns"].read("group")[np.flatnonzero(~p.images.test)[rows]]
    assert len(set(group)) > 2
    np.testing.assert_allclose(z, np.broadcast_to(z[:, :1], z.shape), atol=1e-5)  # in every part of its data
    apart = np.abs(z[:, None, 0] - z[None, :, 0]).max(-1)
    np.testing.assert_array_equal(apart < 1e-5, group[:, None] == group)
