"""Classes that nobody trains on: who has which images, what is scored among what, and the numbers of a run."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clip_helpers import arrays, folder
from input_helpers import SMALL, change

from experiments.cli import parse
from experiments.commands.compare import Plan
from experiments.engine.evaluation import accuracy_on_sides
from experiments.results import metrics, summary
from experiments.results.metrics import Evaluation
from experiments.setup import backbone as backbones
from experiments.setup import data, problem
from experiments.setup.task import TASKS, objectives
from fedlora_jax import partition

NAMES = np.array(["cat", "eel", "of", "photo", "tea"])
Y = np.arange(120) % 5
SPLIT = (np.arange(120) // 5 % 3 == 0).astype(int)
ARRAYS = {
    "x": np.random.default_rng(0).integers(0, 256, (120, 8, 8, 3), np.uint8),
    "y": Y,
    "domain": np.arange(120) // 30 % 2,
    "split": SPLIT,
    "classes": NAMES,
}


def head_of(tmp_path, *options):
    """Classes of a run, and the column of the zero-shot head that each has."""
    path = tmp_path / "data.npz"
    change(**ARRAYS)(path)
    folder(tmp_path / "tiny", arrays())
    given = ["compare", "--data", str(path), "--weights", str(tmp_path / "tiny"), *options]
    config, own, _ = problem._images(parse(given)[1])
    kernel = backbones.read(config, own.classes, None).params["head"]["kernel"]
    return dict(zip(own.classes, kernel.T, strict=True))


@pytest.mark.parametrize("named", [(), ("--class-names", "cats,long fish,from,picture,a drink")])
def test_a_class_keeps_the_name_that_it_was_given(named, tmp_path):
    """Names are in the data's order, in which novel classes need not stand last."""
    whole, split = head_of(tmp_path, *named), head_of(tmp_path, *named, "--novel", "eel,cat")
    assert [*whole] == NAMES.tolist()
    assert [*split] == ["of", "photo", "tea", "eel", "cat"]
    for name, column in whole.items():
        np.testing.assert_allclose(split[name], column, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--class-names a,b", "--class-names are 2, the data has 5 classes: name each in its order .cat, eel, of, ..."),
        ("--keep-head", "--keep-head takes the weights' outputs in the data's order, and --novel eel,cat puts"),
    ],
)
def test_what_is_said_class_by_class_must_be_known_of_each(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        head_of(tmp_path, "--novel", "eel,cat", *options.split())


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.npz"
    change(**ARRAYS)(path)
    return data.load(str(path))


@pytest.mark.parametrize(
    ("novel", "base"), [(("half",), [0, 1, 2]), (("eel", "cat"), [2, 3, 4]), (("of", "photo", "tea"), [0, 1])]
)
def test_novel_classes_stand_last_and_have_test_images_alone(novel, base, images):
    own = data.base_to_novel(images, novel)
    behind = NAMES[3:] if novel == ("half",) else novel
    assert own.known == len(base)
    assert own.classes == (*NAMES[base], *behind)
    kept = np.flatnonzero(np.isin(Y, base) | (SPLIT == 1))
    np.testing.assert_array_equal(own.rows, kept)
    np.testing.assert_array_equal(own.x, ARRAYS["x"][kept])
    assert [own.classes[y] for y in own.y] == NAMES[Y[kept]].tolist()
    assert (own.y[~own.test] < own.known).all()
    assert data.base_to_novel(images, ()) is images


@pytest.mark.parametrize(
    ("novel", "said"),
    [
        (("dog",), "there is no dog"),
        (("cat",), "leaves 4: expected two at least on either side"),
        (("cat", "eel", "of", "tea"), "leaves 1: expected two at least"),
        (("cat", "cat"), "leaves 4: expected two at least on either side, each named once"),
    ],
)
def test_novel_classes_that_are_none_are_refused(novel, said, images):
    with pytest.raises(ValueError, match=f"--novel {','.join(novel)}: {said}"):
        data.base_to_novel(images, novel)


def test_an_image_is_scored_among_the_classes_of_its_side():
    """Logits are the images themselves; the loss is that of the classes that are trained on alone."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(200, 5)).astype(np.float32), rng.integers(0, 5, 200)
    backbone = SimpleNamespace(apply=lambda params, adapter, x, training: (x + params, x))
    loss, correct, *_ = objectives(TASKS["softmax"], backbone, known=3)  # type: ignore[arg-type]
    shift = np.float32([0, 0, 0, 9, 9])  # of which nothing must be seen on the other side
    picked = np.where(y < 3, x[:, :3].argmax(1), 3 + x[:, 3:].argmax(1))
    right = np.asarray(correct(shift, {}, (jnp.asarray(x), jnp.asarray(y))))
    np.testing.assert_array_equal(right, picked == y)
    base = y < 3
    found = accuracy_on_sides(correct, (jnp.asarray(x), jnp.asarray(y)), 3, jnp.asarray(shift), {})
    np.testing.assert_allclose(found, [(picked == y)[base].mean(), (picked == y)[~base].mean()], rtol=1e-6)
    logits = np.float64(x[base][:, :3])
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), y[base]]
    got = loss(shift, {}, (x[base], y[base]), jax.random.key(0))
    np.testing.assert_allclose(got, expected.mean(), rtol=1e-5)


def test_the_harmonic_mean_is_of_the_three():
    sides = np.array([[0.5, 0.25], [0.7, 0.35]])
    one = Evaluation(np.ones(2), np.arange(2), np.zeros(2), np.array([0.9, np.nan]), np.ones(1), sides=sides)
    found = metrics.of(one)
    assert (found["base_accuracy"], found["novel_accuracy"]) == pytest.approx((0.6, 0.3))
    assert found["harmonic_mean"] == pytest.approx(3 / (1 / 0.9 + 1 / 0.6 + 1 / 0.3))
    assert metrics.of(one._replace(sides=0 * sides))["harmonic_mean"] == 0
    assert not {"base_accuracy", "harmonic_mean"} & metrics.of(one._replace(sides=None)).keys()
    assert "HM" not in summary.columns({"novel": []}).values()


@pytest.mark.long
def test_a_run_has_base_and_novel_of_every_client(tmp_path, monkeypatch, capsys):
    """Of a method that sends one model to everybody, base is what that is on all test images, and nobody trains on
    novel ones; what nothing has trained is the zero-shot model still."""
    monkeypatch.chdir(tmp_path)
    change(**ARRAYS)(tmp_path / "data.npz")
    folder(tmp_path / "tiny", arrays())
    options = [*SMALL, "--data", "data.npz", "--weights", "tiny", "--rank", "2", "--out", "out", "--head", "text"]
    options += ["--targets", "", "--full", "^head/logit", "--novel", "half", "--partition", "iid", "--adapt-last", "1"]
    plan = Plan(*parse(["compare", "--methods", "fedit", *options]))
    built = plan.problem
    assert built.images.known == 3
    label, trained = np.asarray(built.test[1]), np.asarray(built.train[1])
    assert trained.max() == 2
    counts, rows = np.asarray(built.clients.test_counts[0]), np.asarray(built.clients.test_rows[0])
    own = np.concatenate([row[:n] for row, n in zip(rows, counts, strict=True)])
    np.testing.assert_array_equal(np.sort(own), np.flatnonzero(label < 3))
    backbone, adapter = built.backbone, jax.tree.map(lambda x: x[0], built.adapters)
    x = built.images.x[built.images.test]
    logits = np.asarray(backbone.apply(backbone.params, jax.tree.map(jnp.zeros_like, adapter), x)[0])
    y = built.images.y[built.images.test]
    picked = np.where(y < 3, logits[:, :3].argmax(1), 3 + logits[:, 3:].argmax(1))
    plan.execute()
    assert " HM " in capsys.readouterr().out
    for row in map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()):
        # a scale of logits that is trained alone moves no prediction
        assert row["base_accuracy"] == pytest.approx(np.mean((picked == y)[y < 3]))
        assert row["novel_accuracy"] == pytest.approx(np.mean((picked == y)[y >= 3]))
        assert row["base_accuracy"] == pytest.approx(row["pooled_accuracy"])
        three = [row[f"{name}_accuracy"] for name in ("personal", "base", "novel")]
        assert row["harmonic_mean"] == pytest.approx(3 / sum(1 / x for x in three) if min(three) else 0)
    entry = json.loads((tmp_path / "out" / "summary.json").read_text())["methods"]["fedit"]
    assert entry["novel_accuracy_tuned"]["last"]["mean"] == pytest.approx(np.mean((picked == y)[y >= 3]))
    assert "harmonic mean" in (tmp_path / "out" / "report.html").read_text().lower()


@pytest.mark.parametrize(
    ("classes", "clients", "sizes"), [(51, 10, [5] * 9 + [6]), (24, 10, [2] * 9 + [6]), (5, 5, [1] * 5)]
)
def test_blocks_share_no_class(classes, clients, sizes):
    labels = np.random.default_rng(0).permutation(np.arange(4 * classes) % classes)
    parts = partition.split("blocks", labels, None, clients, np.random.default_rng(1))
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    own = [set(labels[part]) for part in parts]
    assert sorted(map(len, own)) == sizes
    assert sum(map(len, own)) == classes
    other = partition.split("blocks", labels, None, clients, np.random.default_rng(2))
    assert [set(labels[part]) for part in other] != own


def test_blocks_that_do_not_fit_are_refused():
    labels = np.arange(60) % 6
    with pytest.raises(ValueError, match="blocks: 8 clients with 1 of 6 classes each leave the last one without any"):
        partition.split("blocks", labels, None, 8, np.random.default_rng(0))
    lopsided = np.repeat(np.arange(3), (50, 5, 5))
    with pytest.raises(ValueError, match="fewer than 6 examples"):
        partition.split("blocks", lopsided, None, 3, np.random.default_rng(0), 6)
