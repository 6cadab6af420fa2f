"""Where images come from: folders, split lists, TensorFlow Datasets, Hugging Face; each decoded once and then kept."""

import io
import json
import multiprocessing
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from input_helpers import SMALL, refused
from PIL import Image

from experiments.commands import describe_data
from experiments.config import Config
from experiments.setup import columns, data, decoding, image_folder, problem, tfds
from experiments.setup.on_disk import OnDisk


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test sees what another kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fedlora-jax-images"


def pixels(i: int, side: int = 6) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (side, side, 3), np.uint8)


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(i)).save(buffer, "PNG")
    return buffer.getvalue()


def put(path: Path, i: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(i))


def folder(root: Path, each: int = 3) -> Path:
    """Two classes of so many images; image i is ``pixels(i)``."""
    for i in range(2 * each):
        put(root / "ab"[i // each] / f"{i}.png", i)
    return root


def test_images_are_decoded_once(tmp_path, own_cache, monkeypatch, capsys):
    root = folder(tmp_path / "images")
    first = data.load(str(root), test_share=0.34)
    np.testing.assert_array_equal(first.x, np.stack([pixels(i) for i in range(6)]))
    assert isinstance(first.x, OnDisk)
    monkeypatch.setattr(decoding, "opened", lambda *args: pytest.fail("decoded again"))
    again = data.load(str(root), test_share=0.34)
    assert again.fingerprint() == first.fingerprint() == first._replace(x=np.asarray(first.x)).fingerprint()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_cache.parent))
    put(root / "a" / "0.png", 99)  # another image under the same name
    changed = data.load(str(root), test_share=0.34)
    np.testing.assert_array_equal(changed.x[0], pixels(99))
    assert sorted(path.suffix for path in own_cache.iterdir()) == ["", "", ".lock", ".lock"]


