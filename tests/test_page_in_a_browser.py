"""A report in a browser: nothing goes wrong, nothing is wider than a telephone, columns are sorted, methods hidden."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_report import make, write

pytestmark = [
    pytest.mark.skipif(find_spec("PyQt6") is None, reason="PyQt6-WebEngine is not there"),
    pytest.mark.usefixtures("pictures"),
]
ASK = """(() => {
const column=[...document.querySelectorAll('table.sorts')][0];
const told=()=>[...column.tBodies[0].rows].map(row=>row.className);
const boxes=[...document.querySelectorAll('#show input')],own=[...document.querySelectorAll('svg .m1,tr.m1')];
const said={wide:document.documentElement.scrollWidth,before:told(),boxes:boxes.length};
column.tHead.querySelectorAll('button')[1].click();said.down=told();column.tHead.querySelectorAll('button')[1].click();
said.up=told();boxes[1].click();said.hidden=own.length>0&&own.every(one=>one.style.display==='none');boxes[1].click();
said.shown=own.every(one=>one.style.display==='');return said})()"""


def browse(path, width):
    browser = [sys.executable, str(Path(__file__).with_name("browser.py")), str(path), str(width), ASK]
    ran = subprocess.run(browser, capture_output=True, text=True, timeout=120)
    if ran.returncode == 77:
        pytest.skip(ran.stderr)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_a_page_works_as_it_is(tmp_path):
    summary, rows, holdings = make(names=("FedIT", "FLoRA", "HyperLoRA (a name of many words)"))
    write(tmp_path, summary, rows, holdings)
    means = [entry["global_accuracy"]["last5"]["mean"] for entry in summary["methods"].values()]
    ranked = [f"m{i}" for i in sorted(range(3), key=lambda i: -means[i])]
    for width in (360, 1200):
        told = browse(tmp_path / "report.html", width)
        said = told["found"]
        assert told["console"] == []
        assert told["printed"] > 10_000  # bytes: a sheet with something on it
        assert said["wide"] <= width
        assert said["before"] == ["m0", "m1", "m2"]
        assert (said["boxes"], said["hidden"], said["shown"]) == (3, True, True)
        assert (said["down"], said["up"]) == (ranked, ranked[::-1])
