"""MLP-Mixer: its equations, its weights in two formats, and federated like any other model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from input_helpers import SMALL, change, refused
from safetensors.numpy import save_file
from scipy.special import erf

from experiments.cli import parse
from experiments.commands.compare import Plan
from fedlora_jax.lora import flatten
from models import tables
from models.mixer import Mixer, mixer
from models.parts import split_blocks
from models.pretrained_mixer import ORIGINAL, TIMM, load_mixer, mixer_backbone

SIDE, PATCH, CLASSES = 16, 4, 3
MODEL = Mixer(CLASSES, PATCH, width=12, depth=3, tokens_width=10, channels_width=20)
FACTS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "epsilon": 1e-6}


def draw(seed=0):
    """Every array random, so that none can be left out or mistaken for another."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)))["params"]
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.5, shapes)


PARAMS = draw()
IMAGES = np.random.default_rng(1).normal(size=(5, SIDE, SIDE, 3)).astype(np.float32)


def written(table, params=PARAMS):
    return {name: np.asarray(x) for name, x in tables.write_params(table, params, PATCH).items()}


def save(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, path)
    return path


def by_hand(arrays, images, act=None):
    """The published network in float64, of arrays under timm's names."""
    w = {name: np.float64(x) for name, x in arrays.items()}
    gelu = act or (lambda x: x * 0.5 * (1 + erf(x / 2**0.5)))
    dense = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    mlp = lambda x, name: dense(gelu(dense(x, f"{name}.fc1")), f"{name}.fc2")

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]

    kernel = w["stem.proj.weight"]  # [out, in, p, p]
    grid = SIDE // PATCH
    x = np.zeros((len(images), grid**2, kernel.shape[0]))
    for i in range(grid):
        for j in range(grid):
            part = images[:, i * PATCH : (i + 1) * PATCH, j * PATCH : (j + 1) * PATCH]
            x[:, i * grid + j] = np.einsum("nhwc,ochw->no", part, kernel) + w["stem.proj.bias"]
    for i in range(3):
        x = x + mlp(norm(x, f"blocks.{i}.norm1").swapaxes(1, 2), f"blocks.{i}.mlp_tokens").swapaxes(1, 2)
        x = x + mlp(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp_channels")
    features = norm(x, "norm").mean(1)
    return dense(features, "head"), features


def test_it_computes_the_published_equations():
    logits, out = MODEL.apply({"params": PARAMS}, IMAGES)
    for found, expected in zip((logits, out["features"]), by_hand(written(TIMM), IMAGES), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("table", [TIMM, ORIGINAL], ids=["timm", "original"])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_weights_come_back_as_they_went(table, suffix, tmp_path):
    path = save(tmp_path / f"a{suffix}", written(table))
    loaded = load_mixer(path, keep_head=True, classes=CLASSES, image_size=SIDE, **FACTS)
    own, expected = flatten(loaded.params), flatten(PARAMS)
    assert own.keys() == expected.keys()
    for name, x in own.items():
        np.testing.assert_array_equal(x, expected[name])
    assert loaded.model == MODEL.clone(act="gelu" if table is TIMM else "gelu_tanh")
    assert loaded.facts()["mean"] == "0.1,0.2,0.3 (given)"
    assert "heads" not in loaded.facts()


def test_a_stem_and_a_top_are_the_whole():
    logits, _ = MODEL.apply({"params": PARAMS}, IMAGES)
    (stem, before), (top, rest) = split_blocks(MODEL, PARAMS, 2)
    tokens, _ = stem.apply({"params": before}, IMAGES)
    np.testing.assert_allclose(top.apply({"params": rest}, tokens)[0], logits, rtol=1e-5, atol=1e-5)


def without(*parts):
    return lambda arrays: [arrays.pop(name) for name in list(arrays) if all(part in name for part in parts)]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without("blocks.1.norm2.bias"), "it lacks blocks.1.norm2.bias"),
        (without("blocks.2.", "channels"), "it lacks blocks.2.mlp_channels.fc1.bias"),
        (lambda a: a.update({"blocks.0.gamma": np.ones(3)}), "it has blocks.0.gamma"),
        (
            lambda a: a.update({"norm.bias": np.ones(11, np.float32)}),
            r"norm.bias has the shape \[11\], expected \[12\]",
        ),
        (lambda a: a.update({"norm.bias": np.full(12, np.nan, np.float32)}), "not finite"),
        (lambda a: a.update({"norm.bias": np.ones(12, np.int8)}), "int8, expected floats"),
        (lambda a: a.update({"stem.proj.weight": np.ones((12, 48), np.float32)}), "patches are embedded"),
    ],
)
def test_what_is_no_mixer_is_refused_by_name(damage, said, tmp_path):
    arrays = written(TIMM)
    damage(arrays)
    with pytest.raises(ValueError, match=said):
        load_mixer(save(tmp_path / "a.npz", arrays), CLASSES, **FACTS)


