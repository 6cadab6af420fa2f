"""Varied images are what the ways say, inside a run too; keys make them, so that a run can be repeated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from input_helpers import SMALL, refused
from PIL import Image

from experiments.setup import augment, task
from experiments.setup.augment import augmentation

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (64, 12, 12, 3), np.uint8)
Y = RNG.integers(0, 4, 64)
KEY = jax.random.key(3)


def varied(*texts, key=KEY):
    x, y = augmentation(texts)(key, (jnp.asarray(X), jnp.asarray(Y)), 4)
    return np.asarray(x), np.asarray(y)


def test_half_are_mirrored():
    x, y = varied("flip")
    mirrored = (x == X[:, :, ::-1]).all((1, 2, 3))
    assert ((x == X).all((1, 2, 3)) ^ mirrored).all()
    assert 20 < mirrored.sum() < 44
    np.testing.assert_array_equal(y, Y)


def test_crops_are_windows_of_the_image_on_black():
    x, _ = varied("crop:2")
    wide = np.pad(X, ((0, 0), (2, 2), (2, 2), (0, 0)))
    found = [
        [(i, j) for i in range(5) for j in range(5) if (wide[n, i : i + 12, j : j + 12] == x[n]).all()]
        for n in range(64)
    ]
    assert all(len(own) == 1 for own in found)
    assert len({own[0] for own in found}) > 15


def test_parts_are_those_that_pillow_would_cut_out():
    smooth = np.stack([np.asarray(Image.fromarray(x).resize((12, 12), Image.Resampling.BOX, (4, 4, 8, 8))) for x in X])
    (x, _), boxes = (
        augment.resized_crop(KEY, (jnp.asarray(smooth), jnp.asarray(Y)), 4, 0.3),
        augment.boxes(KEY, 64, 0.3),
    )
    for image, got, (top, left, height, width) in zip(smooth, x, 12 * np.asarray(boxes), strict=True):
        box = (left, top, left + width, top + height)
        expected = Image.fromarray(image).resize((12, 12), Image.Resampling.BILINEAR, box)
        inner = np.s_[2:-2, 2:-2]  # Pillow does not look beyond the box's edges
        assert np.abs(np.asarray(got, int) - np.asarray(expected, int))[inner].max() <= 2


def test_parts_have_the_areas_and_shapes_that_were_asked_for():
    top, left, height, width = np.asarray(augment.boxes(KEY, 20_000, 0.25)).T
    assert min(top.min(), left.min()) >= 0
    assert max((top + height).max(), (left + width).max()) <= 1 + 1e-6
    whole = (height < 1) & (width < 1)  # not cut off at the image's edge
    ratio = (width / height)[whole]
    assert 0.75 - 1e-5 <= ratio.min() < ratio.max() <= 4 / 3 + 1e-5
    assert 0.25 - 1e-6 <= (height * width)[whole].min() < 0.26
    assert abs((height * width < 0.625).mean() - 0.5) < 0.05  # the middle of 0.25 to 1
    assert varied("resized_crop:1")[0].shape == X.shape


def test_mixed_labels_have_the_shares_of_the_images():
    """By least squares every mixed image is a share of itself and the rest of one other; so are its labels."""
    x, y = varied("mixup:0.8")
    np.testing.assert_allclose(y.sum(-1), 1, rtol=1e-6)
    flat, mixed = X.reshape(64, -1).astype(float), x.reshape(64, -1).astype(float)
    others = []
    for n in range(64):
        apart, moved = flat - flat[n], mixed[n] - flat[n]
        share = apart @ moved / np.maximum((apart * apart).sum(-1), 1)  # of each other one
        rest = np.abs(moved - share[:, None] * apart).max(-1)  # what it leaves unexplained
        m = int(rest.argmin())
        assert rest[m] <= 1
        np.testing.assert_allclose(y[n], (1 - share[m]) * np.eye(4)[Y[n]] + share[m] * np.eye(4)[Y[m]], atol=0.01)
        others.append(m)
    assert len(set(others)) > 40


def test_a_key_is_a_picture():
    ways = ("flip", "crop:1", "resized_crop:0.5", "mixup:1")
    np.testing.assert_array_equal(varied(*ways)[0], varied(*ways)[0])
    assert (varied(*ways)[0] != varied(*ways, key=jax.random.key(4))[0]).any()


def test_training_sees_varied_images_and_scoring_does_not():
    class Model:
        apply = staticmethod(lambda base, adapter, x, training: (x[:, :2, 0, 0].astype(jnp.float32) / 255, x))

    loss, correct = task.objectives(task.TASKS["softmax"], Model(), augment=("flip",))  # type: ignore[arg-type]
    plain, same = task.objectives(task.TASKS["softmax"], Model())  # type: ignore[arg-type]
    batch = (jnp.asarray(X), jnp.asarray(Y % 2))
    assert loss({}, {}, batch, KEY) != plain({}, {}, batch, KEY)
    assert loss({}, {}, batch, KEY) == loss({}, {}, batch, KEY)
    symmetric = (jnp.concatenate([batch[0], batch[0][:, :, ::-1]], 2), batch[1])
    np.testing.assert_allclose(loss({}, {}, symmetric, KEY), plain({}, {}, symmetric, KEY), rtol=1e-6)
    np.testing.assert_array_equal(correct({}, {}, batch), same({}, {}, batch))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--augment blur", "--augment must be of flip, crop:PIXELS"),
        ("--augment flip:2", "--augment must be of flip"),
        ("--augment crop", "crop:PIXELS"),
        ("--augment crop:1.5", "whole"),
        ("--augment resized_crop:0", "--augment resized_crop"),
        ("--augment mixup:nan", "--augment mixup"),
        ("--augment flip --adapt-last 2 --prefix stored", "--prefix stored"),
    ],
)
def test_what_means_nothing_is_refused(options, said, capsys, monkeypatch):
    assert said in refused(["compare", *SMALL, *options.split()], capsys, monkeypatch)
