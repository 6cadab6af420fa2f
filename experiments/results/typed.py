"""What to type for a run again: of its options those alone that are not as by default."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from experiments.config import Config
from experiments.options import RESULTS


def again(command: str, options: dict[str, Any]) -> str:
    """The command line of a run.

    Args:
      command: compare or run.
      options: by name, as in config.json.
    """
    default, words = Config(), ["python", "-m", "experiments", command]
    for field in dataclasses.fields(Config):
        value, own = options.get(field.name), getattr(default, field.name)
        value = tuple(value) if isinstance(value, list) else value
        if value is None or value == own or field.metadata["decides"] != RESULTS:
            continue
        name = "method" if (field.name, command) == ("methods", "run") else field.name
        flag = "--" + name.replace("_", "-")
        words += [flag] if isinstance(value, bool) else [flag, _text(field.name, value)]
    return shlex.join(words)


def _text(name: str, value: Any) -> str:
    if name == "seeds" and value == tuple(range(len(value))):
        return str(len(value))  # a number alone is a count
    if isinstance(value, tuple):
        return ",".join(map(_one, value)) + "," * (name == "seeds" and len(value) == 1)
    return _one(value)


def _one(value: Any) -> str:
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)
