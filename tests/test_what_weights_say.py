"""Normalisation, heads, epsilon and classes of foreign weights: found where they stand, or guessed aloud."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weight_helpers import FACTS, reference_forward, timm_arrays, write

from experiments.commands import budget
from experiments.config import Config
from experiments.results.folder import Folder
from experiments.setup import backbone
from models.pretrained import load_vit, to_timm
from models.vit import ViT, normalise

NORMAL = {key: FACTS[key] for key in ("mean", "std")}
REST = {"num_attention_heads": 3, "layer_norm_eps": 1e-3}
# what the file says of itself, and what files beside it say
SAID = {
    "meta": (FACTS, {}),
    "config.json of timm": (
        None,
        {
            "config": {
                "architecture": "vit_small_mine",
                "num_classes": 5,
                "global_pool": "token",
                "pretrained_cfg": {**NORMAL, "input_size": [3, 4, 4], "head": "head"},
                "model_args": {"num_heads": 3, "ln_eps": 1e-3, "embed_dim": 12},
            }
        },
    ),
    "older config.json of timm": (None, {"config": {**NORMAL, "num_heads": 3, "epsilon": 1e-3, "head": "head"}}),
    "files of transformers": (
        None,
        {
            "config": {**REST, "hidden_size": 12, "hidden_act": "gelu", "id2label": {"0": "a"}},
            "preprocessor_config": {
                "image_mean": NORMAL["mean"],
                "image_std": NORMAL["std"],
                "rescale_factor": 1 / 255,
            },
        },
    ),
}


def logits(pretrained, image):
    x = normalise(image[None], pretrained.mean, pretrained.std)
    return pretrained.model.apply({"params": pretrained.params}, x)[0][0]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("said", [*SAID, "arguments"])
def test_wherever_it_stands_the_network_is_that_of_the_definition(tmp_path, suffix, said):
    arrays, image = timm_arrays(), np.random.default_rng(1).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    inside, beside = SAID.get(said, (None, {}))
    path = write(tmp_path / f"tiny{suffix}", arrays, inside, **beside)
    given = {**NORMAL, "heads": 3, "epsilon": 1e-3} if said == "arguments" else {}
    tiny = load_vit(path, **given)  # warnings are errors: nothing is guessed
    np.testing.assert_allclose(logits(tiny, image), reference_forward(arrays, image, FACTS), rtol=2e-4, atol=2e-4)


@pytest.mark.long
def test_a_width_of_128_with_four_heads_has_four(tmp_path):
    """Timm's convention would make two of it."""
    model = ViT(classes=3, patch=4, width=128, depth=1, heads=4, mlp_width=64, epsilon=1e-12)
    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    config = {"hidden_size": 128, "num_attention_heads": 4, "layer_norm_eps": 1e-12}
    path = write(tmp_path / "model.safetensors", to_timm(params), None, config=config, preprocessor_config=NORMAL)
    loaded = load_vit(path).model
    assert (loaded.heads, loaded.epsilon) == (4, 1e-12)


def test_who_goes_before_whom(tmp_path):
    """Each source is believed where those before it are silent."""
    of = lambda i: {"mean": [i / 10] * 3, "std": [i / 10] * 3}
    beside = {
        "config": {"architecture": "x", **of(3)},
        "preprocessor_config": {"image_mean": [0.4] * 3, "image_std": [0.4] * 3},
    }
    rest = {"heads": 3, "ln_eps": 1e-3}
    path = write(tmp_path / "tiny.npz", None, {**rest, **of(2)}, **beside)
    with pytest.warns(UserWarning, match=r"mean 0.1,0.1,0.1 is given, and tiny.npz says 0.2,0.2,0.2: the given one is"):
        first = load_vit(path, mean=of(1)["mean"], std=of(2)["std"])
    assert first.facts()["mean"] == "0.1,0.1,0.1 (given)"
    assert load_vit(path).facts()["mean"] == "0.2,0.2,0.2 (tiny.npz)"
    with pytest.warns(UserWarning, match="heads 4 is given, and tiny.npz says 3"):
        assert load_vit(path, heads=4).model.heads == 4
    with pytest.warns(UserWarning, match=r"std 0.7,0.7,0.7 is given"):
        assert load_vit(path, std=[0.7] * 3).facts()["mean"] == "0.2,0.2,0.2 (tiny.npz)"
    write(path, None, rest, **beside)
    third = load_vit(path)
    assert third.facts()["std"] == "0.3,0.3,0.3 (config.json)"
    np.testing.assert_allclose(third.std, 0.3, rtol=1e-6)
    (tmp_path / "config.json").unlink()
    assert load_vit(path).facts()["std"] == "0.4,0.4,0.4 (preprocessor_config.json)"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False, "image_mean": [0.4] * 3}))
    plain = load_vit(path)
    assert (plain.mean.tolist(), plain.std.tolist()) == ([0, 0, 0], [1, 1, 1])


