"""ViTs that are not plain: the network of the definition, read, cut, and written again."""

import jax
import numpy as np
import pytest
from weight_helpers import FACTS, reference_forward, timm_arrays, write

from experiments.setup.backbone import NANO
from fedlora_jax.lora import flatten
from models import original, tables
from models.parts import ACTIVATIONS, attend, split_blocks
from models.pretrained import load_vit, vit_backbone
from models.vit import ViT, normalise

draw = np.random.default_rng(7).normal
IMAGES = np.random.default_rng(1).integers(0, 256, (2, 4, 4, 3)).astype(np.uint8)
NO_NORM = {"norm.weight": None, "norm.bias": None}
FC_NORM = {**NO_NORM, "fc_norm.weight": draw(size=12), "fc_norm.bias": draw(size=12)}
PRE = {"norm_pre.weight": draw(size=12), "norm_pre.bias": draw(size=12), "patch_embed.proj.bias": None}
OF_PATCHES = {"pos_embed": draw(size=(1, 4, 12))}
# what differs from a plain ViT in arrays, and what the file then says
VARIANTS = {
    "MAE: norm of the mean": (FC_NORM, {}),
    "mean of the normalised": ({}, {"global_pool": "avg", "pool": "mean"}),
    "no class token": ({"cls_token": None, **OF_PATCHES}, {"pool": "mean"}),
    "no class token, norm of the mean": ({"cls_token": None, **OF_PATCHES, **FC_NORM}, {}),
    "DINOv2: registers": ({"reg_token": draw(size=(1, 3, 12)), **OF_PATCHES}, {}),
    "registers with positions": ({"reg_token": draw(size=(1, 2, 12)), "pos_embed": draw(size=(1, 7, 12))}, {}),
    "registers, no class token": ({"cls_token": None, "reg_token": draw(size=(1, 2, 12)), **OF_PATCHES}, {}),
    "CLIP: norm before, quick GELU": (PRE, {"act": "quick_gelu"}),
    "OpenCLIP: norm before": (PRE, {"act": "gelu"}),
    "GELU by tanh": ({}, {"act": "gelu_tanh"}),
}


def logits(backbone):
    return np.asarray(backbone.apply(backbone.params, {}, IMAGES)[0])


@pytest.mark.parametrize("case", VARIANTS)
def test_a_variant_is_the_network_of_the_definition_and_goes_out_as_it_is(case, tmp_path):
    """Read, and written with the facts of it, and read again: the same logits."""
    changes, said = VARIANTS[case]
    arrays, facts = timm_arrays(**changes), {**FACTS, **said}
    made = vit_backbone(write(tmp_path / "a.safetensors", arrays, facts))
    expected = [reference_forward(arrays, image, facts) for image in IMAGES]
    np.testing.assert_allclose(logits(made), expected, rtol=1e-3, atol=1e-3)
    published = made.publish(made.params)
    assert published.arrays.keys() == arrays.keys()
    again = vit_backbone(write(tmp_path / "b.safetensors", published.arrays, published.said))
    np.testing.assert_allclose(logits(again), expected, rtol=1e-3, atol=1e-3)
    assert {fact: published.said.get(fact, value) for fact, value in said.items()} == said


@pytest.mark.long
def test_a_variant_is_cut_in_two():
    """Registers, mean and the norm before are on their sides of the cut; features have length 1 behind a projection."""
    model = ViT(3, 2, 12, 2, 3, 20, pool="norm_of_mean", registers=2, norm_pre=True, act="quick_gelu", projection=6)
    x = normalise(IMAGES, 0.5, 0.5)
    params = jax.tree.map(lambda x: x + 0.1, model.init(jax.random.key(0), x)["params"])
    expected, out = model.apply({"params": params}, x)
    (stem, before), (top, rest) = split_blocks(model, params, 1)
    assert {"registers", "norm_pre"} <= before.keys()
    assert {"projection", "norm", "head", "blocks"} == rest.keys()
    found, _ = top.apply({"params": rest}, stem.apply({"params": before}, x)[0])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(out["features"], axis=-1), 1, rtol=1e-5)


