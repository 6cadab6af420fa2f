"""Weight files: every array is used or refused by name, and nothing is believed that a file cannot hold."""

import io
import json
import struct
import tracemalloc
import zipfile

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from weight_helpers import FACTS, reference_forward, timm_arrays, write

from models.pretrained import load_vit
from models.vit import normalise, vit

draw = np.random.default_rng(7).normal


def in_blocks(**arrays) -> dict[str, np.ndarray | None]:
    return {f"blocks.{i}.{name.replace('_', '.')}": x for i in range(2) for name, x in arrays.items()}


# networks that another one, without these layers, equals
FOLDED = {
    "layer scale": {f"blocks.{i}.ls{j}.gamma": draw(size=12) for i in range(2) for j in (1, 2)},
    "layer scale of attention alone": in_blocks(ls1_gamma=draw(size=12)),
    "no bias of queries, keys and values": in_blocks(attn_qkv_bias=None),
    "no position of the class token": {"pos_embed": draw(size=(1, 4, 12))},
    "a token of masked pre-training": {"mask_token": draw(size=(1, 12))},
}


@pytest.mark.parametrize("case", FOLDED)
def test_what_folds_into_a_plain_network_gives_its_outputs(tmp_path, case):
    arrays = timm_arrays(**FOLDED[case])
    loaded = load_vit(write(tmp_path / "a.safetensors", arrays))
    images = np.random.default_rng(1).integers(0, 256, (3, 4, 4, 3)).astype(np.uint8)
    logits, _ = loaded.model.apply({"params": loaded.params}, normalise(images, loaded.mean, loaded.std))
    expected = [reference_forward(arrays, image, FACTS) for image in images]
    np.testing.assert_allclose(logits, expected, rtol=5e-4, atol=5e-4)


OTHERS = {
    "norms of queries": (in_blocks(attn_q__norm_weight=draw(size=4)), "blocks.0.attn.q_norm.weight", "normalised"),
    "two norms": ({"fc_norm.weight": draw(size=12)}, "fc_norm.weight", "their mean once more"),
    "distillation": ({"dist_token": draw(size=(1, 1, 12))}, "dist_token", "distillation"),
    "a second head": ({"head_dist.weight": draw(size=(5, 12))}, "head_dist.weight", "distillation"),
    "a layer before the head": ({"pre_logits.fc.weight": draw(size=(12, 12))}, "pre_logits.fc.weight", "layer between"),
    "a norm of patches": ({"patch_embed.norm.weight": draw(size=12)}, "patch_embed.norm.weight", "convolution"),
    "relative positions": (in_blocks(attn_rel__pos=draw(size=3)), "blocks.0.attn.rel_pos", "relative"),
    "a norm inside": (in_blocks(mlp_norm_weight=draw(size=20)), "blocks.0.mlp.norm.weight", "inside"),
    "something unheard of": ({"whatever": draw(size=1)}, "whatever", "another network"),
    "a buffer": ({"steps": np.zeros(1, np.int64)}, "steps", "another network"),
}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("case", OTHERS)
def test_an_array_of_another_network_is_refused_by_name(tmp_path, case, suffix):
    more, name, why = OTHERS[case]
    arrays = timm_arrays(**{key.replace("..", "_"): x for key, x in more.items()})
    with pytest.raises(ValueError, match=why) as refused:
        load_vit(write(tmp_path / f"a{suffix}", arrays))
    assert name in str(refused.value)


def test_many_other_arrays_are_counted(tmp_path):
    path = write(tmp_path / "a.npz", timm_arrays(**{f"more.{i}": draw(size=2) for i in range(9)}))
    with pytest.raises(ValueError, match=r"it has more\.0, more\.1, more\.2 and 6 more"):
        load_vit(path)


def test_names_of_another_model_of_transformers_are_refused_as_such(tmp_path):
    arrays = {"vision_model.embeddings.class_embedding": draw(size=12), "text_model.embeddings.x": draw(size=12)}
    with pytest.raises(ValueError, match=r"lacks .* and has text_model.*transformers model"):
        load_vit(write(tmp_path / "a.npz", arrays))


@pytest.mark.parametrize(
    "lost", ["norm.bias", "blocks.1.ls2.gamma", "blocks.0.attn.qkv.bias", "pos_embed", "head.bias"]
)
def test_an_array_that_is_missing_is_named(tmp_path, lost):
    arrays = timm_arrays(**FOLDED["layer scale"])
    del arrays[lost]
    with pytest.raises(ValueError, match=f"lacks {lost}$"):
        load_vit(write(tmp_path / "a.npz", arrays))


