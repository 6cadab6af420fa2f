"""CLIP: the network of the definition in both formats, a head of the classes' names, federated; or a refusal."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from clip_helpers import (
    CONFIG,
    LENGTH,
    MERGES,
    NAMES,
    OPEN_CONFIG,
    arrays,
    as_open_clip,
    encode,
    folder,
    reference,
    vocabulary,
)
from input_helpers import SMALL, change
from safetensors.numpy import save_file
from tokenizers.decoders import ByteLevel
from weight_helpers import write

from experiments.cli import parse
from experiments.commands.compare import Plan
from experiments.commands.export import Plan as Export
from experiments.config import Config
from experiments.setup import backbone as backbones
from models import families, prompts
from models.pretrained_clip import clip_backbone, load_clip
from models.tokenizer import END, START, built, files_in, find

HEADS = ("zero_shot", "text")
IMAGES = np.random.default_rng(1).integers(0, 256, (3, 4, 4, 3)).astype(np.uint8)
ROOT = Path(__file__).parents[1]


def ids(*tokens):
    return [vocabulary()[token] for token in tokens]


# what a text is cut into, by hand
WORDS = {
    "a photo of a cat.": ["a", "photo", "of", "a", "cat", "."],
    "It's 42!": ["it", "'s", "4", "2", "!"],
    "  A\t b\n": ["a", "b"],
    "x'll--y": ["x", "'ll", "--", "y"],
    "Cafe\u0301 ½ 一 Ⅷ": ["café", "½", "一", "ⅷ"],
    "a_b": ["a", "_", "b"],
    "": [],
}


@pytest.mark.parametrize("text", WORDS)
def test_a_text_is_cut_into_words(text):
    tokens = [list(vocabulary())[i] for i in encode(text)[1:-1]]
    words = "".join(tokens).split("</w>")[:-1]
    assert [ByteLevel().decode([word]) for word in words] == WORDS[text]


def test_words_become_tokens_by_the_order_of_merges():
    """ph-o-t-o: ``phot`` and then no merge; ``cat`` by ``at</w>`` first; GPT-2's bytes of what is not ASCII."""
    assert encode("photo cat") == ids(START, "phot", "o</w>", "cat</w>", END)
    assert encode("eee") == ids(START, "ee", "e</w>", END)
    assert encode("é") == ids(START, "Ã", "©</w>", END)
    assert encode("") == ids(START, END)


def test_texts_are_filled_up_and_cut_before_their_end():
    tokens, ends = built(vocabulary(), MERGES).encode_all(["cat", "cat cat cat cat"], 5)
    cat, end = ids("cat</w>", END)
    assert tokens.tolist() == [[*ids(START), cat, end, end, end], [*ids(START), cat, cat, cat, end]]
    assert ends.tolist() == [2, 4]


def test_a_tokenizer_is_read_from_either_file(tmp_path):
    """What a file says of lengths is of its last use; with one of the pair alone there is none."""
    assert find(tmp_path) is None
    own, text = built(vocabulary(), MERGES).own, "A photo of <|endoftext|>, it's a cat"
    own.enable_truncation(4)
    own.enable_padding(length=9)
    own.save(str(tmp_path / "tokenizer.json"))
    assert find(tmp_path).encode(text) == encode(text)
    assert files_in(tmp_path).keys() == {"tokenizer.json"}
    folder(tmp_path / "pair", {})
    assert find(tmp_path / "pair").encode(text) == encode(text)
    assert find(tmp_path / "pair").ids == vocabulary()
    (tmp_path / "pair" / "merges.txt").unlink()
    assert find(tmp_path / "pair") is None


def whole(changes=MappingProxyType({}), **model):
    said = json.loads(built(vocabulary(), MERGES).own.to_str())
    return json.dumps(said | changes | {"model": said["model"] | model})


