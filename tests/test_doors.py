"""What comes to an experiment comes through a door: a model, a source of images, a task; each in one file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from input_helpers import SMALL, change, refused
from PIL import Image
from scipy.special import expit, log_softmax

from experiments.cli import parse
from experiments.commands import compare
from experiments.commands.compare import Plan
from experiments.groups.problem import TASKS as NAMES
from experiments.setup import data
from experiments.setup.data import SOURCES, Source
from experiments.setup.task import TASKS

CNN = """
import jax
import jax.numpy as jnp
from flax import linen as nn

from fedlora_jax import Dense, lora
from models.backbone import Backbone


class CNN(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x):
        for width in (8, 16):
            x = nn.relu(nn.Conv(width, (3, 3), strides=2)(x))
        x = nn.relu(Dense(12, name="neck")(x.mean((-3, -2))))
        return Dense(self.classes, name="head")(x), x


def cnn(classes, image_size):
    model = CNN(len(classes))
    params = model.init(jax.random.key(0), jnp.zeros((1, image_size, image_size, 3)))["params"]

    def apply(params, adapter, images, *, training=False):
        return model.apply(lora.variables(params, adapter), images.astype(jnp.float32) / 255)

    return Backbone("a small CNN", params, apply, targets={"all": ["neck/kernel"]})


def nothing(classes):
    return 3


def nan(classes):
    return cnn(classes, 16)._replace(params={"neck": jnp.full(3, jnp.nan)})


def layers():
    return Backbone("in a list", {0: jnp.zeros(3)}, None)


def narrow(image_size):
    return cnn("ab", image_size)


def letters(classes, image_size):
    return cnn(classes, image_size)._replace(targets={"all": "neck/kernel"})


def made(classes, change):
    made = cnn(classes, 16)
    return made._replace(apply=lambda *given, training: change(*made.apply(*given)))


def counts(classes):
    return made(classes, lambda logits, features: (logits.astype(jnp.int32), features))


def three(classes):
    return made(classes, lambda logits, features: (logits, features, features))


def unfitting(classes):
    made = cnn(classes, 16)
    return made._replace(params={name: made.params[name] for name in ("neck", "head")})


def wide(classes, width):
    return cnn(classes, width)


def fails():
    return {}["no"]


def divides(classes):
    return made(classes, lambda logits, features: (jnp.log(0 * logits), features))


def scales(classes):
    return made(classes, lambda logits, features: (logits, features / 0))
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change()(tmp_path / "data.npz")
    (tmp_path / "own.py").write_text(CNN)
    (tmp_path / "broken.py").write_text("import os\n\nnumber = 1 / 0\n")
    return tmp_path


def plan(*options):
    return Plan(*parse([*options, *SMALL, "--data", "data.npz", "--out", "out"]))


