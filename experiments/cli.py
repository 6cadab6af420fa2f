"""What is typed, with what files of options, an adapter and a run that goes on add to it."""

from __future__ import annotations

import argparse
import sys
import typing
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from typing import Any

from experiments.config import Config
from experiments.options import check_fields
from experiments.parsers import COMMANDS, LEFT_OUT, Parser, parsers
from experiments.results.folder import asked
from experiments.setup import adapter, option_files
from experiments.setup.option_values import from_file, is_a


def parse(
    arguments: Sequence[str] | None = None,
) -> tuple[str, Any]:
    """The command and its options, a ``Config`` or what it has in ``COMMANDS``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser, commands = parsers(arguments)
    given = vars(parser.parse_args(arguments))
    command = given.pop("command")
    if nothing := [name for name, value in given.items() if value == []]:  # what argparse makes of --data=--
        parser.error(f"argument --{nothing[0].replace('_', '-')}: expected one argument")
    files = [given[name] for name in _FROM_FILES if given.get(name) is not None]
    own, typed = commands[command], _typed(command, arguments)
    for name in ("alpha", "local_epochs"):
        if name in typed and (both := typed & set(option_files.INSTEAD[name])):
            own.error(f"--{name} and --{min(both)} say the same in two ways: give one of them".replace("_", "-"))
    if (given.get("resume") and given["out"]) or files or given.get("adapter"):
        filed = _filed(own, given, {kind: given.get(kind) for kind in _FROM_FILES})
        out, goes_on = given.get("out") or filed.get("out"), given.get("resume") or filed.get("resume")
        held = (_held(out, given.keys()) if goes_on and out else {}) | filed
        of_adapter = _of_adapter(own, given.get("adapter") or held.get("adapter"))
        if given.get("alpha", held.get("alpha")) is not None:
            of_adapter.pop("scale", None)  # which alpha stands for
        own.set_defaults(**option_files.over(of_adapter | held, {name: given[name] for name in typed}))
        given = vars(parser.parse_args(arguments))
        del given["command"]
    shows, recipe = given.pop("print_config", False), given.get("recipe")
    given = {name: value for name, value in given.items() if name not in _FROM_FILES}
    if command not in LEFT_OUT:
        return command, COMMANDS[command].options(**given)
    if "method" in given and given["method"] is None:
        own.error("the following arguments are required: --method")
    if "method" in given:
        given["methods"] = (given.pop("method"),)
    config = Config(**given)
    for note in option_files.notes(recipe, config) if recipe and not shows else ():
        print(f"note: {note}", file=sys.stderr)
    if shows:
        try:
            check_fields(config)
        except ValueError as error:
            own.error(str(error))
        print(option_files.text(config), end="")
        sys.exit(0)
    return command, config


def _typed(command: str, arguments: Sequence[str]) -> set[str]:
    """The options that are given on the command line itself."""
    if command not in LEFT_OUT:
        return set()
    parser, commands = parsers(arguments)
    for action in commands[command]._actions:
        action.default = argparse.SUPPRESS
    return {name for name in vars(parser.parse_args(arguments)) if name != "command"}


def _of_adapter(parser: Parser, folder: str | None) -> dict[str, Any]:
    """The options that an adapter decides where they are not given."""
    try:
        return {} if folder is None else adapter.options(folder)
    except ValueError as error:
        parser.error(str(error))


_FROM_FILES = ("recipe", "config")  # options that name a file of options; of two that say the same the last is right


def _filed(parser: Parser, given: Collection[str], paths: dict[str, str | None]) -> dict[str, Any]:
    """The options in the files that are named, of those that the command takes."""
    hints, found = typing.get_type_hints(Config), {}
    for kind, name in paths.items():
        if name is None:
            continue
        try:
            values = option_files.read(option_files.recipe(name) if kind == "recipe" else name)
            values.pop(option_files.ABOUT, None)
            if unknown := sorted(values.keys() - hints.keys()):
                near = "".join(f"; did you mean {own!r}?" for own in get_close_matches(unknown[0], hints, 1))
                raise ValueError(f"--{kind} {name} has the key {unknown[0]!r}, which is no option{near}")
            own = {key: from_file(f"--{kind} {name}", key, value, hints[key]) for key, value in values.items()}
            found = option_files.over(found, own) | own
        except ValueError as error:
            parser.error(str(error))
    if found.get("novel") and "novel" not in given:
        says = "in this command nothing is novel: all classes are trained on and scored"
        print(f"note: the file's novel = {','.join(found['novel'])} is left out, {says}", file=sys.stderr)
    if "method" in given and len(found.get("methods", ())) == 1:
        found["method"] = found["methods"][0]
    return {name: value for name, value in found.items() if name in given}


def _held(out: str, names: Collection[str]) -> dict[str, Any]:
    """The options of the run that goes on in a folder: what is not given stays as it was."""
    hints, found = typing.get_type_hints(Config), {}
    for name, value in asked(out).items():
        value = tuple(value) if isinstance(value, list) else value
        if name == "methods" and "method" in names and is_a(value, hints[name]) and len(value) == 1:
            found["method"] = value[0]
        if name in names and is_a(value, hints[name]):
            found[name] = value
    return found
