"""An adapter that leaves as PEFT's computes what it computed, put onto the published arrays by any of their names."""

import json

import jax
import numpy as np
import pytest
import test_huggingface as theirs
import test_mixer
from peft_helpers import applied, folder, random_adapter
from safetensors.numpy import load_file
from weight_helpers import FACTS, reference_forward, timm_arrays, write

from fedlora_jax import lora
from models import peft
from models.families import find
from models.huggingface import TABLES

IMAGES = theirs.IMAGES
WHOLE, BARE = ("transformers4", "transformers"), ("transformers4-bare", "transformers-bare")
LAYOUTS = (*WHOLE, *WHOLE, *BARE) * 2
EVERYTHING = ("attn/", "mlp/(fc1|fc2)/kernel")


def ours(backbone, adapter):
    return backbone.apply(backbone.params, adapter, IMAGES)[0]


def out(path, backbone, adapter, layout=None):
    chosen = backbone.layouts[layout or next(iter(backbone.layouts))]
    assert not peft.unheld(chosen, backbone.params, adapter)
    return folder(path, peft.files_of(chosen, backbone.params, adapter, {}))


@pytest.mark.parametrize("targets", ["attn/(query|value)/kernel", EVERYTHING], ids=["qv", "all"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "LayerScale"])
def test_an_adapter_of_a_vit_with_timm_names(targets, scaled, tmp_path):
    """Queries, keys and values are one layer there: a higher rank."""
    draw = np.random.default_rng(5).normal
    gains = {f"blocks.{i}.ls{j}.gamma": draw(size=12) for i in range(2) for j in (1, 2)} if scaled else {}
    arrays = timm_arrays(**gains)
    path = write(tmp_path / "vit.safetensors", arrays)
    backbone = find(None, path)(path, 5)
    adapter = random_adapter(backbone.params, targets, scale=-0.7)
    held = out(tmp_path / "a", backbone, adapter)
    merged = applied(arrays, held)
    expected = [reference_forward(merged, image, FACTS) for image in IMAGES]
    np.testing.assert_allclose(ours(backbone, adapter), expected, rtol=5e-4, atol=5e-4)
    config = json.loads((held / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["head"]
    ranks = {module: len(load_file(held / "adapter_model.safetensors")[f"{peft.PREFIX}{module}.lora_A.weight"])
             for module in config["target_modules"]}  # fmt: skip
    assert ranks.pop("blocks.0.attn.qkv") == (6 if "qu" in targets else 9)
    assert set(ranks.values()) == ({6} if "qu" in targets else {9, 3})


@pytest.mark.parametrize(("table", "layout"), list(zip(TABLES, LAYOUTS, strict=True)))
def test_an_adapter_of_a_model_of_transformers(table, layout, tmp_path):
    arrays, draw = theirs.by_hand(table), np.random.default_rng(6).normal
    arrays |= {template.format(i=i): draw(size=12) for template in table.scales.values() for i in range(2)}
    path = theirs.folder(tmp_path / "weights", arrays)
    backbone = find(None, path)(path, theirs.NAMES, keep_head=True)
    adapter = random_adapter(backbone.params, EVERYTHING, full=() if "bare" in layout else ("^head/",))
    held = out(tmp_path / "a", backbone, adapter, layout)
    merged = applied(arrays, held)
    weight = merged["classifier.weight"]
    if table.scales and "bare" not in layout:  # reads the mean of the patches as well
        assert weight.shape == (5, 24)
        assert not weight[:, 12:].any()
    merged["classifier.weight"] = weight[:, :12]
    again = theirs.folder(tmp_path / "merged", {name: np.float32(x) for name, x in merged.items()})
    read = find(None, again)(again, theirs.NAMES, keep_head=True)
    np.testing.assert_allclose(ours(backbone, adapter), ours(read, {}), rtol=5e-4, atol=5e-4)
    assert len(json.loads((held / "adapter_config.json").read_text())["target_modules"]) == 12


@pytest.mark.long
def test_an_adapter_of_a_mixer(tmp_path):
    arrays = test_mixer.written(test_mixer.TIMM)
    path = test_mixer.save(tmp_path / "mixer.safetensors", arrays)
    given = {name: test_mixer.FACTS[name] for name in ("mean", "std", "epsilon")}
    backbone = find(None, path)(path, 3, keep_head=True, **given)
    adapter = random_adapter(backbone.params, ("mlp_(tokens|channels)/(fc1|fc2)/kernel",), rank=2)
    merged = applied(arrays, out(tmp_path / "a", backbone, adapter))
    images = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    expected, _ = test_mixer.by_hand(merged, (images / 255 - given["mean"]) / given["std"])
    np.testing.assert_allclose(backbone.apply(backbone.params, adapter, images)[0], expected, rtol=5e-4, atol=5e-4)
    original = test_mixer.save(tmp_path / "original.npz", test_mixer.written(test_mixer.ORIGINAL))
    assert not find(None, original)(original, 3, **given).layouts


def test_of_a_model_that_was_cut_the_last_blocks_alone_are_named(tmp_path):
    arrays = timm_arrays()
    path = write(tmp_path / "vit.safetensors", arrays)
    whole = find(None, path)(path, 5)
    stem, top = whole.cut(1)
    adapter = random_adapter(top.params, EVERYTHING)
    held = out(tmp_path / "a", top, adapter)
    merged = applied(arrays, held)
    expected = [reference_forward(merged, image, FACTS) for image in IMAGES]
    tokens = stem.apply(stem.params, IMAGES)
    np.testing.assert_allclose(top.apply(top.params, adapter, tokens)[0], expected, rtol=5e-4, atol=5e-4)
    modules = json.loads((held / "adapter_config.json").read_text())["target_modules"]
    assert {name.split(".")[1] for name in modules} == {"1"}


def test_a_client_of_a_smaller_rank_leaves_at_its_rank(tmp_path):
    path = write(tmp_path / "vit.safetensors")
    backbone = find(None, path)(path, 5)
    adapter = random_adapter(backbone.params, "attn/out/kernel")
    mask = lora.rank_mask(adapter, np.array([2]))
    smaller = jax.tree.map(lambda x, m: np.asarray(x * m[0]), adapter, mask)
    config = json.loads((out(tmp_path / "a", backbone, smaller) / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 3.0)
    assert applied(timm_arrays(), tmp_path / "a").keys() == timm_arrays().keys()


def test_what_peft_cannot_hold_is_named(tmp_path):
    gains = {f"blocks.{i}.ls1.gamma": np.float32([0, *[1] * 11]) for i in range(2)}
    path = write(tmp_path / "vit.safetensors", timm_arrays(**gains))
    backbone = find(None, path)(path, 5)
    layout = backbone.layouts["timm"]
    held = lambda *given: peft.unheld(layout, backbone.params, random_adapter(backbone.params, *given))
    assert held("mlp/fc1/kernel", ("^head/",)) == []
    assert held("mlp/fc1/kernel", ("norm", "^cls$", "fc2/bias")) == [
        "blocks/mlp/fc2/bias", "blocks/norm1/bias", "blocks/norm1/scale", "blocks/norm2/bias", "blocks/norm2/scale",
        "cls", "norm/bias", "norm/scale",
    ]  # fmt: skip
    assert held("attn/out/kernel") == ["blocks/attn/out/kernel"]  # its first output is multiplied by 0 there
    assert held("embed/kernel") == ["embed/kernel"]  # a convolution there
    assert held("head/kernel", ("head/bias",)) == ["head/bias"]
