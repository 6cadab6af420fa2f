"""Trackers are told of every number of a run once, however often it goes on; what fails ends nothing."""

import csv
import importlib.util
import json
import struct

import pytest

from experiments.groups.training import TRACKERS
from experiments.results import finished, tracking
from experiments.results.folder import file_name

CONFIG = {"methods": ["fedit", "fedit+proximal:mu=0.1"], "seeds": [3, 4], "rounds": 2, "rank": [4, 8]}
theirs = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::UserWarning")


def needs(*modules):
    lacks = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(lacks), reason=f"{', '.join(lacks)} not installed")


def row(method, seed, round):
    n = 10 * round + seed + (method != "fedit") / 3
    own = {"method": method, "seed": seed, "round": round, "clients": [0, 2], "loss": 1 / n, "dropped": 0}
    own |= {"bytes_up": 100 * round, "global_accuracy": n / 100, "gap": None, "per_domain": {"a b/ü": n, "c": None}}
    if round == CONFIG["rounds"]:
        own |= {"client_accuracies": [0.5, None, 0.25], "client_numbers": [7, 8, 9]}
    return own


ROWS = [row(m, s, r) for m in CONFIG["methods"] for r in (1, 2) for s in CONFIG["seeds"]]


def scalars(method, seed):
    """What trackers of scalars should have been told, by name: [(round, number)]."""
    found = {}
    for own in ROWS:
        if (own["method"], own["seed"]) == (method, seed):
            for name in ("loss", "dropped", "bytes_up", "global_accuracy"):
                found.setdefault(name, []).append((own["round"], own[name]))
            found.setdefault("per_domain/a b/_", []).append((own["round"], own["per_domain"]["a b/ü"]))
    return found


def told(name, folder, *steps):
    """One process after another, each beginning with the rows that the one before left."""
    for before, new in steps:
        with tracking.following([name], folder, CONFIG, ROWS[:before]) as tell:
            for i in range(before, new):
                tell(ROWS[i : i + 1])
    return folder / tracking.FOLDER / name


STOPS = ((0, 3), (2, 6), (8, 8))  # cut back to two rows, then to what it wrote itself and more, then finished


@pytest.mark.parametrize("steps", [((0, 8),), STOPS, ((8, 8), (8, 8))], ids=["at once", "going on", "asked for late"])
def test_a_file_has_every_number_once(tmp_path, steps):
    with (told("csv", tmp_path, *steps) / tracking.CSV).open(newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0] == ["method", "seed", "round", "measure", "of", "value"]
    expected = []
    for own in ROWS:
        name = [own["method"], str(own["seed"]), str(own["round"])]
        expected += [[*name, key, "", repr(own[key])] for key in ("loss", "dropped", "bytes_up", "global_accuracy")]
        expected += [[*name, "per_domain", "a b/ü", repr(own["per_domain"]["a b/ü"])]]
        if "client_accuracies" in own:
            expected += [[*name, "client_accuracy", "7", "0.5"], [*name, "client_accuracy", "9", "0.25"]]
    assert lines[1:] == expected


def test_lines_that_a_kill_cut_short_do_not_spoil_others(tmp_path):
    folder = told("csv", tmp_path, (0, 2))
    for name in (tracking.TOLD, tracking.CSV):
        (folder / name).write_bytes((folder / name).read_bytes()[:-3])
    told("csv", tmp_path, (2, 8))
    lines = (folder / tracking.CSV).read_text().splitlines()
    assert sum(line.startswith("fedit,4,2,loss") for line in lines) == 1
    assert [json.loads(line) for line in (folder / tracking.TOLD).read_text().splitlines()[-1:]] == [
        [ROWS[7][key] for key in tracking.IDENTITY]
    ]


