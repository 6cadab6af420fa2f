"""Families of models by name: a new one is one file that makes a ``Backbone``, and one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from models.backbone import Backbone
from models.pretrained import vit_backbone

FAMILIES: dict[str, Callable[..., Backbone]] = {"vit": vit_backbone}


def find(name: str) -> Callable[..., Any]:
    """The function of a family.

    Raises:
      ValueError: there is none of that name.
    """
    if name not in FAMILIES:
        names = ", ".join(FAMILIES)
        raise ValueError(f"no family of models {name!r}: expected {names}, or FILE.py:FUNCTION of your own")
    return FAMILIES[name]
