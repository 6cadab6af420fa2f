"""Families of models by name: a new one is one file that makes a ``Backbone``, and one line here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from models import files, pretrained_mixer
from models.backbone import Backbone
from models.pretrained import vit_backbone
from models.pretrained_mixer import mixer_backbone


class Family(NamedTuple):
    """A way of making a ``Backbone`` of a weight file.

    Attributes:
      make: ``(weights, classes, image_size, ...) -> Backbone``, given what it asks for by name.
      claims: are the arrays of a file, by their names, those of such a model? The first family that says so has it.
    """

    make: Callable[..., Backbone]
    claims: Callable[[Iterable[str]], bool]


FAMILIES = {
    "mixer": Family(mixer_backbone, pretrained_mixer.claims),
    "vit": Family(vit_backbone, lambda names: True),  # the last: it says what is wrong with a file of nobody's
}


def find(name: str | None, weights: str | Path) -> Callable[..., Backbone]:
    """The function of a family; of no name, of the one that the names in the file tell.

    Raises:
      ValueError: there is none of that name.
    """
    if name is None:
        found = files.names_in(files.located(weights))
        return next(family.make for family in FAMILIES.values() if family.claims(found))
    if name not in FAMILIES:
        names = ", ".join(FAMILIES)
        raise ValueError(f"no family of models {name!r}: expected {names}, or FILE.py:FUNCTION of your own")
    return FAMILIES[name].make