def test_what_is_kept_is_made_again_where_it_is_damaged(tmp_path, own_cache):
    root = folder(tmp_path / "images")
    good = data.load(str(root), test_share=0.34).fingerprint()
    kept = next(path for path in own_cache.iterdir() if path.is_dir())
    for name in ("x", "rest.npz", "about.json"):
        content = bytearray((kept / name).read_bytes())
        content[len(content) // 2] ^= 1
        (kept / name).write_bytes(content)
        assert data.load(str(root), test_share=0.34).fingerprint() == good
    (kept / "x").write_bytes(b"")
    assert data.load(str(root), test_share=0.34).fingerprint() == good


def test_images_that_cannot_be_read_are_named_and_counted(tmp_path, own_cache, capsys, monkeypatch):
    root = folder(tmp_path / "images", each=20)
    for i in range(5):
        path = root / "a" / f"{i}.png"
        path.write_bytes(path.read_bytes()[: 40 + i])  # the header is whole
    says = refused(["compare", "--data", str(root), *SMALL], capsys, monkeypatch)
    assert "5 of 40 images cannot be used (a/0.png " in says
    assert "a/10.png" not in says
    assert "--skip-damaged" in says
    assert not [path for path in own_cache.iterdir() if path.suffix != ".lock"]
    images = data.load(str(root), skip=True)
    assert "left out, 5 of 40" in capsys.readouterr().err
    assert len(images.x) == len(images.y) == 35
    left = [i for i in sorted(range(20), key=str) if i >= 5] + list(range(20, 40))
    np.testing.assert_array_equal(images.x, np.stack([pixels(i) for i in left]))
    assert np.bincount(images.y).tolist() == [15, 20]


def load_in_a_process(root, cache, results):
    os.environ["XDG_CACHE_HOME"] = cache
    results.put(data.load(root, test_share=0.34).fingerprint())


def test_whatever_damaged_bytes_make_pillow_raise_is_one_line(tmp_path, monkeypatch):
    """A header of 90,000 x 90,000 pixels; tags that cannot be written again when the image is turned."""
    buffer = io.BytesIO()
    Image.fromarray(pixels(0)).save(buffer, "BMP")
    huge = bytearray(buffer.getvalue())
    huge[18:26] = struct.pack("<ii", 90_000, 90_000)
    with pytest.raises(ValueError, match="cannot be read: Image size"):
        decoding.opened(bytes(huge), None)

    def stumbles(image):
        raise struct.error("required argument is not an integer")

    monkeypatch.setattr(decoding.ImageOps, "exif_transpose", stumbles)
    with pytest.raises(ValueError, match="cannot be read: required argument"):
        decoding.opened(png(0), None)


def test_folders_that_link_to_one_another_have_an_end(tmp_path):
    root = folder(tmp_path / "images")
    for here, there in ("ab", "ba"):
        for i in range(20):
            (root / here / f"link{i}").symlink_to(root / there)
    with pytest.raises(ValueError, match=r"a/0\.png and a/link0/3\.png lie 1 and 2 folders deep"):
        data.load(str(root))


@pytest.mark.long
def test_two_processes_may_decode_at_once(tmp_path, own_cache):
    root = str(folder(tmp_path / "images", each=30))
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    both = [context.Process(target=load_in_a_process, args=(root, str(own_cache.parent), results)) for _ in range(2)]
    for process in both:
        process.start()
    found = {results.get(timeout=60) for _ in both}
    for process in both:
        process.join()
    assert found == {data.load(root, test_share=0.34).fingerprint()}


KILLED = """
import os, signal, sys
from experiments.setup import data, decoding
decode, seen = decoding.opened, []
def opened(*args):
    seen.append(args)
    if len(seen) > 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(*args)
decoding.opened = opened
data.load(sys.argv[1])
"""


def test_a_killed_process_leaves_nothing_that_counts(tmp_path, own_cache):
    root = folder(tmp_path / "images", each=30)
    ended = subprocess.run([sys.executable, "-c", KILLED, str(root)], cwd=Path(__file__).parents[1], timeout=100)
    assert ended.returncode == -9
    assert {path.suffix for path in own_cache.iterdir()} == {".lock", ".part"}
    assert len(data.load(str(root)).x) == 60
    assert {path.suffix for path in own_cache.iterdir()} == {".lock", ""}


def test_no_room_is_one_line(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"cannot keep the decoded images of .*: No space left on device; set XDG"):
        data.load(str(folder(tmp_path / "images")))


def test_split_lists_say_what_is_used(tmp_path):
    """As DomainNet is published: lists of path and number, of several domains; images of no list are not used."""
    names, i = ["zebra", "ant", "bee"], 0
    for domain in ("real", "sketch"):
        for split in ("train", "test"):
            lines = []
            for number, name in enumerate(names):
                for _ in range(2):
                    put(tmp_path / domain / name / f"{i}.png", i)
                    lines.append(f"{domain}/{name}/{i}.png {number}")
                    i += 1
            (tmp_path / f"{domain}_{split}.txt").write_text("\n".join(lines) + "\n")
    put(tmp_path / "real" / "cat" / "1.png", 0)
    images = data.load(str(tmp_path))
    assert images.classes == ("zebra", "ant", "bee")  # by number, not by name
    assert images.domains == ("real", "sketch")
    assert len(images.x) == 24
    for x, y, domain, test in zip(images.x, images.y, images.domain, images.test, strict=True):
        i = next(i for i in range(24) if (pixels(i) == x).all())
        assert (y, domain, test) == (i // 2 % 3, i // 12, i // 6 % 2 == 1)


def test_split_lists_may_lie_in_a_folder_of_their_own(tmp_path):
    """Read in UTF-8, also where it says so itself; two of one name are not guessed between."""
    folder(tmp_path)
    (tmp_path / "splits").mkdir()
    for split, i in (("train", 0), ("test", 1)):
        (tmp_path / "splits" / f"own_{split}.txt").write_text(f"a/{i}.png 1\nb/{3 + i}.png 0\n", "utf-8-sig")
    images = data.load(str(tmp_path))
    assert images.classes == ("b", "a")
    assert [i for x in images.x for i in range(6) if (pixels(i) == x).all()] == [1, 4, 0, 3]
    np.testing.assert_array_equal(images.test, [True, True, False, False])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "own_train.txt").write_text("a/0.png 0\n")
    with pytest.raises(ValueError, match=r"other/own_train.txt and .*splits/own_train.txt are two lists of one name"):
        data.load(str(tmp_path))


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("a/0.png 0\na/9.png 0\n", r"line 2: there is no a/9.png in"),
        ("a/0.png\n", r"line 1: expected PATH NUMBER, got 'a/0.png'"),
        ("a/0.png -1\n", r"line 1: expected PATH NUMBER"),
        ("a/0.png 0\nb/3.png 0\n", r"line 2: class 0 is b here and a before"),
        ("a/0.png 0\na/1.png 1\n", r"two numbers to images in folders of one name"),
        ("\n", r"name no images"),
        ("a/0.png 0\na/1.png 0\na/0.png 0\n", r"line 3: a/0.png is there before"),
    ],
)
def test_wrong_split_lists_are_refused(lines, said, tmp_path):
    folder(tmp_path)
    (tmp_path / "own_train.txt").write_text(lines)
    with pytest.raises(ValueError, match=said):
        data.load(str(tmp_path))


