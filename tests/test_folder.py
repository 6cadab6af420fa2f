"""One process at a time writes a folder; what a kill leaves there is in nobody's way, what a user keeps there is."""

import dataclasses
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.cli import parse
from experiments.commands import compare
from experiments.config import Config
from experiments.options import RESULTS, SPEED
from experiments.results import folder
from experiments.results.folder import Folder, sealed, unsealed, write_atomically

ROOT = Path(__file__).parents[1]


def test_a_second_is_refused_by_the_name_of_the_first(tmp_path):
    first, late = Folder("compare", str(tmp_path / "out")), Folder("compare", str(tmp_path / "out"))
    with first as path:
        with pytest.raises(ValueError, match=f"is being written by process {os.getpid()} on .* since 20"):
            Folder("compare", str(path))
        with pytest.raises(BlockingIOError, match=f"is being written by process {os.getpid()} on "), late:
            pytest.fail("it was let in")
    assert list(path.iterdir()) == []
    with late:
        pass


def test_who_prepared_while_another_wrote_is_not_let_in(tmp_path):
    late = Folder("compare", str(tmp_path))
    with Folder("compare", str(tmp_path)) as path:
        (path / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="since this command began"), late:
        pytest.fail("it was let in")
    resumed = Folder("compare", str(tmp_path), resume=True)
    (path / "config.json").write_text('{"config": {}}')
    with pytest.raises(FileExistsError, match="since this command began"), resumed:
        pytest.fail("it was let in")
    assert os.listdir(path) == ["config.json"]


def test_a_killed_owner_is_nobody(tmp_path):
    code = (
        "import os, sys; from experiments.results.folder import Folder; Folder('compare', sys.argv[1]).__enter__(); "
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=60)
    assert (tmp_path / ".lock").read_text().startswith("process ")
    with Folder("compare", str(tmp_path)):
        assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()


def test_two_that_begin_in_the_same_second_have_folders_of_their_own(tmp_path, monkeypatch):
    second = datetime.datetime(2026, 1, 2, 3, 4, 5)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folder.datetime, "datetime", SimpleNamespace(now=lambda: second))
    three = [Folder("compare", None) for _ in range(3)]
    with three[0] as a, three[1] as b, three[2] as c:
        names = [f"compare-20260102-030405{end}" for end in ("", "-2", "-3")]
        assert [path.name for path in (a, b, c)] == sorted(os.listdir("runs")) == names


def test_what_a_kill_left_counts_for_nothing_and_goes(tmp_path):
    left = [".config.json.8060", ".summary.json.1", ".hyperlora_mode=exact.theta.npz.77", ".curves.png.3", ".lock"]
    for name in left:
        (tmp_path / name).write_text("half")
    with Folder("compare", str(tmp_path)):
        assert os.listdir(tmp_path) == [".lock"]
    for name in (".thesis.json", ".config.json.bak", "config.json.8060", ".git"):
        (tmp_path / name).write_text("precious")
        with pytest.raises(ValueError, match="not empty"):
            Folder("compare", str(tmp_path))
        assert (tmp_path / name).read_text() == "precious"
        (tmp_path / name).unlink()


def test_the_command_that_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiments", "compare", "--data", "my file.npz"])
    monkeypatch.chdir(tmp_path)
    own = Folder("compare", None, resume=False)
    same = "python -m experiments compare --data 'my file.npz'"
    assert own.command() == same, "nothing is written yet"
    with own as path:
        assert own.command() == same
        (path / "config.json").write_text("{}")
    assert own.command() == f"{same} --out {path} --resume"
    monkeypatch.setattr(sys, "argv", ["experiments", "compare", "--out", str(path), "--resume"])
    with Folder("compare", str(path), resume=True) as _:
        assert Folder("sweep", "x").command() == f"python -m experiments compare --out {path} --resume"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *[(text, "not what a run writes") for text in ("", "[]", "null", "3", '{"config": []}', "[" * 100_000, "{cut")],
        ('{"config": {}}', "methods was null"),
        ('{"config": {"rounds": [2], "lr": {}, "seeds": 1, "methods": null}}', "belongs to another configuration"),
    ],
)
def test_a_config_that_no_run_wrote_is_refused(text, said, tmp_path):
    (tmp_path / "config.json").write_text(text)
    _, config = parse(["compare", "--resume", "--out", str(tmp_path)])
    assert isinstance(config, Config)
    with pytest.raises(ValueError, match=said):
        compare.Plan("compare", config)
    assert os.listdir(tmp_path) == ["config.json"]


def test_options_that_are_not_given_stay_as_they_were(tmp_path):
    before = Config(methods=("flora", "fedit"), rounds=7, adapt_last=2, lr=0.25, partition="iid", seeds=(3, 1), chunk=4)
    parts = {"config": before.deciding(RESULTS), "speed": before.deciding(SPEED)}
    assert "chunk" not in parts["config"]
    (tmp_path / "config.json").write_text(json.dumps(parts))
    _, config = parse(["compare", "--resume", "--out", str(tmp_path), "--rounds", "9"])
    assert config == dataclasses.replace(before, rounds=9, resume=True, out=str(tmp_path))
    _, config = parse(["compare", "--resume", "--out", str(tmp_path), "--chunk", "2"])
    assert config == dataclasses.replace(before, chunk=2, resume=True, out=str(tmp_path))


def test_the_one_method_of_a_run_stays_as_it_was(tmp_path, capsys):
    goes_on, path = ["run", "--resume", "--out", str(tmp_path)], tmp_path / "config.json"
    path.write_text(json.dumps({"config": Config(methods=("flora+clip:bound=2",)).deciding(RESULTS)}))
    assert parse(goes_on)[1] == Config(methods=("flora+clip:bound=2",), resume=True, out=str(tmp_path))
    assert parse([*goes_on, "--method", "fedit"])[1].methods == ("fedit",)
    path.write_text(json.dumps({"config": Config(methods=("flora", "fedit")).deciding(RESULTS)}))
    for options in (goes_on, ["run"], ["run", "--out", str(tmp_path)]):
        with pytest.raises(SystemExit):
            parse(options)
        assert "arguments are required: --method" in capsys.readouterr().err


def test_a_seal_shows_any_change():
    value = {"method": "fedit", "loss": 0.1, "list": [1, None, {"a": "\u00e9"}]}
    text = json.dumps(sealed(value)).encode()
    assert unsealed(json.loads(text)) == value
    for at in range(len(text)):
        changed = text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :]
        assert unsealed(folder.read_json(changed)) is None, changed
    for other in ([], None, 3, "sum", {}, {"sum": 1}, [["sum", 2]]):
        assert unsealed(other) is None


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