@pytest.mark.long
def test_a_model_of_ones_own_is_compared_like_any_other(files):
    found = plan("compare", "--methods", "fedit", "--model", "own.py:cnn", "--targets", "all", "--rank", "2")
    record = found.problem.record
    assert record["adapted"] == ["neck/kernel"]
    assert record["model"].startswith("own.py:cnn (")
    found.execute()
    rows = [json.loads(line) for line in (files / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} == {"fedit"}
    assert all(row["loss"] > 0 and 0 <= row["global_accuracy"] <= 1 for row in rows)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--model cnn", "no family of models 'cnn': expected clip, mixer, vit, or FILE.py"),
        ("--model nowhere.py:cnn", "no file 'nowhere.py'"),
        ("--model own.py:cnns", "own.py has no function 'cnns' for a model: it has"),
        ("--model broken.py:cnn", "broken.py, line 3 cannot be imported: ZeroDivisionError"),
        ("--model own.py:nothing", "own.py:nothing returned int: expected models.backbone.Backbone"),
        ("--model own.py:nan", "own.py:nan: params/neck holds NaN"),
        ("--model own.py:layers", "the key 0: expected nested dicts with string keys"),
        ("--model own.py:narrow", "a small CNN makes logits float32[96, 2]"),
        ("--model own.py:counts --targets all", "makes logits int32[96, 3] and features float32[96, 12]"),
        ("--model own.py:three --targets all", "ValueError: too many values to unpack (expected 2); expected apply("),
        ("--model own.py:unfitting --targets all", "ScopeParamNotFoundError: "),
        ("--model own.py:cnn", "a small CNN does not say which kernels get adapters: name one of its sets (all)"),
        ("--model own.py:cnn --targets all --adapt-last 1", "a small CNN has no blocks to count"),
        ("--model own.py:letters", "own.py:letters: targets is {'all': 'neck/kernel'}: expected lists"),
        ("--model own.py:divides --targets all", "makes logits that are nan or infinite of 1 of 1 images"),
        ("--model own.py:scales --targets all", "makes features that are nan or infinite of 72 of 72 images"),
        ("--model own.py:wide", "nothing gives it width: a default would, and there are classes"),
        ("--model own.py:fails", "own.py, line 74: KeyError: 'no'"),
        ("--model own.py:cnn --heads 3", "own.py:cnn does not take --heads: leave it out, got 3"),
        ("--method fedit+fedlc --task sigmoid", "FedLC calibrates a softmax"),
        ("--task guess", "--task must be one of softmax, sigmoid, pairs; got guess"),
    ],
)
def test_what_is_no_model_or_no_task_is_refused(options, said, files, capsys, monkeypatch):
    arguments = [
        "run",
        *([] if "--method" in options else ["--method", "fedit"]),
        *SMALL,
        "--data",
        "data.npz",
        "--out",
        "out",
        *options.split(),
    ]
    assert said in refused(arguments, capsys, monkeypatch)
    assert not (files / "out").exists()


@pytest.mark.long
def test_named_sets_are_the_kernels_they_say(files, monkeypatch):
    monkeypatch.setattr(compare, "Trial", lambda *_: None)  # nothing is traced
    adapted = lambda *options: plan("run", "--method", "fedit", *options).problem.record["adapted"]
    attention = [f"blocks/attn/{name}/kernel" for name in ("key", "out", "query", "value")]
    mlp = ["blocks/mlp/fc1/kernel", "blocks/mlp/fc2/kernel"]
    assert adapted() == adapted("--targets", "attn/(query|value)/kernel") == attention[2:]
    assert adapted("--targets", "qkvo") == adapted("--targets", "attn") == attention
    assert adapted("--targets", "out_fc2") == [attention[1], mlp[1]]
    assert adapted("--targets", "mlp,attn/key") == adapted("--targets", "attn/key,mlp") == [attention[0], *mlp]
    assert adapted("--targets", "all") == [*attention, *mlp]


