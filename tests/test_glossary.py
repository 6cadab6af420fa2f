"""Words of the glossary are found where it says."""

import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = [
    [cell.strip() for cell in line.strip("| ").split(" | ")]
    for line in (ROOT / "docs" / "glossary.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| word ")
]


def found(name):
    """What a dotted name is: a module, or something inside one or inside a class of the contract."""
    first, _, rest = name.partition(".")
    if first in ("experiments", "models") or importlib.util.find_spec(f"fedlora_jax.{first}"):
        return pkgutil.resolve_name(name if first in ("experiments", "models") else f"fedlora_jax.{name}")
    return pkgutil.resolve_name(f"fedlora_jax:{name}") if not rest else _field(first, rest)


def _field(owner, field):
    fields = getattr(importlib.import_module("fedlora_jax"), owner)._fields
    assert field in fields
    return field


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_word_is_where_the_glossary_says(row):
    word, meaning, elsewhere, where = row
    assert word
    assert elsewhere
    assert meaning.endswith(".")
    assert found(re.fullmatch(r"`([\w.]+)`", where)[1]) is not None


def test_no_word_is_explained_twice():
    words = [row[0] for row in ROWS]
    assert len(words) > 40
    assert len(set(words)) == len(words)
