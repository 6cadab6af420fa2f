"""CLIP as transformers computes it, small and random, against ours in both directions; and its tokenizer."""

import json
import unicodedata
from pathlib import Path

import jax
import numpy as np
import pytest
from clip_helpers import MERGES, vocabulary
from peft_helpers import federated, random_adapter
from safetensors.numpy import save_file

from experiments.config import Config
from experiments.setup import adapter as adapters
from experiments.setup import backbone as backbones
from experiments.setup.backbone import BUILT_IN
from experiments.setup.problem import new_adapter
from fedlora_jax.lora import flatten
from models import peft as ours_peft
from models import tokenizer
from models.pretrained_clip import clip_backbone, load_clip
from models.two_towers import TARGETS as BOTH
from models.vit import TARGETS

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
# what peft asks transformers, which has another name for it now
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SIDE, NAMES = 12, ["cat", "giant_panda", "eel of no great length at all"]
PROMPTS = [f"a photo of a {name.replace('_', ' ')}." for name in NAMES]
SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40}
PROCESSOR = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "rescale_factor": 1 / 255}
IMAGES = np.random.default_rng(1).integers(0, 256, (4, SIDE, SIDE, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def words():
    """Trained on the text that is here, so that its merges are of real words. Of pairs that are equally frequent the
    trainer merges another first each time: what networks make of texts differs from run to run.
    """
    small = transformers.CLIPTokenizer(vocab=vocabulary(), merges=MERGES)
    corpus = [path.read_text() for path in Path(__file__).parents[1].glob("*.md")]
    return small.train_new_from_iterator([*corpus, *["naïve café, l'été; don't, we'll"] * 9], 1200)


@pytest.fixture(scope="module")
def folder(words, tmp_path_factory):
    """A vocabulary; models are saved beside it."""
    path = tmp_path_factory.mktemp("clip")
    words.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return path


def model(words, act, **changes):
    text = {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": words.eos_token_id}
    both = {**SIZES, "hidden_act": act, **changes}
    config = transformers.CLIPConfig(
        vision_config={**both, "image_size": SIDE, "patch_size": 4},
        text_config={**both, "hidden_size": 20, "num_attention_heads": 5, **text, "max_position_embeddings": 16},
        projection_dim=14,
    )
    torch.manual_seed(0)
    made = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for x in made.parameters():
            x.copy_(0.3 * torch.randn_like(x))
    return made


def theirs(made, words):
    tokens = words(PROMPTS, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    x = (IMAGES / 255 - np.array(PROCESSOR["image_mean"])) / np.array(PROCESSOR["image_std"])
    with torch.no_grad():
        out = made(**tokens, pixel_values=torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32))
    return out.logits_per_image.numpy()


def ours(backbone):
    return np.asarray(backbone.apply(backbone.params, {}, IMAGES)[0])


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_a_folder_of_theirs_gives_their_logits_and_goes_back(act, words, folder):
    made = model(words, act, layer_norm_eps=1e-3)
    made.save_pretrained(folder)
    backbone = clip_backbone(folder, NAMES)
    assert backbone.facts["epsilon"] == "0.001 (vision_config in config.json)"
    np.testing.assert_allclose(ours(backbone), theirs(made, words), atol=1e-4)
    published = backbone.publish(backbone.params)
    arrays = {name: x for name, x in published.arrays.items() if not name.startswith("classifier")}
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    again, info = transformers.CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    np.testing.assert_allclose(theirs(again.eval(), words), ours(backbone), atol=1e-4)


def test_names_of_a_state_dict_and_short_floats_are_read_too(words, folder):
    made = model(words, "quick_gelu").to(torch.float16)
    made.save_pretrained(folder)
    save_file({name: x.numpy() for name, x in made.state_dict().items()}, folder / "model.safetensors")
    np.testing.assert_allclose(ours(clip_backbone(folder, NAMES)), theirs(made.float(), words), atol=1e-4)


def test_siglip_is_refused(tmp_path):
    sizes = {**SIZES, "vocab_size": 99}
    config = transformers.SiglipConfig(vision_config={**sizes, "image_size": SIDE, "patch_size": 4}, text_config=sizes)
    transformers.SiglipModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"SigLIP: pooled by attention"):
        load_clip(tmp_path, NAMES)


ODD = [
    "",
    " ",
    "It's 42, don't!! 'S",
    "Ünïcödé ΣΑΣ İstanbul",
    "e\u0301 ½ ² Ⅷ 一二 ﬁ",
    "a\u00a0b\u3000c\x1cd\n\te",
    "😀 emoji!!'s x_y__z can't'll",
    "<|endoftext|> in it",
    "words " * 40,
]


@pytest.mark.parametrize("files", [("tokenizer.json",), ("vocab.json", "merges.txt")])
def test_text_is_cut_as_theirs_is(files, words, tmp_path):
    """Odd texts, and random ones over all of Unicode, by the file they write and by the two that were before it."""
    words.save_pretrained(tmp_path)
    if "vocab.json" in files:
        model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
        (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"])]))
    assert tokenizer.files_in(tmp_path).keys() == set(files)
    rng, own = np.random.default_rng(0), tokenizer.find(tmp_path)
    signs = [chr(i) for i in range(0x3000) if unicodedata.category(chr(i)) not in ("Cn", "Cs", "Co")]
    random = ["".join(rng.choice(signs, 30)) for _ in range(100)]
    plain = ["".join(rng.choice(list("abc'dst 12.,\n-"), 30)) for _ in range(100)]
    for text in (*ODD, *random, *plain):
        assert own.encode(text) == words(text)["input_ids"], text
    texts = [text for text in ODD if text.strip()]
    tokens, _ = own.encode_all(texts, 16)
    expected = words(texts, padding="max_length", truncation=True, max_length=16)["input_ids"]
    assert tokens.tolist() == expected


def test_an_adapter_of_its_image_tower_goes_out_and_comes_in(words, folder, tmp_path):
    """Two rounds, then their logits of images and texts; and what peft has written of it, read here."""
    peft = pytest.importorskip("peft")
    made = model(words, "quick_gelu")
    made.save_pretrained(folder)
    backbone = clip_backbone(folder, NAMES)
    start = random_adapter(backbone.params, (*TARGETS["all"], "projection"), full=())
    adapter = federated(backbone, start, SIDE, len(NAMES))
    layout, before = backbone.layouts["transformers"], theirs(made, words)
    assert not ours_peft.unheld(layout, backbone.params, adapter)
    (tmp_path / "out").mkdir()
    for file, content in ours_peft.files_of(layout, backbone.params, adapter, {}).items():
        (tmp_path / "out" / file).write_bytes(content)
    assert layout.base == "transformers.CLIPModel.from_pretrained(MODEL)"
    whole = peft.PeftModel.from_pretrained(transformers.CLIPModel.from_pretrained(folder), str(tmp_path / "out")).eval()
    expected = backbone.apply(backbone.params, adapter, IMAGES)[0]
    np.testing.assert_allclose(theirs(whole, words), expected, atol=1e-5)
    assert np.abs(theirs(whole, words) - before).max() > 0.01
    saved = peft.LoraConfig(
        r=3, target_modules=r"vision_model\..*\.(q_proj|fc2)", modules_to_save=["visual_projection"], use_rslora=True
    )
    whole = peft.get_peft_model(made, saved).eval()
    with torch.no_grad():
        for x in (x for x in whole.parameters() if x.requires_grad):
            x.copy_(0.3 * torch.randn_like(x))
    whole.save_pretrained(tmp_path / "in")
    config = Config(**{**adapters.options(str(tmp_path / "in")), "adapter": str(tmp_path / "in"), "full": ()})
    config, top, begin = adapters.begins(config, backbone, backbone, tuple(NAMES))
    adapter = begin.onto(new_adapter(config, top, jax.random.key(0)))
    np.testing.assert_allclose(top.apply(top.params, adapter, IMAGES)[0], theirs(whole, words), atol=1e-5)


def test_an_adapter_of_both_towers_comes_in(words, folder, tmp_path):
    """As it does where targets are named alone: what is of the text tower is in the zero-shot head."""
    peft = pytest.importorskip("peft")
    made = model(words, "quick_gelu")
    made.save_pretrained(folder)
    saved = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1", "text_projection"], lora_alpha=3)
    whole = peft.get_peft_model(made, saved).eval()
    with torch.no_grad():
        for x in (x for x in whole.parameters() if x.requires_grad):
            x.copy_(0.3 * torch.randn_like(x))
    whole.save_pretrained(path := str(tmp_path / "in"))
    config = Config(**{**adapters.options(path), "weights": str(folder), "adapter": path, "full": ()})
    backbone = backbones.read(config, tuple(NAMES), SIDE)
    config, top, begin = adapters.begins(config, backbone, backbone, tuple(NAMES))
    adapter = begin.onto(new_adapter(config, top, jax.random.key(0)))
    assert set(config.targets) == {"^blocks/attn/query/kernel$", "^blocks/mlp/fc1/kernel$"}
    np.testing.assert_allclose(top.apply(top.params, adapter, IMAGES)[0], theirs(whole, words), atol=1e-5)
    unheld = ours_peft.unheld(backbone.layouts["transformers"], backbone.params, adapter)
    assert "text_projection" in unheld, "it leaves merged, with the text tower as it is now"
    merged = {name: x for name, x in backbone.publish(backbone.params).arrays.items() if name.startswith("text_")}
    for name, x in whole.merge_and_unload().state_dict().items():
        if name in merged:
            np.testing.assert_allclose(merged[name], x.numpy(), atol=1e-5)


def test_an_adapter_of_both_towers_goes_out_and_comes_back(words, folder, tmp_path):
    """Trained in both for two rounds: torch's logits with the folder that is written are ours, and so are they here."""
    peft = pytest.importorskip("peft")
    model(words, "quick_gelu").save_pretrained(folder)
    backbone = clip_backbone(folder, NAMES, head="text")
    before = theirs(transformers.CLIPModel.from_pretrained(folder).eval(), words)
    np.testing.assert_allclose(ours(backbone), before, atol=1e-4)
    start = random_adapter(backbone.params, (*BOTH["all"], "projection"), full=())
    assert {name.split("/")[0] for name in flatten(start)} == {"blocks", "projection", "text"}
    adapter = federated(backbone, start, SIDE, len(NAMES))
    moved = [np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (start, adapter)), strict=True)]
    # Keys of the image tower move least, by 2e-6 to 4e-6 with the vocabulary of most runs and 7.5e-7 with that of one;
    # an ulp of such numbers is 3e-8
    assert min(moved) > 1e-7
    layout = backbone.layouts["transformers"]
    assert not ours_peft.unheld(layout, backbone.params, adapter)
    (tmp_path / "out").mkdir()
    for file, content in ours_peft.files_of(layout, backbone.params, adapter, {}).items():
        (tmp_path / "out" / file).write_bytes(content)
    whole = peft.PeftModel.from_pretrained(transformers.CLIPModel.from_pretrained(folder), str(tmp_path / "out")).eval()
    expected = backbone.apply(backbone.params, adapter, IMAGES)[0]
    np.testing.assert_allclose(theirs(whole, words), expected, atol=1e-4)
    assert np.abs(theirs(whole, words) - before).max() > 0.01
    path = str(tmp_path / "out")
    config = Config(**{**adapters.options(path), "weights": str(folder), "adapter": path, "head": "text", "full": ()})
    again = backbones.read(config, tuple(NAMES), SIDE)
    config, top, begin = adapters.begins(config, again, again, tuple(NAMES))
    assert {target.strip("^$") for target in config.targets} == set(flatten(adapter))
    own = begin.onto(new_adapter(config, top, jax.random.key(0)))
    np.testing.assert_allclose(top.apply(top.params, own, IMAGES)[0], expected, atol=1e-4)


def test_the_clip_that_comes_along_is_one_for_transformers_too():
    """Its folder as it is: tokenizer, both towers and logits."""
    nano = transformers.CLIPModel.from_pretrained(BUILT_IN["clip"]).eval().float()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(BUILT_IN["clip"])
    digits = tuple(map(str, range(10)))
    backbone = clip_backbone(BUILT_IN["clip"], digits, head="text")
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
    tokens = tokenizer([f"a photo of a {name}." for name in digits], padding=True, return_tensors="pt")
    x = torch.tensor((images / 255 - 0.5) / 0.5, dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = nano(**tokens, pixel_values=x).logits_per_image.numpy()
    np.testing.assert_allclose(backbone.apply(backbone.params, {}, images)[0], expected, atol=1e-3)
