"""Bad inputs by the hundred, made of every option and of every array of a file: each ends with one line and code 2.

Nothing is compiled, nothing written, nothing of a file's content executed, and no terminal is told anything but text.
One in seven is tried, always the same, and of the largest section one in 13;
``EVERY=1 python -m pytest tests/test_bad_input_by_the_hundred.py`` tries all.
"""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hostile_helpers import (
    HOSTILE,
    OBJECTS,
    RUNS,
    SAFETENSORS,
    STRUCTURES,
    TEXTS,
    Case,
    fault,
    of_arrays,
    of_options,
    with_one,
)
from input_helpers import SMALL, change, good_arrays
from PIL import Image
from test_archive import BAD as ARCHIVES
from test_starting_from_an_adapter import made_by_peft
from weight_helpers import FACTS, timm_arrays, write

from experiments.bench import options as bench
from experiments.config import Config
from experiments.options import RESULTS, SPEED
from experiments.parsers import LEFT_OUT
from experiments.requests import Data, Export, Models

COUNTED: dict[str, int] = {}
EVERY = int(os.environ.get("EVERY", "7"))
FEW, MANY = 40, 1500  # cases of a section that are always tried; and beyond which they are tried half as often
ON_DATA = ["--data", "data.npz", "--partition", "iid", "--out", "out"]
TRAINS = [*SMALL, *ON_DATA]
RUN = ["run", "--method", "fedit", *TRAINS]


def of_config(name: str) -> list[str]:
    """A command that has the option."""
    needs = {
        "resize": ["--image-size", "16", "--data", "images"],
        "resample": ["--image-size", "16", "--data", "images"],
        "local_cap": ["--local-epochs", "1", "--local-steps", "default"],
        "coordinator": ["--hosts", "2", "--process-id", "0"],
        "momentum": ["--optimizer", "momentum"],
    }
    if name not in LEFT_OUT["compare"]:
        return [*(RUN if name != "methods" else ["compare", *TRAINS]), *needs.get(name, ())]
    command = next(own for own in ("sweep", "budget", "meta") if name not in LEFT_OUT[own])
    steps = [] if command == "budget" else ["--local-steps", "1"]
    method = ["--method" if command == "meta" else "--methods", "hyperlora"]
    return [command, *method, *SMALL[:-2], *steps, *ON_DATA, "--holdout-clients", "1"]


# Of options that may be almost any text those that none of them is.
EMPTY = ("", " ")
FREE = {"out": EMPTY, "prompts": EMPTY, "context": EMPTY, "class_names": (), "python": ()}


def options(place):
    yield from of_options(Config, of_config, FREE)


def options_of_other_commands(place):
    data = lambda name: ["data", "data.npz", *([] if name == "partition" else ["--partition", "iid"])]
    yield from of_options(Data, data, {"source": ()})
    yield from of_options(Models, lambda name: ["models"], {"file": (), "targets": ()})
    yield from of_options(Export, lambda name: ["export", "nowhere"], {"run": (), **FREE})
    yield from of_options(bench.Options, lambda _: ["bench", "round"], FREE, {"repeats", "chunk", "devices"})
    yield from of_options(bench.Options, lambda _: ["bench", "compile"], FREE, {"methods"})
    for text in TEXTS:
        for command in ("recipes", "export", "compare-runs", "data", "models"):
            yield Case(f"{command} {text[:40]!r}", [command, "--", text])


def data_files(place):
    fine = {("split", "missing"), ("superclass", "missing"), ("classes", "one more")}
    arrays = good_arrays() | {"superclass": np.array([0, 0, 1])}
    for i, (what, bad) in enumerate(of_arrays(arrays, lambda *case: case in fine)):
        np.savez(f"{i}.npz", **bad)
        yield Case(what, ["data", f"{i}.npz"])


def archives(place):
    """What is wrong with a ``.npz``, whoever reads it."""
    readers = {
        "data": lambda path: ["data", path],
        "weights": lambda path: ["models", path],
        "theta": lambda path: [*RUN, "--method", "hyperlora", "--theta", path],
        "partition": lambda path: [*RUN, "--partition", f"file:{path}"],
    }
    for i, (what, (make, _)) in enumerate(ARCHIVES.items()):
        make(Path(f"{i}.npz"))
        for reader, arguments in readers.items():
            yield Case(f"{reader}: {what}", arguments(f"{i}.npz"))


def weight_files(place):
    names = [name for name in timm_arrays() if not name.startswith("blocks.1")]
    arrays = timm_arrays()
    for i, (what, bad) in enumerate(of_arrays(arrays, lambda name, what: name not in names)):
        np.savez(f"{i}.npz", **bad, meta=json.dumps(FACTS))
        yield Case(what, ["models", f"{i}.npz"])
    for i, (what, bad) in enumerate(with_one(FACTS, OBJECTS, lambda name, value: value == "")):  # which says nothing
        write(Path(f"facts{i}.npz"), arrays, bad)
        yield Case(what, ["models", f"facts{i}.npz"])