FEW = {"a": 0, "b": 1}
DAMAGED = {
    "nothing": ({"tokenizer.json": ""}, "tokenizer.json cannot be read: EOF while parsing"),
    "cut off": ({"tokenizer.json": whole()[:999]}, "tokenizer.json cannot be read: EOF while parsing"),
    "no kind": ({"tokenizer.json": whole(type="Nothing")}, "tokenizer.json cannot be read: "),
    "another kind": ({"tokenizer.json": whole(type="WordLevel")}, "no tokenizer of CLIP: expected a model BPE"),
    "another end": ({"tokenizer.json": whole(end_of_word_suffix="")}, "no tokenizer of CLIP: expected a model BPE"),
    "no words": ({"tokenizer.json": whole({"pre_tokenizer": None})}, "no tokenizer of CLIP: .*how texts are cut"),
    "no ends": (
        {"tokenizer.json": whole({"added_tokens": []}, vocab=FEW, merges=[])},
        r"no vocabulary of CLIP: <\|startoftext\|> is not among its 2 tokens.*published with the weights",
    ),
    "no unknown": ({"tokenizer.json": whole(unk_token="<unk>")}, "no vocabulary of CLIP: <unk> is not among its 521"),
    "no ends in the pair": ({"vocab.json": json.dumps(FEW), "merges.txt": ""}, "no vocabulary of CLIP"),
    "cut off in the pair": ({"vocab.json": '{"a": ', "merges.txt": ""}, "vocab.json with .*merges.txt cannot be read"),
    "no numbers": ({"vocab.json": '{"a": "b"}', "merges.txt": "a a"}, "cannot be read: .*out of vocabulary; fetch it"),
    "merges of another": ({"vocab.json": json.dumps(FEW), "merges.txt": "a b"}, "cannot be read: "),
    "merges of three": ({"vocab.json": json.dumps(FEW), "merges.txt": "a b c"}, "cannot be read: .*invalid at line 1"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_no_tokenizer_of_clip_is_refused(case, tmp_path):
    files, said = DAMAGED[case]
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said) as refused:
        find(tmp_path)
    assert "\n" not in str(refused.value)


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    """Where a CLIP reads text, and nowhere else."""
    path = folder(tmp_path / "a", arrays())
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"reading .*vocab\.json needs the package tokenizers: pip install tokenizers"):
        load_clip(path, NAMES)
    assert load_clip(path, 3, head="linear").image.model.classes == 3


def test_processes_may_fork_after_a_text_was_read():
    """Versions of the package warn where threads of its own have been at work (0.21)."""
    code = "import os; from pathlib import Path; from models import tokenizer\n"
    code += "own = tokenizer.find(Path('experiments/data/nano_clip')); own.encode_all(['a photo of a 2.'] * 99, 16)\n"
    code += "pid = os.fork(); own.encode_all(['a'] * 99, 16)\nif pid: assert os.waitpid(pid, 0)[1] == 0\n"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def expected(names, w, act="quick_gelu", epsilon=1e-3):
    rows = [encode(f"a photo of a {name.replace('_', ' ')}.") for name in names]
    rows = [row if len(row) <= LENGTH else [*row[: LENGTH - 1], row[-1]] for row in rows]
    return reference(w, IMAGES, rows, epsilon, act)


def logits(backbone):
    return np.asarray(backbone.apply(backbone.params, {}, IMAGES)[0])


@pytest.mark.long
def test_a_zero_shot_head_gives_the_logits_of_the_definition(tmp_path):
    w = arrays()
    made = clip_backbone(folder(tmp_path / "a", w), NAMES)
    np.testing.assert_allclose(logits(made), expected(NAMES, w), rtol=1e-3, atol=1e-3)
    assert made.facts["head"] == "zero-shot, 'a photo of a {}.' with the classes' names"
    assert made.facts["act"] == "quick_gelu (vision_config in config.json)"
    assert families.of(tmp_path / "a") == "clip"
    other = clip_backbone(tmp_path / "a", NAMES, prompts=("{}",))
    assert np.abs(logits(other) - logits(made)).max() > 1e-3
    linear = clip_backbone(tmp_path / "a", NAMES, head="linear")
    assert not logits(linear).any()
    np.testing.assert_allclose(np.linalg.norm(linear.apply(linear.params, {}, IMAGES)[1], axis=-1), 1, rtol=1e-5)


def test_published_prompts_have_names(tmp_path):
    path = folder(tmp_path / "a", arrays())
    made = backbones.read(Config(weights=str(path), prompts="oxford_pets|{} of"), NAMES, 4)
    assert made.facts["head"] == "zero-shot, 'a photo of a {}, a type of pet.', '{} of' with the classes' names"
    described = next(field for field in dataclasses.fields(Config) if field.name == "prompts").metadata["help"]
    assert f": {', '.join(prompts.PUBLISHED)} (default" in described
    assert all("{}" in prompt for own in prompts.PUBLISHED.values() for prompt in own)


