"""Published weights give the published outputs, and damaged files are refused."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from fedlora_jax import lora
from models.parts import split_blocks
from models.positions import resize_positions
from models.pretrained import load_vit
from models.vit import normalise, vit

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="evaluation data are not here")


@pytest.mark.long
@needs_data
def test_deit_tiny_reproduces_its_reference(tmp_path):
    """As it is here, and as it is published: arrays alone, with timm's or transformers' facts beside them."""
    reference = np.load(SHARED / "deit_tiny_reference.npz")
    with np.load(SHARED / "deit_tiny_imagenet1k.npz") as file:
        arrays = {name: np.ascontiguousarray(file[name]) for name in file.files if name not in ("meta", "synsets")}
        meta = json.loads(str(file["meta"]))
    normal = {key: meta[key] for key in ("mean", "std")}
    config = {"architecture": "deit_tiny_patch16_224", "global_pool": "token", "pretrained_cfg": normal}
    processor = {f"image_{key}": value for key, value in normal.items()}
    more = {"hidden_size": 192, "num_attention_heads": 3, "layer_norm_eps": 1e-6}
    for folder in ("timm", "transformers", "bare"):
        (tmp_path / folder).mkdir()
        save_file(arrays, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
    (tmp_path / "transformers" / "config.json").write_text(json.dumps(more))
    (tmp_path / "transformers" / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.warns(UserWarning, match="GUESS.*--mean --std --heads --epsilon"):
        guessed = load_vit(tmp_path / "bare" / "model.safetensors")
    deit = load_vit(SHARED / "deit_tiny_imagenet1k.npz")
    forward = jax.jit(deit.model.apply)

    def outputs(loaded):
        assert loaded.model == deit.model
        images = normalise(reference["x"].repeat(7, 1).repeat(7, 2), loaded.mean, loaded.std)
        return forward({"params": loaded.params}, images)

    for loaded in (deit, *(load_vit(tmp_path / name / "model.safetensors") for name in ("timm", "transformers"))):
        logits, out = outputs(loaded)
        np.testing.assert_allclose(out["features"], reference["feature"], atol=1e-4)
        np.testing.assert_allclose(logits, reference["logits"], atol=1e-4)
    assert np.abs(outputs(guessed)[0] - reference["logits"]).max() > 1  # what the warning is for


@pytest.mark.long
@needs_data
def test_interpolated_positions_keep_what_the_network_sees():
    """At half the size features stay close in direction: a transposed or shuffled grid would not."""
    reference = np.load(SHARED / "deit_tiny_reference.npz")
    images = reference["x"].repeat(7, 1).repeat(7, 2)
    small = jax.image.resize(images.astype(np.float32), (16, 112, 112, 3), "linear")
    full, half = (load_vit(SHARED / "deit_tiny_imagenet1k.npz", image_size=size) for size in (None, 112))
    _, a = full.model.apply({"params": full.params}, normalise(images, full.mean, full.std))
    _, b = half.model.apply({"params": half.params}, normalise(small, half.mean, half.std))
    cosine = jnp.sum(a["features"] * b["features"], -1) / (
        jnp.linalg.norm(a["features"], axis=-1) * jnp.linalg.norm(b["features"], axis=-1)
    )
    grid = half.params["pos"][1:].reshape(7, 7, -1).swapaxes(0, 1).reshape(49, -1)
    turned = {**half.params, "pos": jnp.concatenate([half.params["pos"][:1], grid])}
    _, c = half.model.apply({"params": turned}, normalise(small, half.mean, half.std))
    wrong = jnp.sum(a["features"] * c["features"], -1) / (
        jnp.linalg.norm(a["features"], axis=-1) * jnp.linalg.norm(c["features"], axis=-1)
    )
    assert cosine.mean() > wrong.mean()


def test_positions_of_the_same_grid_are_untouched_and_constant_ones_stay_constant():
    positions = np.random.default_rng(0).normal(size=(17, 8)).astype(np.float32)
    assert resize_positions(positions, 4) is positions
    flat = np.ones((17, 8), np.float32)
    for antialias in (True, False):
        np.testing.assert_allclose(resize_positions(flat, 7, 1, antialias), np.ones((50, 8)), atol=1e-5)


@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 4), (5, 15), (6, 1)])
def test_positions_are_interpolated_by_cubic_convolution(old, new):
    """Value by value in float64: the last are repeated beyond the ends, as where transformers resizes them."""

    def kernel(d, a=-0.75):
        d = abs(d)
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    def at(row, x):
        return sum(kernel(x - j) * row[min(max(j, 0), old - 1)] for j in range(-3, old + 3))

    positions = np.random.default_rng(0).normal(size=(old, old))
    where = [(i + 0.5) * old / new - 0.5 for i in range(new)]
    columns = np.array([[at(row, x) for x in where] for row in positions])
    expected = np.array([[at(column, y) for column in columns.T] for y in where])
    flat = np.float32(np.append(0.0, positions.reshape(-1)))[:, None]
    found = resize_positions(flat, new, 1, antialias=False)[1:].reshape(new, new)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("top", [1, 3])
def test_a_model_in_two_parts_is_the_model(top):
    """Adapters in the last blocks only: the same logits and, up to rounding, gradients."""
    whole = vit("nano/4", classes=5)
    x = jax.random.normal(jax.random.key(0), (3, 16, 16, 3))
    params = whole.init(jax.random.key(1), x)["params"]
    (stem, stem_params), (rest, rest_params) = split_blocks(whole, params, top)
    tokens, _ = stem.apply({"params": stem_params}, x)
    new = lambda params: lora.new(jax.random.key(2), params, 2, targets="attn/(query|value)/kernel", full="^head/")
    adapter = jax.tree.map(lambda x: x + 0.1, new(rest_params))
    padded = lambda z: jnp.concatenate([jnp.zeros((4 - top, *z.shape[1:])), z])
    wide = lora.tree_map(lambda z: lora.LoRA(padded(z.a), padded(z.b), z.scale), adapter)

    def logits(model, params, inputs, adapter):
        out, end = model.apply(lora.variables(params, adapter), inputs)
        return out, end["features"]

    for a, b in zip(logits(rest, rest_params, tokens, adapter), logits(whole, params, x, wide), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    square = lambda *row: jnp.sum(logits(*row)[0] ** 2)
    short = jax.grad(square, 3)(rest, rest_params, tokens, adapter)
    long = jax.grad(square, 3)(whole, params, x, wide)
    for a, b in zip(lora.low_rank_leaves(short), lora.low_rank_leaves(long), strict=True):
        np.testing.assert_allclose(a.a, b.a[4 - top :], atol=1e-4)
        np.testing.assert_allclose(a.b, b.b[4 - top :], atol=1e-4)
    with pytest.raises(ValueError, match="choose 1 to 3"):
        split_blocks(whole, params, 4)
