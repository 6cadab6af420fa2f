"""Weights of Hugging Face transformers: the network of the definition, in every layout, or one line that refuses."""

import json

import ml_dtypes
import numpy as np
import pytest
from input_helpers import SMALL, change
from safetensors.numpy import save_file
from weight_helpers import FACTS, reference_forward, timm_arrays

from experiments.cli import parse
from experiments.commands.compare import Plan
from fedlora_jax.lora import flatten
from models import huggingface, tables
from models.huggingface import TABLES
from models.pretrained import load_vit, vit_backbone
from models.vit import normalise

NAMES = ("cat", "dog", "eel", "fox", "gnu")
CONFIG = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "patch_size": 2,
    "layer_norm_eps": 1e-3,
    "hidden_act": "gelu",
    "id2label": {str(i): name for i, name in enumerate(NAMES)},
}
PROCESSOR = {"image_mean": FACTS["mean"], "image_std": FACTS["std"], "rescale_factor": 1 / 255}
IMAGES = np.random.default_rng(1).integers(0, 256, (3, 4, 4, 3)).astype(np.uint8)
LOGITS = [reference_forward(timm_arrays(), image, FACTS) for image in IMAGES]


def by_hand(table):
    """The random network of ``timm_arrays`` under transformers' names, renamed and cut here by hand."""
    layers = {ours.removeprefix("blocks/"): name for ours, name in table.block.items()}
    timm = {"attn/out": "attn.proj", "mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2", "norm1": "norm1", "norm2": "norm2"}
    arrays, out = timm_arrays(), {}
    tops = {"embed": "patch_embed.proj", "norm": "norm", "head": "head"}
    for kind in ("weight", "bias"):
        out |= {f"{table.top[ours]}.{kind}": arrays[f"{name}.{kind}"] for ours, name in tops.items()}
        for i in range(2):
            out |= {f"{layers[o].format(i=i)}.{kind}": arrays[f"blocks.{i}.{n}.{kind}"] for o, n in timm.items()}
            for part, x in zip(
                ("query", "key", "value"), np.split(arrays[f"blocks.{i}.attn.qkv.{kind}"], 3), strict=True
            ):
                out[f"{layers[f'attn/{part}'].format(i=i)}.{kind}"] = x
            for template in table.scales.values():
                out[template.format(i=i)] = np.ones(12, np.float32)
    return out | {table.tokens["cls"]: arrays["cls_token"], table.tokens["pos"]: arrays["pos_embed"]}


def folder(path, arrays, config=CONFIG, processor=PROCESSOR):
    path.mkdir(exist_ok=True)
    save_file(
        {name: np.ascontiguousarray(x) for name, x in arrays.items()}, path / "model.safetensors", {"format": "pt"}
    )
    (path / "config.json").write_text(json.dumps(config))
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


def sharded(path, arrays, config=CONFIG):
    folder(path, arrays, config)
    (path / "model.safetensors").unlink()
    names = sorted(arrays)
    where = {name: f"model-0000{1 + (i > 9)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: np.ascontiguousarray(arrays[name]) for name in names if where[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return path


def logits(loaded):
    x = normalise(IMAGES, loaded.mean, loaded.std)
    return loaded.model.apply({"params": loaded.params}, x)[0]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: next(iter(table.block.values())))
def test_the_network_is_that_of_the_definition(table, tmp_path):
    loaded = load_vit(folder(tmp_path / "vit.tiny", by_hand(table)), NAMES)  # warnings are errors: nothing is guessed
    np.testing.assert_allclose(logits(loaded), LOGITS, rtol=5e-4, atol=5e-4)
    assert loaded.name == "vit.tiny"
    assert loaded.origins["head"] == "kept, for these classes"
    assert loaded.facts()["mean"] == "0.1,0.2,0.3 (preprocessor_config.json)"


@pytest.mark.parametrize("table", TABLES, ids=lambda table: next(iter(table.block.values())))
def test_what_is_written_is_what_was_read(table, tmp_path):
    arrays = by_hand(table)
    params = load_vit(folder(tmp_path / "a", arrays)).params
    written = tables.write_params(table, params, 2)
    assert written.keys() == arrays.keys()
    for name, x in written.items():
        np.testing.assert_array_equal(x, arrays[name])


@pytest.mark.parametrize("table", TABLES, ids=lambda table: next(iter(table.block.values())))
def test_weights_leave_as_a_folder_that_is_read_again(table, tmp_path):
    """With a classifier, whatever they came as; what files beside them say is enough, and theirs are not asked."""
    made = vit_backbone(folder(tmp_path / "a", by_hand(table)), NAMES)
    published = made.publish(made.params)
    path = folder(tmp_path / "b", published.arrays, *map(json.loads, published.beside.values()))
    again = load_vit(path, NAMES)
    np.testing.assert_allclose(logits(again), LOGITS, rtol=5e-4, atol=5e-4)
    assert again.origins["head"] == "kept, for these classes"
    assert again.origins["epsilon"] == "config.json"
    prefix = json.loads(published.beside["config.json"])["model_type"]
    own = table.top["embed"].partition(".")[0]
    assert prefix == (own if own != "embeddings" else "dinov2" if table.scales else "vit")
    assert all(name.startswith((f"{prefix}.", "classifier.")) for name in published.arrays)


