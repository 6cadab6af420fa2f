"""What can be typed: the commands, their options in groups of a screen each, and examples of them."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import sys
import textwrap
import typing
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple, NoReturn

import fedlora_jax
from experiments.bench import options as bench
from experiments.config import Config
from experiments.requests import CompareRuns, Completion, Data, Doctor, Export, Models, Pool, Recipes
from experiments.results.folder import program
from experiments.setup.option_values import converter


class Command(NamedTuple):
    """What a command does, examples of it, its options, and which of these is positional."""

    text: str
    examples: tuple[str, ...] = ("",)
    options: type = Config
    what: str = ""


COMMANDS = {
    "compare": Command(
        "run several methods on the same seeds, clients and batches; the main job",
        (
            "--methods fedit,ditto+proximal --out runs/a",
            "--out runs/a --resume --rounds 20",
            "--data photos --weights deit.npz --dry-run",
        ),
    ),
    "run": Command("run one method", ("--method hyperlora --rounds 50", "--method fedit --rank 4,8,16")),
    "bounds": Command(
        "what needs no federation: zero-shot, linear probe, local-only and centralised tuning",
        ("", "--data photos --image-size 64 --seeds 3"),
    ),
    "sweep": Command(
        "accuracy against the learning rate and one option: all values and seeds in one compiled program",
        ("--methods fedit,flora --lrs 0.05,0.1", "--methods fedit+proximal --vary mu=0.01,0.1"),
    ),
    "budget": Command(
        "accuracy against the number of local steps, learning rates chosen on a part of the training images",
        ("--methods fedit,hyperlora --budgets 1,5",),
    ),
    "meta": Command(
        "learn a method's theta by differentiating through whole rounds, for --theta of other runs",
        ("--method hyperlora:mode=frozen --unroll 2",),
    ),
    "export": Command(
        "what a finished run has learned, as weights or as an adapter",
        ("runs/a --method flora", "runs/a --method flora --to peft"),
        *(Export, "run"),
    ),
    "pool": Command(
        "unseen clients of a finished run, served by the adapters that its clients left behind",
        ("runs/a --method fedit", "runs/a --router retrieval --by image"),
        *(Pool, "run"),
    ),
    "compare-runs": Command(
        "finished runs side by side: accuracies, paired differences, options that differ",
        ("runs/a runs/b",),
        *(CompareRuns, "runs"),
    ),
    "bench": Command(
        "how fast, how large, compared with whom: one bench for each question; JSON lines",
        ("round", "round --help"),
        bench.Options,
    ),
    "methods": Command(
        "tables of methods and wrappers: paper, what is trained, sent and kept, sizes, tests",
        ("", "--model mixer --rank 8"),
    ),
    "data": Command(
        "what is in a source of images: classes, domains, sizes, duplicates; what a partition gives every client",
        ("digits", "photos --partition dirichlet:0.5 --clients 20"),
        *(Data, "source"),
    ),
    "models": Command(
        "families of models, their sizes and what an adapter of them holds; or what a weight file is",
        ("", "deit_tiny/model.safetensors --rank 8"),
        *(Models, "file"),
    ),
    "recipes": Command(
        "published protocols that 'compare --recipe NAME' follows: what is published, what is ours, reported figures",
        ("", "lora_fair/domainnet_feature"),
        *(Recipes, "name"),
    ),
    "completion": Command(
        "what a shell needs to complete commands, options and names behind fedlora", ("bash",), *(Completion, "shell")
    ),
    "doctor": Command("this machine: versions, devices, caches, what is missing for what", options=Doctor),
}
GROUPS = {group.__name__.lower(): group for group in reversed(Config.__bases__)}
LONGEST = 1200  # letters of an error
FIRST = ("run", "search")  # the groups that --help shows at once


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, which wraps line by line, and takes no shortened options."""

    def __init__(self, **more: Any):
        super().__init__(formatter_class=_ByLine, allow_abbrev=False, **more)

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see {self.prog} --help)")


class _ByLine(argparse.HelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        wrap = functools.partial(textwrap.fill, width=width, initial_indent=indent, subsequent_indent=indent)
        return "\n".join(map(wrap, text.splitlines()))


def fail(message: str, code: int = 2) -> NoReturn:
    text = "".join(
        c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split())
    )  # files have hostile names
    if len(text) > LONGEST:  # what was got may be as long as a command line can be
        text = f"{text[: LONGEST * 2 // 3]} ... {text[-LONGEST // 3 :]}"
    print(f"error: {text}", file=sys.stderr)
    sys.exit(code)


