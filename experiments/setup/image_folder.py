"""Images in folders: ``FOLDER/CLASS/IMAGE`` or ``FOLDER/DOMAIN/CLASS/IMAGE``, with ``train`` and ``test`` (or ``val``,
where there is no ``test``; else it is left out) above that where the folder is split, or between domain and class.

So are PACS, Office-Home, VLCS, TerraIncognita and NICO++ laid out. Where lists ``DOMAIN_train.txt`` and
``DOMAIN_test.txt`` lie in the folder, as DomainNet and NICO++ are published, they say which images there are, of which
class, and how they are split.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.setup.decoding import Listing, decoded
from experiments.setup.resizing import Resizing

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
SPLITS = {"train": 0, "training": 0, "test": 1, "val": 1, "valid": 1, "validation": 1}
LIST = re.compile(r"(?P<domain>.+)_(?P<split>train|test)\.txt")


class Found(NamedTuple):
    """Images and what their places, or lists, say of them."""

    paths: list[Path]
    classes: list[str]  # of each image
    domains: list[str] | None
    splits: list[int] | None  # 0 train, 1 test


def read(source: str, side: int | Resizing | None, skip: bool = False) -> dict[str, Any]:
    """The arrays of the contract (``data.py``). Classes and domains are in the order of their names, those of lists in
    that of their numbers.

    Args:
      source: the folder.
      side, skip: see ``decoded``.

    Raises:
      ValueError: no images, folders of different depth, lists that do not fit, or as for ``decoded``.
    """
    root = Path(source)
    lists = sorted(path for path in root.glob("*.txt") if LIST.fullmatch(path.name))
    found, order = _listed(root, lists) if lists else (_placed(root), None)
    names = [str(path.relative_to(root)) for path in found.paths]

    def arrays() -> dict[str, np.ndarray]:
        classes = order or sorted(set(found.classes))
        number = {name: i for i, name in enumerate(classes)}
        own = {"y": np.array([number[name] for name in found.classes]), "classes": np.array(classes)}
        if found.domains is not None:
            own["domains"], own["domain"] = np.unique(found.domains, return_inverse=True)
        return own if found.splits is None else {**own, "split": np.array(found.splits)}

    digest = hashlib.sha256(repr((order, found.classes, found.domains, found.splits)).encode())
    for name, path in zip(names, found.paths, strict=True):
        about = path.stat()
        digest.update(f"{name}\0{about.st_size}\0{about.st_mtime_ns}\n".encode("utf8", "surrogateescape"))
    identity = f"{root.resolve()} {digest.hexdigest()}"
    return decoded(Listing(str(source), identity, names, found.paths.__getitem__, arrays), side, skip)


def _placed(root: Path) -> Found:
    """What the folders say that images lie in.

    Raises:
      ValueError: there are no images, or they lie at different depths.
    """
    paths = sorted(p for p in _files(root) if p.suffix.lower() in SUFFIXES and _is_shown(p.relative_to(root)))
    if not paths:
        raise ValueError(f"{root} holds no images ({', '.join(SUFFIXES)}): expected FOLDER/CLASS/IMAGE")
    places = [path.relative_to(root).parts[:-1] for path in paths]
    at = next((i for i in (0, 1) if _is_split(places, i)), None)
    splits = None if at is None else [place[at].lower() for place in places]
    if splits and "test" in splits:
        kept = [i for i, split in enumerate(splits) if not split.startswith("val")]
        paths, places, splits = [paths[i] for i in kept], [places[i] for i in kept], [splits[i] for i in kept]
    named = places if at is None else [(*place[:at], *place[at + 1 :]) for place in places]
    depths = {len(place) for place in named}
    if depths == {0}:
        raise ValueError(f"{root}: its images lie in no folder of their class: expected FOLDER/CLASS/IMAGE")
    if depths not in ({1}, {2}):
        shallow, deep = (paths[[len(p) for p in named].index(f(depths))] for f in (min, max))
        raise ValueError(
            f"{root}: {shallow.relative_to(root)} and {deep.relative_to(root)} lie {min(depths)} and {max(depths)} "
            "folders deep: expected all of them in CLASS, or all in DOMAIN/CLASS"
        )
    domains = [place[0] for place in named] if depths == {2} else None
    of_split = None if splits is None else [SPLITS[split] for split in splits]
    return Found(paths, [place[-1] for place in named], domains, of_split)


def _is_split(places: list[tuple[str, ...]], at: int) -> bool:
    """Do folders of a depth say what is for training and what for testing? A class's own folder does not.

    Raises:
      ValueError: some do, and others beside them mean something else.
    """
    if not all(len(place) > at + 1 for place in places):
        return False
    named = {place[at].lower(): "/".join(place[: at + 1]) for place in places}
    others = sorted(named.keys() - SPLITS.keys())
    if others and {"train", "training"} & named.keys() and {"test", "val", "valid", "validation"} & named.keys():
        raise ValueError(
            f"{named[others[0]]} lies beside folders for training and testing: move it away, or into one of them"
        )
    return not others


def _listed(root: Path, lists: list[Path]) -> tuple[Found, list[str]]:
    """What lists of ``PATH NUMBER`` say, a path from the folder; and the classes in the order of their numbers, by the
    name of the folder that their images lie in.

    Raises:
      ValueError: a list cannot be read, an image is not there, or numbers and folders do not agree.
    """
    rows, names, seen = [], {}, {}
    for path in lists:
        match = LIST.fullmatch(path.name)
        assert match is not None
        for line, text in enumerate(path.read_text(errors="replace").splitlines(), 1):
            place, _, number = text.strip().rpartition(" ")
            if not text.strip():
                continue
            image = root / place
            if not place or not re.fullmatch(r"\d{1,9}", number):
                raise ValueError(f"{path}, line {line}: expected PATH NUMBER, got {text[:80]!r}")
            if not image.is_file():
                raise ValueError(
                    f"{path}, line {line}: there is no {place} in {root}: fetch it, or move the list away to use all "
                    "images that are there"
                )
            if names.setdefault(int(number), image.parent.name) != image.parent.name:
                raise ValueError(
                    f"{path}, line {line}: class {number} is {image.parent.name} here and {names[int(number)]} before"
                )
            if seen.setdefault(place, path.name) != path.name:
                raise ValueError(
                    f"{path}, line {line}: {place} is in {seen[place]} too: an image has one domain and split"
                )
            rows.append((image, int(number), match["domain"], SPLITS[match["split"]]))
    if not rows:
        raise ValueError(f"{lists[0]} and the other lists beside it name no images")
    if len(set(names.values())) < len(names):
        raise ValueError(f"the lists in {root} give two numbers to images in folders of one name")
    paths, numbers, domains, splits = map(list, zip(*rows, strict=True))
    order = [names[number] for number in sorted(names)]
    several = len(set(domains)) > 1
    return Found(paths, [names[number] for number in numbers], domains if several else None, splits), order


def _files(root: Path) -> Iterator[Path]:
    """All files below, also behind links; not those of a link that leads back up, which would have no end."""
    for folder, folders, names in os.walk(root, followlinks=True):
        here = Path(folder).resolve()
        folders[:] = [name for name in folders if not here.is_relative_to(Path(folder, name).resolve())]
        yield from (Path(folder, name) for name in names)


def _is_shown(path: Path) -> bool:
    return not any(part.startswith((".", "__")) for part in path.parts)