def test_shards_are_read_together_and_apart(tmp_path):
    whole = load_vit(folder(tmp_path / "a", by_hand(TABLES[0])))
    for path in (tmp_path / "b", tmp_path / "b" / "model.safetensors.index.json"):
        parts = load_vit(sharded(tmp_path / "b", by_hand(TABLES[0])) if path.is_dir() or not path.exists() else path)
        for name, x in flatten(parts.params).items():
            np.testing.assert_array_equal(x, flatten(whole.params)[name])


def test_a_layer_scale_multiplies_what_its_layer_puts_out(tmp_path):
    """As timm's does, in the same network."""
    draw, table = np.random.default_rng(3).normal, huggingface.DINOV2
    scales = {(i, j): draw(size=12).astype(np.float32) for i in range(2) for j in (1, 2)}
    timm = timm_arrays(**{f"blocks.{i}.ls{j}.gamma": x for (i, j), x in scales.items()})
    arrays = by_hand(table)
    for (i, j), x in scales.items():
        arrays[f"dinov2.encoder.layer.{i}.layer_scale{j}.lambda1"] = x
    arrays["dinov2.embeddings.mask_token"] = draw(size=(1, 12)).astype(np.float32)
    expected = [reference_forward(timm, image, FACTS) for image in IMAGES]
    np.testing.assert_allclose(logits(load_vit(folder(tmp_path / "a", arrays))), expected, rtol=5e-4, atol=5e-4)


def test_a_classifier_of_dinov2_reads_the_class_token_and_the_mean(tmp_path):
    """A new head for other classes does, too; nothing beside the file may say otherwise."""
    head, table = np.random.default_rng(4).normal(size=(5, 24)).astype(np.float32), huggingface.DINOV2
    path = folder(tmp_path / "a", {**by_hand(table), "classifier.weight": head})
    both = {**FACTS, "pool": "cls_mean"}
    expected = [reference_forward(timm_arrays(**{"head.weight": head}), image, both) for image in IMAGES]
    loaded = load_vit(path, NAMES)
    np.testing.assert_allclose(logits(loaded), expected, rtol=5e-4, atol=5e-4)
    assert loaded.facts()["pool"] == "cls_mean (as its format implies)"
    assert load_vit(path, 2).params["head"]["kernel"].shape == (24, 2)
    with pytest.raises(ValueError, match="a head that reads the class token and the mean"):
        load_vit(folder(path, {**by_hand(table), "classifier.weight": head}, {**CONFIG, "global_pool": "token"}))
    with pytest.raises(ValueError, match="a head that reads the class token alone"):
        load_vit(folder(path, by_hand(table), {**CONFIG, "pool": "cls_mean"}))


def test_a_bias_that_is_not_there_is_zero_and_a_pooler_is_not_read(tmp_path):
    arrays = by_hand(TABLES[0])
    zero = {
        name: 0 * x if ".attention.attention." in name and name.endswith("bias") else x for name, x in arrays.items()
    }
    without = {name: x for name, x in zero.items() if x.any()}
    assert len(without) == len(arrays) - 6
    without |= {
        "vit.pooler.dense.weight": np.eye(12, dtype=np.float32),
        "vit.pooler.dense.bias": np.ones(12, np.float32),
    }
    found = logits(load_vit(folder(tmp_path / "a", without)))
    np.testing.assert_allclose(found, logits(load_vit(folder(tmp_path / "b", zero))), rtol=1e-6)


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_short_floats_are_read(kind, tmp_path):
    arrays = {name: x.astype(kind) for name, x in by_hand(TABLES[0]).items()}
    kernel = load_vit(folder(tmp_path / "a", arrays)).params["head"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel.T, timm_arrays()["head.weight"].astype(kind).astype(np.float32))


def test_a_patch_may_have_two_sides_in_config_json(tmp_path):
    path = folder(tmp_path / "a", by_hand(TABLES[0]), {**CONFIG, "patch_size": [2, 2]})
    assert load_vit(path).model.patch == 2
    folder(path, by_hand(TABLES[0]), {**CONFIG, "patch_size": [4, 4]})
    with pytest.raises(ValueError, match=r"patch_size is \[4, 4\] \(config\.json\), expected 2"):
        load_vit(path)


def test_no_head_is_a_new_one(tmp_path):
    arrays = {name: x for name, x in by_hand(TABLES[2]).items() if "classifier" not in name}
    loaded = load_vit(folder(tmp_path / "a", arrays), NAMES, image_size=8)
    assert loaded.origins["head"] == "new, the file has none"
    assert loaded.params["pos"].shape == (17, 12)


