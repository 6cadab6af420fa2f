"""CLIP with both towers: logits of the definition whatever is adapted; learned vectors are words; it is federated."""

import jax
import numpy as np
import pytest
from clip_helpers import CONFIG, LENGTH, arrays, encode, folder, reference
from input_helpers import SMALL, change
from peft_helpers import applied, random_adapter
from weight_helpers import write

from experiments.cli import parse
from experiments.commands.compare import Plan
from experiments.config import Config, check
from experiments.setup import backbone as backbones
from experiments.setup import task
from fedlora_jax import lora
from fedlora_jax.lora import LoRA
from models import peft
from models.pretrained_clip import clip_backbone
from models.two_towers import TARGETS

IMAGES = np.random.default_rng(1).integers(0, 256, (3, 4, 4, 3)).astype(np.uint8)
SHORT = ("cat", "eel", "of")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("clip") / "a", arrays())


def both(path, classes=SHORT, **options):
    return clip_backbone(path, classes, head="text", **options)


def logits(backbone, adapter=None, images=IMAGES):
    return np.asarray(backbone.apply(backbone.params, adapter or {}, images)[0])


@pytest.mark.long
def test_logits_are_those_of_the_definition_with_every_layer_adapted(path, tmp_path):
    """The reference computes with the arrays that PEFT would make of the adapter."""
    backbone = both(path)
    layout = backbone.layouts["transformers"]
    adapter = random_adapter(backbone.params, TARGETS["all"], full=(), scale=1.5)
    assert not peft.unheld(layout, backbone.params, adapter)
    (tmp_path / "out").mkdir()
    for name, content in peft.files_of(layout, backbone.params, adapter, {}).items():
        (tmp_path / "out" / name).write_bytes(content)
    w = applied(arrays(), tmp_path / "out")
    rows = [encode(f"a photo of a {name}.") for name in SHORT]
    assert max(map(len, rows)) <= LENGTH
    np.testing.assert_allclose(logits(backbone, adapter), reference(w, IMAGES, rows), rtol=1e-3, atol=2e-3)


