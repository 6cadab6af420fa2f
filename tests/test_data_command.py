"""What the data command says is what a run gets; a partition that it saves is dealt out again."""

import dataclasses
import io

import numpy as np
import pytest
from input_helpers import SMALL, good_arrays, refused
from PIL import Image

from experiments.cli import parse
from experiments.commands import describe_data
from experiments.commands.describe_data import Plan
from experiments.config import Config
from experiments.requests import Data
from experiments.setup import data, partition_file, problem


@pytest.fixture
def file(tmp_path):
    """Two images twice: once in training and testing, once in two classes."""
    arrays = good_arrays()
    arrays["x"][0] = arrays["x"][9]  # of which the first is a test image
    arrays["x"][2] = arrays["x"][1]
    np.savez(tmp_path / "own.npz", **arrays)
    return tmp_path / "own.npz", arrays


def shown(plan, capsys):
    plan.execute()
    return capsys.readouterr().out


def test_counts_and_duplicates_are_those_of_the_data(file, capsys):
    path, arrays = file
    text = shown(Plan(Data(source=str(path))), capsys)
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line[:1] in "abc" and " + " in line}
    for j, name in enumerate("abc"):
        counts = [[(arrays["y"] == j) & (arrays["split"] == s) for s in (0, 1)]]
        counts += [
            [(arrays["y"] == j) & (arrays["split"] == s) & (arrays["domain"] == d) for s in (0, 1)] for d in (0, 1)
        ]
        assert rows[name] == " ".join(f"{a.sum()} + {b.sum()}" for a, b in counts).split()
    assert "more than once: 2" in text
    assert "both for training and for testing: 1 (first: rows 0, 9)" in text
    assert "more than one class: 1 (first: rows 1, 2)" in text
    assert "no image is there twice" in shown(Plan(Data()), capsys)


def test_a_partition_is_the_one_of_a_run_and_can_be_kept(file, tmp_path, capsys):
    path, _ = file
    options = {"partition": "dirichlet:1.0", "clients": 4, "holdout_clients": 2, "minimum": 2}
    kept = tmp_path / "kept.npz"
    text = shown(Plan(Data(source=str(path), save=str(kept), seed=3, **options)), capsys)
    images = data.load(str(path))
    train, test = np.flatnonzero(~images.test), np.flatnonzero(images.test)
    parts, tests, _ = problem.dealt(Config(**options), images, train, test, 3)
    assert problem.partition_hash(parts, tests) in text
    config = Config(**options | {"partition": f"file:{kept}"})
    again, their_tests, _ = problem.dealt(config, images, train, test, 7)
    for one, other in zip(
        [*parts, *tests], [*again, *their_tests], strict=True
    ):  # the same clients, in an order of rows
        np.testing.assert_array_equal(np.sort(one), other)
    with np.load(kept) as found:
        np.savez(tmp_path / "other.npz", **{**found, "test_client": found["test_client"][1:]})
    with pytest.raises(ValueError, match="one for each test image, below 6"):
        problem.dealt(config, images, train, test[1:], 7)
    other = dataclasses.replace(config, partition=f"file:{tmp_path / 'other.npz'}")
    with pytest.raises(ValueError, match="one for each test image, below 6"):
        problem.dealt(other, images, train, test, 7)


def test_natural_clients_come_from_any_column(file, tmp_path):
    """Whose images they are, -1 of nobody; no fingerprint, as a user would write it."""
    images = data.load(str(file[0]))
    writer = np.random.default_rng(0).integers(-1, 5, (~images.test).sum())
    np.savez(tmp_path / "writers.npz", client=writer)
    config = Config(partition=f"file:{tmp_path / 'writers.npz'}", clients=4, holdout_clients=1, minimum=1)
    parts, tests, _ = problem.dealt(config, images, np.flatnonzero(~images.test), np.flatnonzero(images.test), 0)
    for i, part in enumerate(parts):
        np.testing.assert_array_equal(part, np.flatnonzero(writer == i))
    assert len(tests) == 5


def dealt(images, seed=0, **options):
    rows = [np.flatnonzero(images.test == part) for part in (False, True)]
    return problem.dealt(Config(**options), images, *rows, seed), rows