def test_prompts_are_averaged_and_call_the_classes_as_asked(tmp_path):
    path = folder(tmp_path / "a", arrays())
    config = Config(weights=str(path), prompts="a photo of a {}.|{}", class_names=("cat", "eel", "a photo"))
    made = backbones.read(config, ("0", "1", "2"), 4)
    assert made.facts["head"] == "zero-shot, 'a photo of a {}.', '{}' with cat, eel, a photo"
    parts = [
        clip_backbone(path, config.class_names, prompts=(p,)).params["head"]["kernel"]
        for p in config.prompts.split("|")
    ]
    mean = sum(np.float64(kernel) / np.linalg.norm(kernel, axis=0) for kernel in parts)
    expected = np.exp(0.7) * mean / np.linalg.norm(mean, axis=0)
    np.testing.assert_allclose(made.params["head"]["kernel"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompts": "a photo"}, "the prompt 'a photo' has no {} for the name of a class"),
        ({"prompts": "{}|"}, "the prompt '' has no {} for the name of a class"),
        (
            {"class_names": ("a", "b")},
            "--class-names are 2, the data has 3 classes: name each in its order (cat, giant_",
        ),
        (
            {"class_names": ("a", "b", "a")},
            "two classes are called 'a', and what reads their names cannot tell",
        ),
        (
            {"prompts": "{}", "head": "linear"},
            "--prompts and --class-names are of a zero-shot head, and the head is lin",
        ),
        ({"prompts": "{}", "model": "vit", "weights": "nano"}, "vit does not take --prompts: leave it out, got {}"),
        ({"prompts": "{}", "weights": "nano", "model": None}, "--prompts: leave it out, or --model clip, got {}"),
        ({"head": "text", "weights": "nano", "model": None}, "use linear, cosine or prototype, or --model clip"),
        ({"class_names": ("a", "b"), "model": "mixer", "weights": "nano"}, "--class-names: leave it out, got a,b"),
    ],
)
def test_prompts_that_make_no_head_are_refused(options, said, tmp_path):
    path = str(folder(tmp_path / "a", arrays()))
    with pytest.raises(ValueError, match=re.escape(said)):
        backbones.read(Config(**{"weights": path, **options}), NAMES, 4 if "model" not in options else 16)


@pytest.mark.parametrize("quick", [True, False])
def test_open_clip_is_the_same_under_other_names(quick, tmp_path):
    w = arrays()
    config = {**OPEN_CONFIG, "model_cfg": {**OPEN_CONFIG["model_cfg"], "quick_gelu": quick}}
    path = folder(tmp_path / "a", as_open_clip(w), config, "open_clip_pytorch_model.safetensors")
    made = clip_backbone(path, NAMES)
    np.testing.assert_allclose(
        logits(made), expected(NAMES, w, "quick_gelu" if quick else "gelu", 1e-5), rtol=1e-3, atol=1e-3
    )
    assert made.facts["mean"] == "0.1,0.2,0.3 (open_clip_config.json)"


@pytest.mark.long
def test_shards_with_their_index_are_one_network(tmp_path):
    whole, parts = folder(tmp_path / "a", arrays()), folder(tmp_path / "b", arrays())
    (parts / "model.safetensors").unlink()
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(arrays())}
    for file in set(where.values()):
        save_file({name: np.array(x, order="C") for name, x in arrays().items() if where[name] == file}, parts / file)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for head in HEADS:
        one, other = (clip_backbone(path, NAMES, head=head) for path in (whole, parts))
        np.testing.assert_array_equal(logits(one), logits(other))
    assert other.publish(other.params).beside.keys() == {"vocab.json", "merges.txt"}


@pytest.mark.parametrize("form", ["transformers", "OpenCLIP"])
def test_it_goes_out_as_it_came_and_is_read_again_with_its_head(form, tmp_path):
    w = arrays() if form == "transformers" else as_open_clip(arrays())
    config = CONFIG if form == "transformers" else OPEN_CONFIG
    whole = clip_backbone(folder(tmp_path / "a", w, config), NAMES)
    top = whole.cut(1)[1]
    published = top.publish(top.params)
    assert published.arrays.keys() == {*w, "classifier.weight", "classifier.bias"}
    for name, x in w.items():
        np.testing.assert_array_equal(published.arrays[name], x)
    said = {**published.said, "classes": NAMES}
    again = clip_backbone(write(tmp_path / "b.safetensors", published.arrays, said), NAMES[::-1])
    assert again.facts["head"] == "kept, for these classes in another order"
    np.testing.assert_allclose(logits(again)[:, ::-1], logits(whole), rtol=1e-5, atol=1e-5)


def test_a_bias_that_no_file_can_hold_is_not_lost(tmp_path):
    made = clip_backbone(folder(tmp_path / "a", arrays()), NAMES)
    with pytest.raises(ValueError, match="embed/bias was trained"):
        made.publish({**made.params, "embed": {**made.params["embed"], "bias": np.ones(12, np.float32)}})


def without(part):
    return lambda w: {name: x for name, x in w.items() if part not in name}


