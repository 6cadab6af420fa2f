"""The command line, made from dataclasses of options: types, defaults and help are in ``config`` and ``requests``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

import fedlora_jax
from experiments.bench import options as bench
from experiments.config import Config
from experiments.options import PLACE, SPEED, check_fields
from experiments.requests import CompareRuns, Data, Doctor, Export, Models, Pool, Recipes
from experiments.results.folder import asked, program
from experiments.setup import adapter, option_files
from experiments.setup.option_values import converter, from_file, is_a

_EPILOG = "examples:\n  python -m experiments compare\n  python -m experiments run --method hyperlora --rounds 50"

OWN = {
    "bench": bench.Options,
    "compare-runs": CompareRuns,
    "data": Data,
    "doctor": Doctor,
    "export": Export,
    "models": Models,
    "pool": Pool,
    "recipes": Recipes,
}  # commands with options of their own
GROUPS = {  # of options, by what they decide
    SPEED: ("speed", "These decide speed and memory alone; results agree to rounding."),
    PLACE: ("hosts", "Who computes; results agree to rounding. A run that goes on may be told otherwise, or nothing."),
}
LONGEST = 1200  # letters of an error


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see {self.prog} --help)")


def fail(message: str, code: int = 2) -> NoReturn:
    text = "".join(
        c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split())
    )  # files have hostile names
    if len(text) > LONGEST:  # what was got may be as long as a command line can be
        text = f"{text[: LONGEST * 2 // 3]} ... {text[-LONGEST // 3 :]}"
    print(f"error: {text}", file=sys.stderr)
    sys.exit(code)


def _parsers() -> tuple[_Parser, Any]:
    """Of everything, and of each command."""
    parser = _Parser(
        prog=" ".join(program()),
        description="Federated LoRA fine-tuning: run methods side by side, every round one compiled program.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fedlora-jax {fedlora_jax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for name, text in (
        ("compare", "run several methods on the same seeds, clients and batches; the main job"),
        ("run", "run one method"),
        ("bounds", "what needs no federation: zero-shot, linear probe, local-only and centralised tuning"),
        ("sweep", "accuracy against the learning rate and one option: all values and seeds in one compiled program"),
        (
            "budget",
            "accuracy against the number of local steps, learning rates chosen on a part of the training images",
        ),
        ("meta", "learn a method's theta by differentiating through whole rounds, for --theta of other runs"),
    ):
        add_options(commands.add_parser(name, help=text, description=text, allow_abbrev=False), name)
    text = "what a finished run has learned, as weights or as an adapter"
    _add_own(commands, "export", text, Export, "run")
    text = "unseen clients of a finished run, served by the adapters that its clients left behind"
    _add_own(commands, "pool", text, Pool, "run")
    text = "finished runs side by side: accuracies, paired differences, options that differ"
    _add_own(commands, "compare-runs", text, CompareRuns, "runs")
    _add_benches(commands)
    text = "tables of methods and wrappers: paper, what is trained, sent and kept, sizes, tests"
    add_options(commands.add_parser("methods", help=text, description=text, allow_abbrev=False), "methods")
    text = "what is in a source of images: classes, domains, sizes, duplicates; what a partition gives every client"
    _add_own(commands, "data", text, Data, "source")
    text = "families of models, their sizes and what an adapter of them holds; or what a weight file is"
    _add_own(commands, "models", text, Models, "file")
    text = "published protocols that 'compare --recipe NAME' follows: what is published, what is ours, reported figures"
    _add_own(commands, "recipes", text, Recipes, "name")
    _add_own(commands, "doctor", "this machine: versions, devices, caches, what is missing for what", Doctor)
    return parser, commands


def parse(
    arguments: Sequence[str] | None = None,
) -> tuple[str, Any]:
    """The command and its options, a ``Config`` or what it has in ``OWN``."""
    parser, commands = _parsers()
    given = vars(parser.parse_args(arguments))
    command = given.pop("command")
    if nothing := [name for name, value in given.items() if value == []]:  # what argparse makes of --data=--
        parser.error(f"argument --{nothing[0].replace('_', '-')}: expected one argument")
    files = [given[name] for name in _FROM_FILES if given.get(name) is not None]
    own, typed = commands.choices[command], _typed(command, arguments)
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
    if command in OWN:
        return command, OWN[command](**given)
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


def _typed(command: str, arguments: Sequence[str] | None) -> set[str]:
    """The options that are given on the command line itself."""
    if command not in _LEFT_OUT:
        return set()
    parser, commands = _parsers()
    for action in commands.choices[command]._actions:
        action.default = argparse.SUPPRESS
    return {name for name in vars(parser.parse_args(arguments)) if name != "command"}


def _of_adapter(parser: _Parser, folder: str | None) -> dict[str, Any]:
    """The options that an adapter decides where they are not given."""
    try:
        return {} if folder is None else adapter.options(folder)
    except ValueError as error:
        parser.error(str(error))


_FROM_FILES = ("recipe", "config")  # options that name a file of options; of two that say the same the last is right


def _filed(parser: _Parser, given: Collection[str], paths: dict[str, str | None]) -> dict[str, Any]:
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


_RECORDED = {"resume", "target", "checkpoint_every", "dry_run", "track"}
_META = {"unroll", "meta_lr"}
_HOSTS = {"hosts", "coordinator", "process_id"}
_WORK = {"local_steps", "local_steps_from", "local_epochs", "local_cap"}
_TUNED = {"budgets", "lrs", "tuning_seeds", "vary"} | _META
_AT_ONCE = {"images", "kept"}  # of what needs all images, and what all clients keep, at once
_WEIGHTS = {"weights", "mean", "std", "heads", "epsilon", "keep_head"}
_MODEL = _WEIGHTS | {
    "head",
    "prompts",
    "context",
    "bridge",
    "class_names",
    "model",
    "data",
    "classes",
    "skip_damaged",
    "image_size",
    "targets",
    "adapt_last",
    "prefix",
    "blocks",
    "full",
    "rank",
    "scale",
    "alpha",
}
_LEFT_OUT = {
    "compare": _TUNED,
    "run": _TUNED,
    "bounds": _TUNED
    | _RECORDED
    | _HOSTS
    | _AT_ONCE
    | {"methods", "out", "eval_every", "chunk", "devices", "seeds_at_once", "sampling"}
    | {"signature", "theta", "schedule", "local_schedule", "adapter", "eval_clients", "novel", "attack"},
    "sweep": {"resume", "checkpoint_every", "dry_run", "track", "lr", "budgets", "tuning_seeds", "attack"}
    | _META
    | _AT_ONCE
    | _HOSTS,
    "budget": {"checkpoint_every", "dry_run", "track", "lr", "validation", "vary", "eval_clients", "novel", "attack"}
    | {"sampling"}
    | _META
    | _WORK
    | _HOSTS
    | _AT_ONCE,
    "meta": (_TUNED - _META)
    | _RECORDED
    | _HOSTS
    | _AT_ONCE
    | {"devices", "seeds_at_once", "adapter", "eval_clients", "novel", "attack", "sampling"}
    | (_WORK - {"local_steps"}),
    "methods": {field.name for field in dataclasses.fields(Config)} - _MODEL - {"clients", "clients_per_round"},
}


def _add_own(commands: Any, command: str, text: str, options: type, what: str = "") -> None:
    """A command with options of its own; ``what`` is positional, and may be left out where it has a default."""
    parser = commands.add_parser(command, help=text, description=text, allow_abbrev=False)
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        if field.name == what:
            optional = {"nargs": "?", "default": field.default} if field.default not in ("", ()) else {}
            optional = {"nargs": "+"} if field.default == () else optional
            parser.add_argument(what, metavar=what.upper(), help=field.metadata["help"], **optional)
        else:
            _add_option(parser, field, hints[field.name], field.default)


def _add_benches(commands: Any) -> None:
    text = "how fast, how large, compared with whom: one bench for each question; JSON lines"
    benches = commands.add_parser("bench", help=text, description=text, allow_abbrev=False)
    names = benches.add_subparsers(dest="bench", required=True, metavar="BENCH", parser_class=_Parser)
    fields = {field.name: field for field in dataclasses.fields(bench.Options)}
    hints = typing.get_type_hints(bench.Options)
    for name, text in bench.BENCHES.items():
        parser = names.add_parser(name, help=text, description=text, allow_abbrev=False)
        for key in (*bench.USES[name], "out"):
            default = bench.BY_DEFAULT.get(name, {}).get(key, fields[key].default)
            _add_option(parser, fields[key], hints[key], default)


def add_options(parser: argparse.ArgumentParser, command: str) -> None:
    """One option for each field of ``Config``; ``run`` has ``--method``, every command only what it depends on."""
    hints, fields = typing.get_type_hints(Config), dataclasses.fields(Config)
    fields = [field for field in fields if field.name not in _LEFT_OUT[command]]
    of = lambda what: [field for field in fields if field.metadata["decides"] == what]
    if command != "methods":
        _add_files(parser)
    for field in fields:
        if field.metadata["decides"] in GROUPS:
            continue
        if field.name == "methods" and command in ("run", "meta"):
            parser.add_argument(
                "--method",
                metavar="NAME",
                help="the method, by file name, with options and wrappers as in compare --methods"
                + "; it may be left out with --resume" * (command == "run"),
            )
        else:
            _add_option(parser, field, hints[field.name], field.default)
    for what, (title, text) in GROUPS.items():
        if own := of(what):
            group = parser.add_argument_group(title, text)
            for field in own:
                _add_option(group, field, hints[field.name], field.default)


def _add_files(parser: argparse.ArgumentParser) -> None:
    text = "a TOML file of options, a key for each, or the config.json of a run; what is typed goes before it"
    parser.add_argument("--config", metavar="FILE", help=text)
    text = (
        "a published protocol ('python -m experiments recipes'); what is typed, or in --config, goes before it: --NAME "
        "default and --no-NAME take back what it says of an option, or of a switch"
    )
    parser.add_argument("--recipe", metavar="NAME", help=text)
    parser.add_argument("--print-config", action="store_true", help="print all options as such a file, and end")


def _add_option(parser: argparse._ActionsContainer, field: dataclasses.Field, hint: Any, default: Any) -> None:
    flag, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
    if hint is bool:
        parser.add_argument(flag, action="store_true", help=text)
        parser.add_argument(f"--no-{flag[2:]}", dest=field.name, action="store_false", help=argparse.SUPPRESS)
        return
    shown = "" if default in (None, ()) else f" (default: {_show(default)})"
    kind, metavar = converter(field.name, hint, default)
    parser.add_argument(flag, type=kind, default=default, metavar=metavar, help=(text + shown).replace("%", "%%"))


def _show(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
