"""Data sets of Hugging Face: a folder that ``datasets`` has saved (``save_to_disk``), or ``hf:NAME[:CONFIG]``, by name.

A column of images and one of classes are used, those called ``image`` (or ``img``) and ``label`` where there are
several; where a column is called ``domain``, it says the domain of each image.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from experiments.setup import columns
from experiments.setup.decoding import Listing, decoded
from experiments.setup.resizing import Resizing

PREFIX = "hf:"
SAVED = ("dataset_dict.json", "state.json")
PLAIN = ("string", "large_string", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
TESTS = ("test", "validation")  # the first of these splits that there is


def claims(source: str) -> bool:
    return source.startswith(PREFIX) or any((Path(source) / name).is_file() for name in SAVED)


def read(source: str, side: int | Resizing | None, skip: bool = False) -> dict[str, Any]:
    """The arrays of the contract (``data.py``).

    Args:
      source: as above.
      side, skip: see ``decoded``.

    Raises:
      ValueError: ``datasets`` is not installed, cannot load it, or finds no images with one class each; or as for
        ``decoded``.
    """
    splits = _loaded(source)
    if "train" not in splits:
        raise ValueError(f"--data {source} has the splits {', '.join(splits)}: expected train")
    test = next((name for name in TESTS if name in splits), None)
    used = {"train": 0, **({} if test is None else {test: 1})}
    image, label, classes = _columns(source, splits["train"])
    domains = ["domain"] if "domain" in splits["train"].column_names else []
    if lacking := [x for x in (image, label, *domains) if test is not None and x not in splits[test].column_names]:
        raise ValueError(f"--data {source}: the split {test} has no column {lacking[0]}, which train has")
    splits = {name: splits[name].cast_column(image, _library().Image(decode=False)) for name in used}
    places = [(name, i) for name in used for i in range(len(splits[name]))]

    def encoded(i: int) -> Path | bytes:
        name, own = places[i]
        held = splits[name][own][image]
        if held is None:
            raise ValueError("is missing")
        return held["bytes"] if held.get("bytes") is not None else Path(held["path"])

    def arrays() -> dict[str, np.ndarray]:
        joined = lambda column: _values([splits[name] for name in used], column)
        own: dict[str, Any] = {"y": _numbers(source, label, joined(label), classes), "classes": np.array(classes)}
        if domains:
            values = joined("domain").astype(str)
            own["domains"] = np.unique(values[values != columns.MISSING])
            own["domain"] = _numbers(source, "domain", values, own["domains"].tolist())
        for name, kind in splits["train"].features.items():
            told = name not in (image, label) and all(name in splits[part].column_names for part in used)
            if told and (hasattr(kind, "names") or getattr(kind, "dtype", "") in PLAIN):
                own[columns.KEPT + name] = joined(name)
        return own if test is None else {**own, "split": np.array([used[name] for name, _ in places])}

    identity = " ".join(("classes by name", *(splits[name]._fingerprint for name in used)))
    names = [f"{name} {i}" for name, i in places]
    return decoded(Listing(source, identity, names, encoded, arrays), side, skip)


def _values(splits: list[Any], column: str) -> np.ndarray:
    """A column of all splits, class labels by their names, which each split numbers in its own way.

    Where some are missing (of class labels -1 is that too), all are text.
    """
    values: list[Any] = []
    for split in splits:
        own, names = list(split[column]), getattr(split.features[column], "names", None)
        values += own if names is None else [None if x is None or x < 0 else names[x] for x in own]
    missing = any(x is None for x in values)
    return np.array([columns.MISSING if x is None else str(x) for x in values]) if missing else np.array(values)


def _numbers(source: str, column: str, values: np.ndarray, names: list[str]) -> np.ndarray:
    """Names as numbers of them.

    Raises:
      ValueError: some are missing, or are none of these.
    """
    number = {name: i for i, name in enumerate(names)}
    found = [number.get(str(x), -1) for x in values.tolist()]
    if (count := found.count(-1)) > 0:
        first = values[found.index(-1)]
        what = f"is {first}, which train does not have," if first != columns.MISSING else "is missing"
        raise ValueError(f"--data {source}: {column} {what} in {count} of {len(found)} rows: mend or leave them out")
    return np.array(found)


def _library() -> Any:
    return importlib.import_module("datasets")  # an extra


def _loaded(source: str) -> dict[str, Any]:
    """Splits by name; images are not decoded."""
    try:
        datasets = _library()
    except ImportError:
        raise ValueError(f"--data {source} needs datasets: pip install 'fedlora-jax[hf]'") from None
    try:
        if not source.startswith(PREFIX):
            loaded = datasets.load_from_disk(source)
        else:
            name, _, config = source.removeprefix(PREFIX).partition(":")
            loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # of whatever libraries it fetches with
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"datasets cannot load {source}: {first}; without a network give a folder that save_to_disk has written"
        ) from None
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _columns(source: str, split: Any) -> tuple[str, str, list[str]]:
    """The columns that are the image and its class, and the classes' names."""
    datasets = _library()
    kinds = {name: type(feature) for name, feature in split.features.items()}
    images = [name for name, kind in kinds.items() if kind is datasets.Image]
    labels = [name for name, kind in kinds.items() if kind is datasets.ClassLabel and name != "domain"]
    image = next((name for name in ("image", "img") if name in images), images[0] if len(images) == 1 else None)
    label = "label" if "label" in labels else labels[0] if len(labels) == 1 else None
    if image is None or label is None:
        raise ValueError(
            f"--data {source} has the columns {', '.join(kinds)}: expected one of images (called image where there "
            "are several) and one of class labels (called label)"
        )
    return image, label, split.features[label].names