@pytest.mark.parametrize("names", [np.array([f"w{i}" for i in range(10)]), np.arange(100, 110)])
def test_clients_may_be_the_values_of_a_column(names, tmp_path):
    """Some train, others are the unseen ones, by the seed; test images are of the same writers, where they have any."""
    arrays, rng = good_arrays(480), np.random.default_rng(1)
    writer = names[rng.integers(0, 9, 480)]
    writer[6:9] = names[9]  # too few for training
    np.savez(tmp_path / "own.npz", writer=writer, clumsy=np.zeros((480, 2)), **arrays)
    images = data.load(str(tmp_path / "own.npz"))
    options = {"partition": "column:writer", "clients": 5, "holdout_clients": 2, "minimum": 4}
    (parts, tests, _), (train, test) = dealt(images, **options)
    held = [set(writer[train[part]]) for part in parts]
    assert all(len(own) == 1 for own in held)
    assert len(set.union(*held)) == 7
    assert names[9] not in set.union(*held)
    for own, part, of_test in zip(held, parts, tests, strict=True):
        assert len(part) == (writer[train] == next(iter(own))).sum()
        np.testing.assert_array_equal(np.sort(of_test), np.flatnonzero(writer[test] == next(iter(own))))
    (others, _, _), _ = dealt(images, 1, **options)
    assert [set(writer[train[part]]) for part in others] != held
    few = data.validation(data.of_classes(images, ["c", "a"]), 0.25)  # other rows, the same writers
    (parts, _, _), (train, _) = dealt(few, **options | {"minimum": 1})
    assert all(len(set(writer[few.rows[train[part]]])) == 1 for part in parts)
    for name, changed, said in (
        ("hospital", {}, "own has writer, clumsy: expected a column"),
        ("clumsy", {}, r"clumsy of own is float64 \[480, 2\]"),
        ("writer", {"clients": 9}, "9 of 10 values have at least 4 training images, and 11 clients"),
    ):
        with pytest.raises(ValueError, match=said):
            dealt(images, **options | {"partition": f"column:{name}"} | changed)


def test_test_images_follow_classes_where_their_writers_are_others(tmp_path):
    arrays = good_arrays(480)
    writer = np.arange(480) % 5 + 5 * arrays["split"]
    np.savez(tmp_path / "own.npz", writer=writer, **arrays)
    images = data.load(str(tmp_path / "own.npz"))
    (parts, tests, _), _ = dealt(images, partition="column:writer", clients=4, holdout_clients=1, minimum=4)
    assert sum(map(len, tests)) == images.test.sum()
    assert min(map(len, parts)) > 10


def test_who_has_no_test_images_is_dealt_those_that_are_nobodys_and_that_is_said(tmp_path, capsys):
    """The others keep their own; of what is dealt nothing is another client's; of no class that is not trained on."""
    arrays = good_arrays(480)
    writer = np.arange(480) % 6
    writer[(arrays["split"] == 1) & (writer < 2)] = -1  # two have none: their test images are of nobody in particular
    np.savez(tmp_path / "own.npz", writer=writer, **arrays)
    images = data.load(str(tmp_path / "own.npz"))
    options = {"partition": "column:writer", "clients": 4, "holdout_clients": 2, "minimum": 4, "seeds": (3,)}
    (parts, tests, _), (train, test) = dealt(images, 3, **options)
    who = [int(writer[train[part[0]]]) for part in parts]
    said = capsys.readouterr().err
    without = [i for i, own in enumerate(who) if own < 2]
    count = sum(len(tests[i]) for i in without)
    assert said.startswith("note: --partition column:writer, seed 3: 2 of 6 clients have no test images of their own: ")
    assert f": {count} of their classes that are nobody's are dealt to them\n" in said
    for i, (own, rows) in enumerate(zip(who, tests, strict=True)):
        assert set(writer[test[rows]]) == ({-1} if i in without else {own})
        assert set(images.y[test[rows]]) <= set(images.y[train[parts[i]]])
    assert len(np.concatenate(tests)) == len(np.unique(np.concatenate(tests)))
    _, tests, _ = problem.dealt(Config(**options), images, train, test[writer[test] >= 0], 3)
    assert sorted(i for i, rows in enumerate(tests) if not len(rows)) == without
    assert "; 2 of them find none and are not scored on their own" in capsys.readouterr().err