def test_what_lies_beside_splits_is_refused_and_an_image_has_one_split(tmp_path):
    for split in ("train", "test", "unlabeled"):
        for name in "ab":
            put(tmp_path / split / name / "1.png", 0)
    with pytest.raises(ValueError, match="unlabeled lies beside folders for training and testing"):
        data.load(str(tmp_path))
    folder(tmp_path / "lists")
    for split in ("train", "test"):
        (tmp_path / "lists" / f"own_{split}.txt").write_text("a/0.png 0\nb/3.png 1\n")
    with pytest.raises(ValueError, match=r"a/0.png is in own_test.txt too"):
        data.load(str(tmp_path / "lists"))
    (tmp_path / "lists" / "own_test.txt").write_text(f"{tmp_path}/lists/a/0.png 0\nb/../b/3.png 1\n")
    with pytest.raises(ValueError, match=r"own_train.txt, line 1: a/0.png is in own_test.txt too"):
        data.load(str(tmp_path / "lists"))
    put(tmp_path / "flat" / "1.png", 0)
    with pytest.raises(ValueError, match="lie in no folder of their class"):
        data.load(str(tmp_path / "flat"))


@pytest.mark.parametrize("above", ["", "cat/"])
def test_folders_for_training_and_testing_are_no_classes(above, tmp_path):
    for i, split in enumerate(("train", "Test")):
        put(tmp_path / above / split / "1.png", i)
        put(tmp_path / above.replace("cat", "dog") / split / "2.png", i)
    with pytest.raises(ValueError, match="expected train/CLASS/IMAGE, or DOMAIN/train/CLASS/IMAGE"):
        data.load(str(tmp_path))


def test_a_class_without_images_for_training_is_said(tmp_path, capsys):
    for split, names in (("train", "ab"), ("test", "abc")):
        for i, name in enumerate(names):
            put(tmp_path / split / name / "1.png", i)
    (tmp_path / "train" / "c").mkdir()
    (tmp_path / "train" / "c" / "1.heic").write_bytes(b"of a phone")
    (tmp_path / "train" / "d").mkdir()
    (tmp_path / "train" / "a" / "notes.txt").write_text("beside an image")
    _, images, _ = problem._images(Config(data=str(tmp_path)))
    assert images.classes == ("a", "b", "c")
    said = capsys.readouterr().err
    assert "no training images of class c\n" in said
    assert "2 folders hold no images that are read, as train/c\n" in said
    assert "1 images are of a kind that is not read (.heic), as train/c/1.heic\n" in said


def test_what_is_left_out_is_said_each_time(tmp_path, capsys):
    (folder(tmp_path / "images") / "a" / "0.png").write_bytes(b"damaged")
    for _ in range(2):
        assert len(data.load(str(tmp_path / "images"), skip=True, test_share=0.34).x) == 5
        assert "left out, 1 of 6 images cannot be used" in capsys.readouterr().err


def test_an_image_much_longer_than_wide_takes_no_more_memory_than_its_middle(tmp_path):
    long = np.zeros((4, 60_000, 3), np.uint8)
    long[:, 29_990:30_010] = 255
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.fromarray(long).save(tmp_path / name / f"{i}.png")
    images = data.load(str(tmp_path), 64, test_share=0.5)
    assert (np.asarray(images.x) == 255).all()