def tensors(place):
    """What is wrong with a ``.safetensors``, of weights and of an adapter."""
    for i, (what, content) in enumerate(SAFETENSORS.items()):
        Path(f"{i}.safetensors").write_bytes(content)
        made_by_peft(Path(f"adapter{i}"))
        Path(f"adapter{i}/adapter_model.safetensors").write_bytes(content)
        yield Case(f"weights: {what}", ["models", f"{i}.safetensors"])
        yield Case(f"adapter: {what}", [*RUN, "--adapter", f"adapter{i}"])


def adapters(place):
    config = json.loads((made_by_peft(place / "adapter") / "adapter_config.json").read_text())
    idle = {"base_model_name_or_path", "task_type", "modules_to_save"}  # which decide nothing
    for i, (what, bad) in enumerate(with_one(config, OBJECTS, lambda name, value: name in idle)):
        made_by_peft(Path(f"a{i}"), rank_pattern={})
        Path(f"a{i}/adapter_config.json").write_text(json.dumps(bad))
        yield Case(what, [*RUN, "--adapter", f"a{i}"])


def partitions(place):
    train = int((good_arrays()["split"] == 0).sum())
    arrays = {"client": np.arange(train) % 4, "test_client": np.arange(96 - train) % 4, "images": np.array("0123")}
    fine = {("test_client", "missing"), ("images", "missing")}
    for i, (what, bad) in enumerate(of_arrays(arrays, lambda *case: case in fine)):
        np.savez(f"{i}.npz", **bad)
        yield Case(what, [*RUN, "--partition", f"file:{i}.npz"])


def thetas(place):
    for i, (what, bad) in enumerate(of_arrays({".generator": np.zeros((3, 2), np.float32)}, lambda *case: False)):
        np.savez(f"{i}.npz", **bad)
        yield Case(what, [*RUN, "--method", "hyperlora", "--theta", f"{i}.npz"])


def option_files(place):
    """Every option in TOML, and in the ``config.json`` of a run: what no option is."""
    tables = {"a table": "{a = 1}", "a list of lists": "[[1]]", "a date": "1979-05-27", "a list of tables": "[{}]"}
    tables |= {"a number without end": "1" + "0" * 400, "a text": json.dumps(HOSTILE + RUNS)}
    for field in dataclasses.fields(Config):
        if field.name in LEFT_OUT["compare"]:  # and so by this command
            continue
        for what, text in tables.items():
            if what == "a text" and "str" in field.type:
                continue
            path = f"{field.name} {what}.toml"
            Path(path).write_text(f"{field.name} = {text}")
            yield Case(path, ["compare", "--config", path])
    config = Config(methods=("fedit",), rounds=2)
    own, speed = config.deciding(RESULTS), config.deciding(SPEED)
    begun = json.loads(json.dumps({"command": "compare", "config": own, "speed": speed, "record": {}}))
    for i, (what, bad) in enumerate(with_one(begun["config"], STRUCTURES, lambda name, _: name in LEFT_OUT["compare"])):
        Path(f"run{i}").mkdir()
        Path(f"run{i}/config.json").write_text(json.dumps({**begun, "config": bad}))
        yield Case(f"export: {what}", ["export", f"run{i}"])
        yield Case(f"resume: {what}", ["compare", "--out", f"run{i}", "--resume"])
        yield Case(f"--config: {what}", ["compare", "--config", f"run{i}/config.json"])


def images(place):
    """Files that are no images, among some that are."""
    whole = Path("whole.png")
    Image.new("RGB", (8, 8), 7).save(whole)
    png = whole.read_bytes()
    bad = {
        "empty": b"",
        "text": RUNS.encode(),
        "cut": png[:40],
        "a bomb": png[:16] + (2**30).to_bytes(4, "big") * 2 + png[24:],
        "without data": png[:33],
        "a drawing": b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        "nothing wide": png[:16] + bytes(8) + png[24:],
    }
    for i, (what, content) in enumerate(bad.items()):
        for name in "ab":
            Path(f"images{i}/{name}").mkdir(parents=True)
            Path(f"images{i}/{name}/1.png").write_bytes(png)
        Path(f"images{i}/a/\x1b[31m<script>.png").write_bytes(content)
        yield Case(what, ["data", f"images{i}"])


SECTIONS = {
    make.__name__: make
    for make in (
        options,
        options_of_other_commands,
        data_files,
        archives,
        weight_files,
        tensors,
        adapters,
        partitions,
        thetas,
        option_files,
        images,
    )
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where everything lies, and a home that nobody writes to."""
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    change()(tmp_path / "data.npz")
    for name in "ab":
        for i in range(2):
            (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), 7).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path


@pytest.mark.timeout(300 if EVERY > 1 else 3000)  # all cases of `options` take four minutes on two busy cores
@pytest.mark.parametrize("section", SECTIONS)
def test_bad_input_is_refused(section, place, compilations):
    cases = list(SECTIONS[section](place))
    stride = 1 if len(cases) <= FEW else EVERY if len(cases) <= MANY else 2 * EVERY - 1
    cases = cases[::stride]
    wrong = {case.label: fault(case, place, compilations, section != "images") for case in cases}
    COUNTED[section] = len(cases)
    assert not {label: why for label, why in wrong.items() if why}


def test_they_are_five_hundred_and_more():
    if COUNTED.keys() >= set(SECTIONS):  # not where one of them runs alone
        assert sum(COUNTED.values()) >= 500, COUNTED
