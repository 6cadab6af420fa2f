"""Data sets as TensorFlow Datasets has prepared them: ``tfds:NAME[/CONFIG][:VERSION]``, several configs as domains.

Their records are read one by one and without TensorFlow, which would take its share of an accelerator's memory: files
of the format ``array_record`` by TensorFlow Datasets itself, those of ``tfrecord`` here (before each record 8 bytes of
its length and 4 of checksum, after it 4 of checksum). ``$TFDS_DATA_DIR`` says where they lie, else
``~/tensorflow_datasets``.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import struct
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.setup.columns import KEPT
from experiments.setup.decoding import Listing, decoded
from experiments.setup.resizing import Resizing

PREFIX = "tfds:"
FORM = re.compile(r"tfds:(?P<name>\w+)(/(?P<configs>[\w.\-]+(,[\w.\-]+)*))?(:(?P<version>\d+\.\d+\.\d+))?")
TESTS = ("test", "validation")  # the first of these splits that there is


class Part(NamedTuple):
    """One split of one config."""

    name: str
    domain: int
    split: int  # 0 train, 1 test
    records: Sequence[dict[str, Any]]  # images not decoded


def read(source: str, side: int | Resizing | None, skip: bool = False) -> dict[str, Any]:
    """The arrays of the contract (``data.py``).

    Args:
      source: as above.
      side, skip: see ``decoded``.

    Raises:
      ValueError: TensorFlow Datasets is not installed, has no such data set, or has not prepared it; it has no images
        with one class each; or as for ``decoded``.
    """
    match = FORM.fullmatch(source)
    if match is None:
        raise ValueError(f"--data {source}: expected tfds:NAME, tfds:NAME/CONFIG or tfds:NAME/CONFIG,CONFIG:VERSION")
    configs = match["configs"].split(",") if match["configs"] else [None]
    version = f":{match['version']}" if match["version"] else ""
    builders = [_builder(match["name"] + (f"/{own}" if own else "") + version) for own in configs]
    image, label, classes = _features(source, builders)
    parts = [part for i, builder in enumerate(builders) for part in _parts(builder, i, image)]
    places = [(part, i) for part in parts for i in range(len(part.records))]

    def encoded(i: int) -> bytes:
        return bytes(_record(*places[i])[image])

    def arrays() -> dict[str, np.ndarray]:
        names = (label, *_columns(builders, (image, label)))
        records = (_record(part, i) for part, i in places)
        said = np.array([[record[name] for name in names] for record in records], object).reshape(-1, len(names)).T
        own: dict[str, Any] = {"y": said[0].astype(np.int32), "classes": np.array(classes)}
        own |= {KEPT + name: _plain(values) for name, values in zip(names[1:], said[1:], strict=True)}
        if len(builders) > 1:
            own |= {"domain": np.array([part.domain for part, _ in places]), "domains": np.array(configs)}
        return own | ({"split": np.array([part.split for part, _ in places])} if any(p.split for p in parts) else {})

    names = [f"{part.name} {i}" for part, i in places]
    return decoded(Listing(source, _identity(builders), names, encoded, arrays), side, skip)


def _record(part: Part, i: int) -> dict[str, Any]:
    """One record.

    Raises:
      ValueError: its file is not there, damaged or truncated; array_record's own errors are of any kind.
    """
    try:
        return part.records[i]
    except Exception as error:
        said = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"cannot be read from the files of {part.name} ({said}): prepare it anew") from None


def _library() -> Any:
    return importlib.import_module("tensorflow_datasets")  # an extra


def _builder(name: str) -> Any:
    try:
        tfds = _library()
    except ImportError:
        raise ValueError(
            f"--data tfds:{name} needs TensorFlow Datasets: pip install 'fedlora-jax[tfds]' (TensorFlow itself is not "
            "needed)"
        ) from None
    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of what is refused here
    try:
        builder = tfds.builder(name, try_gcs=False, data_dir=os.environ.get("TFDS_DATA_DIR"))
        splits = builder.info.splits
    except (ValueError, ImportError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"TensorFlow Datasets cannot load {name}: {first}") from None
    if not splits:
        raise ValueError(
            f'TensorFlow Datasets has not prepared {name} in {builder.data_dir}: run python -c "import '
            f"tensorflow_datasets as t; t.builder('{name}', file_format='array_record').download_and_prepare()\" where "
            "there is a network, and set TFDS_DATA_DIR to where it lies"
        )
    return builder


def _features(source: str, builders: list[Any]) -> tuple[str, str, list[str]]:
    """The names of the features that are the image and its class, and the classes' names."""
    tfds, found = _library(), set()
    for builder in builders:
        features, keys = builder.info.features, builder.info.supervised_keys or ("image", "label")
        kinds = {name: type(features[name]) for name in keys if isinstance(name, str) and name in features}
        if [*kinds.values()] != [tfds.features.Image, tfds.features.ClassLabel]:
            raise ValueError(
                f"--data {source}: {builder.info.full_name} has the features {', '.join(features)}: expected an image "
                "and one class label"
            )
        found.add((*kinds, tuple(features[keys[1]].names)))
    if len(found) > 1:
        raise ValueError(f"--data {source}: its configs have different classes, and cannot be domains of one data set")
    image, label, classes = found.pop()
    return image, label, list(classes)