TEXT = "text_model.embeddings.token_embedding.weight"
BAD = {
    "half the layers of text": (without("text_model.encoder.layers.1"), r"num_hidden_layers is 2 .*expected 1"),
    "half a block": (without("vision_model.encoder.layers.1.mlp"), r"lacks vision_model\.encoder\.layers\.1\.mlp\.fc1"),
    "no text tower": (without("text_"), "is not the text tower of a CLIP"),
    "no scale": (without("logit_scale"), "lacks logit_scale"),
    "SigLIP": (lambda w: {**w, "logit_bias": np.float32([1])}, r"has logit_bias \(SigLIP: pooled by attention"),
    "a ResNet": (lambda w: {**w, "visual.layer1.0.conv1.weight": w["logit_scale"]}, "image tower is a ResNet"),
    "another width": (lambda w: {**w, TEXT: w[TEXT][:, :9]}, r"token_embedding\.weight has the shape \[521, 9\]"),
    "a flat convolution": (
        lambda w: {**w, "vision_model.embeddings.patch_embedding.weight": np.ones((12, 12), np.float32)},
        r"is not a CLIP: it embeds patches by an array \[12, 12\]",
    ),
    "NaN": (lambda w: {**w, "logit_scale": np.float32(np.nan)}, "logit_scale holds numbers that are not finite"),
    "int8": (lambda w: {**w, "logit_scale": np.int8(1)}, "logit_scale is int8, expected floats"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_clip_is_refused_by_name(case, tmp_path):
    damage, said = BAD[case]
    with pytest.raises(ValueError, match=said) as refused:
        load_clip(folder(tmp_path / "a", damage(arrays())), NAMES)
    assert "\n" not in str(refused.value)


def test_a_file_cut_short_is_refused(tmp_path):
    path = folder(tmp_path / "a", arrays())
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged or truncated"):
        families.find("clip", path)(path, NAMES)


def part(**changes):
    return {**CONFIG, "vision_config": {**CONFIG["vision_config"], **changes}}


CONFIGS = {
    "nothing": ({}, {}, "how many attention heads"),
    "another activation": (part(hidden_act="relu"), {}, r"act \(vision_config in config\.json\) is 'relu'"),
    "another depth": (part(num_hidden_layers=3), {}, "num_hidden_layers is 3 .*expected 2"),
    "another width": (part(hidden_size=24), {}, "hidden_size is 24 .*expected 12"),
    "no vocabulary": (CONFIG, {"words": False}, r"no vocabulary beside it.*put vocab\.json and merges\.txt"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_says_nothing_or_something_else_is_refused(case, tmp_path):
    config, options, said = CONFIGS[case]
    with pytest.raises(ValueError, match=said) as refused:
        load_clip(folder(tmp_path / "a", arrays(), config, **options), NAMES)
    assert "\n" not in str(refused.value)


def test_open_clip_says_what_it_is_or_is_refused(tmp_path):
    model = OPEN_CONFIG["model_cfg"]
    pooled = {**OPEN_CONFIG, "model_cfg": {**model, "vision_cfg": {**model["vision_cfg"], "attentional_pool": True}}}
    with pytest.raises(ValueError, match="attentional_pool is True, which nothing computes"):
        load_clip(folder(tmp_path / "a", as_open_clip(arrays()), pooled), NAMES)


def test_a_zero_shot_head_needs_names(tmp_path):
    with pytest.raises(ValueError, match=r"made of the classes' names, got 3"):
        load_clip(folder(tmp_path / "a", arrays()), 3)
    assert load_clip(tmp_path / "a", 3, head="linear").image.model.classes == 3


@pytest.mark.long
def test_it_is_federated_like_any_other_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    change()(tmp_path / "data.npz")
    folder(tmp_path / "tiny", arrays())
    options = [*SMALL, "--data", "data.npz", "--weights", "tiny", "--rank", "2", "--adapt-last", "1", "--out", "out"]
    plan = Plan(*parse(["compare", "--methods", "fedit", *options]))
    assert "head zero-shot, 'a photo of a {}.' with the classes' names" in capsys.readouterr().err
    assert plan.problem.record["adapted"] == ["blocks/attn/query/kernel", "blocks/attn/value/kernel"]
    plan.execute()
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows
    assert all(np.isfinite(row["loss"]) for row in rows)
    Export(parse(["export", "out", "--out", "merged"])[1]).execute()
    assert {path.name for path in (tmp_path / "merged" / "global").iterdir()} == {
        "model.safetensors",
        "vocab.json",
        "merges.txt",
    }
    images = plan.problem.images.x[:3]
    kept, text = (clip_backbone("merged/global", plan.problem.images.classes, 16, head=head) for head in HEADS)
    assert kept.facts["head"] == "kept, for these classes"
    before = clip_backbone("tiny", plan.problem.images.classes, 16, head="text")
    features = lambda made: np.asarray(made.apply(made.params, {}, images)[1])
    np.testing.assert_array_equal(features(text), features(kept))
    assert np.abs(features(text) - features(before)).max() > 1e-5
    options[options.index("tiny")], options[options.index("out")] = "merged/global", "again"
    again = Plan(*parse(["compare", "--methods", "fedit", *options, "--head", "text"])).problem.record["head"]
    assert again.startswith("the text tower, 'a photo of a {}.'")
