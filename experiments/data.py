"""Labelled images with domains and a fixed train/test split, from a ``.npz`` file or built in.

The contract of a file (no pickles): ``x`` uint8 ``[N, H, W, 3]``, ``y`` integer ``[N]``, ``classes [n_classes]``, and
where they exist ``domain`` integer ``[N]``, ``domains [n_domains]``, ``split [N]`` (0 train, 1 test), ``superclass``
integer ``[n_classes]`` (the one of each class; those of CIFAR-100 are known by the names of its classes).
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

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
    """One data set; arrays on the host."""

    name: str
    x: np.ndarray  # uint8 [N, H, W, 3]
    y: np.ndarray  # int32 [N]
    domain: np.ndarray  # int32 [N]; all 0 where the file has no domains
    test: np.ndarray  # bool [N]
    classes: tuple[str, ...]
    domains: tuple[str, ...]  # ("all",) where the file has none
    superclass: np.ndarray | None = None  # int32 [n_classes], where classes belong to superclasses

    @property
    def has_domains(self) -> bool:
        return len(self.domains) > 1

    def fingerprint(self) -> str:
        """A hash of everything in it."""
        digest = hashlib.sha256()
        for array in (self.x, self.y, self.domain, self.test):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


def load(source: str, test_share: float = 0.2) -> Images:
    """``digits`` (built in) or the path of a ``.npz`` file.

    Args:
      source: name or path.
      test_share: where the file has no split, this share of each class (and domain) is set apart for testing, drawn
        with a fixed seed.

    Raises:
      ValueError: the file is missing, damaged, or breaks the contract; the message says where.
    """
    if source == "digits":
        from experiments.digits import digits

        arrays, name = digits(), "digits"
    else:
        arrays, name = _read(source), Path(source).stem
    return _checked(name, arrays, test_share)


def _read(source: str) -> dict[str, np.ndarray]:
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"no data {source!r}: expected 'digits' or the path of a .npz file")
    try:
        with path.open("rb") as file:
            return dict(np.load(file, allow_pickle=False))
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{source} is not a readable .npz file (damaged, truncated or pickled): {error}") from None


def _checked(name: str, arrays: dict[str, np.ndarray], test_share: float) -> Images:
    missing = [key for key in ("x", "y", "classes") if key not in arrays]
    if missing:
        raise ValueError(f"{name} lacks the array(s) {', '.join(missing)}; it has {', '.join(arrays) or 'none'}")
    x, y, classes = arrays["x"], arrays["y"], tuple(map(str, arrays["classes"]))
    if np.issubdtype(x.dtype, np.floating) and not np.isfinite(x).all():
        raise ValueError(f"{name}: x holds NaN or infinite values; expected uint8 images")
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] != 3 or not x.size:
        raise ValueError(f"{name}: x is {x.dtype} {list(x.shape)}; expected uint8 [N, H, W, 3] with N > 0")
    domains = tuple(map(str, arrays["domains"])) if "domains" in arrays else ("all",)
    if ("domain" in arrays) != ("domains" in arrays):
        raise ValueError(f"{name} has only one of the arrays domain and domains; expected both or neither")
    domain = arrays.get("domain", np.zeros(len(x), np.int32))
    split = arrays.get("split")
    for key, values, count in (("y", y, len(classes)), ("domain", domain, len(domains)), ("split", split, 2)):
        if values is None:
            continue
        if values.shape != (len(x),) or not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"{name}: {key} is {values.dtype} {list(values.shape)}; expected integers [{len(x)}]")
        if values.min() < 0 or values.max() >= count:
            raise ValueError(f"{name}: {key} runs from {values.min()} to {values.max()}; expected 0 to {count - 1}")
    y, domain = y.astype(np.int32), domain.astype(np.int32)
    test = _split(domain * len(classes) + y, test_share) if split is None else split.astype(bool)
    for j, label in enumerate(domains):
        for part, where in (("training", ~test), ("test", test)):
            if not (domain[where] == j).any():
                raise ValueError(f"{name}: domain {label!r} has no {part} images")
    return Images(name, x, y, domain, test, classes, domains, _superclass(name, arrays, classes))


def _superclass(name: str, arrays: dict[str, np.ndarray], classes: tuple[str, ...]) -> np.ndarray | None:
    found = arrays.get("superclass")
    if found is None:
        of = {label: i for i, labels in enumerate(CIFAR100.values()) for label in labels.split()}
        return np.array([of[label] for label in classes], np.int32) if set(classes) == of.keys() else None
    if found.shape != (len(classes),) or not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"{name}: superclass is {found.dtype} {list(found.shape)}; expected integers [{len(classes)}]")
    return found.astype(np.int32)


def validation(images: Images, share: float, seed: int = 1) -> Images:
    """The training images alone, a share of each class and domain set apart as test images: to choose options on."""
    kept = np.flatnonzero(~images.test)
    cells = images.domain[kept] * len(images.classes) + images.y[kept]
    own = images._replace(x=images.x[kept], y=images.y[kept], domain=images.domain[kept])
    return own._replace(name=f"{images.name} (validation)", test=_split(cells, share, seed))


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
    parts = [np.asarray(resize(part)) for part in np.array_split(images.x, max(1, len(images.x) // 512))]
    return images._replace(x=np.clip(np.round(np.concatenate(parts)), 0, 255).astype(np.uint8))
