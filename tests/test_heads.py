"""``--head`` decides what makes logits of features; who trains it is said by other options."""

import jax
import numpy as np
import pytest
from input_helpers import SMALL, change, refused

from experiments.cli import parse
from experiments.config import Config
from experiments.setup import problem
from experiments.setup.backbone import load
from experiments.setup.head import prototypes
from experiments.setup.problem import new_adapter
from fedlora_jax import lora
from models.backbone import NO_ADAPTER
from models.families import FAMILIES

CLASSES = tuple("0123456789")
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)


def unit(x, axis):
    return x / np.linalg.norm(x, axis=axis, keepdims=True)


@pytest.mark.long
def test_cosines_are_those_of_features_and_columns():
    plain, cosine = (load(Config(model="mixer", head=head), CLASSES, 16) for head in (None, "cosine"))
    _, features = plain.apply(plain.params, NO_ADAPTER, IMAGES)
    kernel = np.float64(plain.params["head"]["kernel"])
    expected = 10 * unit(np.float64(features), -1) @ unit(kernel, 0)
    logits, same = cosine.apply(cosine.params, NO_ADAPTER, IMAGES)
    np.testing.assert_allclose(same, features, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert cosine.facts["head"] == "kept, for these classes; cosines with it"


@pytest.mark.long
def test_what_is_trained_of_it_moves_its_logits_and_a_cut_changes_nothing():
    model = load(Config(head="cosine"), CLASSES, 16)
    adapter = new_adapter(Config(), model, jax.random.key(0))
    assert set(adapter["head"]) == {"kernel", "temperature"}
    adapter = jax.tree.map(lambda x: 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), adapter)
    logits, features = model.apply(model.params, adapter, IMAGES, training=True)
    kernel = np.float64(model.params["head"]["kernel"]) + np.float64(adapter["head"]["kernel"])
    temperature = 10 + float(adapter["head"]["temperature"][0])
    expected = temperature * unit(np.float64(features), -1) @ unit(kernel, 0)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    stem, top = model.cut(2)
    again, _ = top.apply(top.params, NO_ADAPTER, stem.apply(stem.params, IMAGES))
    np.testing.assert_allclose(again, model.apply(model.params, NO_ADAPTER, IMAGES)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_a_gate_is_the_softmax_of_two_layers_and_starts_open():
    plain, gated = (load(Config(model="clip", head=head), CLASSES, 16) for head in ("zero_shot", "gate"))
    logits, features = plain.apply(plain.params, NO_ADAPTER, IMAGES)
    np.testing.assert_allclose(gated.apply(gated.params, NO_ADAPTER, IMAGES)[0], logits, rtol=1e-3, atol=1e-3)
    adapter = new_adapter(Config(targets=(), full=("^head/gate/",)), gated, jax.random.key(0))
    assert set(lora.flatten(adapter)) == {f"head/gate/fc{i}/{kind}" for i in (1, 2) for kind in ("kernel", "bias")}
    adapter = jax.tree.map(lambda x: 0.5 * jax.random.normal(jax.random.key(x.size), x.shape), adapter)
    flat = {name: np.float64(x) for name, x in lora.flatten(lora.merge(gated.params["head"], adapter["head"])).items()}
    f = np.float64(features)
    scores = np.tanh(f @ flat["gate/fc1/kernel"] + flat["gate/fc1/bias"]) @ flat["gate/fc2/kernel"]
    gate = np.exp(scores + flat["gate/fc2/bias"])
    h = unit(f * gate / gate.sum(-1, keepdims=True), -1) * np.linalg.norm(f, axis=-1, keepdims=True)
    expected = h @ flat["kernel"] + flat["bias"]
    np.testing.assert_allclose(gated.apply(gated.params, adapter, IMAGES)[0], expected, rtol=1e-3, atol=1e-3)
    assert np.abs(expected - logits).max() > 0.1


@pytest.mark.long
def test_a_new_head_begins_with_columns_that_have_directions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change()(tmp_path / "data.npz")
    options = ["run", "--method", "fedit", *SMALL, "--data", "data.npz", "--rank", "2", "--head", "cosine"]
    made = problem.build(parse(options)[1])
    assert made.record["head"] == "new, the file's is for 10 other classes; cosines with it"
    assert made.record["trained_in_full"] == ["head/kernel", "head/temperature"]
    adapter, batch = (jax.tree.map(lambda x: x[0], made.adapters), jax.tree.map(lambda x: x[:8], made.train))
    gradient = jax.jit(jax.grad(made.loss_fn, 1))(made.base, adapter, batch, jax.random.key(0))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    assert np.linalg.norm(gradient["head"]["kernel"]) > 1e-3
    low_rank = lora.low_rank_leaves(gradient)
    assert all(np.linalg.norm(x.b) > 1e-6 for x in low_rank), "features are trained from the first step on"


def test_a_head_of_names_is_the_models_that_reads_them(capsys, monkeypatch):
    asked = []

    def reads(weights, classes, image_size, head="other"):
        asked.append(head)
        return FAMILIES["vit"].make(weights, classes, image_size)

    monkeypatch.setitem(FAMILIES, "reads", FAMILIES["vit"]._replace(make=reads))
    nano = str(load.__globals__["NANO"])
    for head in ("zero_shot", "linear", None):
        load(Config(model="reads", weights=nano, head=head), CLASSES, 16)
    assert asked == ["zero_shot", "linear", "other"]
    assert load(Config(head="linear"), CLASSES, 16).facts == load(Config(), CLASSES, 16).facts
    capsys.readouterr()
    said = refused(["run", "--method", "fedit", "--head", "zero_shot", "--model", "vit"], capsys, monkeypatch)
    assert "vit reads no text to make --head zero_shot of: use linear, cosine or prototype" in said


@pytest.mark.long
def test_prototypes_are_the_means_of_the_training_clients(tmp_path, monkeypatch):
    """Of each seed its own; logits are distances from them, and unseen clients tell nothing of their images."""
    monkeypatch.chdir(tmp_path)
    change()(tmp_path / "data.npz")
    options = ["run", "--method", "fedit", *SMALL, "--data", "data.npz", "--rank", "2", "--head", "prototype"]
    made = problem.build(parse([*options, "--holdout-clients", "2", "--seeds", "2", "--adapt-last", "1"])[1])
    x, y = made.images.x[~made.images.test], np.asarray(made.train[1])
    _, features = made.backbone.apply(made.backbone.params, NO_ADAPTER, x)
    features, heads = np.float64(features), made.adapters["head"]
    for s in range(2):
        rows, sizes = (np.asarray(x[s]) for x in made.clients.population[:2])
        held = np.concatenate([row[:size] for row, size in zip(rows[:4], sizes[:4], strict=True)])
        means = np.stack([features[held[y[held] == c]].mean(0) for c in range(3)])
        logits = features @ np.float64(heads["kernel"][s]) + np.float64(heads["bias"][s])
        distances = ((features[:, None] - means) ** 2).sum(-1)
        spread = distances[held, y[held]].mean()
        np.testing.assert_allclose(logits, ((features**2).sum(-1)[:, None] - distances) / spread, rtol=1e-4, atol=1e-3)
    assert np.abs(heads["kernel"][0] - heads["kernel"][1]).max() > 1e-3
    assert not np.asarray(made.base["head"]["kernel"]).any()
    assert made.record["head"] == "prototypes: mean features of each class over the training clients"


def test_a_class_that_nobody_has_is_in_the_middle():
    features, labels = np.float32([[1, 0], [3, 0], [0, 2]]), np.array([0, 0, 2])
    head = prototypes(features, labels, [np.array([0, 1]), np.array([2])], 3)
    spread = 2 / 3  # of 1, 1 and 0
    np.testing.assert_allclose(head["kernel"].T * spread / 2, [[2, 0], [4 / 3, 2 / 3], [0, 2]], rtol=1e-6)
    alone = prototypes(features[1:], labels[1:], [np.array([0, 1])], 3)
    np.testing.assert_allclose(alone["bias"], [-9, -(1.5**2 + 1), -4], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--full", ""], "--full '' leaves it frozen: name it there (^head/)"),
        (["--full", "^head/kernel"], "--full ^head/kernel leaves it frozen"),
        (["--keep-head"], "--keep-head and --head prototype both say where the head starts: give one of them"),
    ],
)
def test_prototypes_that_nothing_would_hold_are_refused(options, said, capsys, monkeypatch):
    assert said in refused(["run", "--method", "fedit", "--head", "prototype", *options], capsys, monkeypatch)