def picture(path, size, colour, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def test_a_folder_of_images_is_read_as_it_is_sorted(tmp_path):
    """Two domains, three classes, a split, several formats and colour modes, hidden files: everything by its name."""
    for i, kind in enumerate("abc"):
        for split, suffix in (("train", "png"), ("test", "JPG")):
            for domain in ("paint", "photo"):
                picture(tmp_path / split / domain / kind / f"1.{suffix}", (8, 8), (80 * i, 0, 10 * (domain == "photo")))
    picture(tmp_path / "train" / "paint" / "b" / "2.png", (8, 8), (0, 0, 0, 0), "RGBA")
    picture(tmp_path / "train" / "paint" / "b" / "3.png", (8, 8), 7, "L")
    picture(tmp_path / "train" / "photo" / "c" / ".hidden.png", (3, 3), 0, "L")
    (tmp_path / "train" / "notes.txt").write_text("no image")
    images = data.load(str(tmp_path))
    assert (images.classes, images.domains) == (("a", "b", "c"), ("paint", "photo"))
    assert images.x.shape == (14, 8, 8, 3)
    assert images.test.sum() == 6
    whole = np.asarray(images.x).reshape(14, -1, 3).mean(1)
    plain = np.asarray(images.x).reshape(14, -1, 3).std(1).max(1) < 1  # one colour each; JPEG may be off by a little
    own = whole[:, 0] // 40
    assert plain.all()
    odd = [i for i, colour in enumerate(whole) if colour[0] == colour[1] > 0]
    assert sorted(whole[odd][:, 0]) == [7, 255]  # grey, and what is transparent lies on white
    others = np.setdiff1d(np.arange(14), odd)
    np.testing.assert_array_equal(np.round(whole[others, 0] / 80), images.y[others])
    np.testing.assert_array_equal(np.round(whole[others, 2] / 10), images.domain[others])
    assert own.max() >= 2


def test_images_of_many_sizes_need_a_size(tmp_path):
    for i, size in enumerate([(10, 6), (6, 12), (6, 6), (30, 30)]):
        picture(tmp_path / "ab"[i % 2] / f"{i}.png", size, (i, 50, 200))
    with pytest.raises(ValueError, match=r"a/0.png has 6 x 10 pixels and a/2.png 6 x 6: use --image-size"):
        data.load(str(tmp_path), test_share=0.5)
    images = data.load(str(tmp_path), 6, test_share=0.5)
    np.testing.assert_array_equal(images.x[:, 0, 0], [[i, 50, 200] for i in (0, 2, 1, 3)])
    assert images.x.shape == (4, 6, 6, 3)


def test_the_middle_of_a_wide_image_is_kept(tmp_path):
    left, right = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    middle = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.fromarray(np.concatenate([left, middle, right], 1)).save(tmp_path / name / f"{i}.png")
    images = data.load(str(tmp_path), 4, test_share=0.5)
    np.testing.assert_array_equal(images.x, np.stack([middle] * 4))


def test_odd_images_are_read_as_a_viewer_shows_them(tmp_path):
    """A class that is a link, a link back up, a photo that was held upright, a folder val beside test."""
    colours = np.zeros((4, 4, 3), np.uint8)
    colours[0] = 255
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter
    for split in ("train", "test", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "b").mkdir()
        Image.fromarray(colours).save(tmp_path / split / "a" / "1.png", exif=turned)
        Image.fromarray(colours).save(tmp_path / split / "b" / "1.png")
    (tmp_path / "train" / "c").symlink_to(tmp_path / "train" / "a")
    (tmp_path / "test" / "c").symlink_to(tmp_path / "test" / "a")
    (tmp_path / "train" / "a" / "up").symlink_to(tmp_path / "train")
    images = data.load(str(tmp_path))
    assert images.classes == ("a", "b", "c")
    assert images.test.tolist() == [True] * 3 + [False] * 3  # val is neither
    for x, y in zip(images.x, images.y, strict=True):
        np.testing.assert_array_equal(x, colours if y == 1 else np.rot90(colours, -1))


def test_sixteen_bits_become_eight(tmp_path):
    """White is white: 65,535 is 255, and the rest in proportion; turned as the file says."""
    values = np.array([[0, 257 * 7, 257 * 7 + 129], [60_000, 65_535, 128]], np.uint16)
    turned = Image.Exif()
    turned[0x0112] = 3
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.fromarray(values).save(tmp_path / name / f"{i}.png", exif=turned)
    shown = np.asarray(data.load(str(tmp_path), test_share=0.5).x[:])
    expected = np.rint(np.float64(values) / 65_535 * 255)[::-1, ::-1]
    np.testing.assert_array_equal(shown, np.broadcast_to(expected[..., None], shown.shape))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: picture(root / "a" / "2.tif", (4, 4), 60_000, "I"), "32 bits a pixel"),
        (lambda root: root.mkdir(exist_ok=True), "holds no images"),
        (lambda root: picture(root / "1.png", (4, 4), 0, "L"), "lie 0 and"),
        (lambda root: picture(root / "a" / "b" / "c" / "1.png", (4, 4), 0, "L"), "3 folders deep"),
        (lambda root: (root / "b" / "bad.png").write_bytes(b"no image"), "bad.png is no image that can be read"),
    ],
)
def test_folders_that_mean_nothing_are_refused(make, said, tmp_path):
    root = tmp_path / "images"
    if "holds" not in said:
        for name in "ab":
            picture(root / name / "1.png", (4, 4), 0, "L")
    make(root)
    with pytest.raises(ValueError, match=said):
        data.load(str(root))


