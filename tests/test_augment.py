"""Varied images are what the ways say, inside a run too; keys make them, so that a run can be repeated."""

import colorsys
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from input_helpers import SMALL, refused
from PIL import Image, ImageEnhance, ImageOps

from experiments.setup import augment, operations, task
from experiments.setup.augment import augmentation

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (64, 12, 12, 3), np.uint8)
Y = RNG.integers(0, 4, 64)
KEY = jax.random.key(3)


@functools.cache
def program(texts):
    return jax.jit(lambda key, batch: augmentation(texts)(key, batch, 4))


def varied(*texts, key=KEY):
    return jax.device_get(program(texts)(key, (X, Y)))


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


@pytest.fixture(scope="module")
def photographs():
    """Smooth ones, one of few values, one of a single value."""
    coarse = [Image.fromarray(RNG.integers(0, 256, (5, 5, 3), np.uint8)) for _ in range(3)]
    smooth = [np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)) for image in coarse]
    return np.stack([*smooth, smooth[0] // 64 * 40, np.full((32, 32, 3), 90, np.uint8)])


ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "colour": ImageEnhance.Color,
    "sharpness": ImageEnhance.Sharpness,
}


@pytest.mark.parametrize("name", ENHANCERS)
def test_colours_change_as_in_pillow(name, photographs):
    function = jax.jit(jax.vmap(getattr(operations, name), (0, None)))
    for factor in (0.0, 0.3, 1.0, 1.7):
        expected = [np.asarray(ENHANCERS[name](Image.fromarray(x)).enhance(factor), int) for x in photographs]
        assert np.abs(np.asarray(function(photographs, factor), int) - expected).max() <= 1  # float32 in another order
        assert (np.asarray(function(photographs, factor), int) != expected).mean() < 0.01


def test_hues_turn_about_the_circle_of_colours(photographs):
    function = jax.jit(jax.vmap(operations.hue, (0, None)))
    for turn in (-0.3, 0.0, 0.11, 0.5):

        def pixel(rgb, turn=turn):
            h, s, v = colorsys.rgb_to_hsv(*rgb / 255)
            return 255 * np.array(colorsys.hsv_to_rgb((h + turn) % 1, s, v))

        expected = np.apply_along_axis(pixel, -1, np.float64(photographs))
        assert np.abs(np.asarray(function(photographs, turn)) - expected).max() <= 0.51


def by_pillow(name, m, sign):
    """RandAugment's operations in Pillow's words, at ``m`` from 0 to 1."""
    moved = lambda *matrix: lambda x: x.transform(x.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)
    factor, pixels = 1 + 0.9 * m * sign, int(150 / 331 * 32 * m) * sign
    return {
        "identity": lambda x: x,
        "rotate": lambda x: x.rotate(30 * m * sign, Image.Resampling.NEAREST),
        "shear_x": moved(1, 0.3 * m * sign, 0, 0, 1, 0),
        "shear_y": moved(1, 0, 0, 0.3 * m * sign, 1, 0),
        "translate_x": moved(1, 0, pixels, 0, 1, 0),
        "translate_y": moved(1, 0, 0, 0, 1, pixels),
        "autocontrast": ImageOps.autocontrast,
        "equalize": ImageOps.equalize,
        "solarize": lambda x: ImageOps.solarize(x, 255 * (1 - m)),
        "posterize": lambda x: ImageOps.posterize(x, 8 - round(4 * m)),
        **{name: lambda x, own=own: own(x).enhance(factor) for name, own in ENHANCERS.items()},
    }[name]


def test_randaugment_does_what_pillow_does(photographs):
    names = operations.RANDAUGMENT
    function = jax.jit(jax.vmap(operations.randaugmented, (0, None, None, None)))
    for m, sign in ((0.9, 1), (0.35, -1)):
        for which, name in enumerate(names):
            own = by_pillow(name, m, sign)
            expected = np.stack([np.asarray(own(Image.fromarray(x)), int) for x in photographs])
            off = np.abs(np.asarray(function(photographs, which, m, sign), int) - expected)
            assert (off > 1).mean() < (0.01 if name in ("rotate", "shear_x", "shear_y") else 1e-9), (
                name
            )  # ties of places


@pytest.mark.long
def test_randaugment_draws_its_operations_and_their_ways(photographs):
    many = np.repeat(photographs[:1], 200, 0)
    draw = jax.jit(augment.randaugment, static_argnums=(2, 3, 4))
    x, y = draw(KEY, (many, np.arange(200)), 4, 1, 5.0)
    possible = jax.jit(jax.vmap(operations.randaugmented, (None, 0, None, 0)))
    which, sign = np.divmod(np.arange(28), 2)
    outcomes = np.asarray(possible(many[0], which, 0.5, 2.0 * sign - 1))
    found = (outcomes[:, None] == np.asarray(x)).mean((2, 3, 4)) > 0.99  # another program rounds otherwise
    assert found.any(0).all()
    assert {operations.RANDAUGMENT[w] for w in which[found.any(1)]} == set(operations.RANDAUGMENT)
    np.testing.assert_array_equal(y, np.arange(200))
    twice = draw(KEY, (many, np.arange(200)), 4, 2, 5.0)[0]
    assert len(np.unique(np.asarray(twice).reshape(200, -1), axis=0)) > 60


def test_jittered_colours_stay_within_their_strength(photographs):
    """Of a grey image contrast and saturation change nothing: what is left is its brightness."""
    plain, jitter = np.full((400, 4, 4, 3), 100, np.uint8), jax.jit(augment.jitter, static_argnums=(2, 3))
    x, _ = jitter(KEY, (plain, np.zeros(400, int)), 4, 0.4)
    values = np.asarray(x)[:, 0, 0, 0].astype(int)
    assert (np.asarray(x) == values[:, None, None, None]).all()
    assert 59 <= values.min() <= 63
    assert 137 <= values.max() <= 140
    x, _ = jitter(KEY, (photographs, np.zeros(5, int)), 4, 0.4)
    assert (np.asarray(x)[:4] != photographs[:4]).any((1, 2, 3)).all()


def test_boxes_come_from_another_image_and_so_does_their_share_of_the_label():
    shares = []
    for seed in range(40):
        x, y = varied("cutmix:1", key=jax.random.key(seed))
        np.testing.assert_allclose(y.sum(-1), 1, rtol=1e-6)
        kept = (x == X).all(-1)  # [n, 12, 12]
        n = int(kept.reshape(64, -1).sum(1).argmin())
        box = ~kept[n]
        rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
        part = len(rows) * len(columns) / 144
        assert box.sum() == round(144 * part)
        if part:
            other = next(m for m in range(64) if (X[m][box] == x[n][box]).all())
            np.testing.assert_allclose(y[n], (1 - part) * np.eye(4)[Y[n]] + part * np.eye(4)[Y[other]], atol=1e-6)
        shares.append(part)
    assert min(shares) < 0.1
    assert max(shares) > 0.4


@pytest.mark.long
def test_a_key_is_a_picture():
    ways = ("flip", "crop:1", "resized_crop:0.5", "jitter:0.4", "hue:0.1", "randaugment:1:5", "mixup:1", "cutmix:1")
    one = varied(*ways)[0]
    np.testing.assert_array_equal(varied(*ways)[0], one)
    assert (varied(*ways, key=jax.random.key(4))[0] != one).any()


def test_training_sees_varied_images_and_scoring_does_not():
    class Model:
        apply = staticmethod(lambda base, adapter, x, training: (x[:, :2, 0, 0].astype(jnp.float32) / 255, x))

    loss, correct, *_ = task.objectives(task.TASKS["softmax"], Model(), augment=("flip",))  # type: ignore[arg-type]
    plain, same, *_ = task.objectives(task.TASKS["softmax"], Model())  # type: ignore[arg-type]
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
        ("--augment randaugment:2", "randaugment:COUNT:STRENGTH"),
        ("--augment randaugment:1.5:9", "COUNT must be a whole number"),
        ("--augment randaugment:2:11", "STRENGTH must be above 0 and at most 10"),
        ("--augment hue:0.6", "SHARE must be"),
        ("--augment flip --adapt-last 2 --prefix stored", "--prefix stored"),
    ],
)
def test_what_means_nothing_is_refused(options, said, capsys, monkeypatch):
    assert said in refused(["compare", *SMALL, *options.split()], capsys, monkeypatch)