def test_images_of_another_size_are_refused(tmp_path):
    with pytest.raises(ValueError, match="images of side 16: use --image-size 16, got 32"):
        load_mixer(save(tmp_path / "a.npz", written(TIMM)), CLASSES, 32, **FACTS)


def test_sizes_have_names():
    assert mixer("B/16", 10) == Mixer(10, 16, 768, 12, 384, 3072)
    with pytest.raises(ValueError, match="unknown Mixer 'X/16'"):
        mixer("X/16", 10)


@pytest.mark.long
def test_it_is_federated_like_any_other_model(tmp_path, monkeypatch, capsys):
    """Nothing is said but the file: its names tell what it is. Depth can be left out, and the prefix stored."""
    monkeypatch.chdir(tmp_path)
    change()(tmp_path / "data.npz")
    save(tmp_path / "mixer.safetensors", written(TIMM))
    (tmp_path / "config.json").write_text(json.dumps({"mean": [0.5] * 3, "std": [0.5] * 3, "epsilon": 1e-6}))
    options = [*SMALL, "--data", "data.npz", "--weights", "mixer.safetensors", "--rank", "2", "--out", "out"]
    plan = Plan(*parse(["compare", "--methods", "fedra", "--adapt-last", "2", *options]))
    assert "weights mixer: mean 0.5,0.5,0.5 (config.json)" in capsys.readouterr().err
    assert plan.problem.record["adapted"] == ["blocks/mlp_channels/fc2/kernel", "blocks/mlp_tokens/fc2/kernel"]
    plan.execute()
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(np.isfinite(row["loss"]) for row in rows)
    capsys.readouterr()
    said = refused(["run", "--method", "fedit", *options[:-1], "no", "--model", "vit"], capsys, monkeypatch)
    assert "not a ViT with timm names" in said


@pytest.mark.parametrize("table", [TIMM, ORIGINAL], ids=["timm", "original"])
@pytest.mark.parametrize("last", [3, 2])
def test_a_mixer_goes_out_as_it_came(table, last, tmp_path):
    """Cut or not, under the names of its file."""
    path = save(tmp_path / "mixer.npz", {**written(table), "meta": json.dumps(FACTS)})
    whole = mixer_backbone(path)
    top = whole if last == whole.depth else whole.cut(last)[1]
    published = top.publish(top.params)
    assert published.arrays.keys() == written(table).keys()
    for name, x in written(table).items():
        np.testing.assert_array_equal(published.arrays[name], x)
    assert published.said == {
        "mean": pytest.approx(FACTS["mean"]),
        "std": pytest.approx(FACTS["std"]),
        "ln_eps": FACTS["epsilon"],
        **({} if table is TIMM else {"act": "gelu_tanh"}),
    }


@pytest.mark.long
def test_the_original_approximates_gelu_by_tanh_as_flax_does(tmp_path):
    """Unless the file says otherwise."""
    arrays, shown = written(ORIGINAL), np.random.default_rng(1).integers(0, 256, (2, SIDE, SIDE, 3)).astype(np.uint8)
    images = (shown / 255 - np.array(FACTS["mean"])) / np.array(FACTS["std"])
    tanh = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    by_tanh, exactly = (by_hand(written(TIMM), images, act)[0] for act in (tanh, None))
    for said, expected, other in (({}, by_tanh, exactly), ({"act": "gelu"}, exactly, by_tanh)):
        path = save(tmp_path / "mixer.npz", {**arrays, "meta": json.dumps({**FACTS, **said})})
        made = mixer_backbone(path, keep_head=True)
        found = made.apply(made.params, {}, shown)[0]
        assert np.abs(found - expected).max() < 0.2 * np.abs(found - other).max()
