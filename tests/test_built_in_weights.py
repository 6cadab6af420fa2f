"""The weights that come along are what their command makes, small, and of models that have learned to read."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config import Config
from experiments.setup import pretrain, pretrain_clip
from experiments.setup.backbone import BUILT_IN, load
from experiments.setup.digits import SIDE, digits
from fedlora_jax.lora import flatten
from models import families
from models.backbone import NO_ADAPTER

OPTIONS = (
    "--clients 6 --holdout-clients 0 --rounds 2 --seeds 1 --local-steps 2 --batch 8 --rank 2 --prefix anew".split()
)


def test_every_model_that_is_pretrained_comes_along():
    assert pretrain.MODELS.keys() | {"clip"} == BUILT_IN.keys()
    files = [*BUILT_IN["clip"].iterdir(), *(BUILT_IN[name] for name in pretrain.MODELS)]
    assert all(path.stat().st_size < 600_000 for path in files)


@pytest.mark.parametrize("name", pretrain.MODELS)
def test_a_file_is_written_as_the_one_that_comes_along(name, tmp_path):
    """The same arrays and the same words beside them, and what is read is what was written."""
    nano = pretrain.MODELS[name]
    params = nano.make(len(pretrain.DIGITS)).init(jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 3)))["params"]
    pretrain.save(tmp_path / "own.npz", nano, params)
    with np.load(tmp_path / "own.npz") as own, np.load(BUILT_IN[name]) as theirs:
        assert {key: x.shape for key, x in own.items()} == {key: x.shape for key, x in theirs.items()}
        said, expected = (json.loads(x["meta"].item()) for x in (own, theirs))
        assert said == expected | {"command": "python -m experiments.setup.pretrain"}
    read = flatten(families.find(None, tmp_path / "own.npz")(tmp_path / "own.npz").params)
    for key, x in flatten(params).items():
        np.testing.assert_array_equal(read[key], x)


def test_a_clip_is_written_as_the_one_that_comes_along(tmp_path):
    """The same files, in which arrays alone differ, and what is read is what was written, to half precision."""
    lesson = pretrain_clip.characters(np.zeros((1, 42, 48, 48)))
    (ids, _), key = pretrain_clip.vocabulary(lesson), jax.random.key(0)
    image, text = pretrain_clip.towers(len(ids))
    one = jnp.zeros((1,), jnp.int32)
    params = {
        "image": pretrain_clip.without_head(image.init(key, jnp.zeros((1, SIDE, SIDE, 3)))["params"]),
        "text": text.init(key, one[None], one)["params"],
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
