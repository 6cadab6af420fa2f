"""What the README and the pages of docs show runs as it stands there."""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest
from input_helpers import PLAIN, change

import fedlora_jax.methods
from experiments.__main__ import main
from experiments.cli import parse
from experiments.config import Config, check
from experiments.engine import methods

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = "python -m experiments"
RUN = ["README.md", "library.md", "methods.md"]  # the pages with a block of Python, each of which runs here
READ = ["clip.md"]  # and those of which it cannot: images that a user has to have


def block(page: str, heading: str) -> str:
    section = (ROOT / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]


def test_the_readme_is_a_page_to_read():
    assert len((ROOT / "README.md").read_bytes()) < 9000


def test_links_between_pages_lead_somewhere():
    """Files, and headings in them as GitHub names them."""
    name = lambda heading: re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
    anchors = {page: {name(h) for h in re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)} for page in PAGES}
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if target.startswith("http"):
                continue
            file, _, anchor = target.partition("#")
            found = (page.parent / file).resolve() if file else page
            assert found.exists(), (page.name, target)
            assert not anchor or anchor in anchors[found], (page.name, target)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_ones_that_the_command_line_knows(page):
    """All that stand in blocks, and within sentences those that are whole: options and methods, alone and together.

    Data, weights and folders that they name are not looked at.
    """
    text = re.sub(r"\n(?!\n)", " ", re.sub(r"```(?:ba)?sh\n.*?```", "", page.read_text(), flags=re.DOTALL))
    blocks = re.findall(r"```(?:ba)?sh\n(.*?)```", page.read_text(), re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", "").splitlines() if line.startswith(COMMAND)]
    commands += [code for code in re.findall(r"`([^`]+)`", text) if code.startswith(COMMAND)]
    for command in commands:
        typed = shlex.split(command.split(" && ")[0], comments=True)[3:]
        if typed and not any("..." in word for word in typed):
            try:
                options = parse(typed)[1]
                if isinstance(options, Config):
                    check(options)
                    for name in options.methods:
                        methods.check(name)
            except (SystemExit, ValueError) as error:
                raise AssertionError(f"{page.name}: {command}: {error}") from error


def test_no_block_is_of_a_kind_that_nobody_runs():
    """Python runs below, commands are parsed above; what is neither is only looked at."""
    kinds = {page.name: re.findall(r"^```(\w*)\n.*?^```", page.read_text(), re.MULTILINE | re.DOTALL) for page in PAGES}
    assert {kind for found in kinds.values() for kind in found} <= {"", "text", "bash", "sh", "python"}
    assert sorted(name for name, found in kinds.items() for kind in found if kind == "python") == sorted(RUN + READ)


def test_what_a_beginner_plans_is_what_is_run_then():
    """The commands of the first page that need no data of one's own. What planning says: ``test_forecast``."""
    text = (ROOT / "docs/start.md").read_text()
    planned, ran = (line for line in text.splitlines() if line.startswith(f"{COMMAND} compare --methods"))
    assert planned.removesuffix(" --dry-run") == ran.removesuffix(" --out runs/first") != ran


@pytest.mark.long
def test_the_examples_run_one_after_the_other():
    first, second = block("README.md", "The library in 25 lines"), block("docs/library.md", "Learn through rounds")
    assert sum(bool(line.strip()) for line in first.splitlines()) <= 25
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(first + second, "README.md", "exec"), {})
    lines = printed.getvalue().splitlines()
    assert lines[0].startswith("loss")
    learned = eval(lines[-1])
    assert learned["lr"] > 0.012  # it was far too small
    assert learned["lam"] != 0.1


@pytest.mark.long
def test_the_tutorial_method_is_one_short_file_that_works_at_once(tmp_path, monkeypatch, capsys):
    code = block("docs/methods.md", "Add a method")
    assert len(code.splitlines()) < 60
    (tmp_path / "fed_median.py").write_text(code)
    monkeypatch.setattr(fedlora_jax.methods, "__path__", [*fedlora_jax.methods.__path__, str(tmp_path)])
    options = "run --method fed_median --clients 6 --holdout-clients 0 --rounds 1 --seeds 1 --partition iid --rank 2"
    change()(tmp_path / "data.npz")
    files = [*PLAIN, "--data", str(tmp_path / "data.npz"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["experiments", *options.split(), *files])
    main()
    output = capsys.readouterr().out
    assert "fed_median" in output
    assert (tmp_path / "out" / "report.html").exists()
    del sys.modules["fedlora_jax.methods.fed_median"]


def test_every_method_and_wrapper_is_in_its_table_as_it_says_of_itself():
    rows = dict(re.findall(r"^\| `(\w+)` (.*)$", (ROOT / "docs/methods.md").read_text(), re.MULTILINE))
    told = {name: methods.about(name) for name in methods.names()}
    said = {name: (about.name, about.paper, about.arxiv, about.trains, about.exact) for name, about in told.items()}
    said |= {name: about[:4] for name, about in methods.wrappers().items()}  # what it tells is in another table
    assert set(said) == set(rows) - {"file"}
    for name, parts in said.items():
        missing = [part for part in parts if part.replace("|", "&#124;") not in rows[name]]
        assert not missing, (name, missing)
