"""Labelled images with domains and a fixed train/test split: built in, from a file, or from where ``SOURCES`` say.

The contract of a file (no pickles): ``x`` uint8 ``[N, H, W, 3]``, ``y`` integer ``[N]``, ``classes [n_classes]``, and
where they exist ``domain`` integer ``[N]``, ``domains [n_domains]``, ``split [N]`` (0 train, 1 test), ``superclass``
integer ``[n_classes]`` (the one of each class; those of CIFAR-100 are known by the names of its classes).
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.setup import columns, hugging_face_data, image_folder, memory, on_disk, tfds
from experiments.setup.columns import Columns
from experiments.setup.on_disk import OnDisk, taken
from experiments.setup.resizing import Resizing
from models import archive

CONTRACT = ("x", "y", "classes", "domain", "domains", "split", "superclass")

# The superclasses of CIFAR-100 (Krizhevsky 2009), each with its five classes.
CIFAR100 = {
    "aquatic mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food containers": "bottle bowl can cup plate",
    "fruit and vegetables": "apple mushroom orange pear sweet_pepper",
    "household electrical devices": "clock keyboard lamp telephone television",
    "household furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large carnivores": "bear leopard lion tiger wolf",
    "large man-made outdoor things": "bridge castle house road skyscraper",
    "large natural outdoor scenes": "cloud forest mountain plain sea",
    "large omnivores and herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium-sized mammals": "fox porcupine possum raccoon skunk",
    "non-insect invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles 1": "bicycle bus motorcycle pickup_truck train",
    "vehicles 2": "lawn_mower rocket streetcar tank tractor",
}


class Images(NamedTuple):
    """One data set; arrays on the host, images there or on disk."""

    name: str
    x: np.ndarray | OnDisk  # uint8 [N, H, W, 3]
    y: np.ndarray  # int32 [N]
    domain: np.ndarray  # int32 [N]; all 0 where the file has no domains
    test: np.ndarray  # bool [N]
    classes: tuple[str, ...]
    domains: tuple[str, ...]  # ("all",) where the file has none
    superclass: np.ndarray | None = None  # int32 [n_classes], where classes belong to superclasses
    columns: Columns = columns.NONE  # what else the source says of each of its images
    rows: np.ndarray | None = None  # [N] which of them these are; None: all of them, in order
    known: int | None = None  # how many of the classes, the first, are trained on; None: all of them

    @property
    def has_domains(self) -> bool:
        return len(self.domains) > 1

    def fingerprint(self) -> str:
        """A hash of everything in it."""
        known = self.x.digest if isinstance(self.x, OnDisk) else None  # gigabytes are read once
        digest = hashlib.sha256() if known is None else known.copy()
        for array in (self.x, self.y, self.domain, self.test)[known is not None :]:
            for start in range(0, len(array), 1024):  # x may be larger than memory
                digest.update(np.ascontiguousarray(array[start : start + 1024]).tobytes())
        return digest.hexdigest()[:16]


class Source(NamedTuple):
    """One way of writing ``--data``; a new one is an entry of ``SOURCES``."""

    form: str  # of what is written, for messages
    claims: Callable[[str], bool]  # is this text one of its own?
    read: Callable[[str, int | Resizing | None, bool], dict[str, Any]]  # (text, side of the images or None, whether to
    #   leave out what cannot be read) -> arrays of the contract; the side is a wish: other sizes are resized later
    decodes: bool = True  # does it read images from files, and resize them then?


def _digits() -> dict[str, np.ndarray]:
    from experiments.setup.digits import digits  # scikit-learn takes a second

    return digits()


def _digit_clients(source: str) -> dict[str, Any]:
    from experiments.setup.digit_clients import read

    return read(source)


SOURCES = {
    "digits": Source("'digits'", lambda source: source == "digits", lambda source, side, skip: _digits(), False),
    "digits of many clients": Source(
        "digits:KIND",
        lambda source: source.startswith("digits:"),
        lambda source, side, skip: _digit_clients(source),
        False,
    ),
    "tfds": Source("tfds:NAME[/CONFIG,...][:VERSION]", lambda source: source.startswith(tfds.PREFIX), tfds.read),
    "hugging face": Source(
        "hf:NAME[:CONFIG] or a folder that datasets has saved", hugging_face_data.claims, hugging_face_data.read
    ),
    "folder": Source("a folder of images", lambda source: Path(source).is_dir(), image_folder.read),
    "file": Source(
        "the path of a .npz file",
        lambda source: Path(source).is_file(),
        lambda source, side, skip: _read(source),
        False,
    ),
}


def is_decoded(source: str) -> bool:
    """Are its images read from files, and resized then? (Nothing is refused yet.)"""
    return next((own.decodes for own in SOURCES.values() if own.claims(source)), False)


def load(
    source: str,
    side: int | Resizing | None = None,
    test_share: float = 0.2,
    skip: bool = False,
    classes: Sequence[str] = (),
) -> Images:
    """The images of one of the ``SOURCES``.

    Args:
      source: name or path.
      side: of the images, where they should be of another size than they are; or how they are resized.
      test_share: where the file has no split, this share of each class (and domain) is set apart for testing, drawn
        with a fixed seed.
      skip: leave out images that cannot be read.
      classes: use these alone, by name, in this order; or the first so many.

    Raises:
      ValueError: the file is missing, damaged, or breaks the contract; the message says where.
    """
    for own in SOURCES.values():
        if own.claims(source):
            name = Path(source).stem if Path(source).exists() else source
            return of_classes(_checked(name or source, own.read(source, side, skip), test_share), classes)
    *most, last = (own.form for own in SOURCES.values())
    raise ValueError(f"no data {source!r}: expected {', '.join(most)} or {last}")


def _read(source: str) -> dict[str, Any]:
    x = _on_disk(source)
    arrays = archive.read_npz(source, CONTRACT if x is None else CONTRACT[1:]) | ({} if x is None else {"x": x})
    missing = [key for key in ("x", "y", "classes") if key not in arrays]
    if missing:
        has = ", ".join(archive.members(source)) or "none"
        raise ValueError(f"{source} lacks the array(s) {', '.join(missing)}; it has {has}")
    others = tuple(name for name in archive.members(source) if name not in CONTRACT)
    return {**arrays, "columns": Columns(others, lambda name: archive.read_npz(source, (name,))[name])}


def _on_disk(source: str) -> OnDisk | None:
    """Images of a ``.npz`` that would take more than a part of memory, where it has not packed them: read as needed."""
    place, have = archive.stored(source, "x"), memory.available()
    if place is None or have is None or place.dtype != np.uint8 or math.prod(place.shape) <= memory.RESIDENT * have:
        return None
    return on_disk.opened(Path(source), place.shape, place.dtype, start=place.start)


def _checked(name: str, arrays: dict[str, Any], test_share: float) -> Images:
    x, y, classes = arrays["x"], arrays["y"], _names(name, "classes", arrays["classes"])
    if np.issubdtype(x.dtype, np.floating) and not np.isfinite(x).all():
        raise ValueError(f"{name}: x holds NaN or infinite values; expected uint8 images")
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] != 3 or not x.size:
        raise ValueError(f"{name}: x is {x.dtype} {list(x.shape)}; expected uint8 [N, H, W, 3] with N > 0")
    if not 2 <= len(classes) <= len(x):
        raise ValueError(
            f"{name}: {len(classes)} classes for {len(x)} images; expected at least 2, at most one an image"
        )
    if ("domain" in arrays) != ("domains" in arrays):
        raise ValueError(f"{name} has only one of the arrays domain and domains; expected both or neither")
    domains = _names(name, "domains", arrays["domains"]) if "domains" in arrays else ("all",)
    if len(set(domains)) < len(domains):  # results are listed by them; two classes may well be called alike
        raise ValueError(f"{name}: two domains have the same name among {', '.join(domains[:20])}")
    y = _numbers(name, "y", y, len(x), len(classes))
    domain = _numbers(name, "domain", arrays.get("domain", np.zeros(len(x), int)), len(x), len(domains))
    if "split" in arrays:
        test = _numbers(name, "split", arrays["split"], len(x), 2).astype(bool)
    else:
        test = _split(domain * len(classes) + y, test_share)
    groups, told = _superclass(name, arrays, classes), arrays.get("columns", columns.NONE)
    images = Images(name, x, y, domain, test, classes, domains, groups, told)
    apart = f"of each of its classes {test_share:g} is set apart for testing, rounded: give it more"
    _check_parts(images, "give it some, or leave the domain out" if "split" in arrays else apart)
    return images


def _names(name: str, key: str, names: np.ndarray) -> tuple[str, ...]:
    """Names that can be written and told apart; whole numbers are taken as names too."""
    if names.ndim != 1 or names.dtype.kind not in "USiu":
        raise ValueError(f"{name}: {key} is {names.dtype} {list(names.shape)}; expected names [number of {key}]")
    try:
        found = tuple(x.decode() if isinstance(x, bytes) else str(x) for x in names.tolist())
        "".join(found).encode()
    except UnicodeError as error:
        raise ValueError(f"{name}: {key} holds names that are no text: {error}") from None
    if not all(map(str.strip, found)):
        raise ValueError(f"{name}: {key} holds an empty name; give every one a name")
    return found


def _numbers(name: str, key: str, values: np.ndarray, length: int, count: int) -> np.ndarray:
    """``length`` whole numbers from 0 to below ``count``, as int32."""
    if values.shape != (length,) or values.dtype.kind not in "iu":
        raise ValueError(f"{name}: {key} is {values.dtype} {list(values.shape)}; expected integers [{length}]")
    if values.min() < 0 or values.max() >= count:
        raise ValueError(f"{name}: {key} runs from {values.min()} to {values.max()}; expected 0 to {count - 1}")
    return values.astype(np.int32)


def _check_parts(images: Images, remedy: str) -> None:
    """Every domain has training and test images."""
    for part, where in (("training", ~images.test), ("test", images.test)):
        counts = np.bincount(images.domain[where], minlength=len(images.domains))
        if not counts.all():
            where = f"domain {images.domains[int(np.argmin(counts))]!r} has" if images.has_domains else "it has"
            raise ValueError(f"{images.name}: {where} no {part} images: {remedy}")


def note_untrained(images: Images) -> None:
    """Say which classes have no training images, as one that is misspelt in a folder for testing."""
    counts = np.bincount(images.y[~images.test], minlength=len(images.classes))
    if len(none := np.flatnonzero(counts == 0)):
        more = f" and {len(none) - 1} more" if len(none) > 1 else ""
        print(f"note: {images.name}: no training images of class {images.classes[none[0]]}{more}", file=sys.stderr)


def _superclass(name: str, arrays: dict[str, np.ndarray], classes: tuple[str, ...]) -> np.ndarray | None:
    if "superclass" in arrays:
        return _numbers(name, "superclass", arrays["superclass"], len(classes), len(classes))
    of = {label: i for i, labels in enumerate(CIFAR100.values()) for label in labels.split()}
    return np.array([of[label] for label in classes], np.int32) if set(classes) == of.keys() else None


def of_classes(images: Images, wanted: Sequence[str]) -> Images:
    """The images of some classes, in the order that is asked for.

    Raises:
      ValueError: there is no such class, or fewer, or only one is left; a domain has none of them.
    """
    if not wanted:
        return images
    if len(wanted) == 1 and wanted[0].isdigit() and wanted[0] not in images.classes:
        wanted = images.classes[: int(wanted[0])] if int(wanted[0]) <= len(images.classes) else wanted
    missing = [name for name in wanted if name not in images.classes]
    if missing or len(set(wanted)) < max(2, len(wanted)):
        what = f"there is no {missing[0]}" if missing else "expected at least two, each once"
        raise ValueError(f"--classes {','.join(wanted)}: {what} (of {images.name}'s {len(images.classes)} classes)")
    number = np.full(len(images.classes), -1, np.int32)
    order = [images.classes.index(name) for name in wanted]
    number[order] = np.arange(len(order))
    kept = np.flatnonzero(number[images.y] >= 0)
    own = images._replace(
        x=taken(images.x, kept), y=number[images.y[kept]], domain=images.domain[kept], test=images.test[kept]
    )
    groups = None if images.superclass is None else images.superclass[order]
    own = own._replace(classes=tuple(wanted), superclass=groups, rows=_rows(images, kept))
    _check_parts(own, "use other --classes")
    return own


def base_to_novel(images: Images, novel: Sequence[str]) -> Images:
    """The images with some classes behind all others, of which test images alone are left: nobody trains on them.

    As in Zhou et al., *Conditional Prompt Learning for Vision-Language Models*, CVPR 2022, arXiv 2203.05557, section
    4.1, where the base classes are the first half, rounded up.

    Args:
      images: of all classes.
      novel: these classes by name; or ``half``, where none is called so: those behind the first half.

    Raises:
      ValueError: there is no such class; fewer than two are novel, or left to train on; a domain is left without any.
    """
    if not novel:
        return images
    if tuple(novel) == ("half",) and "half" not in images.classes:
        novel = images.classes[-(-len(images.classes) // 2) :]
    missing = [name for name in novel if name not in images.classes]
    base = [name for name in images.classes if name not in novel]
    if missing or len(set(novel)) < len(novel) or min(len(base), len(novel)) < 2:
        told = f"leaves {len(base)}: expected two at least on either side, each named once"
        what = f"there is no {missing[0]}" if missing else told
        raise ValueError(f"--novel {','.join(novel)}: {what} (of {images.name}'s {len(images.classes)} classes)")
    own = of_classes(images, (*base, *novel))
    kept = np.flatnonzero(own.test | (own.y < len(base)))
    own = own._replace(x=taken(own.x, kept), y=own.y[kept], domain=own.domain[kept], test=own.test[kept])
    own = own._replace(rows=_rows(own, kept), known=len(base))
    _check_parts(own._replace(test=own.test & (own.y < len(base))), "use other --novel classes")
    return own


def validation(images: Images, share: float, seed: int = 1) -> Images:
    """The training images alone, a share of each class and domain set apart as test images: to choose options on."""
    kept = np.flatnonzero(~images.test)
    cells = images.domain[kept] * len(images.classes) + images.y[kept]
    own = images._replace(x=taken(images.x, kept), y=images.y[kept], domain=images.domain[kept])
    own = own._replace(name=f"{images.name} (validation)", test=_split(cells, share, seed), rows=_rows(images, kept))
    _check_parts(own, f"a share of {share:g} of each of its classes leaves none; use another --validation")
    return own


def _rows(images: Images, kept: np.ndarray) -> np.ndarray:
    return kept if images.rows is None else images.rows[kept]


def resplit(images: Images, share: float) -> Images:
    """All images, of which a share of each class and domain is for testing, drawn anew whatever was said of them."""
    own = images._replace(test=_split(images.domain * len(images.classes) + images.y, share))
    _check_parts(own, f"a share of {share:g} of each of its classes leaves none; use another --resplit")
    return own


def _split(cells: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
    rng, test = np.random.default_rng(seed), np.zeros(len(cells), bool)
    for cell in np.unique(cells):
        members = rng.permutation(np.flatnonzero(cells == cell))
        test[members[: round(share * len(members))]] = True
    return test


def resized(images: Images, side: int) -> Images:
    """Every image resized to ``side x side``, bicubic."""
    if images.x.shape[1:3] == (side, side):
        return images
    resize = jax.jit(lambda x: jax.image.resize(x.astype(np.float32), (len(x), side, side, 3), "bicubic"))
    as_bytes = lambda x: np.clip(np.round(x), 0, 255).astype(np.uint8)  # each part at once: floats take four times that
    parts = [as_bytes(np.asarray(resize(part))) for part in np.array_split(images.x, max(1, len(images.x) // 512))]
    return images._replace(x=np.concatenate(parts))