@pytest.mark.long
def test_it_starts_as_the_zero_shot_head(path):
    """Of one prompt, and of several, whose features are averaged."""
    for prompts in ((), ("a photo of a {}.", "{}", "{} of")):
        zero_shot = clip_backbone(path, SHORT, prompts=prompts)
        np.testing.assert_allclose(logits(both(path, prompts=prompts)), logits(zero_shot), rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_texts_are_computed_once_for_a_batch(path):
    """Another image costs what it costs the image tower alone."""

    def flops(backbone, count):
        x = np.zeros((count, 4, 4, 3), np.uint8)
        apply = jax.jit(lambda params, x: backbone.apply(params, {}, x, training=True)[0])
        return apply.lower(backbone.params, x).cost_analysis()["flops"]

    text, alone = both(path), clip_backbone(path, SHORT)
    more = [flops(backbone, 9) - flops(backbone, 3) for backbone in (text, alone)]
    np.testing.assert_allclose(*more, rtol=0.02)
    assert flops(text, 3) > flops(alone, 3) + more[1] / 3, "the text tower is there"


@pytest.mark.long
def test_learned_vectors_stand_where_words_would(path):
    backbone = both(path, context="a photo of a")
    np.testing.assert_allclose(logits(backbone), logits(both(path)), rtol=1e-4, atol=1e-4)
    assert backbone.params["head"]["context"].shape[0] == len(encode("a photo of a")) - 2
    assert backbone.facts["head"].endswith("'{}.' with the classes' names, behind 'a photo of a' to be learned")
    drawn = both(path, context="3").params["head"]["context"]
    assert drawn.shape == (3, 12)
    assert 0.01 < drawn.std() < 0.03
    other = {"head": {"context": jax.random.normal(jax.random.key(0), backbone.params["head"]["context"].shape)}}
    assert np.abs(logits(backbone, other) - logits(backbone)).max() > 1e-3
    assert backbone.publish is None
    assert not backbone.layouts


@pytest.mark.long
def test_a_term_of_ones_own_is_added_to_learned_vectors_and_held_apart_as_in_fedpgp(path):
    """Against cosines in float64 of the three texts, each of these vectors; that it is added, by logits."""
    backbone, rng = both(path, context="a photo of a"), np.random.default_rng(0)
    n, width = backbone.params["head"]["context"].shape
    shared = rng.normal(size=(n, width)).astype(np.float32)
    term = LoRA(rng.normal(size=(n, 2)).astype(np.float32), rng.normal(size=(2, width)).astype(np.float32), 0.5)
    adapter = {"head": {"context": shared}, "text": {"own": {"kernel": term}}}
    together = {"head": {"context": shared + 0.5 * term.a @ term.b}}
    np.testing.assert_allclose(logits(backbone, adapter), logits(backbone, together), rtol=1e-4, atol=1e-4)
    of = lambda adapter: np.float64(backbone.texts(backbone.params, adapter))
    began, common, own = of({}), of({"head": {"context": shared}}), of(together)
    np.testing.assert_allclose(np.linalg.norm(own, axis=1), 1, rtol=1e-5)
    near, far = (np.exp((x * common).sum(1) / 0.5) for x in (began, own))
    for known in (None, 2):
        found = task.apart(backbone.texts, backbone.params, adapter, known)
        np.testing.assert_allclose(found, -np.log(near / (near + far))[:known].mean(), rtol=1e-4)
    examples = IMAGES, np.arange(3)
    plain, held = (
        task.objectives(task.TASKS["softmax"], backbone, contrast=mu).loss_fn(
            backbone.params, adapter, examples, jax.random.key(0)
        )
        for mu in (0.0, 0.7)
    )
    np.testing.assert_allclose(held - plain, 0.7 * -np.log(near / (near + far)).mean(), rtol=1e-3)
    with pytest.raises(ValueError, match="--contrast compares texts, and a computes none in a step: use --head text"):
        task.objectives(task.TASKS["softmax"], clip_backbone(path, SHORT), contrast=0.5)


@pytest.mark.long
def test_a_client_that_lacks_classes_is_trained_and_scored_among_all_of_them(path):
    """The loss is that of all classes, by hand; texts of those that are absent are learned from as well."""
    backbone = both(path, context="2")
    loss, correct, *_ = task.objectives(task.TASKS["softmax"], backbone)
    y, out = np.full(3, 1), np.float64(logits(backbone))
    expected = np.log(np.exp(out).sum(1)) - out[:, 1]
    adapter = {"head": {"context": np.zeros((2, 12), np.float32)}}
    got, moved = jax.value_and_grad(loss, 1)(backbone.params, adapter, (IMAGES, y), jax.random.key(0))
    np.testing.assert_allclose(got, expected.mean(), rtol=1e-4)
    assert np.linalg.norm(moved["head"]["context"]) > 1e-6
    np.testing.assert_array_equal(correct(backbone.params, adapter, (IMAGES, y)), out.argmax(1) == 1)


def test_sets_of_kernels_name_one_tower_or_both(path):
    params = both(path).params
    found = {name: lora.adapted(params, patterns) for name, patterns in TARGETS.items()}
    image, text = ["blocks/attn/query/kernel", "blocks/attn/value/kernel"], "text/blocks/attn/"
    assert found["default"] == found["image_qv"] == image
    assert found["text_qv"] == [f"{text}query/kernel", f"{text}value/kernel"]
    assert found["qv"] == image + found["text_qv"]
    for name in ("qkv", "mlp", "all", "out_fc2"):
        assert set(found[name]) == set(found[f"image_{name}"]) | set(found[f"text_{name}"])
        assert not set(found[f"image_{name}"]) & set(found[f"text_{name}"])


@pytest.mark.long
def test_a_cut_changes_nothing_and_what_is_published_is_read_again(path, tmp_path):
    whole = both(path)
    stem, top = whole.cut(1)
    np.testing.assert_allclose(logits(top, images=stem.apply(stem.params, IMAGES)), logits(whole), rtol=1e-4, atol=1e-4)
    published = top.publish(top.params)
    assert published.arrays.keys() == arrays().keys()
    for name, x in arrays().items():
        np.testing.assert_array_equal(published.arrays[name], x)
    params = {**top.params, "head": {"logit_scale": np.float32([1.2])}}
    params["text"] = jax.tree.map(lambda x: x * 1.1, params["text"])
    (tmp_path / "b").mkdir()
    folder(tmp_path / "b", {})
    write(tmp_path / "b" / "model.safetensors", top.publish(params).arrays, published.said)
    again = both(tmp_path / "b" / "model.safetensors")
    changed = top._replace(params=params)
    np.testing.assert_allclose(
        logits(again), logits(changed, images=stem.apply(stem.params, IMAGES)), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"context": "8"}, "--context 8 is 8 vectors, and the text tower has 10 places in all: choose 1 to 7"),
        ({"context": "0"}, "--context 0 is 0 vectors"),
        ({"context": "-3"}, "--context -3 is no count and no words: expected how many vectors, as in 16, or words"),
        ({"context": "1.5"}, "--context 1.5 is no count and no words"),
        ({"context": "3", "head": "zero_shot"}, "--context is of --head text, and the head is zero_shot: leave it out"),
        ({"prompts": ("a photo",)}, "the prompt 'a photo' has no {} for the name of a class"),
        (
            {"classes": ("cat cat cat cat cat cat x", "cat cat cat cat cat cat y"), "prompts": ("photo {}",)},
            "'photo cat cat cat cat cat cat y' has 11 tokens and is cut at 10, where it is the same as 'photo cat",
        ),
        ({"classes": 3}, "is made of the classes' names, got 3"),
    ],
)
def test_what_a_text_tower_cannot_be_given_is_refused(options, said, path):
    options = {"classes": SHORT, "head": "text", **options}
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace("{", r"\{")) as refused:
        clip_backbone(path, **options)
    assert "\n" not in str(refused.value)


