"""Images are made square as the weights' publishers made them: where files say so, and where options do."""

import json

import numpy as np
import pytest
from input_helpers import SMALL, refused
from PIL import Image

from experiments.config import Config
from experiments.setup import backbone, data, resizing
from experiments.setup.resizing import Resizing
from models.resizing import beside

RNG = np.random.default_rng(0)


def picture(height, width):
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize(("name", "filter"), [(n, f) for n, f in resizing.FILTERS.items() if f is not None])
def test_crop_keeps_the_shape_of_what_is_shown_and_squash_does_not(name, filter):
    image = picture(40, 70)
    crop = resizing.resized(image, Resizing(14, 0.875, False, name))  # 14 of 16: 16 x 28, then the middle
    expected = image.resize((28, 16), filter).crop((7, 1, 21, 15))
    np.testing.assert_array_equal(crop, expected)
    if name == "bicubic":
        odd = picture(40, 67)  # 26.8 pixels: rounded by itself, down as published
        np.testing.assert_array_equal(resizing.resized(odd, 16), odd.resize((27, 16), filter).crop((5, 0, 21, 16)))
        published = resizing.resized(odd, Resizing(16))
        np.testing.assert_array_equal(published, odd.resize((26, 16), filter).crop((5, 0, 21, 16)))
    squashed = resizing.resized(image, Resizing(14, 1.0, True, name))
    np.testing.assert_array_equal(squashed, image.resize((14, 14), filter))


def test_without_antialiasing_a_pixel_is_made_of_sixteen():
    """Keys' kernel with a = -0.75, in float64 and by loops; edges repeated."""
    image = picture(23, 31)
    x = np.asarray(image, np.float64)

    def kernel(d):
        a, d = -0.75, abs(d)
        return (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0

    expected = np.zeros((9, 9, 3))
    for i in range(9):
        for j in range(9):
            v, u = (i + 0.5) * 23 / 9 - 0.5, (j + 0.5) * 31 / 9 - 0.5
            for r in range(int(np.floor(v)) - 1, int(np.floor(v)) + 3):
                for c in range(int(np.floor(u)) - 1, int(np.floor(u)) + 3):
                    expected[i, j] += kernel(v - r) * kernel(u - c) * x[np.clip(r, 0, 22), np.clip(c, 0, 30)]
    got = resizing.resized(image, Resizing(9, 1.0, True, resizing.ALIASED))
    np.testing.assert_allclose(np.asarray(got, float), np.clip(expected, 0, 255), atol=0.51)


CROP = {"crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "resample": 3}
SAID = {
    "ViT": ({"size": 224, "resample": 2, "image_processor_type": "ViTImageProcessor"}, "squash:1 bilinear"),
    "its newer form": ({"size": {"height": 224, "width": 224}, "resample": 2}, "squash:1 bilinear"),
    "DINOv2": ({"size": {"shortest_edge": 256}, **CROP}, "crop:0.875 bicubic"),
    "CLIP": ({"size": 224, **CROP, "feature_extractor_type": "CLIPFeatureExtractor"}, "crop:1 bicubic"),
    "DeiT": ({"size": 256, **CROP, "crop_size": 224}, "squash:0.875 bicubic"),
    "nothing of it": ({"image_mean": [0.5, 0.5, 0.5]}, ""),
    "not resized": ({"do_resize": False, "size": 224}, ""),
}


@pytest.mark.parametrize("name", SAID)
def test_transformers_files_are_understood(name, tmp_path):
    content, expected = SAID[name]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    told, where = beside(tmp_path / "model.safetensors")
    assert " ".join(told.values()) == expected
    assert where == "preprocessor_config.json" * bool(expected)
    assert beside(tmp_path) == (told, where)


def test_so_is_what_version_5_saves_with_a_tokenizer(tmp_path):
    content, expected = SAID["CLIP"]
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": content}))
    told, where = beside(tmp_path)
    assert (" ".join(told.values()), where) == (expected, "processor_config.json")


def test_so_are_those_of_timm_and_open_clip(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"crop_pct": 0.9, "interpolation": "bicubic"}}))
    assert beside(tmp_path) == ({"resize": "crop:0.9", "resample": "bicubic"}, "config.json")
    own = {"preprocess_cfg": {"interpolation": "bicubic", "resize_mode": "squash"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(own))
    assert beside(tmp_path) == ({"resize": "squash", "resample": "bicubic"}, "open_clip_config.json")


@pytest.mark.parametrize(
    "content",
    [
        {"pretrained_cfg": {"crop_pct": 0.9, "interpolation": "random"}},
        {"pretrained_cfg": {"crop_pct": 0.9, "crop_mode": "border"}},
        {"pretrained_cfg": {"crop_pct": 1.2}},
    ],
)
def test_what_is_not_known_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config\.json says how images are resized in a way that is not known here"):
        beside(tmp_path)


def test_arrays_are_resized_as_they_are_whatever_is_asked_for(capsys):
    assert backbone.sizing(Config(image_size=14, resize="squash")) == (14, {})
    assert "--resize has no part in arrays of images, such as digits" in capsys.readouterr().err


def test_a_run_resizes_as_its_weights_want_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pictures = [picture(20, 36) for _ in range(4)]
    for i, image in enumerate(pictures):
        (tmp_path / "images" / "ab"[i // 2]).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "images" / "ab"[i // 2] / f"{i}.png")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SAID["DeiT"][0]))
    weights = str(tmp_path / "model.safetensors")
    of = lambda **options: backbone.sizing(
        Config(data=str(tmp_path / "images"), image_size=14, weights=weights, **options)
    )
    size, record = of()
    assert record == {"resized": "squash:0.875 bicubic (preprocessor_config.json)"}
    x = data.load(str(tmp_path / "images"), size, test_share=0.5).x
    expected = [image.resize((16, 16), Image.Resampling.BICUBIC).crop((1, 1, 15, 15)) for image in pictures]
    np.testing.assert_array_equal(x, np.stack(expected))
    assert (
        data.load(str(tmp_path / "images"), 14, test_share=0.5).fingerprint()
        != data.load(str(tmp_path / "images"), size, test_share=0.5).fingerprint()
    )
    assert of(resize="squash")[1] == {"resized": "squash bicubic (given)"}
    assert backbone.sizing(Config(data=str(tmp_path / "images"), image_size=14)) == (14, {})
    assert backbone.sizing(Config(image_size=14, weights=weights)) == (14, {})  # arrays are resized as they are


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--resize squash", "as large as --image-size: give that too"),
        ("--data {} --image-size 8 --resize stretch", "--resize must be crop"),
        ("--data {} --image-size 8 --resize crop:1.5", "--resize crop must be above 0 and at most 1"),
        ("--data {} --image-size 8 --resample cubic", "--resample must be bicubic"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, said, tmp_path, capsys, monkeypatch):
    assert said in refused(["compare", *SMALL, *options.format(tmp_path).split()], capsys, monkeypatch)
