"""Images in folders: ``FOLDER/CLASS/IMAGE`` or ``FOLDER/DOMAIN/CLASS/IMAGE``, with ``train`` and ``test`` (or ``val``,
where there is no ``test``; else it is left out) above that where the folder is split, or between domain and class.

So are PACS, Office-Home, VLCS, TerraIncognita and NICO++ laid out. Where lists ``DOMAIN_train.txt`` and
``DOMAIN_test.txt`` lie in the folder or in one right below it, as DomainNet and NICO++ are published, they say which
images there are, of which class, and how they are split.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.setup.decoding import Listing, decoded
from experiments.setup.resizing import Resizing

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".jfif", ".ppm", ".pgm")
OTHERS = (".avif", ".heic", ".heif", ".jp2", ".jpe", ".jxl", ".svg", ".tga")  # images too; a note says so
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
    among = lambda pattern: sorted(path for path in root.glob(pattern) if LIST.fullmatch(path.name))
    lists = among("*.txt") or among("*/*.txt")
    found, order = _listed(root, lists) if lists else (_placed(root), None)
    names = [os.path.relpath(path, root) for path in found.paths]

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
    shown = {folder: names for folder, names in _walked(root) if _is_shown(folder.relative_to(root))}
    files = [folder / name for folder, names in shown.items() for name in names if _is_shown(Path(name))]
    paths = sorted(path for path in files if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{root} holds no images ({', '.join(SUFFIXES)}): expected FOLDER/CLASS/IMAGE")
    _note_folders_without(shown.keys() - {root}, {path.parent for path in paths}, root)
    _note_others([path for path in files if path.suffix.lower() in OTHERS], root)
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
    _refuse_splits_for_classes(root, {place[-1].lower() for place in named})
    domains = [place[0] for place in named] if depths == {2} else None
    of_split = None if splits is None else [SPLITS[split] for split in splits]
    return Found(paths, [place[-1] for place in named], domains, of_split)


def _note_folders_without(there: set[Path], used: set[Path], root: Path) -> None:
    """Say which folders have no image in or below them: one may have been meant as a class."""
    above = {folder for path in used for folder in (path, *path.parents)}
    if without := sorted(there - above):
        first = without[0].relative_to(root)
        print(f"note: {root}: {len(without)} folders hold no images that are read, as {first}", file=sys.stderr)


def _note_others(others: list[Path], root: Path) -> None:
    """Say which images are left out because they are of a kind that is not read."""
    if others:
        first = min(others).relative_to(root)
        kinds = ", ".join(sorted({path.suffix.lower() for path in others}))
        print(
            f"note: {root}: {len(others)} images are of a kind that is not read ({kinds}), as {first}", file=sys.stderr
        )


def _refuse_splits_for_classes(root: Path, classes: set[str]) -> None:
    training, testing = ({name for name, own in SPLITS.items() if own == split} for split in (0, 1))
    if classes <= SPLITS.keys() and classes & training and classes & testing:
        raise ValueError(
            f"{root}: its images lie in {' and '.join(sorted(classes))}, and below these in no folder of their class: "
            "expected train/CLASS/IMAGE, or DOMAIN/train/CLASS/IMAGE"
        )


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
    """What lists of ``PATH NUMBER`` say, a path from the folder, or from that of the list; and the classes in the order
    of their numbers, by the name of the folder that their images lie in.

    Raises:
      ValueError: a list cannot be read, an image is not there, or numbers and folders do not agree.
    """
    rows, names, seen = [], {}, {}
    first = {path.name: path for path in reversed(lists)}
    if twice := [path for path in lists if path != first[path.name]]:
        raise ValueError(f"{first[twice[0].name]} and {twice[0]} are two lists of one name: move one of them away")
    for path in lists:
        match = LIST.fullmatch(path.name)
        assert match is not None
        for line, text in enumerate(path.read_text("utf-8-sig", "replace").splitlines(), 1):
            place, _, number = text.strip().rpartition(" ")
            if not text.strip():
                continue
            image = root / place if (root / place).is_file() else path.parent / place
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
            whole = os.path.abspath(image)  # one image, however its path is written
            if whole in seen:
                where = "there before" if seen[whole] == path.name else f"in {seen[whole]} too"
                raise ValueError(f"{path}, line {line}: {place} is {where}: an image has one line, domain and split")
            seen[whole] = path.name
            rows.append((image, int(number), match["domain"], SPLITS[match["split"]]))
    if not rows:
        raise ValueError(f"{lists[0]} and the other lists beside it name no images")
    if len(set(names.values())) < len(names):
        raise ValueError(f"the lists in {root} give two numbers to images in folders of one name")
    paths, numbers, domains, splits = map(list, zip(*rows, strict=True))
    order = [names[number] for number in sorted(names)]
    several = len(set(domains)) > 1
    return Found(paths, [names[number] for number in numbers], domains if several else None, splits), order


def _walked(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """All folders below and the files in each, also behind links; not behind one that leads back to where the way came
    through or to what is above that, which would have no end."""
    ways: dict[str, tuple[Path, ...]] = {str(root): ()}
    unread = lambda error: print(f"note: {root}: cannot look into {error.filename}: {error.strerror}", file=sys.stderr)
    for folder, folders, names in os.walk(root, onerror=unread, followlinks=True):
        way = (*ways.pop(folder), Path(folder).resolve())
        leads_back = lambda to, way=way: any(place.is_relative_to(to) for place in way)
        folders[:] = [name for name in folders if not leads_back(Path(folder, name).resolve())]
        ways |= {os.path.join(folder, name): way for name in folders}
        yield Path(folder), names


def _is_shown(path: Path) -> bool:
    return not any(part.startswith((".", "__")) for part in path.parts)
