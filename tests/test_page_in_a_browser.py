"""A report in a browser: nothing goes wrong, nothing is wider than a telephone, columns are sorted, methods hidden."""

import json
import re
import shutil
import subprocess

import pytest
from test_report import make, write

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
FOUND = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(FOUND is None, reason=f"none of {', '.join(BROWSERS)} is there"),
    pytest.mark.usefixtures("pictures"),
]
ASK = """<script>
const column=[...document.querySelectorAll('table.sorts')][0];
const told=()=>[...column.tBodies[0].rows].map(row=>row.className);
const boxes=[...document.querySelectorAll('#show input')],own=[...document.querySelectorAll('svg .m1,tr.m1')];
const said={wide:document.documentElement.scrollWidth,before:told(),boxes:boxes.length};
column.tHead.querySelectorAll('button')[1].click();said.down=told();column.tHead.querySelectorAll('button')[1].click();
said.up=told();boxes[1].click();said.hidden=own.length&&own.every(one=>one.style.display==='none');boxes[1].click();
said.shown=own.every(one=>one.style.display==='');document.body.textContent='SAID'+JSON.stringify(said)+'SAID';</script>"""


def browse(path, width, *more):
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--enable-logging=stderr"]
    return subprocess.run(
        [FOUND, *options, *more, path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )


def test_a_page_works_as_it_is(tmp_path):
    summary, rows, holdings = make(names=("FedIT", "FLoRA", "HyperLoRA (a name of many words)"))
    text = write(tmp_path, summary, rows, holdings)
    for width in (360, 1200):
        said = browse(tmp_path / "report.html", width, f"--screenshot={tmp_path / 'shot.png'}")
        assert "CONSOLE" not in said.stderr, said.stderr
    asked = tmp_path / "asked.html"  # the page's own policy runs no script but its own
    asked.write_text(re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</body>", f"{ASK}</body>"), "utf8")
    said = json.loads(browse(asked, 360, "--dump-dom").stdout.split("SAID")[1].replace("&amp;", "&"))
    assert said["wide"] <= 360
    assert said["boxes"] == 3
    assert said["before"] == ["m0", "m1", "m2"]
    means = [entry["global_accuracy"]["last5"]["mean"] for entry in summary["methods"].values()]
    ranked = [f"m{i}" for i in sorted(range(3), key=lambda i: -means[i])]
    assert said["down"] == ranked
    assert said["up"] == ranked[::-1]
    assert said["hidden"]
    assert said["shown"]
