"""Published weights give the published outputs, and damaged files are refused."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from fedlora_jax import lora
from models.pretrained import load_vit, resize_positions
from models.vit import cut, normalise, vit

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="evaluation data are not here")


@needs_data
def test_deit_tiny_reproduces_its_reference():
    deit = load_vit(SHARED / "deit_tiny_imagenet1k.npz")
    reference = np.load(SHARED / "deit_tiny_reference.npz")
    images = normalise(reference["x"].repeat(7, 1).repeat(7, 2), deit.mean, deit.std)
    logits, out = jax.jit(deit.model.apply)({"params": deit.params}, images)
    np.testing.assert_allclose(out["features"], reference["feature"], atol=1e-4)
    np.testing.assert_allclose(logits, reference["logits"], atol=1e-4)


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
    np.testing.assert_allclose(resize_positions(flat, 7), np.ones((50, 8)), atol=1e-5)


def timm_arrays(seed: int = 0, **changes: np.ndarray) -> dict[str, np.ndarray]:
    """A random ViT of width 12, 2 blocks, patch 2, 4 x 4 images, in timm's names and layouts."""
    draw = np.random.default_rng(seed).normal
    arrays = {
        "patch_embed.proj.weight": draw(size=(12, 3, 2, 2)),
        "patch_embed.proj.bias": draw(size=12),
        "cls_token": draw(size=(1, 1, 12)),
        "pos_embed": draw(size=(1, 5, 12)),
        "norm.weight": draw(size=12),
        "norm.bias": draw(size=12),
        "head.weight": draw(size=(5, 12)),
        "head.bias": draw(size=5),
    }
    sizes = {"attn.qkv": (36, 12), "attn.proj": (12, 12), "mlp.fc1": (20, 12), "mlp.fc2": (12, 20)}
    for i in range(2):
        for name, shape in sizes.items():
            arrays |= {f"blocks.{i}.{name}.weight": draw(size=shape), f"blocks.{i}.{name}.bias": draw(size=shape[0])}
        for name in ("norm1", "norm2"):
            arrays |= {f"blocks.{i}.{name}.weight": draw(size=12), f"blocks.{i}.{name}.bias": draw(size=12)}
    return {name: np.asarray(x, np.float32) for name, x in (arrays | changes).items()}


def reference_forward(w: dict[str, np.ndarray], image: np.ndarray, heads: int) -> np.ndarray:
    """The same network written from its definition, in float64 NumPy, one image [4, 4, 3]."""
    from scipy.special import erf

    w = {name: x.astype(np.float64) for name, x in w.items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    dense = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    patches = []
    for row in range(2):
        for column in range(2):
            piece = image[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].transpose(2, 0, 1)
            patches.append(np.einsum("ocij,cij->o", w["patch_embed.proj.weight"], piece) + w["patch_embed.proj.bias"])
    x = np.concatenate([w["cls_token"][0], np.stack(patches)]) + w["pos_embed"][0]
    for i in range(2):
        q, k, v = np.split(dense(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv"), 3, -1)
        out = []
        for h in range(heads):
            s = slice(h * 12 // heads, (h + 1) * 12 // heads)
            scores = np.exp(q[:, s] @ k[:, s].T / np.sqrt(12 / heads))
            out.append(scores / scores.sum(-1, keepdims=True) @ v[:, s])
        x = x + dense(np.concatenate(out, -1), f"blocks.{i}.attn.proj")
        hidden = dense(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        x = x + dense(hidden * 0.5 * (1 + erf(hidden / np.sqrt(2))), f"blocks.{i}.mlp.fc2")
    return dense(norm(x, "norm")[0], "head")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_both_file_formats_give_the_network_of_the_definition(tmp_path, suffix):
    arrays, path = timm_arrays(), tmp_path / f"tiny{suffix}"
    if suffix == ".npz":
        np.savez(path, meta=json.dumps({"heads": 3, "ln_eps": 1e-5}), **arrays)
    else:
        save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, path)
        with pytest.raises(ValueError, match="heads"):  # 12 is less than timm's 64 per head, and nothing else tells
            load_vit(path)
    image = np.random.default_rng(1).normal(size=(4, 4, 3))
    tiny = load_vit(path) if suffix == ".npz" else load_vit(path, heads=3)
    tiny = tiny._replace(model=tiny.model.clone(epsilon=1e-5))
    logits, _ = tiny.model.apply({"params": tiny.params}, jnp.asarray(image, jnp.float32)[None])
    np.testing.assert_allclose(logits[0], reference_forward(arrays, image, heads=3), rtol=2e-4, atol=2e-4)


def test_a_head_for_other_classes_starts_at_zero(tmp_path):
    np.savez(tmp_path / "tiny.npz", meta=json.dumps({"heads": 2}), **timm_arrays())
    assert load_vit(tmp_path / "tiny.npz", classes=5).params["head"]["kernel"].any()
    other = load_vit(tmp_path / "tiny.npz", classes=7)
    assert other.model.classes == 7
    assert other.params["head"]["kernel"].shape == (12, 7)
    assert not other.params["head"]["kernel"].any()


def test_bad_files_are_refused_with_a_reason(tmp_path):
    with pytest.raises(ValueError, match="no weight file"):
        load_vit(tmp_path / "absent.npz")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"expected a \.npz"):
        load_vit(tmp_path / "weights.bin")
    np.savez(tmp_path / "ok.npz", meta=json.dumps({"heads": 2}), **timm_arrays())
    whole = (tmp_path / "ok.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated"):
        load_vit(tmp_path / "cut.npz")
    arrays = timm_arrays()
    del arrays["norm.bias"]
    np.savez(tmp_path / "missing.npz", meta=json.dumps({"heads": 2}), **arrays)
    with pytest.raises(ValueError, match=r"lacks 'norm\.bias'"):
        load_vit(tmp_path / "missing.npz")
    np.savez(tmp_path / "shape.npz", meta=json.dumps({"heads": 2}), **timm_arrays(**{"head.bias": np.zeros(4)}))
    with pytest.raises(ValueError, match="expected"):
        load_vit(tmp_path / "shape.npz")
    with pytest.raises(ValueError, match="multiple"):
        load_vit(tmp_path / "ok.npz", image_size=5)
    with pytest.raises(ValueError, match="unknown ViT"):
        vit("Giant/14", 10)


@pytest.mark.parametrize("top", [1, 3])
def test_a_model_in_two_parts_is_the_model(top):
    """Adapters in the last blocks only: the same logits and, up to rounding, gradients."""
    whole = vit("nano/4", classes=5)
    x = jax.random.normal(jax.random.key(0), (3, 16, 16, 3))
    params = whole.init(jax.random.key(1), x)["params"]
    (stem, stem_params), (rest, rest_params) = cut(whole, params, top)
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
        cut(whole, params, 4)
