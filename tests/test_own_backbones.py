"""The examples of models of one's own compute what they say, and what is no such model is told what to pass."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from input_helpers import SMALL, change

from experiments.cli import parse
from experiments.commands import list_models
from experiments.commands.compare import Plan
from experiments.config import Config
from experiments.requests import Models
from experiments.setup import user_code
from experiments.setup.backbone import load
from fedlora_jax import lora
from models.backbone import NO_ADAPTER, Backbone, checked

EXAMPLE = "examples/own_backbones.py"
CLASSES, SIDE = ("a", "b", "c"), 16
IMAGES = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), np.uint8)


def example(name, root):
    return load(Config(model=f"{root / EXAMPLE}:{name}"), CLASSES, SIDE)


@pytest.mark.long
@pytest.mark.parametrize("name", ["cnn", "nnx_cnn", "plain"])
def test_an_adapter_is_the_model_with_other_weights(name, pytestconfig):
    model = example(name, pytestconfig.rootpath)
    adapter = lora.new(jax.random.key(0), model.params, rank=2, targets=model.patterns(["default"]), full="^head/")
    draw = lambda x: jax.random.normal(jax.random.key(x.size), x.shape)
    adapter = jax.tree.map(draw, adapter)
    apart = model.apply(model.params, adapter, IMAGES, training=True)
    folded = model.apply(lora.merge(model.params, adapter), NO_ADAPTER, IMAGES)
    for x, y in zip(apart, folded, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
    assert np.abs(apart[0] - model.apply(model.params, NO_ADAPTER, IMAGES)[0]).max() > 0.1
    assert apart[0].shape == (4, 3)


def test_an_nnx_model_computes_what_it_did(pytestconfig):
    model = example("nnx_cnn", pytestconfig.rootpath)
    file, _ = user_code.read(str(pytestconfig.rootpath / EXAMPLE))
    direct = file.NNXCNN(3, nnx.Rngs(0))(jnp.asarray(IMAGES, jnp.float32) / 255)
    for x, y in zip(model.apply(model.params, NO_ADAPTER, IMAGES), direct, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_an_nnx_model_is_federated(pytestconfig, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change()(tmp_path / "data.npz")
    own = f"{pytestconfig.rootpath / EXAMPLE}:nnx_cnn"
    options = ["run", "--method", "flexlora", "--model", own, *SMALL, "--data", "data.npz", "--rank", "2"]
    plan = Plan(*parse([*options, "--out", "out"]))
    assert plan.problem.record["adapted"] == ["neck/kernel"]
    plan.execute()
    assert (tmp_path / "out" / "report.html").exists()


def test_what_is_adapted_of_it_is_listed(pytestconfig):
    text = list_models.table(Models(model=f"{pytestconfig.rootpath / EXAMPLE}:nnx_cnn", rank=3))
    assert "default  84      5.3 %   neck/kernel [16, 12]" in text


MODEL = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
PURE = "nnx.to_pure_dict(nnx.state(model, nnx.Param))"


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (MODEL, f"params is Linear of NNX: expected nested dicts of arrays: pass {PURE}"),
        (nnx.state(MODEL), f"params is State of NNX: expected nested dicts of arrays: pass {PURE}"),
        ({"kernel": MODEL.kernel}, f"params/kernel is Param of NNX: expected nested dicts of arrays: pass {PURE}"),
        (
            {"layers": {0: {"kernel": np.ones((2, 2))}}},
            "params/layers has the key 0: expected nested dicts with",
        ),
        (
            {"layers": [np.ones((2, 2))]},
            "params/layers is a list: expected nested dicts of arrays: pass {str(i)",
        ),
        ([np.ones((2, 2))], "params is a list: expected nested dicts"),
        ({"mlp/w": np.ones((2, 2))}, "params has the key 'mlp/w': a slash joins names, 'mlp' should hold a dict"),
        ({"kernel": 1.0}, "params/kernel is float: expected nested dicts of arrays"),
        (np.ones((2, 2)), "params is ndarray: expected nested dicts of arrays"),
    ],
)
def test_other_trees_are_told_what_to_pass(params, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        lora.new(jax.random.key(0), params, rank=1, targets="kernel")
    with pytest.raises(ValueError, match=f"^own.py:mine: {re.escape(said)}"):
        checked(Backbone("mine", params, lambda params, adapter, images: None), "own.py:mine")


def test_the_pure_dict_of_an_nnx_model_is_taken():
    adapter = lora.new(jax.random.key(0), nnx.to_pure_dict(nnx.state(MODEL, nnx.Param)), rank=1, targets="kernel")
    assert adapter["kernel"].a.shape == (3, 1)