def test_a_split_may_lie_below_its_domain(tmp_path):
    """As VLCS is published."""
    for d, domain in enumerate(("CALTECH", "SUN")):
        for s, split in enumerate(("train", "test")):
            for c, name in enumerate("01"):
                put(tmp_path / domain / split / name / "1.png", 4 * d + 2 * s + c)
    images = data.load(str(tmp_path))
    assert (images.domains, images.classes) == (("CALTECH", "SUN"), ("0", "1"))
    place = [next(i for i in range(8) if (pixels(i) == x).all()) for x in images.x]
    np.testing.assert_array_equal(images.domain, np.array(place) // 4)
    np.testing.assert_array_equal(images.test, np.array(place) // 2 % 2 == 1)
    np.testing.assert_array_equal(images.y, np.array(place) % 2)


def described(library, i):
    return {"writer": f"writer {i % 3}", "place": i % 4, "box": library.features.BBox(0.0, 0.0, 1.0, 1.0)}


def builder(library, root: Path, name: str, config: str, first: int):
    """A data set to be prepared: 12 training and 4 test images, ``pixels(i)`` from the first on."""
    features = {"image": library.features.Image(), "label": library.features.ClassLabel(names=["cat", "dog"])}
    features |= {"writer": library.features.Text(), "place": np.int64, "box": library.features.BBoxFeature()}

    class Own(library.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = library.core.Version("1.0.0")
        BUILDER_CONFIGS = [library.core.BuilderConfig(name=config)] if config else []
        pkg_dir_path = root

        def _info(self):
            of_both = library.features.FeaturesDict(features)
            return library.core.DatasetInfo(builder=self, features=of_both, supervised_keys=("image", "label"))

        def _split_generators(self, _):
            return {"train": self._generate_examples(12, first), "test": self._generate_examples(4, first + 12)}

        def _generate_examples(self, count, first):
            for i in range(first, first + count):
                put(root / "files" / f"{i}.png", i)
                yield i, {"image": str(root / "files" / f"{i}.png"), "label": i % 2} | described(library, i)

    Own.name = name
    return Own(data_dir=str(root), file_format="array_record", **({"config": config} if config else {}))


def prepared(monkeypatch, root: Path, kind: str = "array_record", **configs: int) -> None:
    """A data set ``own`` as TensorFlow Datasets writes it, with the first image of each of its configs."""
    library = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    for config, first in (configs or {"": 0}).items():
        builder(library, root, "own", config, first).download_and_prepare()
    if kind == "tfrecord":
        as_tfrecords(root)


def as_tfrecords(root: Path) -> None:
    """The same records between lengths and checksums, which nobody here computes."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    for path in sorted(root.rglob("*.array_record-*")):
        source = ArrayRecordDataSource(str(path))
        records = [source[i] for i in range(len(source))]
        framed = (struct.pack("<Q", len(record)) + bytes(4) + record + bytes(4) for record in records)
        path.with_name(path.name.replace("array_record", "tfrecord")).write_bytes(b"".join(framed))
        path.unlink()
    for path in root.rglob("dataset_info.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fileFormat": "tfrecord"}))


def check(images, count, classes):
    assert images.classes == classes
    seen = [next(i for i in range(64) if (pixels(i) == x).all()) for x in images.x]
    assert sorted(seen) == list(range(count))
    np.testing.assert_array_equal(images.y, np.array(seen) % len(classes))
    return np.array(seen)


@pytest.mark.parametrize("kind", ["array_record", "tfrecord"])
def test_prepared_data_sets_are_read_without_tensorflow(kind, tmp_path, monkeypatch):
    prepared(monkeypatch, tmp_path / "sets", kind)
    images = data.load("tfds:own")
    seen = check(images, 16, ("cat", "dog"))
    np.testing.assert_array_equal(images.test, seen >= 12)
    assert images.name == "tfds:own"
    assert not images.has_domains
    assert "tensorflow" not in sys.modules
    assert images.columns.names == ("image", "place", "writer")
    np.testing.assert_array_equal(columns.of(images, "writer"), [f"writer {i % 3}" for i in seen])
    np.testing.assert_array_equal(columns.of(images, "place"), seen % 4)
    assert data.load("tfds:own:1.0.0").fingerprint() == images.fingerprint()


def test_configs_are_domains(tmp_path, monkeypatch):
    prepared(monkeypatch, tmp_path / "sets", real=0, sketch=16)
    images = data.load("tfds:own/real,sketch")
    seen = check(images, 32, ("cat", "dog"))
    assert images.domains == ("real", "sketch")
    np.testing.assert_array_equal(images.domain, seen // 16)
    np.testing.assert_array_equal(images.test, seen % 16 >= 12)


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: os.truncate(path, 70_000)])
def test_prepared_files_that_are_damaged_or_gone_are_one_line(change, tmp_path, monkeypatch):
    prepared(monkeypatch, tmp_path / "sets", "array_record")
    (path,) = (tmp_path / "sets").rglob("*test.array_record-*")
    assert path.stat().st_size != 70_000
    change(path)
    with pytest.raises(ValueError, match=r"record 0 of tfds:own/.* test cannot be read from .*prepare it anew$"):
        data.load("tfds:own")


def test_what_is_not_prepared_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    prepared(monkeypatch, tmp_path / "sets", "tfrecord")
    capsys.readouterr()
    for source, said in (
        ("tfds:no_such_set", "cannot load no_such_set"),
        ("tfds:own:2.0.0", "cannot load own:2.0.0"),
        ("tfds:mnist", "has not prepared mnist"),
        ("tfds:own/", "expected tfds:NAME"),
    ):
        assert said in refused(["compare", "--data", source, *SMALL], capsys, monkeypatch)
    path = next((tmp_path / "sets").rglob("*train.tfrecord*"))
    path.write_bytes(path.read_bytes()[:-7])
    assert "truncated" in refused(["compare", "--data", "tfds:own", *SMALL], capsys, monkeypatch)


def test_an_extra_that_is_missing_is_named(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(tfds.importlib, "import_module", absent)
    with pytest.raises(ValueError, match=r"pip install 'fedlora-jax\[tfds\]'"):
        data.load("tfds:cifar100")
    with pytest.raises(ValueError, match=r"pip install 'fedlora-jax\[hf\]'"):
        data.load("hf:cifar100")


def saved(root: Path, numbered=("cat dog", "cat dog"), **columns):
    """Classes are cat, dog in turn, as each split numbers them."""
    datasets = pytest.importorskip("datasets")

    def make(rows, names):
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
        features |= {name: kind for name, (kind, _) in columns.items() if kind is not None}
        held = {name: [value(i) for i in rows] for name, (_, value) in columns.items()}
        held |= {"image": [{"bytes": png(i), "path": None} for i in rows]}
        held.setdefault("label", [names.index(("cat", "dog")[i % 2]) for i in rows])
        return datasets.Dataset.from_dict(held, features=datasets.Features(features))

    train, test = (make(rows, names.split()) for rows, names in zip((range(12), range(12, 16)), numbered, strict=True))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(str(root))


def test_a_folder_that_datasets_saved(tmp_path):
    text = pytest.importorskip("datasets").Value("string")
    saved(tmp_path / "set", domain=(text, lambda i: "pq"[i // 2 % 2]), hospital=(text, lambda i: f"h{i % 5}"))
    images = data.load(str(tmp_path / "set"))
    seen = check(images, 16, ("cat", "dog"))
    np.testing.assert_array_equal(images.test, seen >= 12)
    assert images.domains == ("p", "q")
    np.testing.assert_array_equal(images.domain, seen // 2 % 2)
    np.testing.assert_array_equal(columns.of(images, "hospital"), [f"h{i % 5}" for i in seen])


def test_splits_may_number_their_classes_in_their_own_way(tmp_path):
    saved(tmp_path / "set", ("cat dog", "dog cat"))
    check(data.load(str(tmp_path / "set")), 16, ("cat", "dog"))
    saved(tmp_path / "other", ("cat dog", "dog cat cow"), label=(None, lambda i: 1 + (i > 11)))
    with pytest.raises(ValueError, match="label is cow, which train does not have, in 4 of 16 rows"):
        data.load(str(tmp_path / "other"))


def test_what_is_missing_is_nobodys(tmp_path):
    """An unknown writer is no client; nor is -1 the last class, domain or site."""
    library = pytest.importorskip("datasets")
    site = library.ClassLabel(names=["north", "south"]), lambda i: i % 3 - 1
    number = library.Value("int32"), lambda i: None if i < 3 else i % 2
    saved(tmp_path / "set", site=site, number=number)
    images = data.load(str(tmp_path / "set"))
    seen = check(images, 16, ("cat", "dog"))
    np.testing.assert_array_equal(columns.of(images, "site"), [("", "north", "south")[i % 3] for i in seen])
    np.testing.assert_array_equal(columns.of(images, "number"), ["" if i < 3 else f"{i % 2}" for i in seen])
    values, rng = columns.of(images, "site"), np.random.default_rng(0)
    parts, names = columns.natural(values, 2, 1, rng, "column:site")
    assert sorted(names) == ["north", "south"]
    assert sorted(np.concatenate(parts)) == np.flatnonzero(values != "").tolist()
    with pytest.raises(ValueError, match="and 3 clients are asked for"):
        columns.natural(values, 3, 1, rng, "column:site")
    saved(tmp_path / "domains", domain=site)
    with pytest.raises(ValueError, match="domain is missing in 6 of 16 rows"):
        data.load(str(tmp_path / "domains"))


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch, capsys):
    datasets = pytest.importorskip("datasets")

    def offline(*args):
        raise ConnectionError("Couldn't reach 'own/set' on the Hub (LocalEntryNotFoundError)\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    says = refused(["compare", "--data", "hf:own/set", *SMALL], capsys, monkeypatch)
    assert "Couldn't reach" in says
    assert "save_to_disk" in says


def test_images_are_listed_in_the_order_of_their_names(tmp_path):
    arrays = image_folder.read(str(folder(tmp_path / "images")), None)
    assert arrays["classes"].tolist() == ["a", "b"]
    assert arrays["y"].tolist() == [0, 0, 0, 1, 1, 1]


def test_images_that_are_there_twice_are_named(tmp_path):
    root = folder(tmp_path / "images")
    put(root / "b" / "copy.png", 1)
    lines = describe_data.duplicates(data.load(str(root), test_share=0.34))
    assert lines[0] == "images that are there more than once: 1 (first: a/1.png, b/copy.png)"
