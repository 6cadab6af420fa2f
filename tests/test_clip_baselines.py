"""Logits by optimal transport, adapters between the towers, what of them travels, and templates by data set."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clip_helpers import arrays, encode, folder, towers
from helpers import float64
from input_helpers import SMALL, change
from scipy.optimize import linprog, minimize

from experiments.cli import parse
from experiments.commands.compare import Plan
from experiments.config import Config
from experiments.setup import backbone as backbones
from experiments.setup import task
from fedlora_jax import lora
from fedlora_jax.lora import LoRA
from fedlora_jax.methods.fedper import fedper
from models import prompts, transport
from models.pretrained_clip import clip_backbone

IMAGES = np.random.default_rng(1).integers(0, 256, (3, 4, 4, 3)).astype(np.uint8)
SHORT = ("cat", "eel", "of")
PATCHES, PROMPTS = 5, 2


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("clip") / "a", arrays())


def logits(backbone, adapter=None, images=IMAGES):
    return np.asarray(backbone.apply(backbone.params, adapter or {}, images)[0])


def nudged(backbone, names, seed=0, size=0.3):
    """An adapter that trains these in full, and has moved."""
    draw = np.random.default_rng(seed).normal
    flat = lora.flatten(backbone.params)
    return lora.unflatten({name: np.float32(size * draw(size=np.shape(flat[name]))) for name in names})


# --- transport (FedOTP)


def conditions(mass):
    """Matrices of both: of rows at most 1 / patches each, of columns exactly mass / prompts each."""
    at = np.arange(PATCHES * PROMPTS).reshape(PATCHES, PROMPTS)
    rows, columns = (np.float64([[i in part for i in at.flat] for part in parts]) for parts in (at, at.T))
    return (rows, np.full(PATCHES, 1 / PATCHES)), (columns, np.full(PROMPTS, mass / PROMPTS))


@pytest.mark.parametrize("mass", [0.5, 0.8, 1.0])
def test_a_plan_is_what_minimises_cost_and_entropy_under_its_conditions(mass):
    """Against a general minimiser; with little entropy its cost is that of the linear programme."""
    cost = np.random.default_rng(3).uniform(0, 2, (PATCHES, PROMPTS))
    (rows, most), (columns, each) = conditions(mass)
    with float64():
        found = np.asarray(transport.plan(jnp.float64(cost), mass, 0.1, 2000))
        sharp = np.asarray(transport.plan(jnp.float64(cost), mass, 0.005, 20000))
    value = lambda t: t @ cost.ravel() + 0.1 * np.sum(t * np.log(t))
    best = minimize(
        value,
        np.full(PATCHES * PROMPTS, mass / PATCHES / PROMPTS),
        jac=lambda t: cost.ravel() + 0.1 * (np.log(t) + 1),
        bounds=[(1e-9, None)] * (PATCHES * PROMPTS),
        constraints=[
            {"type": "ineq", "fun": lambda t: most - rows @ t, "jac": lambda t: -rows},
            {"type": "eq", "fun": lambda t: columns @ t - each, "jac": lambda t: columns},
        ],
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    np.testing.assert_allclose(found.ravel(), best.x, atol=1e-5)
    np.testing.assert_allclose(found.sum(0), each, rtol=1e-12)
    least = linprog(cost.ravel(), rows, most, columns, each).fun
    np.testing.assert_allclose((sharp * cost).sum(), least, rtol=0.01)


def transported(tokens, texts, scale, steps=3000):
    """Logits in float64: of every image and class a plan by projections onto the two conditions, and cosines."""
    out = np.zeros((len(tokens), texts.shape[1]))
    for i, x in enumerate(tokens[:, 1:]):
        for c in range(texts.shape[1]):
            s = x @ texts[:, c].T
            k, v = np.exp((s - 1) / transport.EPSILON), np.ones(len(texts))
            for _ in range(steps):
                u = np.minimum(1, 1 / len(x) / (k @ v))
                v = transport.MASS / len(texts) / (k.T @ u)
            out[i, c] = np.exp(scale) * np.sum(u[:, None] * k * v * s)
    return out


@pytest.mark.long
def test_logits_of_two_prompts_are_transport_to_the_patches_of_an_image(path):
    """With vectors that have moved; each of them has a gradient, and what stays with a client is the local one."""
    backbone = clip_backbone(path, SHORT, head="transport", context="2")
    start = backbone.params["head"]
    assert np.abs(start["context"] - start["local"]).max() > 0.01
    adapter = nudged(backbone, ("head/context", "head/local"))
    rows = [encode(f"{name}.") for name in SHORT]
    of = lambda name: towers(arrays(), IMAGES, rows, context=np.float64(start[name] + adapter["head"][name]))
    (tokens, shared), (_, local) = of("context"), of("local")
    expected = transported(tokens, np.stack([shared, local]), 0.7)
    got, features = backbone.apply(backbone.params, adapter, IMAGES)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(features, tokens[:, 0], atol=1e-4)
    assert backbone.facts["head"].endswith(
        "2 vectors to be learned, once shared and once each client's own, by transport"
    )
    loss = task.objectives(task.TASKS["softmax"], backbone).loss_fn
    moved = jax.grad(loss, 1)(backbone.params, adapter, (IMAGES, np.arange(3)), jax.random.key(0))["head"]
    assert all(np.linalg.norm(x) > 1e-6 for x in moved.values())
    size = start["local"].size
    travels = fedper("local").traffic(adapter, [adapter])[:2]
    assert [sum(x.size for x in jax.tree.leaves(part)) for part in travels] == [size, size]
    words = clip_backbone(path, SHORT, head="transport", context="a photo of a").params["head"]
    np.testing.assert_array_equal(words["context"], words["local"])


# --- adapters between the towers (pFedMMA)

OWN = [
    f"{tower}blocks/bridge/{part}/{kind}"
    for tower in ("", "text/")
    for part in ("down", "up")
    for kind in ("kernel", "bias")
]
MIDDLE = ["bridge/kernel", "bridge/bias"]


@pytest.mark.long
@pytest.mark.parametrize("last", [1, 2])
def test_adapters_of_both_towers_share_their_middle(last, path):
    """Logits of the definition, all of it moved; the gradient of the middle is that of both towers together."""
    backbone = clip_backbone(path, SHORT, head="text", bridge=f"{last}:5:0.5")
    adapter = nudged(backbone, [*OWN, *MIDDLE])
    flat = lora.flatten(lora.merge(backbone.params, adapter))
    kinds = ("kernel", "bias")

    def of(tower, i):
        j = i - (2 - last)
        own = lambda part: [flat[f"{tower}blocks/bridge/{part}/{kind}"][i] for kind in kinds]
        return None if j < 0 else (*own("down"), *(flat[f"bridge/{kind}"][j] for kind in kinds), *own("up"), 0.5)

    bridge = {name: [of(tower, i) for i in range(2)] for name, tower in (("vision_model", ""), ("text_model", "text/"))}
    tokens, texts = towers(arrays(), IMAGES, [encode(f"a photo of a {name}.") for name in SHORT], bridge=bridge)
    expected = np.exp(0.7) * tokens[:, 0] @ texts.T
    np.testing.assert_allclose(logits(backbone, adapter), expected, rtol=1e-3, atol=1e-3)
    assert np.abs(expected - logits(clip_backbone(path, SHORT, head="text"))).max() > 0.01
    if last == 1:
        stem, top = backbone.cut(1)
        body = {**adapter, "blocks": jax.tree.map(lambda x: x[1:], adapter["blocks"])}
        np.testing.assert_allclose(logits(top, body, stem.apply(stem.params, IMAGES)), expected, rtol=1e-3, atol=1e-3)
    else:
        with pytest.raises(ValueError, match="--adapt-last 1: more blocks than these have adapters, see --bridge"):
            backbone.cut(1)
    assert backbone.publish is None
    assert not backbone.layouts
    term = LoRA(np.ones((last, 5, 1), np.float32), 0.1 * np.ones((last, 1, 5), np.float32), 1.0)
    dense = {**adapter, "bridge": {**adapter["bridge"], "kernel": np.full((last, 5, 5), 0.1, np.float32)}}
    low = {**adapter, "bridge": {**adapter["bridge"], "kernel": term}}
    np.testing.assert_allclose(logits(backbone, low), logits(backbone, dense), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"bridge": "3:5:1"},
            "--bridge 3:5:1: expected BLOCKS:WIDTH:SCALE, as in 2:32:0.1, with 1 to 2 blocks of both",
        ),
        ({"bridge": "1:0:1"}, "--bridge 1:0:1: expected"),
        ({"bridge": "1:5"}, "--bridge 1:5: expected"),
        ({"bridge": "1:5:1", "head": "linear"}, "--bridge is of --head text, and the head is linear: leave it out"),
        ({"head": "transport"}, "--head transport is of two prompts that are learned: give --context"),
    ],
)
def test_what_the_towers_cannot_have_is_refused(options, said, path):
    with pytest.raises(ValueError, match=said) as refused:
        clip_backbone(path, SHORT, **{"head": "text", **options})
    assert "\n" not in str(refused.value)


@pytest.mark.long
def test_they_are_federated(path, tmp_path, monkeypatch):
    """What travels is what is shared, in a run from the command line: of pFedMMA, a part of which stays."""
    monkeypatch.chdir(tmp_path)
    change()(tmp_path / "data.npz")
    model = ["--head", "text", "--bridge", "1:4:0.5", "--full", "^bridge/,bridge/(down|up)/"]
    options = [*SMALL, "--data", "data.npz", "--weights", str(path), "--out", "out", "--targets", "", *model]
    plan = Plan(*parse(["compare", "--methods", "fedper:stays=blocks.bridge", *options]))
    assert set(MIDDLE) < set(plan.problem.record["trained_in_full"])
    plan.execute()
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["loss"]) for row in rows)
    flat = lora.flatten(plan.problem.backbone.params)
    assert rows[-1]["bytes_up"] == plan.config.clients * 4 * sum(flat[part].size for part in MIDDLE)


# --- templates


@pytest.mark.parametrize(
    ("source", "template"),
    [
        ("tfds:oxford_iiit_pet:4.0.0", "a photo of a {}, a type of pet."),
        ("tfds:oxford_flowers102", "a photo of a {}, a type of flower."),
        ("hf:timm/oxford-iiit-pet", "a photo of a {}, a type of pet."),
        ("hf:ethz/food101:default", "a photo of {}, a type of food."),
        ("data/caltech-101", "a photo of a {}."),
        ("data/EuroSAT.npz", "a centered satellite photo of {}."),
        ("tfds:cifar100", "a photo of a {}."),
        ("digits", "a photo of a {}."),
    ],
)
def test_a_data_set_that_is_known_has_its_templates(source, template):
    assert prompts.of_data(backbones.called(source)) == (template,)


def test_they_are_taken_where_names_are_read_and_nothing_else_is_asked_for(path):
    def head(**options):
        config = Config(model="clip", weights=str(path), data="tfds:oxford_flowers102", **options)
        return backbones.read(config, ("cat", "eel"), 4).facts["head"]

    assert head().startswith("zero-shot, 'a photo of a {}, a type of flower.'")
    assert head(prompts="{} of").startswith("zero-shot, '{} of'")
    assert head(head="text").startswith("the text tower, 'a photo of a {}, a type of flower.'")
    assert head(head="text", context="2").startswith("the text tower, '{}.'")
    assert head(head="linear").startswith("new")


def test_a_folder_of_images_may_say_its_own(path, tmp_path):
    """A file beside its classes goes before its name, and is refused where it is asked for and says none."""
    (own := tmp_path / "eurosat" / "templates.txt").parent.mkdir()
    own.write_text("a {} from above\n\n{} of\n")
    config = Config(model="clip", weights=str(path), data=str(own.parent))
    assert backbones.read(config, ("cat", "eel"), 4).facts["head"].startswith("zero-shot, 'a {} from above', '{} of'")
    for text, line in (("{} of\nof\n", "'of'"), ("\n", "''")):
        own.write_text(text)
        with pytest.raises(ValueError, match=rf"eurosat/templates\.txt has the line {line}: expected templates"):
            backbones.read(config, ("cat", "eel"), 4)
        assert backbones.read(Config(data=str(own.parent)), ("0",), 16).name == "nano_glyphs"  # which reads no text


def test_every_other_name_is_of_templates_and_of_one_set():
    assert set(prompts.CALLED) <= set(prompts.PUBLISHED)
    names = [name for own in prompts.CALLED.values() for name in own]
    assert len(set(names)) == len(names)
    assert all(name.isalnum() and name == name.lower() for name in names)