def test_a_folder_without_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no vocabulary beside it, which a text tower needs: put vocab\.json"):
        both(folder(tmp_path / "a", arrays(), CONFIG, words=False))


@pytest.mark.long
def test_both_towers_are_trained(tmp_path, monkeypatch, capsys):
    """Low-rank updates in both, vectors and scale beside them; each of them has a gradient. Rounds of a text tower:
    ``test_base_to_novel``."""
    monkeypatch.chdir(tmp_path)
    change()(tmp_path / "data.npz")
    folder(tmp_path / "tiny", arrays())
    options = [*SMALL, "--data", "data.npz", "--weights", "tiny", "--rank", "2", "--out", "out", "--head", "text"]
    options += ["--targets", "qv", "--context", "2", "--adapt-last", "1"]
    plan = Plan(*parse(["compare", "--methods", "fedit", *options]))
    assert "head the text tower, '{}.' with the classes' names, behind 2 vectors to be" in capsys.readouterr().err
    towers = ("", "text/")
    names = [f"{tower}blocks/attn/{part}/kernel" for tower in towers for part in ("query", "value")]
    assert plan.problem.record["adapted"] == names
    assert plan.problem.record["trained_in_full"] == ["head/context", "head/logit_scale"]
    gradient = jax.jit(jax.grad(plan.problem.loss_fn, 1))
    adapter, batch = (
        jax.tree.map(lambda x: x[0], plan.problem.adapters),
        jax.tree.map(lambda x: x[:8], plan.problem.train),
    )
    moved = gradient(plan.problem.base, adapter, batch, jax.random.key(0))
    assert all(np.linalg.norm(x.b) > 1e-7 for x in lora.low_rank_leaves(moved))
    assert all(np.linalg.norm(x) > 1e-7 for x in moved["head"].values())


def test_nothing_to_adapt_is_an_adapter_too_and_nothing_at_all_is_refused(path):
    made = backbones.read(Config(weights=str(path), head="text", context="2"), SHORT, 4)
    adapter = lora.new(jax.random.key(0), made.params, 2, targets=made.patterns(()), full=("^head/context$",))
    assert set(lora.flatten(adapter)) == {"head/context"}
    with pytest.raises(ValueError, match="leave nothing to be trained"):
        check(parse(["compare", "--targets", "", "--full", ""])[1])


def test_a_set_of_the_text_tower_needs_it_in_the_model(path):
    image = clip_backbone(path, SHORT, head="zero_shot")
    with pytest.raises(
        ValueError, match=r"no parameter matches 'text_qv', and the sets of .* are default, qv, qkv, qkvo"
    ):
        image.patterns(("qv", "text_qv"))
    assert image.patterns(("attn", "query")) == (*image.targets["attn"], "query")
