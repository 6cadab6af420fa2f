"""The weights that come along are what their command makes, small, and of models that have learned to read."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config import Config
from experiments.results import record
from experiments.setup import pretrain, pretrain_clip
from experiments.setup.backbone import BUILT_IN, load, theta_of
from experiments.setup.digits import SIDE, digits
from experiments.setup.problem import new_adapter
from fedlora_jax.lora import flatten
from fedlora_jax.methods.hyperlora import hyperlora, named
from fedlora_jax.signatures import Signature
from models import families, tokenizer
from models.backbone import NO_ADAPTER
from models.clip import PROMPT, text_features
from models.vit import normalise

OPTIONS = (
    "--clients 6 --holdout-clients 0 --rounds 2 --seeds 1 --local-steps 2 --batch 8 --rank 2 --prefix anew".split()
)


def test_every_model_that_is_pretrained_comes_along():
    assert pretrain.MODELS.keys() | {"clip"} == BUILT_IN.keys()
    files = [*BUILT_IN["clip"].iterdir(), *(BUILT_IN[name] for name in pretrain.MODELS)]
    assert all(path.stat().st_size < 600_000 for path in files)


def drawn(model, *inputs):
    """Parameters as the model has them, of any numbers: nothing is compiled."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)


@pytest.mark.long
@pytest.mark.parametrize("name", pretrain.MODELS)
def test_a_file_is_written_as_the_one_that_comes_along(name, tmp_path):
    """The same arrays and the same words beside them, and what is read is what was written."""
    nano = pretrain.MODELS[name]
    params = drawn(nano.make(len(pretrain.DIGITS)), jnp.zeros((1, SIDE, SIDE, 3)))
    pretrain.save(tmp_path / "own.npz", nano, params)
    with np.load(tmp_path / "own.npz") as own, np.load(BUILT_IN[name]) as theirs:
        assert {key: x.shape for key, x in own.items()} == {key: x.shape for key, x in theirs.items()}
        said, expected = (json.loads(x["meta"].item()) for x in (own, theirs))
        assert said == expected | {"command": "python -m experiments.setup.pretrain"}
    read = flatten(families.find(None, tmp_path / "own.npz")(tmp_path / "own.npz").params)
    for key, x in flatten(params).items():
        np.testing.assert_array_equal(read[key], x)


@pytest.mark.long
def test_a_clip_is_written_as_the_one_that_comes_along(tmp_path):
    """The same files, in which arrays alone differ, and what is read is what was written, to half precision."""
    lesson = pretrain_clip.characters(np.zeros((1, 42, 48, 48)))
    ids, _ = pretrain_clip.vocabulary(lesson)
    image, text = pretrain_clip.towers(len(ids))
    one = jnp.zeros((1,), jnp.int32)
    params = {
        "image": pretrain_clip.without_head(drawn(image, jnp.zeros((1, SIDE, SIDE, 3)))),
        "text": drawn(text, one[None], one),
        "logit_scale": jnp.ones(()),
    }
    pretrain_clip.save(tmp_path / "own", params, lesson)
    for path in BUILT_IN["clip"].iterdir():
        if path.name != "model.safetensors":
            assert (tmp_path / "own" / path.name).read_bytes() == path.read_bytes(), path.name
    shapes = lambda model: jax.tree.map(lambda x: (x.shape, x.dtype), model.params)
    of = lambda weights: load(Config(model="clip", weights=str(weights), head="text"), pretrain.DIGITS, SIDE)
    own = of(tmp_path / "own")
    assert shapes(own) == shapes(of(BUILT_IN["clip"]))
    for key, x in flatten(params["text"]).items():
        np.testing.assert_allclose(flatten(own.params)[f"text/{key}"], x, rtol=1e-3, atol=1e-6)
    for key, x in flatten(params["image"]).items():
        np.testing.assert_allclose(flatten(own.params)[key], x, rtol=1e-3, atol=1e-6)