def test_a_partition_fits_images_of_another_size_and_what_validation_leaves(tmp_path):
    arrays = good_arrays(480)
    np.savez(tmp_path / "own.npz", **arrays)
    np.savez(tmp_path / "small.npz", **arrays | {"x": arrays["x"][:, ::2, ::2]})
    kept = str(tmp_path / "kept.npz")
    own = {"clients": 4, "holdout_clients": 2, "minimum": 2}
    Plan(Data(source=str(tmp_path / "own.npz"), partition="dirichlet:1", save=kept, **own)).execute()
    images = data.load(str(tmp_path / "small.npz"))
    (parts, _, _), (train, _) = dealt(images, partition=f"file:{kept}", **own)
    less = data.validation(images, 0.25)
    (few, _, _), (rest, _) = dealt(less, partition=f"file:{kept}", validation=0.25, **own)
    for part, left in zip(parts, few, strict=True):
        np.testing.assert_array_equal(less.rows[rest[left]], np.intersect1d(train[part], less.rows[rest]))
        assert len(left) < len(part)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"client": np.zeros(3, int)}, "expected integers"),
        ({"client": None}, "no array client"),
        ({"images": np.array("other")}, "saved for other images"),
        ({"clients": 5}, "expected 0 to 6"),
        ({"minimum": 40}, "--minimum is 40"),
    ],
)
def test_partition_files_that_do_not_fit_are_refused(change, said, file, tmp_path):
    path, _ = file
    images = data.load(str(path))
    count = int((~images.test).sum())
    arrays = {"client": np.arange(count) % 6, "images": np.array(images.fingerprint())}
    arrays |= {name: x for name, x in change.items() if name in arrays}
    np.savez(tmp_path / "p.npz", **{name: x for name, x in arrays.items() if x is not None})
    clients, minimum = change.get("clients", 4) + 2, change.get("minimum", 2)
    with pytest.raises(ValueError, match=said):
        partition_file.read(tmp_path / "p.npz", count, clients, minimum, images.fingerprint())


def test_a_picture_shows_every_class_and_domain(file):
    """At four times their size, in the place of their class and domain; names need not be letters of Pillow's font."""
    images = data.load(str(file[0]))
    named = images._replace(classes=("a", "\u4e2d", "x" * 99))
    shown = np.asarray(Image.open(io.BytesIO(describe_data.sheet(named))))
    for j in range(3):
        for d in range(2):
            first = images.x[np.flatnonzero((images.y == j) & (images.domain == d))[0]]
            left, top = 120 + d * (3 * 68 + 4), 20 + j * 68
            np.testing.assert_array_equal(shown[top : top + 64 : 4, left : left + 64 : 4], first)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--save x.npz", "--save writes a partition"),
        ("--partition iid --save x.txt", "ends in .npz"),
        ("--sheet no/where/x.png", "in an existing folder"),
        ("--partition iid --minimum 0", "--minimum"),
        ("--clients 3", "--clients is of a partition"),
        ("nowhere.npz", "no data"),
    ],
)
def test_what_means_nothing_is_refused(options, said, capsys, monkeypatch):
    assert said in refused(["data", *options.split()], capsys, monkeypatch)


def test_a_missing_partition_file_is_one_line(capsys, monkeypatch):
    assert "nowhere.npz" in refused(["compare", *SMALL, "--partition", "file:nowhere.npz"], capsys, monkeypatch)


def test_the_source_may_be_left_out():
    assert parse(["data"])[1] == Data()


def test_some_classes_alone(file):
    images = data.load(str(file[0]), classes=("c", "a"))
    whole = data.load(str(file[0]))
    kept = np.flatnonzero(whole.y != 1)
    assert images.classes == ("c", "a")
    np.testing.assert_array_equal(images.x, whole.x[kept])
    np.testing.assert_array_equal(images.y, np.where(whole.y[kept] == 2, 0, 1))
    assert data.load(str(file[0]), classes=("2",)).classes == ("a", "b")
    for wrong, said in (
        (("a", "d"), "there is no d"),
        (("a",), "at least two"),
        (("4",), "no 4"),
        (("a", "a"), "once"),
    ):
        with pytest.raises(ValueError, match=said):
            data.load(str(file[0]), classes=wrong)
