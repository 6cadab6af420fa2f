"""A method from a file of the user's is a method like any other, or is refused with the line that is wrong."""

import json
import re
import sys

import numpy as np
import pytest
from input_helpers import PLAIN, SMALL, change, refused

from experiments.__main__ import main
from experiments.engine import methods
from experiments.setup import user_code
from fedlora_jax.method import Method

CODE = """
import jax
import jax.numpy as jnp
from fedlora_jax import About, fedit
from fedlora_jax.methods.fedit import FedITState

ABOUT = {"fed_median": About("FedMedian", "Yin et al. ICML 2018", "1803.01498", "a, b, head", "a, b, head", "no")}


def fed_median(participants: int, size: float = 1.0, name: str = "x"):
    def aggregate(base, state, cohort, sent, received):
        assert len(cohort.ids) == participants
        return FedITState(jax.tree.map(lambda x: size * jnp.median(x, 0), received))

    return fedit()._replace(aggregate=aggregate)


def same():
    return fedit()


def nothing():
    return 3


def broken(size: float = 1.0):
    return undefined + size


def asks(sky):
    return fedit()


def refuses():
    raise ValueError("not today")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a small data set and a file of methods in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    user_code.read.cache_clear()  # files are known by the path that is typed
    change()(tmp_path / "data.npz")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own.py").write_text(CODE)
    return tmp_path


def run(monkeypatch, *options):
    """The folder that is written."""
    fixed = [*PLAIN, *"--data data.npz --partition iid --eval-every 2".split()]
    monkeypatch.setattr(sys, "argv", ["experiments", *options, *SMALL, *fixed])
    main()


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
def test_it_runs_beside_others_with_options_wrappers_and_facts_of_the_run(here, monkeypatch, capsys):
    names = ["mine/own.py:same", "fedit", "mine/own.py:fed_median:size=0.5+proximal:mu=0.1"]
    run(monkeypatch, "compare", "--methods", ",".join(names), "--out", "out")
    own, fedit, median = ([row for row in rows(here / "out") if row["method"] == name] for name in names)
    assert [row["loss"] for row in own] == [row["loss"] for row in fedit] != [row["loss"] for row in median]
    assert "FedMedian (size=0.5) + FedProx (mu=0.1)" in (here / "out" / "report.html").read_text()
    record = json.loads((here / "out" / "config.json").read_text())["record"]
    assert record["method_files"] == methods.hashes(names)
    inside = [path.relative_to(here / "out") for path in (here / "out" / "checkpoints").iterdir()]
    assert {path.name for path in inside} == {name.replace("/", "%2F") for name in names}
    assert all(re.fullmatch(r"[\w.:=,+%-]+", path.name) for path in inside)


@pytest.mark.long
def test_what_it_learns_is_written_beside_under_a_safe_name(here, monkeypatch):
    (here / "mine" / "learns.py").write_text(
        "from typing import Any, NamedTuple\n"
        "from fedlora_jax import fedit\n"
        "class State(NamedTuple):\n"
        "    adapter: Any\n"
        "    theta: Any\n"
        "def learns():\n"
        "    inner = fedit()\n"
        "    return inner._replace(\n"
        "        init=lambda key, adapter: State(adapter, {'x': 1.0}),\n"
        "        aggregate=lambda base, state, *rest: State(inner.aggregate(base, state, *rest)[0], state.theta),\n"
        "    )\n"
    )
    run(monkeypatch, "run", "--method", "../" + here.name + "/mine/learns.py:learns", "--out", "out")
    (theta,) = (here / "out").glob("*.theta.npz")
    assert theta.name == f"..%2F{here.name}%2Fmine%2Flearns.py_learns.theta.npz"
    assert np.load(theta)["['x']"] == 1.0


@pytest.mark.long
def test_going_on_needs_the_same_file_and_may_add_others(here, monkeypatch, capsys):
    run(monkeypatch, "compare", "--methods", "mine/own.py:same", "--out", "out")
    (here / "other.py").write_text(CODE)
    more = ["compare", "--methods", "mine/own.py:same,other.py:same", "--out", "out", "--resume"]
    run(monkeypatch, *more)
    one, other = ([row["loss"] for row in rows(here / "out") if name in row["method"]] for name in ("mine", "other"))
    assert one == other
    (here / "mine" / "own.py").write_text(CODE + "# another\n")
    user_code.read.cache_clear()  # as in a process of its own
    capsys.readouterr()
    error = refused(more, capsys, monkeypatch)
    assert "belongs to another configuration: method_files was" in error


@pytest.mark.parametrize(
    ("spec", "said"),
    {
        "no_such.py:f": r"no file 'no_such\.py' for a method",
        "mine:f": "unknown method 'mine'",
        "mine/own.py": r"mine/own\.py:FUNCTION, for a method: it has fed_median, same",
        "mine/own.py:no_such": "has no function 'no_such' for a method: it has fed_median",
        "mine/own.py:fed_median:no=1": r"'no=1' is no option of mine/own\.py:fed_median; it has size=1\.0, name=x",
        "mine/own.py:fed_median:size=a": "size must be float, got 'a'",
        "mine/own.py:nothing": r"it returned int: expected a fedlora_jax\.Method",
        "mine/own.py:broken": "line 27: NameError: name 'undefined' is not defined",
        "mine/own.py:asks": "nothing gives it sky: a default would",
        "mine/own.py:refuses": "mine/own.py:refuses: not today",
        "mine/syntax.py:f": r"mine/syntax\.py, line 2 cannot be imported: SyntaxError",
        "mine/imports.py:f": r"mine/imports\.py, line 3 cannot be imported: ModuleNotFoundError: No module",
        "mine/leaves.py:f": r"mine/leaves\.py, line 2 cannot be imported: SystemExit: 3",
        "fedit+own.py:same": "is no wrapper: only methods are from files",
        "mine/own.py:same+no_such": "unknown wrapper",
    }.items(),
)
def test_what_is_wrong_is_said_in_one_line(here, capsys, monkeypatch, spec, said):
    (here / "mine" / "syntax.py").write_text("import jax\ndef f(:\n")
    (here / "mine" / "imports.py").write_text("import jax\n\nimport no_such_module\n")
    (here / "mine" / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    error = refused(["run", "--method", spec, "--data", "data.npz", "--out", "out", *SMALL], capsys, monkeypatch)
    assert re.search(said, error)
    assert not (here / "out").exists()


def test_about_is_optional(here):
    assert methods.about("mine/own.py:same").name == "same"
    assert methods.about("mine/own.py:fed_median:name=y").name == "FedMedian (y)"
    (here / "mine" / "one.py").write_text(CODE.replace('{"fed_median": ', "").replace('"no")}', '"no")'))
    assert methods.about("mine/one.py:same").name == "FedMedian", "of the whole file"


def test_its_options_can_be_varied(here):
    found = methods.find("mine/own.py:fed_median+proximal", "size")
    spec = methods.with_option("mine/own.py:fed_median+proximal", found, 0.25)
    assert spec == "mine/own.py:fed_median:size=0.25+proximal"
    assert isinstance(methods.build(spec, participants=3), Method)
    assert methods.find("mine/own.py:fed_median+proximal", "mine/own.py:fed_median:size") == found
    assert methods.asks("mine/own.py:fed_median", "participants")
