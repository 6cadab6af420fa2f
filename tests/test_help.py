"""``--help`` is a screen that names every group of options, each of which is a screen; its examples can be typed."""

import dataclasses
import re
import shlex

import pytest

from experiments.bench.options import BENCHES
from experiments.cli import parse
from experiments.config import Config
from experiments.parsers import COMMANDS, FIRST, GROUPS, LEFT_OUT, parsers, shown

SCREEN = 45


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def flags(text):
    return set(re.findall(r"^  (--[\w-]+)", text, re.MULTILINE))


def help_of(command, capsys, *group):
    with pytest.raises(SystemExit) as ended:
        parse([command, "--help", *group])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", LEFT_OUT)
def test_every_option_is_in_one_group_and_every_group_on_one_screen(command, capsys):
    first = help_of(command, capsys)
    named = re.findall(r"^  (\w+) +[A-Z].*\.$", first, re.MULTILINE)
    two = 7 * (command in ("sweep", "budget"))  # what is searched for stands there at once too
    assert len(first.splitlines()) <= SCREEN + two
    found = [flags(first), *(flags(shown(command, group).format_help()) for group in named)]
    own = {field.name for field in dataclasses.fields(Config)} - LEFT_OUT[command]
    wanted = {f"--{name.replace('_', '-')}" for name in own}
    if command in ("run", "meta"):
        wanted = wanted - {"--methods"} | {"--method"}
    files = {"--config", "--recipe", "--print-config"} if command != "methods" else set()
    assert set().union(*found) == wanted | files
    assert sum(map(len, found)) == len(wanted | files)  # none is in two
    assert flags(help_of(command, capsys, "all")) == wanted | files
    for group in named:
        assert len(shown(command, group).format_help().splitlines()) <= SCREEN, group


def test_a_group_that_is_none_is_refused_with_those_there_are(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["compare", "--help", "dta"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "'dta' is no group of options: expected all, run, data, " in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - set(LEFT_OUT)))
def test_other_commands_fit_a_screen_as_they_are(command, capsys):
    text = help_of(command, capsys)
    assert len(text.splitlines()) <= SCREEN
    assert "\nexamples:\n" in text


def test_the_commands_and_each_bench_fit_a_screen():
    parser, _ = parsers()
    assert len(parser.format_help().splitlines()) <= SCREEN + 5
    assert "COMMAND --help GROUP" in parser.format_help()
    assert set(FIRST) <= set(GROUPS)
    for name in BENCHES:
        with pytest.raises(SystemExit):
            parse(["bench", name, "--help"])


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_can_be_typed_and_stand_on_one_line(command, capsys):
    for example in COMMANDS[command].examples:
        assert len(f"  python -m experiments {command} {example}") <= 78
        if "--help" not in example:
            assert parse([command, *shlex.split(example)])[0] == command
