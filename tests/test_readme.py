"""What the README shows runs as it stands there."""

import contextlib
import io
import re
import sys
from pathlib import Path

import fedlora_jax.methods
from experiments.__main__ import main

README = (Path(__file__).parents[1] / "README.md").read_text()


def block(heading: str) -> str:
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]


def test_the_examples_run_one_after_the_other():
    first, second = block("The library in 25 lines"), block("Learn through rounds")
    assert sum(bool(line.strip()) for line in first.splitlines()) <= 25
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(first + second, "README.md", "exec"), {})
    lines = printed.getvalue().splitlines()
    assert lines[0].startswith("loss")
    learned = eval(lines[-1])
    assert learned["lr"] > 0.012  # it was far too small
    assert learned["lam"] != 0.1


def test_the_tutorial_method_is_one_short_file_that_works_at_once(tmp_path, monkeypatch, capsys):
    code = block("Add a method")
    assert len(code.splitlines()) < 60
    (tmp_path / "fed_median.py").write_text(code)
    monkeypatch.setattr(fedlora_jax.methods, "__path__", [*fedlora_jax.methods.__path__, str(tmp_path)])
    options = "run --method fed_median --clients 6 --holdout-clients 0 --rounds 1 --seeds 1 --partition iid --rank 2"
    monkeypatch.setattr(sys, "argv", ["experiments", *options.split(), "--out", str(tmp_path / "out")])
    main()
    output = capsys.readouterr().out
    assert "fed_median" in output
    assert (tmp_path / "out" / "report.html").exists()
    del sys.modules["fedlora_jax.methods.fed_median"]


def test_every_method_is_in_the_table():
    from experiments.engine import methods

    for name in methods.names():
        row = next(line for line in README.splitlines() if line.startswith(f"| `{name}` "))
        assert methods.about(name).arxiv in row