def named_for(width: int, architecture: str, path):
    """A file of that width, with a config.json that names an architecture and the normalisation."""
    arrays = {}
    for name, x in timm_arrays().items():
        shape = [{12: width, 36: 3 * width}.get(n, n) for n in x.shape]
        arrays[name] = np.zeros(shape, np.float32)
    return write(path, arrays, None, config={"architecture": architecture, "pretrained_cfg": NORMAL})


def test_a_known_architecture_says_heads_and_epsilon(tmp_path):
    tiny = load_vit(named_for(192, "deit_tiny_patch16_224.fb_in1k", tmp_path / "a.safetensors"))
    assert (tiny.model.heads, tiny.model.epsilon) == (3, 1e-6)
    huge = load_vit(named_for(1280, "vit_huge_patch14_224", tmp_path / "b.safetensors"))
    assert huge.model.heads == 16  # timm's 64 per head would make 20
    with pytest.raises(ValueError, match=r"embed_dim is 384 .*expected 192"):
        load_vit(named_for(192, "vit_small_patch16_224", tmp_path / "c.safetensors"))
    with pytest.warns(UserWarning, match="heads 3, epsilon 1e-06 is a GUESS.* --heads --epsilon$"):
        load_vit(named_for(192, "vit_tiny_patch14_xp_224", tmp_path / "d.safetensors"))
    for name, act in (("clip", "gelu"), ("clip_quickgelu", "quick_gelu")):
        clip = load_vit(named_for(768, f"vit_base_patch32_{name}_224.openai", tmp_path / "e.safetensors"))
        assert (clip.model.heads, clip.model.epsilon, clip.model.act) == (12, 1e-5, act)


def test_what_nothing_says_is_a_guess_aloud(tmp_path):
    path = write(tmp_path / "tiny.safetensors", None, None)
    with pytest.raises(ValueError, match=r"how many attention heads.*--heads"):  # 12 is less than timm's 64 per head
        load_vit(path)
    with pytest.warns(UserWarning, match=r"mean 0.5,0.5,0.5, std 0.5,0.5,0.5, .* is a GUESS.*--mean --std --epsilon$"):
        guess = load_vit(path, heads=3)
    assert guess.facts()["std"] == "0.5,0.5,0.5 (guessed)"
    assert guess.facts()["heads"] == "3 (given)"
    with pytest.warns(UserWarning, match="does not say its epsilon,.* --epsilon$"):
        load_vit(path, heads=3, **NORMAL)


WRONG = {
    "two means": ({"mean": [0.1, 0.2]}, "expected 3 numbers"),
    "a mean of pixels": ({"mean": [123.7, 116.3, 103.5]}, "from 0 to 1"),
    "a mean of words": ({"mean": ["a", "b", "c"]}, "expected 3 numbers"),
    "one mean": ({"mean": 0.5}, "expected 3 numbers"),
    "nan": ({"mean": [float("nan")] * 3}, "from 0 to 1"),
    "no deviation": ({"std": [0.5, 0, 0.5]}, "above 0"),
    "infinite deviation": ({"std": [0.5, float("inf"), 0.5]}, "above 0"),
    "heads that do not divide": ({"heads": 5}, "the width 12 can be cut into"),
    "no heads": ({"heads": 0}, "cut into"),
    "half a head": ({"heads": 1.5}, "cut into"),
    "true heads": ({"heads": True}, "cut into"),
    "heads beyond everything": ({"heads": 10**400}, "cut into"),
    "no epsilon": ({"ln_eps": 0}, "epsilon .* is 0, expected a number above 0"),
    "epsilon as text": ({"ln_eps": "small"}, "epsilon"),
    "huge epsilon": ({"ln_eps": 10**400}, "epsilon"),
    "another activation": ({"act": "relu"}, "act .* is 'relu', which would be another network: expected gelu or"),
    "another pooling": ({"pool": "map"}, "pool .* is 'map', which would be another network: expected cls or token"),
    "a norm that is not there": ({"pool": "norm_of_mean"}, "no norm of the tokens' mean"),
    "norms behind": ({"prenorm": False}, "another network: prenorm"),
    "another width": ({"embed": 768}, "another network: embed is 768"),
}