def without(*parts):
    return lambda arrays: [arrays.pop(name) for name in list(arrays) if all(part in name for part in parts)]


def put(name, x):
    return lambda arrays: arrays.update({name: x})


BAD = {
    "a missing array": (
        without("layer.1.layernorm_after.bias"),
        r"it lacks vit\.encoder\.layer\.1\.layernorm_after\.bias",
    ),
    "half a block": (without("layer.1.", "dense"), r"it lacks .* and 3 more"),
    "half the layers": (without("layer.1."), r"num_hidden_layers is 2 \(config\.json\), expected 1"),
    "half a head": (without("classifier.bias"), r"it lacks classifier\.bias"),
    "registers": (put("vit.embeddings.register_tokens", np.ones((1, 4, 12))), "it has vit.embeddings.register_tokens"),
    "distillation": (
        put("vit.embeddings.distillation_token", np.ones((1, 1, 12))),
        "DeiT with a token for distillation",
    ),
    "another head": (
        put("classifier.weight", np.ones((5, 24))),
        r"classifier.weight has the shape \[5, 24\], expected",
    ),
    "an uneven grid": (
        put("vit.embeddings.position_embeddings", np.ones((1, 7, 12))),
        "holds 7 position embeddings",
    ),
    "a flat convolution": (put("vit.embeddings.patch_embeddings.projection.weight", np.ones((12, 12))), "not a ViT"),
    "NaN": (put("vit.layernorm.bias", np.full(12, np.nan)), "not finite"),
    "int8": (put("vit.layernorm.bias", np.ones(12, np.int8)), "int8, expected floats"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_such_vit_is_refused_by_name(case, tmp_path):
    damage, said = BAD[case]
    arrays = by_hand(TABLES[0])
    damage(arrays)
    with pytest.raises(ValueError, match=said) as refused:
        load_vit(folder(tmp_path / "a", arrays))
    assert "\n" not in str(refused.value)


FOLDERS = {
    "another activation": (
        lambda p: folder(p, by_hand(TABLES[0]), {**CONFIG, "hidden_act": "relu"}),
        r"act \(config\.json\) is 'relu', which would be another network",
    ),
    "an uneven grid of as many patches": (
        lambda p: folder(p, by_hand(TABLES[0]), {**CONFIG, "image_size": [2, 8]}),
        r"image_size is \[2, 8\] \(config\.json\), expected 4 or \[4, 4\]",
    ),
    "a missing shard": (lambda p: next(sharded(p, by_hand(TABLES[0])).glob("*2.safetensors")).unlink(), "fetch it too"),
    "no index": (
        lambda p: (sharded(p, by_hand(TABLES[0])) / "model.safetensors.index.json").write_text("[]"),
        "weight_map",
    ),
    "a shard cut short": (
        lambda p: next(sharded(p, by_hand(TABLES[0])).glob("*2.safetensors")).write_bytes(b"\xff" * 20),
        "damaged",
    ),
    "an index of another file": (
        lambda p: save_file({"x": np.ones(1)}, next(sharded(p, by_hand(TABLES[0])).glob("*2.safetensors"))),
        "which lacks it",
    ),
    "a pickle": (
        lambda p: (p.mkdir(), (p / "pytorch_model.bin").write_bytes(b"x")),
        'convert it: python -c "import sys',
    ),
    "nothing": (lambda p: p.mkdir(), r"no weight file .* a folder with model\.safetensors"),
}


def test_grey_images_are_not_those_here(tmp_path):
    grey = {"vit.embeddings.patch_embeddings.projection.weight": np.ones((12, 1, 2, 2), np.float32)}
    path = folder(tmp_path / "a", {**by_hand(TABLES[0]), **grey}, processor={"image_mean": [0.5], "image_std": [0.5]})
    assert load_vit(path).mean.shape == (1,)
    with pytest.raises(ValueError, match="images of 1 channel"):
        vit_backbone(path, NAMES)


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_of_another_kind_are_refused(case, tmp_path):
    make, said = FOLDERS[case]
    make(tmp_path / "a")
    with pytest.raises(ValueError, match=said) as refused:
        load_vit(tmp_path / "a", 5)
    assert "\n" not in str(refused.value)


@pytest.mark.long
def test_a_folder_is_federated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    change()(tmp_path / "data.npz")
    sharded(tmp_path / "tiny", by_hand(TABLES[0]))
    options = [*SMALL, "--data", "data.npz", "--weights", "tiny", "--rank", "2", "--out", "out"]
    plan = Plan(*parse(["compare", "--methods", "fedit", *options]))
    assert "weights tiny: mean 0.1,0.2,0.3 (preprocessor_config.json)" in capsys.readouterr().err
    plan.execute()
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows
    assert all(np.isfinite(row["loss"]) for row in rows)