def _columns(builders: list[Any], without: tuple[str, ...]) -> list[str]:
    """Features of all configs that are one number or text."""
    scalars = [
        {name for name, kind in builder.info.features.items() if kind.shape == () and name not in without}
        for builder in builders
    ]
    return sorted(set.intersection(*scalars))


def _plain(values: np.ndarray) -> np.ndarray:
    """An array of objects as one of numbers or of text."""
    own = values.tolist()
    return np.array([x.decode("utf8", "replace") for x in own]) if isinstance(own[0], bytes) else np.array(own)


def _parts(builder: Any, domain: int, image: str) -> list[Part]:
    """The splits that are used: train, and test where there is one, else validation."""
    splits = builder.info.splits
    if "train" not in splits:
        raise ValueError(f"{builder.info.full_name} has the splits {', '.join(splits)}: expected train")
    test = next((name for name in TESTS if name in splits), None)
    own = lambda name, split: Part(f"{builder.info.full_name} {name}", domain, split, _records(builder, name, image))
    parts = [own("train", 0)] + ([] if test is None else [own(test, 1)])
    for part, name in zip(parts, ("train", test), strict=False):
        _refuse_damaged(part, splits[name].shard_lengths)
    return parts


def _refuse_damaged(part: Part, lengths: Sequence[int]) -> None:
    """The first record of every file can be read: array_record finds it by the end of the file."""
    for i in np.cumsum([0, *lengths])[:-1][np.array(lengths) > 0].tolist():
        try:
            _record(part, i)
        except ValueError as error:
            raise ValueError(f"record {i} of tfds:{part.name} {error}") from None


def _records(builder: Any, split: str, image: str) -> Sequence[dict[str, Any]]:
    decoders: Any = {image: _library().decode.SkipDecoding()}
    kind = builder.info.file_format.value
    if kind == "array_record":
        return builder.as_data_source(split=split, decoders=decoders)
    if kind == "tfrecord":
        parse = partial(builder.info.features.deserialize_example_np, decoders=decoders)
        return _TFRecords([Path(path) for path in builder.info.splits[split].filepaths], parse)
    raise ValueError(
        f"{builder.info.full_name} is prepared as {kind}: expected array_record or tfrecord (its file_format)"
    )


class _TFRecords(Sequence):
    """Records of files of the format TFRecord, by number."""

    def __init__(self, paths: list[Path], parse: Any):
        self._parse, self._places = parse, []  # (file, first byte, length)
        self._files = [os.open(path, os.O_RDONLY) for path in paths]
        for path, file in zip(paths, self._files, strict=True):
            at, end = 0, os.fstat(file).st_size
            while at < end:
                header = os.pread(file, 8, at)
                length = struct.unpack("<Q", header)[0] if len(header) == 8 else end
                if at + length + 16 > end:
                    raise ValueError(f"{path} is damaged or truncated: fetch or prepare it anew")
                self._places.append((file, at + 12, length))
                at += length + 16

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: Any) -> Any:
        file, at, length = self._places[i]
        return self._parse(os.pread(file, length, at))

    def __del__(self) -> None:
        for file in self._files:
            os.close(file)


def _identity(builders: list[Any]) -> str:
    """Names, versions and the files themselves, by size and time."""
    said = []
    for builder in builders:
        files = sorted(path for path in Path(builder.data_dir).iterdir() if path.is_file())
        said += [builder.info.full_name, *(f"{p} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files)]
    return "\n".join(said)