@pytest.mark.parametrize("where", ["inside", "beside"])
@pytest.mark.parametrize("case", WRONG)
def test_values_of_a_wrong_kind_and_other_networks_are_refused(tmp_path, case, where):
    wrong, said = WRONG[case]
    inside, beside = (FACTS | wrong, {}) if where == "inside" else (None, {"config": FACTS | wrong})
    path = write(tmp_path / "a.npz", None, inside, **beside)
    with pytest.raises(ValueError, match=said) as refused:
        load_vit(path)
    assert ("a.npz" if where == "inside" else "config.json") in str(refused.value)
    given = {"epsilon" if name == "ln_eps" else name: value for name, value in wrong.items()}
    if given.keys() <= {"mean", "std", "heads", "epsilon"}:
        with pytest.raises(ValueError, match="given"):
            load_vit(write(tmp_path / "b.npz"), **given)


@pytest.mark.parametrize("name", ["config", "preprocessor_config"])
@pytest.mark.parametrize("content", ["{", "[]", "null", "\xff", "[" * 100_000])
def test_damaged_files_beside_the_weights_are_refused(tmp_path, name, content):
    path = write(tmp_path / "a.npz")
    (tmp_path / f"{name}.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"{name}\.json, which tells of the weights"):
        load_vit(path)


def test_what_is_saved_with_a_tokenizer_goes_before_what_is_saved_alone(tmp_path):
    """As ``AutoImageProcessor`` of transformers 5 has it, whose ``CLIPProcessor`` saves nothing else."""
    processor = {"image_mean": [0.1] * 3, "image_std": [0.2] * 3}
    alone = {"image_mean": [0.3] * 3, "image_std": [0.4] * 3}
    both = {"processor_config": {"image_processor": processor, "processor_class": "CLIPProcessor"}}
    path = write(tmp_path / "a.npz", None, {"heads": 3, "ln_eps": 1e-3}, preprocessor_config=alone, **both)
    assert load_vit(path).facts()["mean"] == "0.1,0.1,0.1 (processor_config.json)"
    write(path, None, {"heads": 3, "ln_eps": 1e-3}, processor_config={"processor_class": "CLIPProcessor"})
    assert load_vit(path).facts()["mean"] == "0.3,0.3,0.3 (preprocessor_config.json)"


def test_images_on_another_scale_are_refused(tmp_path):
    path = write(tmp_path / "a.npz", None, {"heads": 3}, preprocessor_config={**NORMAL, "rescale_factor": 1 / 127.5})
    with pytest.raises(ValueError, match=r"multiplies images by 0\.00784"):
        load_vit(path)


NAMES = ("cat", "dog", "eel", "fox", "gnu")
HEADS = {
    "the same names": ({"classes": NAMES}, {}, NAMES, "kept, for these classes"),
    "the same names beside": (None, {"config": {**FACTS, "label_names": NAMES}}, NAMES, "kept, for these classes"),
    "the same names of transformers": (
        None,
        {"config": {**FACTS, "id2label": {str(i): name for i, name in enumerate(NAMES)}}},
        NAMES,
        "kept, for these classes",
    ),
    "another order": ({"classes": NAMES}, {}, NAMES[::-1], "kept, for these classes in another order"),
    "other names": ({"classes": NAMES}, {}, ("ant", *NAMES[1:]), "new, the file's is for 5 other classes"),
    "no names": ({}, {}, NAMES, "new, the file does not say"),
    "as many": ({"classes": NAMES}, {}, 5, "new, the file's is for 5 other classes"),
    "more": ({"classes": NAMES}, {}, (*NAMES, "hen"), "new, the file's is for 5 other classes"),
    "names of another head": ({"classes": NAMES[:4]}, {}, NAMES, "new"),
    "names that are none": ({"classes": 5}, {}, NAMES, "new, the file does not say"),
    "a name twice": ({"classes": ["a", "a", "b", "c", "d"]}, {}, ["a", "b", "c", "d", "a"], "new"),
}


@pytest.mark.parametrize("case", HEADS)
def test_a_head_is_kept_for_the_classes_it_names_and_for_no_others(tmp_path, case):
    inside, beside, classes, said = HEADS[case]
    path = write(tmp_path / "a.npz", None, FACTS | inside if inside is not None else None, **beside)
    loaded, whole = load_vit(path, classes), load_vit(path)
    assert loaded.origins["head"].startswith(said)
    kernel, bias = (loaded.params["head"][name] for name in ("kernel", "bias"))
    assert kernel.shape == (12, loaded.model.classes)
    if said.startswith("new"):
        assert not kernel.any()
        assert not bias.any()
    else:
        old = dict(zip(NAMES, timm_arrays()["head.weight"], strict=True))
        np.testing.assert_array_equal(kernel.T, [old[name] for name in classes])
        assert (bias.tolist() == whole.params["head"]["bias"].tolist()) == (tuple(classes) == NAMES)
    kept = load_vit(path, [f"class {i}" for i in range(5)], keep_head=True)
    assert kept.origins["head"] == "kept, as asked"
    np.testing.assert_array_equal(kept.params["head"]["kernel"].T, timm_arrays()["head.weight"])


def test_a_head_that_cannot_be_kept_is_refused(tmp_path):
    path = write(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"a head for 5 classes.*for 7.*--keep-head"):
        load_vit(path, 7, keep_head=True)
    bare = write(tmp_path / "b.npz", timm_arrays(**{"head.weight": None, "head.bias": None}))
    assert load_vit(bare, 7).origins["head"] == "new, the file has none"
    for classes, keep in ((None, False), (7, True)):
        with pytest.raises(ValueError, match="no head"):
            load_vit(bare, classes, keep_head=keep)


def test_the_built_in_head_is_for_digits_alone(capsys):
    ours = backbone.load(Config(), tuple("0123456789"), 16)
    assert ours.facts["head"] == "kept, for these classes"
    with np.load(backbone.NANO) as file:
        np.testing.assert_array_equal(ours.params["head"]["kernel"], file["head.weight"].T)
    other = backbone.load(Config(), [f"letter {x}" for x in "abcdefghij"], 16)
    assert not other.params["head"]["kernel"].any()
    assert capsys.readouterr().err == ""  # nothing to say of what is built in


@pytest.mark.long
def test_a_command_says_once_what_it_uses_and_keeps_it_with_the_results(tmp_path, capsys):
    path = write(tmp_path / "tiny.safetensors", None, None)
    foreign = {"weights": str(path), "heads": 3, "std": (0.2, 0.2, 0.2)}
    few = {"methods": ("fedit",), "seeds": (0,), "tuning_seeds": (9,), "clients": 4, "holdout_clients": 2}
    config = Config(**foreign, **few, out=str(tmp_path / "out"))
    plan = budget.Plan(config)  # two problems, one model
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[0].startswith("warning: ")
    assert said[0].endswith("set --mean --epsilon")
    assert said[1] == (
        "weights tiny: mean 0.5,0.5,0.5 (guessed); std 0.2,0.2,0.2 (given); heads 3 (given); epsilon 1e-06 (guessed); "
        "head new, the file's is for 5 other classes"
    )
    kept = plan.about["record"]
    assert (kept["mean"], kept["heads"], kept["head"][:4]) == ("0.5,0.5,0.5 (guessed)", "3 (given)", "new,")
    # where something else says it now, the run would go on as another
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(json.dumps({"record": kept}))
    (tmp_path / "config.json").write_text(json.dumps({**NORMAL, "std": [0.2] * 3}))
    with pytest.warns(UserWarning, match="GUESS"):
        other = load_vit(path, 10, heads=3, std=(0.2, 0.2, 0.2))
    with pytest.raises(ValueError, match=r"mean was \"0.5,0.5,0.5 \(guessed\)\", is \"0.1,0.2,0.3 \(config.json\)\""):
        Folder("budget", str(tmp_path / "out"), resume=True).check_same("record", {**kept, **other.facts()})