def parsers(typed: Collection[str] = COMMANDS) -> tuple[Parser, dict[str, Parser]]:
    """Of everything, and of each command; those that are not among what is typed have no options."""
    called = " ".join(program())
    parser = Parser(
        prog=called,
        usage="%(prog)s COMMAND ...",
        description="Federated LoRA fine-tuning: run methods side by side, every round one compiled program.",
        epilog="Commands with many options show them by groups: COMMAND --help GROUP, or --help all.\n\n"
        + _examples(called, ("compare", "run --method hyperlora --rounds 50", "compare --help clients")),
    )
    parser.add_argument("--version", action="version", version=f"fedlora-jax {fedlora_jax.__version__}")
    choices = parser.add_subparsers(prog=called, dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, (text, _, options, what) in COMMANDS.items():
        grouped = options is Config
        own = choices.add_parser(name, help=text, add_help=not grouped, **_about(name))
        if name not in typed:
            continue
        if name == "bench":
            _add_benches(own)
        elif grouped:
            own.add_argument("-h", "--help", action=_Help, nargs="?", const="", default=argparse.SUPPRESS)
            add_options(own, name)
        else:
            _add_own(own, options, what)
    return parser, dict(choices.choices)


def _about(command: str) -> dict[str, Any]:
    text, examples, *_ = COMMANDS[command]
    return {"description": text, "epilog": _examples(" ".join((*program(), command)), examples)}


def _examples(called: str, more: Iterable[str]) -> str:
    return "\n".join(["examples:", *(f"  {called} {rest}".rstrip() for rest in more)])


class _Help(argparse.Action):
    """``--help``, ``--help GROUP`` and ``--help all`` of a command."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, value: Any, option: str | None = None) -> None:
        command = parser.prog.split()[-1]
        own = _groups(command)
        if value not in ("", "all", *own):
            parser.error(f"argument --help: {value!r} is no group of options: expected all, {', '.join(own)}")
        shown(command, value).print_help()
        parser.exit()


def shown(command: str, group: str = "") -> Parser:
    """What ``--help`` prints of a command, ``--help GROUP`` of a group, and ``--help all``."""
    about: dict[str, Any] = {} if group in GROUPS else _about(command)
    if not group:
        rest = [f"  {name:<10} {text}" for name, text in _groups(command).items() if name not in FIRST]
        about["epilog"] = "\n".join(["more options (--help GROUP, or --help all):", *rest, "", about["epilog"]])
    parser = Parser(prog=" ".join((*program(), command)), usage="%(prog)s [OPTIONS]", add_help=False, **about)
    add_options(parser, command, {"": FIRST, "all": GROUPS}.get(group, (group,)))
    return parser


def _fields(command: str, group: str) -> list[dataclasses.Field]:
    """The options of a group that a command takes."""
    own = inspect.get_annotations(GROUPS[group])
    return [field for field in dataclasses.fields(Config) if field.name in own and field.name not in LEFT_OUT[command]]


def _groups(command: str) -> dict[str, str]:
    """The groups of a command's options, and what they are about; files are of all but of the tables of methods."""
    some = lambda name: _fields(command, name) or (name == "files" and command != "methods")
    return {name: group.__doc__ or "" for name, group in GROUPS.items() if some(name)}


_RECORDED = {"resume", "target", "checkpoint_every", "dry_run", "track"}
_META = {"unroll", "episode", "meta_lr"}
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
LEFT_OUT = {
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
    "budget": {"checkpoint_every", "dry_run", "track", "lr", "validation", "vary", "novel", "attack", "sampling"}
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


def add_options(parser: argparse.ArgumentParser, command: str, groups: Iterable[str] = GROUPS) -> None:
    """One option for each field of ``Config``; ``run`` has ``--method``, every command only what it depends on."""
    hints = typing.get_type_hints(Config)
    for name, text in _groups(command).items():
        if name not in groups:
            continue
        group = parser.add_argument_group(name, None if groups == FIRST else text)
        for field in _fields(command, name):
            if field.name == "methods" and command in ("run", "meta"):
                text = "the method, by file name, with options and wrappers as in compare --methods"
                text += "; it may be left out with --resume" * (command == "run")
                group.add_argument("--method", metavar="NAME", help=text)
            else:
                _add_option(group, field, hints[field.name], field.default)
        if name == "files":
            _add_files(group)


def _add_own(parser: Parser, options: type, what: str) -> None:
    """Options of a command's own; ``what`` is positional, and may be left out where it has a default."""
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        if field.name == what:
            optional: dict[str, Any] = {"nargs": "?", "default": field.default} if field.default not in ("", ()) else {}
            optional = {"nargs": "+"} if field.default == () else optional
            parser.add_argument(what, metavar=what.upper(), help=field.metadata["help"], **optional)
        else:
            _add_option(parser, field, hints[field.name], field.default)


def _add_benches(benches: Parser) -> None:
    names = benches.add_subparsers(dest="bench", required=True, metavar="BENCH", parser_class=Parser)
    fields = {field.name: field for field in dataclasses.fields(bench.Options)}
    hints = typing.get_type_hints(bench.Options)
    for name, text in bench.BENCHES.items():
        parser = names.add_parser(name, help=text, description=text)
        for key in (*bench.USES[name], "out"):
            default = bench.BY_DEFAULT.get(name, {}).get(key, fields[key].default)
            _add_option(parser, fields[key], hints[key], default)


def _add_files(parser: argparse._ActionsContainer) -> None:
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