def test_a_causal_token_sees_nothing_behind_it_and_its_derivative_neither():
    q, k, v = draw(size=(3, 2, 5, 4)).astype(np.float32)
    scores = np.where(np.tri(5, dtype=bool), np.float64(q) @ np.float64(k).swapaxes(-1, -2) / 2, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(attend(q, k, v, True), p / p.sum(-1, keepdims=True) @ v, rtol=1e-5, atol=1e-5)
    third = jax.grad(lambda *x: attend(*x, True)[:, 2].sum(), (0, 1, 2))(q, k, v)
    plain = jax.grad(lambda q, k, v: attend(q[:, 2:3], k[:, :3], v[:, :3]).sum(), (0, 1, 2))(q, k, v)
    for a, b in zip(third, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_quick_gelu_and_the_approximation_are_what_they_are():
    x = np.linspace(-4, 4, 9)
    np.testing.assert_allclose(ACTIVATIONS["quick_gelu"](x), x / (1 + np.exp(-1.702 * x)), rtol=1e-5, atol=1e-6)
    tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(ACTIVATIONS["gelu_tanh"](x), tanh, rtol=1e-5, atol=1e-6)


def test_a_norm_before_the_blocks_needs_an_activation(tmp_path):
    """OpenAI's towers have another than OpenCLIP's, under the same names."""
    path = write(tmp_path / "a.safetensors", timm_arrays(**PRE))
    with pytest.raises(ValueError, match="does not say whether its activation is gelu or quick_gelu"):
        load_vit(path)
    write(path, timm_arrays(**PRE), None, config={**FACTS, "model_args": {"act_layer": "quick_gelu"}})
    loaded = load_vit(path)
    assert loaded.model.act == "quick_gelu"
    assert loaded.facts()["act"] == "quick_gelu (config.json)"


@pytest.mark.parametrize(
    ("changes", "said", "why"),
    [
        ({"cls_token": None, **OF_PATCHES}, {"pool": "token"}, "said to be 'cls' .*no class token"),
        ({**PRE, "norm_pre.bias": None}, {"act": "gelu"}, r"lacks norm_pre\.bias"),
        ({"reg_token": draw(size=(1, 2, 11))}, {}, r"reg_token has the shape \[1, 2, 11\], expected \[1, 2, 12\]"),
        ({"reg_token": draw(size=(1, 2, 12)), **OF_PATCHES}, {"reg_tokens": 4}, "reg_tokens is 4 .*expected 2"),
    ],
)
def test_variants_that_do_not_fit_are_refused(changes, said, why, tmp_path):
    with pytest.raises(ValueError, match=why) as refused:
        load_vit(write(tmp_path / "a.npz", timm_arrays(**changes), {**FACTS, **said}))
    assert "\n" not in str(refused.value)


def by_hand(prefix="", numbers=(0, 1, 2, 3), pos="Transformer/posembed_input/pos_embedding"):
    """The random network of ``timm_arrays`` in the layout of its original, renamed and cut here by hand."""
    arrays = timm_arrays()
    norm1, attention, norm2, mlp = numbers
    out = {
        "embedding/kernel": arrays["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": arrays["patch_embed.proj.bias"],
        "cls": arrays["cls_token"],
        pos: arrays["pos_embed"],
        "Transformer/encoder_norm/scale": arrays["norm.weight"],
        "Transformer/encoder_norm/bias": arrays["norm.bias"],
        "head/kernel": arrays["head.weight"].T,
        "head/bias": arrays["head.bias"],
    }
    for i in range(2):
        block, theirs = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        for j, name in ((norm1, "norm1"), (norm2, "norm2")):
            out[f"{block}/LayerNorm_{j}/scale"] = arrays[f"{theirs}.{name}.weight"]
            out[f"{block}/LayerNorm_{j}/bias"] = arrays[f"{theirs}.{name}.bias"]
        heads = f"{block}/MultiHeadDotProductAttention_{attention}"
        qkv = (np.split(arrays[f"{theirs}.attn.qkv.{kind}"], 3) for kind in ("weight", "bias"))
        for part, weight, bias in zip(("query", "key", "value"), *qkv, strict=True):
            out[f"{heads}/{part}/kernel"], out[f"{heads}/{part}/bias"] = weight.T.reshape(12, 3, 4), bias.reshape(3, 4)
        out[f"{heads}/out/kernel"] = arrays[f"{theirs}.attn.proj.weight"].T.reshape(3, 4, 12)
        out[f"{heads}/out/bias"] = arrays[f"{theirs}.attn.proj.bias"]
        for j in (0, 1):
            dense = f"{block}/MlpBlock_{mlp}/Dense_{j}"
            out[f"{dense}/kernel"] = arrays[f"{theirs}.mlp.fc{j + 1}.weight"].T
            out[f"{dense}/bias"] = arrays[f"{theirs}.mlp.fc{j + 1}.bias"]
    return {f"{prefix}{name}": x for name, x in out.items()}


BIG_VISION = {"numbers": (0, 0, 1, 0), "pos": "pos_embedding"}
ORIGINALS = {
    "vision_transformer": ({}, original.ORIGINAL),
    "big_vision": ({"prefix": "params/", **BIG_VISION}, original.BIG_VISION[0]),
    "big_vision, bare": (BIG_VISION, original.BIG_VISION[1]),
}


@pytest.mark.parametrize("case", ORIGINALS)
def test_the_original_files_are_the_network_and_come_back(case, tmp_path):
    """Heads, epsilon and activation are what flax computes; how images are shown, what the first repository does."""
    layout, table = ORIGINALS[case]
    arrays = by_hand(**layout)
    np.savez(tmp_path / "a.npz", **arrays)
    shown = {} if table is original.ORIGINAL else {"mean": [0.5] * 3, "std": [0.5] * 3}
    loaded = load_vit(tmp_path / "a.npz", **shown)
    assert (loaded.model.heads, loaded.model.act, loaded.model.epsilon) == (3, "gelu_tanh", 1e-6)
    assert loaded.facts()["heads"] == "3 (as its format implies)"
    facts = {"mean": [0.5] * 3, "std": [0.5] * 3, "heads": 3, "ln_eps": 1e-6, "act": "gelu_tanh"}
    expected = [reference_forward(timm_arrays(), image, facts) for image in IMAGES]
    found, _ = loaded.model.apply({"params": loaded.params}, normalise(IMAGES, loaded.mean, loaded.std))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    written = tables.write_params(table._replace(heads=3), loaded.params, 2)
    assert written.keys() == arrays.keys()
    for name, x in written.items():
        np.testing.assert_array_equal(x, arrays[name])


def without(part):
    return lambda arrays: {name: x for name, x in arrays.items() if part not in name}


ATTENTION = "Transformer/encoderblock_0/MultiHeadDotProductAttention_1"
BAD = {
    "a layer before the head": (
        lambda a: {**a, "pre_logits/kernel": np.ones((12, 12)), "pre_logits/bias": np.ones(12)},
        "has pre_logits/bias, pre_logits/kernel .*layer between features and head",
    ),
    "pooled by attention": (lambda a: {**a, "MAPHead_0/probe": np.ones((1, 1, 12))}, "pooled by attention"),
    "a ResNet before": (lambda a: {**a, "conv_root/kernel": np.ones((7, 7, 3, 12))}, "patches are those of a ResNet"),
    "half a block": (without("encoderblock_1/Mlp"), "lacks Transformer/encoderblock_1/MlpBlock_3/Dense_0"),
    "no positions": (without("pos_embedding"), "lacks Transformer/posembed_input/pos_embedding"),
    "other heads": (
        lambda a: {**a, f"{ATTENTION}/key/kernel": a[f"{ATTENTION}/key/kernel"].reshape(12, 4, 3)},
        r"key/kernel has the shape \[12, 4, 3\], expected \[12, 3, 4\]",
    ),
    "no heads": (
        lambda a: {**a, f"{ATTENTION}/query/kernel": a[f"{ATTENTION}/query/kernel"].reshape(12, 12)},
        r"its queries by one \[12, 12\]",
    ),
    "NaN": (lambda a: {**a, "cls": a["cls"] * np.nan}, "cls holds numbers that are not finite"),
    "int8": (lambda a: {**a, "cls": a["cls"].astype(np.int8)}, "cls is int8, expected floats"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_original_vit_is_refused_by_name(case, tmp_path):
    damage, said = BAD[case]
    np.savez(tmp_path / "a.npz", **damage(by_hand()))
    with pytest.raises(ValueError, match=said) as refused:
        load_vit(tmp_path / "a.npz")
    assert "\n" not in str(refused.value)


def test_heads_of_the_original_cannot_be_others(tmp_path):
    np.savez(tmp_path / "a.npz", **by_hand())
    with pytest.raises(ValueError, match=r"heads is 4 .*expected 3"):
        load_vit(tmp_path / "a.npz", heads=4)


def test_a_variant_has_the_parameters_of_its_names_alone(tmp_path):
    plain = flatten(load_vit(write(tmp_path / "a.npz")).params).keys()
    clip = flatten(load_vit(write(tmp_path / "b.npz", timm_arrays(**PRE), {**FACTS, "act": "gelu"})).params).keys()
    assert clip - plain == {"norm_pre/scale", "norm_pre/bias"}
    assert plain <= clip


@pytest.mark.long
def test_prompts_are_tokens_that_nothing_reads_and_all_attend_to():
    """As a ViT with registers of these values; where none are asked for the model is as it was."""
    plain, made, read = vit_backbone(NANO, 10), vit_backbone(NANO, 10, context="4"), load_vit(NANO, 10)
    assert flatten(made.params).keys() - flatten(plain.params).keys() == {"registers"}
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    _, expected = read.model.clone(registers=4).apply({"params": made.params}, normalise(images, read.mean, read.std))
    out = made.apply(made.params, {}, images)[1]
    np.testing.assert_allclose(out, expected["features"], rtol=1e-4, atol=1e-5)
    assert np.abs(out - plain.apply(plain.params, {}, images)[1]).max() > 1e-4
    loss = lambda prompts: (made.apply(made.params, {"registers": prompts}, images, training=True)[1] ** 3).sum()
    assert np.abs(jax.grad(loss)(np.zeros((4, 64), np.float32))).max() > 1e-4
    for asked in ("0", "1001", "a photo", "-1"):
        with pytest.raises(ValueError, match="1 to 1000 prompts"):
            vit_backbone(NANO, 10, context=asked)