def test_what_fails_is_said_once_and_others_go_on(tmp_path, monkeypatch, capsys):
    def breaks(place):
        raise RuntimeError("no\nserver")

    monkeypatch.setitem(tracking.OPEN, "wandb", (breaks, ()))
    with tracking.following(["wandb", "csv"], tmp_path, CONFIG, ROWS[:1]) as tell:
        tell(ROWS[1:])
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "note: --track wandb ends here (no server); metrics.jsonl has all rows"
    assert "fedit+proximal:mu=0.1,4,2,loss" in (tmp_path / tracking.FOLDER / "csv" / tracking.CSV).read_text()


def test_what_is_not_installed_is_named(monkeypatch):
    assert set(TRACKERS) == set(tracking.OPEN)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tracking.check(["csv"])
    with pytest.raises(ValueError, match=r"--track mlflow needs mlflow, sqlalchemy, alembic: pip install 'fedlora-jax"):
        tracking.check(["csv", "mlflow"])


@needs("tensorboardX")
@theirs
def test_tensorboard_has_every_scalar_once(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    folder, found = told("tensorboard", tmp_path, *STOPS), {}
    for path in sorted((folder / file_name("fedit+proximal:mu=0.1") / "seed4").iterdir()):
        content = path.read_bytes()
        while content:  # length, its checksum, the event, its checksum
            (size,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    expected = scalars("fedit+proximal:mu=0.1", 4)
    assert {name.replace("_", " ") for name in found} == {name.replace("_", " ") for name in expected}
    assert sorted(found["global_accuracy"]) == [(r, pytest.approx(x)) for r, x in expected["global_accuracy"]]


@needs("wandb")
@theirs
def test_wandb_has_every_scalar_once_offline(tmp_path, monkeypatch):
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    folder, found = told("wandb", tmp_path, *STOPS), {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        content = path.read_bytes()[7:]  # after the file's own header
        name = None
        while content:  # checksum, length, kind; a short file is one block
            size = struct.unpack("<H", content[4:6])[0]
            record = Record.FromString(content[7 : 7 + size])
            content = content[7 + size :]
            name = record.run.display_name or name
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            for key, value in items.items():
                if not key.startswith("_"):
                    found.setdefault(name, {}).setdefault(key, []).append((int(items["_step"]), json.loads(value)))
    assert found["fedit+proximal:mu=0.1, seed 4"] == scalars("fedit+proximal:mu=0.1", 4)
    assert len(found) == 4


@needs("mlflow", "sqlalchemy", "alembic")
@theirs
def test_mlflow_has_every_scalar_once(tmp_path, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = told("mlflow", tmp_path, *STOPS)
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(tmp_path.name)
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert len(runs) == 4
    run = runs["fedit+proximal:mu=0.1, seed 4"]
    assert run.info.status == "FINISHED"
    assert run.data.params["rank"] == "[4, 8]"
    for name, expected in scalars("fedit+proximal:mu=0.1", 4).items():
        history = client.get_metric_history(run.info.run_id, name)
        assert [(m.step, m.value) for m in history] == [(r, pytest.approx(x)) for r, x in expected]


@needs("pandas", "xarray")
def test_a_finished_run_is_a_table_and_arrays():
    run = finished.Finished("run", CONFIG, {}, {}, ROWS)
    table = run.to_pandas()
    own = table[(table.method == "fedit") & (table.seed == 4) & (table["round"] == 2)]
    assert dict(zip(own.measure[own.of == ""], own.value[own.of == ""], strict=True)) == {
        key: ROWS[3][key] for key in ("loss", "dropped", "bytes_up", "global_accuracy")
    }
    arrays = run.to_xarray()
    for row in ROWS:
        at = arrays.sel({key: row[key] for key in tracking.IDENTITY})
        assert float(at["loss"]) == row["loss"]
        assert float(at["per_domain"].sel(domain="a b/ü")) == row["per_domain"]["a b/ü"]
    last = arrays["client_accuracy"].sel({"method": "fedit", "seed": 3, "round": 2})
    assert [float(last.sel(client=i)) for i in ("7", "9")] == [0.5, 0.25]
