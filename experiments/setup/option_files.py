"""Options in a file: TOML with a key for each, or the ``config.json`` of a run; and the recipes that come along.

A recipe is such a file for one published protocol, ``experiments/recipes/NAME.toml``. Its table ``about`` is for
readers: what is published, what is ours where it is not, which figures were reported. Nobody here knows where data and
weights lie: a recipe says what they are, and leaves ``--data`` and ``--weights`` to whoever runs it.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parents[1] / "recipes"
ABOUT = "about"
INSTEAD = {  # what an option says, these say too: where it is given, what stands further down of them is taken back
    "alpha": ("scale",),
    "scale": ("alpha",),
    "local_steps": ("local_epochs", "local_cap"),
    "local_steps_from": ("local_epochs", "local_cap"),
    "local_epochs": ("local_steps", "local_steps_from"),
}


def read(path: str | Path) -> dict[str, Any]:
    """The options in a file, by name, lists as they are; and ``about``, if it has one.

    Raises:
      ValueError: it is missing, or no such file.
    """
    path = Path(path)
    try:
        content = path.read_text("utf8")
        found = json.loads(content) if path.suffix == ".json" else tomllib.loads(content)
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--config {path} is no TOML (of a run: config.json): {error}") from None
    if path.suffix == ".json":
        parts: list[Any] = [found.get(part) for part in ("config", "speed")] if isinstance(found, dict) else [None]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError(f"--config {path} is not the config.json of a run, which has 'config' and 'speed'")
        found = {name: value for part in parts for name, value in part.items() if value is not None}
    own = {name.replace("-", "_"): value for name, value in found.items()}
    if len(own) < len(found):
        twice = next(name for name in found if name.replace("-", "_") != name and name.replace("-", "_") in found)
        raise ValueError(f"--config {path} has both {twice} and {twice.replace('-', '_')}, which are one option")
    return own


def over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Of the options ``below`` those that stay where others are given ``above`` them: not what these take back.

    A momentum is taken back by another optimizer.
    """
    back = {name for key, value in above.items() if value is not None for name in INSTEAD.get(key, ())}
    if above.get("optimizer", "momentum") != "momentum":
        back.add("momentum")
    return {name: value for name, value in below.items() if name not in back - above.keys()}


def recipe(name: str) -> Path:
    """The file of a recipe.

    Raises:
      ValueError: there is none of that name.
    """
    path = RECIPES / f"{name}.toml"
    if name not in recipes():
        near = get_close_matches(name, recipes(), 3, 0.4)
        said = f"near are {', '.join(near)}; " if near else ""
        raise ValueError(f"no recipe {name!r}: {said}the command 'recipes' lists them all")
    return path


def notes(name: str, options: Any) -> list[str]:
    """What a recipe is of, where that is left to whoever runs it and not given: built-in ones are taken."""
    about, left = (
        read(recipe(name))[ABOUT],
        {"data", "weights"} - ({"weights"} if ":" in (options.model or "") else set()),
    )
    built_in = [key for key in sorted(left) if getattr(options, key) == getattr(type(options), key)]
    return [f"--recipe {name} leaves --{key} to you ({about[key]}): now what is built in is taken" for key in built_in]


def recipes() -> list[str]:
    return sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.toml"))


def text(options: Any) -> str:
    """A dataclass of options as a file that ``read`` understands; what is ``None`` is left out."""
    values = {entry.name: getattr(options, entry.name) for entry in dataclasses.fields(options)}
    shown = lambda x: f"[{', '.join(map(_one, x))}]" if isinstance(x, tuple) else _one(x)
    return "".join(f"{name} = {shown(value)}\n" for name, value in values.items() if value is not None)


def _one(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def listing(name: str | None) -> str:
    """All recipes, a line each; or one of them whole."""
    if name is not None:
        return recipe(name).read_text("utf8").strip()
    titles = {own: read(RECIPES / f"{own}.toml")[ABOUT]["title"] for own in recipes()}
    widest = max(map(len, titles))
    lines = [f"{own.ljust(widest)}  {title}" for own, title in titles.items()]
    return "\n".join(
        ["'recipes NAME' shows one whole, 'compare --recipe NAME --data ... --weights ...' runs it", "", *lines]
    )