@pytest.mark.long
def test_a_clip_of_any_data_computes_as_it_was_trained(tmp_path, monkeypatch, capsys):
    """Two steps, by the command: what the folder is read as, a run's model, has the features that it was saved with."""
    draw, source = np.random.default_rng(0), tmp_path / "own.npz"
    x, y = draw.integers(0, 256, (12, 8, 8, 3)).astype(np.uint8), np.arange(12) % 3
    np.savez(source, x=x, y=y, classes=["cat", "sea_lion", "eel"], split=np.repeat([0, 1], 6))

    def make(*options):
        monkeypatch.setattr(sys, "argv", ["pretrain_clip", "--data", str(source), *options])
        pretrain_clip.main()

    for module in (pretrain, pretrain_clip):
        monkeypatch.setattr(module, "SCAN", 2)
    made = []
    trained = pretrain_clip.pretrain
    monkeypatch.setattr(pretrain_clip, "pretrain", lambda *rest: made.append(trained(*rest)) or made[-1])
    make("--out", str(tmp_path / "clip"), "--image-size", "8", "--steps", "2")
    assert "'a photo of a cat.' and so on: " in capsys.readouterr().out
    names = ("cat", "sea lion", "eel")
    model = load(Config(model="clip", weights=str(tmp_path / "clip"), head="text"), names, 8)
    lesson = pretrain_clip.of_data(str(source), 8)
    image, text = pretrain_clip.towers(len(pretrain_clip.vocabulary(lesson)[0]))
    words = tokenizer.built(*pretrain_clip.vocabulary(lesson))
    g = text_features(text, made[0]["text"], words, [PROMPT.format(name) for name in names])
    f = pretrain_clip.features(image, made[0]["image"], normalise(x, pretrain.MEAN, pretrain.STD))
    scores = np.exp(float(made[0]["logit_scale"])) * np.asarray(f) @ g.T
    np.testing.assert_allclose(model.apply(model.params, NO_ADAPTER, x)[0], scores, atol=0.05)
    capsys.readouterr()
    for options, said in (
        ([], "--data makes a model of its own: name the folder to write with --out"),
        (["--out", "a", "--steps", "3"], "--steps must be a multiple of 2; got 3"),
        (["--out", "a", "--image-size", "6"], "--image-size must be a multiple of 4, the side of a patch; got 6"),
    ):
        with pytest.raises(SystemExit):
            make(*options)
        assert capsys.readouterr().err == f"error: {said}\n"


@pytest.mark.long
@pytest.mark.parametrize("name", BUILT_IN)
def test_they_read_half_of_the_handwriting_that_they_have_never_seen(name):
    data = digits()
    model = load(Config(model=name), tuple(data["classes"]), SIDE)
    logits = jax.jit(lambda x: model.apply(model.params, NO_ADAPTER, x)[0])(data["x"][data["split"] == 0])
    assert np.mean(np.asarray(logits).argmax(-1) == data["y"][data["split"] == 0]) > 0.5  # by chance 0.1


def test_a_family_is_chosen_by_its_name(monkeypatch):
    named = lambda model: load(Config(model=model), pretrain.DIGITS, SIDE).name
    names = ["nano_glyphs", "nano_glyphs", "nano_mixer", "nano_clip"]
    assert [named(model) for model in (None, "vit", "mixer", "clip")] == names
    monkeypatch.setitem(families.FAMILIES, "large", families.FAMILIES["vit"])
    with pytest.raises(ValueError, match="no weights are built in for --model large: give --weights"):
        named("large")


def test_the_built_in_theta_is_of_the_main_job_and_of_no_other_adapter():
    """Learned for the adapter of the default options."""
    config = Config(theta="nano")
    like = lambda classes: Signature(np.zeros(0), np.zeros(classes), np.zeros(1))
    theta = record.read_arrays(theta_of(config))

    def begun(config, classes):
        model = load(config, pretrain.DIGITS[:classes], SIDE)
        adapter = new_adapter(config, model, jax.random.key(0))
        return hyperlora(12, like(classes), "frozen", theta=theta).init(jax.random.key(0), adapter)

    state = jax.jit(lambda: begun(config, 10))()
    held = named(state.theta)
    assert held.keys() == theta.keys()
    for name, x in theta.items():
        np.testing.assert_array_equal(held[name], x)
    with pytest.raises(ValueError, match="theta was learned for another signature, adapter or form"):
        begun(Config(targets=("all",)), 10)
    assert theta_of(Config()) is None
    assert theta_of(Config(theta="mine.npz")) == "mine.npz"
