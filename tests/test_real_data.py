"""Real images through the doors by which users bring them: PACS as folders, CIFAR-100 as TensorFlow Datasets."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.cli import parse
from experiments.setup import data, problem

SHARED = Path(__file__).parents[2] / "shared" / "data"


def some_of(name: str, step: int) -> dict[str, np.ndarray]:
    if not (SHARED / name).is_file():
        pytest.skip(f"there is no {name} beside this clone")
    with np.load(SHARED / name) as file:
        return {key: file[key][::step] if key in ("x", "y", "domain", "split") else file[key] for key in file.files}


def dealt(recipe: str, images: data.Images, *more: str):
    config = parse(["compare", "--recipe", recipe, "--minimum", "1", *more])[1]
    return problem.dealt(config, images, *(np.flatnonzero(images.test == part) for part in (False, True)), 0)


def same(images: data.Images, held: dict[str, np.ndarray], order: list[int]) -> None:
    """The images are those that were written, with all that is said of them."""
    np.testing.assert_array_equal(np.asarray(images.x[:]), held["x"][order])
    assert [images.classes[i] for i in images.y] == held["classes"][held["y"][order]].tolist()


def test_pacs_as_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    held = some_of("pacs32.npz", 13)
    for i, (x, y, d) in enumerate(zip(held["x"], held["y"], held["domain"], strict=True)):
        path = tmp_path / "pacs" / str(held["domains"][d]) / str(held["classes"][y]) / f"{i:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x).save(path)
    images = data.load(str(tmp_path / "pacs"))
    paths = sorted((tmp_path / "pacs").rglob("*.png"))
    order = [int(path.stem) for path in paths]
    same(images, held, order)
    assert [images.domains[i] for i in images.domain] == held["domains"][held["domain"][order]].tolist()
    parts, tests, _ = dealt("fedra/domainnet", images, "--clients", "4")
    train = np.flatnonzero(~images.test)
    assert [len(set(images.domain[train[part]])) for part in parts] == [1] * 4
    assert sum(map(len, parts)) == len(train)
    assert sum(map(len, tests)) == images.test.sum()


def test_cifar100_as_tensorflow_datasets_has_it(tmp_path, monkeypatch):
    library = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "sets"))
    held = some_of("cifar100_15k.npz", 5)
    rows = [np.flatnonzero(held["split"] == part) for part in (0, 1)]

    class Own(library.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = library.core.Version("1.0.0")
        pkg_dir_path = tmp_path

        def _info(self):
            names = library.features.ClassLabel(names=held["classes"].tolist())
            features = library.features.FeaturesDict({"image": library.features.Image(), "label": names})
            return library.core.DatasetInfo(builder=self, features=features, supervised_keys=("image", "label"))

        def _split_generators(self, _):
            return {name: self._generate_examples(part) for name, part in zip(("train", "test"), rows, strict=True)}

        def _generate_examples(self, part):
            for i in part.tolist():
                path = tmp_path / f"{i}.png"
                Image.fromarray(held["x"][i]).save(path)
                yield i, {"image": str(path), "label": int(held["y"][i])}

    Own.name = "own"
    Own(data_dir=str(tmp_path / "sets"), file_format="array_record").download_and_prepare()
    images = data.load("tfds:own")
    found = {x.tobytes(): i for i, x in enumerate(held["x"])}
    order = [found[np.asarray(x).tobytes()] for x in images.x[:]]
    same(images, held, order)
    np.testing.assert_array_equal(images.test, held["split"][order] == 1)
    assert images.superclass is not None
    assert np.bincount(images.superclass).tolist() == [5] * 20
    parts, _, _ = dealt("hilora/cifar100_patho", images)
    train = np.flatnonzero(~images.test)
    owners = np.zeros(100, int)
    for part in parts:
        owners[np.unique(images.y[train[part]])] += 1
    np.testing.assert_array_equal(owners, 10)
