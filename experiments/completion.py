"""What a shell needs to complete ``fedlora``: commands, options, and values that are names; written by shtab."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.engine import methods
from experiments.parsers import COMMANDS, GROUPS, parsers
from experiments.setup import option_files

FILES = ("adapter", "config", "data", "file", "out", "run", "runs", "save", "sheet", "source", "theta", "weights")
# In bash each name of a list is completed, and behind a plus sign a wrapper; elsewhere the first name.
BASH = """_fedlora_methods() {{
  local last="${{1##*[,+]}}" names="{methods}"
  local before="${{1%"$last"}}"
  [[ $before == *+ ]] && names="{wrappers}"
  compgen -P "$before" -W "$names" -- "$last"
}}"""


def script(shell: str) -> str:
    """The completions of ``fedlora`` for bash, zsh or fish.

    Raises:
      ValueError: shtab is not installed.
    """
    try:
        import shtab  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("completion needs shtab: pip install 'fedlora-jax[completion]'") from None
    parser, commands = parsers()
    parser.prog = "fedlora"
    names, wrappers = " ".join(methods.names()), " ".join(sorted(methods.wrappers()))
    listed = {"bash": BASH.format(methods=names, wrappers=wrappers)}
    of_methods = {"bash": "_fedlora_methods", "zsh": f"({names})", "fish": names, "preamble": listed}
    special: dict[str, Any] = dict.fromkeys(FILES, shtab.FILE) | {"method": of_methods, "methods": of_methods}
    for name, own in commands.items():
        fields = dataclasses.fields(COMMANDS[name].options)
        known = {field.name: field.metadata["among"] for field in fields if field.metadata.get("among")}
        _fill(own, special, known | {"recipe": option_files.recipes(), "name": option_files.recipes()})
    return shtab.complete(parser, shell)


def _fill(parser: argparse.ArgumentParser, special: Mapping[str, Any], known: Mapping[str, Sequence]) -> None:
    """Say of each option what may stand behind it."""
    for action in parser._actions:
        if isinstance(action.choices, dict):  # commands of a command
            for own in action.choices.values():
                _fill(own, special, known)
        elif "--help" in action.option_strings and action.nargs == "?":
            action.choices = ("all", *GROUPS)
        elif action.dest in special:
            action.complete = special[action.dest]  # type: ignore[attr-defined]
        elif action.nargs != 0:
            action.choices = known.get(action.dest)