KINDS = {
    "quantised": ({"norm.bias": np.ones(12, np.int8)}, "norm.bias is int8, expected floats"),
    "complex": ({"norm.bias": np.ones(12, complex)}, "norm.bias is complex"),
    "text": ({"norm.bias": np.array(["1.0"] * 12)}, "norm.bias is <U3"),
    "nan": ({"norm.bias": np.full(12, np.nan)}, "norm.bias holds numbers that are not finite"),
    "a head of other sizes": ({"head.bias": np.zeros(4)}, r"head.weight has the shape \[5, 12\], expected \[4, 12\]"),
    "a flat convolution": ({"patch_embed.proj.weight": draw(size=(12, 12))}, r"embedded by an array \[12, 12\]"),
    "oblong patches": ({"patch_embed.proj.weight": draw(size=(12, 3, 2, 4))}, "patch_embed.proj.weight has"),
    "a block of another width": ({"blocks.1.mlp.fc1.weight": draw(size=(21, 12))}, "blocks.1.mlp.fc1.weight has"),
    "three tokens of a kind": ({"cls_token": draw(size=(1, 3, 12))}, "cls_token has"),
    "an uneven grid": ({"pos_embed": draw(size=(1, 7, 12))}, "pos_embed holds 7 position embeddings"),
    "no class token for its position": ({"cls_token": None}, "5 position embeddings.*as it has no class token"),
    "nothing in it": ({"norm.weight": np.zeros(0)}, "has the shape"),
}


@pytest.mark.parametrize("case", KINDS)
def test_arrays_of_a_wrong_kind_are_refused(tmp_path, case):
    changes, said = KINDS[case]
    with pytest.raises(ValueError, match=said) as refused:
        load_vit(write(tmp_path / "a.npz", timm_arrays(**changes)))
    assert "a.npz" in str(refused.value)


def test_floats_without_a_name_in_numpy_are_refused(tmp_path):
    arrays = timm_arrays()
    save_file(arrays | {"norm.bias": np.ones(12, ml_dtypes.float8_e4m3fn)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors: norm.bias is F8_E4M3, expected floats of 16"):
        load_vit(tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_floats_of_other_sizes_are_read(tmp_path, kind):
    arrays = {name: x.astype(kind) for name, x in timm_arrays().items()}
    save_file(arrays, tmp_path / "a.safetensors", metadata={name: json.dumps(value) for name, value in FACTS.items()})
    scale = load_vit(tmp_path / "a.safetensors").params["norm"]["scale"]
    assert scale.dtype == np.float32
    np.testing.assert_array_equal(scale, timm_arrays()["norm.weight"].astype(kind).astype(np.float32))


def npy(shape, data=b"") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + data


def member(path, name, content, **options):
    with zipfile.ZipFile(path, "a", **options) as file:
        file.writestr(f"{name}.npy", content)


def meta(content):
    return lambda path: np.savez(path, meta=content, **timm_arrays())


def claims_too_much(path):
    np.savez(path, **timm_arrays(**{"norm.bias": None}))
    member(path, "norm.bias", npy((10**12,)))


def claims_too_much_unread(path):
    np.savez(path, **timm_arrays())
    member(path, "optimizer", npy((10**12,)))


def safetensors_that_claim_too_much(path):
    header = json.dumps({"norm.bias": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


FILES = {
    "10^12 elements": ("a.npz", claims_too_much, "'norm.bias' claims float32"),
    "10^12 elements of something else": ("a.npz", claims_too_much_unread, "another network .* optimizer"),
    "10^12 elements, safetensors": ("a.safetensors", safetensors_that_claim_too_much, "damaged"),
    "a header beyond the file": ("a.safetensors", lambda p: p.write_bytes(b"\xff" * 20), "damaged"),
    "an empty file": ("a.npz", lambda p: p.write_bytes(b""), "damaged"),
    "an empty file of safetensors": ("a.safetensors", lambda p: p.write_bytes(b""), "damaged"),
    "another kind of file": ("a.bin", lambda p: p.write_bytes(b"x"), r"expected a \.npz"),
    "no file": ("a.npz", lambda p: None, "no weight file"),
    "a folder": ("a.npz", lambda p: p.mkdir(), "no weight file"),
    "damaged meta": ("a.npz", meta("{'heads': 3}"), "expected a JSON object"),
    "a list of meta": ("a.npz", meta("[3]"), "expected a JSON object"),
    "meta that is none": ("a.npz", meta("null"), "expected a JSON object"),
    "numbers for meta": ("a.npz", meta(np.zeros(3)), r"meta is float64 \[3\]"),
    "deep meta": ("a.npz", meta("[" * 100_000), "expected a JSON object"),
    "pickled meta": ("a.npz", meta(np.array({"heads": 3}, object)), "pickled"),
    "lzma": ("a.npz", lambda p: member(p, "patch_embed.proj.weight", npy((1,), b"0000"), compression=14), "lacks"),
}


@pytest.mark.parametrize("case", FILES)
def test_damaged_and_hostile_files_are_refused_before_memory_is_taken(tmp_path, case):
    name, make, said = FILES[case]
    make(tmp_path / name)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=said) as refused:
            load_vit(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    for suffix, said in ((".npz", "truncated"), (".safetensors", "damaged")):
        whole = write(tmp_path / f"a{suffix}").read_bytes()
        for share in (0.1, 0.5, 0.99):
            (tmp_path / f"b{suffix}").write_bytes(whole[: int(share * len(whole))])
            with pytest.raises(ValueError, match=said):
                load_vit(tmp_path / f"b{suffix}")


def test_sizes_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="multiple"):
        load_vit(write(tmp_path / "a.npz"), image_size=5)
    with pytest.raises(ValueError, match="unknown ViT"):
        vit("Giant/14", 10)
    assert jnp.isfinite(load_vit(write(tmp_path / "a.npz"), image_size=8).params["pos"]).all()