def test_a_source_of_images_is_one_entry(monkeypatch):
    """Stripes of a direction: the text says how many, and their size is as wished."""

    def stripes(text, side, skip):
        count, side = int(text.removeprefix("stripes:")), side or 4
        lines = np.uint8(255 * (np.arange(side) % 2))
        across = np.broadcast_to(lines[:, None, None], (side, side, 3))
        y = np.arange(count) % 2
        return {
            "x": np.where(y[:, None, None, None], across, across.swapaxes(0, 1)),
            "y": y,
            "classes": np.array(["|", "-"]),
        }

    with pytest.raises(ValueError, match=r"no data 'stripes:20': expected 'digits', .*folder of images or the path of"):
        data.load("stripes:20")
    own = Source("'stripes:N'", lambda text: text.startswith("stripes:"), stripes)
    monkeypatch.setitem(SOURCES, "stripes", own)
    images = data.load("stripes:20", 6)
    assert images.x.shape == (20, 6, 6, 3)
    assert images.classes == ("|", "-")
    assert images.test.sum() == 4


def test_tasks_are_what_they_say():
    rng = np.random.default_rng(0)
    logits, y = rng.normal(size=(20, 5)) * 3, rng.integers(0, 5, 20)
    hot = np.eye(5)[y]
    scores, same = logits[:, y], y[:, None] == y
    of_pairs = [-(log_softmax(x, -1) * same).sum(-1) / same.sum(-1) for x in (scores, scores.T)]
    oracle = {
        "softmax": -log_softmax(logits, -1)[np.arange(20), y],
        "sigmoid": -(hot * np.log(expit(logits)) + (1 - hot) * np.log(expit(-logits))).sum(-1),
        "pairs": (of_pairs[0] + of_pairs[1]) / 2,
    }
    assert tuple(TASKS) == NAMES == tuple(oracle)
    for name, task in TASKS.items():
        np.testing.assert_allclose(task.loss(jnp.asarray(logits, jnp.float32), y), oracle[name], rtol=1e-5)
        np.testing.assert_array_equal(task.right(jnp.asarray(logits), y), logits.argmax(-1) == y)


def test_pairs_of_different_classes_have_the_loss_of_clip():
    """Mean cross-entropy of the diagonal, along either axis (figure 3 of the paper)."""
    scores = np.random.default_rng(0).normal(size=(6, 6)) * 2
    order = np.random.default_rng(1).permutation(6)
    diagonal = [log_softmax(scores[:, order], axis)[np.arange(6), np.arange(6)] for axis in (0, 1)]
    got = TASKS["pairs"].loss(jnp.asarray(scores, jnp.float32), order).mean()
    np.testing.assert_allclose(got, -np.mean(diagonal), rtol=1e-5)
    assert (
        float(jnp.abs(jax.grad(lambda x: TASKS["pairs"].loss(x, jnp.zeros(6, int)).mean())(scores)[:, 1:]).max()) == 0
    )


@pytest.mark.long
def test_a_run_minimises_its_task(files):
    losses = {}
    for name in NAMES:
        p = plan("run", "--method", "fedit", "--task", name).problem
        adapter, (x, y) = jax.tree.map(lambda x: x[0], p.adapters), p.train
        logits, _ = p.backbone.apply(p.base, adapter, x[:8])
        losses[name] = (
            p.loss_fn(p.base, adapter, (x[:8], y[:8]), jax.random.key(0)),
            TASKS[name].loss(logits, y[:8]).mean(),
        )
        np.testing.assert_allclose(*losses[name], rtol=1e-5)
    assert abs(losses["softmax"][0] - losses["sigmoid"][0]) > 0.1
