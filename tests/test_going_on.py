"""A finished run goes on with more rounds, methods and seeds, to the bytes of a run that asked for all at first."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import users_programs
from input_helpers import PLAIN
from test_bad_input import change

from experiments.cli import parse
from experiments.commands import compare
from experiments.config import Config
from experiments.engine.trial import Failed
from experiments.results import tracking
from experiments.results.checkpoints import Checkpoints
from experiments.results.finished import load
from experiments.results.folder import file_name
from fedlora_jax import accountant
from fedlora_jax.clients import Sampling

SMALL = "--clients 3 --holdout-clients 1 --partition iid --minimum 4 --local-steps 5 --batch 8 --rank 2".split()
SMALL += ["--checkpoint-every", "2"]
AGAIN = "from fedlora_jax import fedit\n\n\ndef again():\n    return fedit()\n"  # a second method, compiled already
VANISHING = {"bias", "correction"}  # norms of differences that cancel: rounding is its square root there
TIMES = {"date", "seconds_per_round", "compile_seconds"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.npz"
    change()(path)
    return [*SMALL, "--data", str(path)]


@pytest.fixture(scope="module")
def again(tmp_path_factory):
    path = tmp_path_factory.mktemp("methods") / "mine.py"
    path.write_text(AGAIN)
    return f"{path}:again"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(compare.report, "write", lambda *_: "")


def plan(out, *options: str) -> compare.Plan:
    command, config = parse(["compare", *options, "--out", str(out)])
    assert isinstance(config, Config)
    return compare.Plan(command, config)


def run(out, *options: str) -> tuple[bytes, dict]:
    plan(out, *options).execute()
    return (out / "metrics.jsonl").read_bytes(), json.loads((out / "summary.json").read_text())


def without_times(x):
    if isinstance(x, dict):
        return {key: without_times(value) for key, value in x.items() if key not in TIMES}
    return x


def assert_as_if_at_first(out, whole) -> None:
    assert (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    one, two = (without_times(json.loads((path / "summary.json").read_text())) for path in (out, whole))
    assert one == two
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


def assert_told_once(out) -> None:
    """A tracker has every number of every row, and none twice."""
    with (out / tracking.FOLDER / "csv" / tracking.CSV).open(newline="") as file:
        lines = [(tuple(line[:5]), float(line[5])) for line in list(csv.reader(file))[1:]]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    name = lambda row: (row["method"], str(row["seed"]), str(row["round"]))
    expected = {(*name(row), x.name, x.of): x.value for row in rows for x in tracking.values(row)}
    assert len(lines) == len(dict(lines))
    assert dict(lines).items() >= expected.items()  # rows that were the last once were told of with more


@pytest.fixture
def as_a_user():
    """One seed alone, another that joins it and both at once are the same bytes in a user's programs."""
    with users_programs():
        yield


@pytest.fixture(scope="module")
def whole(small, again, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch, users_programs():
        monkeypatch.setattr(compare.report, "write", lambda *_: "")
        run(out, *small, *PLAIN, "--methods", f"fedit,{again}", "--rounds", "7", "--seeds", "2")
    return out


@pytest.mark.long
@pytest.mark.usefixtures("as_a_user")
def test_more_rounds_a_method_and_seeds_at_once(small, again, whole, tmp_path):
    """Which holds what each of them alone would: the last five rounds of two are not those of seven."""
    run(tmp_path, *small, *PLAIN, "--methods", "fedit", "--rounds", "2", "--seeds", "1", "--track", "csv")
    run(tmp_path, "--resume", "--rounds", "7", "--methods", f"fedit,{again}", "--seeds", "0,1", "--track", "csv")
    assert_as_if_at_first(tmp_path, whole)
    assert_told_once(tmp_path)


@pytest.mark.long
def test_a_finished_run_keeps_its_timings_and_trains_nothing(whole, monkeypatch):
    monkeypatch.setattr(compare.Trial, "compile", lambda self: pytest.fail("something is compiled"))
    rows, before = (whole / "metrics.jsonl").read_bytes(), json.loads((whole / "summary.json").read_text())
    again, now = run(whole, "--resume", "--track", "csv")
    assert again == rows
    assert_told_once(whole)
    assert now | {"date": before["date"]} == before  # at midnight it is another
    assert before["methods"]["fedit"]["seconds_per_round"] > 0


@pytest.mark.long
@pytest.mark.usefixtures("as_a_user")
def test_what_is_damaged_is_said_and_computed_again(again, whole, tmp_path, capsys):
    """A flipped byte in the newest checkpoint: from the one before. In an early row, or in both checkpoints: anew."""
    theirs = Path("checkpoints", file_name(again))
    for damage, said in (
        (lambda out: flip(largest(out / "checkpoints/fedit/0-2/7")), "note: fedit goes on after round 6: "),
        (lambda out: flip(out / "metrics.jsonl"), "note: fedit begins anew: rows after round 0 are damaged"),
        (lambda out: shutil.rmtree(out / theirs), f"note: {again} begins anew: its checkpoints"),
    ):
        out = tmp_path / "out"
        shutil.copytree(whole, out)
        damage(out)
        capsys.readouterr()
        run(out, "--resume")
        notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
        assert len(notes) == 1
        assert notes[0].startswith(said), notes
        assert_as_if_at_first(out, whole)
        shutil.rmtree(out)


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path, at: int = 100) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.long
def test_a_method_without_a_result_is_named_and_the_others_go_on(small, tmp_path, capsys):
    """Its step is beyond float32 from the second round on; with ``--resume`` it is tried again. Where there is no other
    method the run ends with its line."""
    late = "fedit+fedavgm:lr=1e38"
    names, out = ("--methods", f"{late},fedit", "--rounds", "4", "--seeds", "2"), tmp_path / "both"
    for _ in range(2):
        rows, summary = run(out, *small, *names, *["--resume"] * out.exists())
        assert list(summary["methods"]) == ["fedit"]
        assert re.match(re.escape(f"{late}, 2 seeds of 2 (0, 1): ") + ".* by round [12]; try", summary["failed"][late])
        said = capsys.readouterr()
        assert f"note: {summary['failed'][late]}; the other methods go on\n" in said.err
        assert f"\nno result: {summary['failed'][late]}\n" in said.out
    own = [line for line in rows.splitlines() if json.loads(line)["method"] == "fedit"]
    alone, _ = run(tmp_path / "alone", *small, "--methods", "fedit", "--rounds", "4", "--seeds", "2")
    assert own == alone.splitlines()
    assert {row["method"] for row in load(out).rows} == {"fedit"}
    with pytest.raises(Failed, match=re.escape(late)):
        run(tmp_path / "late", *small, "--methods", late, "--rounds", "4", "--seeds", "2")


@pytest.mark.long
def test_nothing_is_cut_before_it_is_known_from_where_a_run_goes_on(whole, tmp_path, monkeypatch):
    """The fault may be in what reads: rows and checkpoints are as they were when it fails."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    flip(largest(out / "checkpoints/fedit/0-2/7"))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare.Trial, "compile", lambda self: None)
    monkeypatch.setattr(compare.Plan, "_refuse_what_does_not_fit", lambda *_: None)
    monkeypatch.setattr(Checkpoints, "restore", killed)
    with pytest.raises(KeyboardInterrupt):
        run(out, "--resume")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.long
def test_what_decides_speed_alone_may_change_and_numbers_agree_to_rounding(small, tmp_path):
    """Clients in other chunks, seeds one by one, frozen blocks anew in each step: from half-way on.

    A ViT has such blocks. HiLoRA has a trial for newcomers and a memory on every client.
    """
    names = "hilora:root=0.5:cluster=0.0"
    common = [*small, "--methods", names, *"--rounds 2 --seeds 2 --checkpoint-every 1 --adapt-last 2".split()]
    fast, slow = (
        "--chunk 3 --seeds-at-once 2 --prefix stored",
        "--chunk 1 --seeds-at-once 1 --prefix anew --blocks unrolled",
    )
    rows, one = run(tmp_path / "one", *common, *fast.split())
    shutil.copytree(tmp_path / "one", tmp_path / "half")
    for newest in (tmp_path / "half" / "checkpoints").glob("*/0-2/2"):
        shutil.rmtree(newest)
    half, goes_on = run(tmp_path / "half", "--resume", *slow.split())
    assert goes_on["speed"] != one["speed"]
    assert goes_on["config"] == one["config"]
    assert half.splitlines()[:2] == rows.splitlines()[:2]
    assert half != rows, "they are other programs"
    for a, b in zip(*(map(json.loads, found.splitlines()) for found in (half, rows)), strict=True):
        assert a.keys() == b.keys()
        # bias_share is bias over update, both of which are looked at; where the update is small it is all rounding
        for name in a.keys() - {"method", "sum", "client_positions", "bias_share"}:
            close = 2e-3 if name in VANISHING else 1e-5
            np.testing.assert_allclose(flat(a[name]), flat(b[name]), rtol=0, atol=close, err_msg=name)


def flat(x) -> np.ndarray:
    return np.array([*x.values()] if isinstance(x, dict) else x, float)


@pytest.fixture
def untraced(monkeypatch):
    monkeypatch.setattr(compare, "Trial", lambda *_: None)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--rounds 6", "rounds was 7, is 6 (it may only have more"),
        ("--methods AGAIN,fedit", "methods was"),
        ("--methods fedit", "methods was"),
        ("--seeds 1,0", "seeds was"),
        ("--seeds 1,2", "seeds was"),
        ("--lr 0.2", "lr was 0.1, is 0.2"),
    ],
)
def test_what_there_is_cannot_be_less_or_other(options, said, small, again, tmp_path):
    about = plan(tmp_path, *small, "--methods", f"fedit,{again}", "--rounds", "7", "--seeds", "2").about
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=re.escape(said)):
        plan(tmp_path, "--resume", *options.replace("AGAIN", again).split())


@pytest.mark.usefixtures("untraced")
def test_stages_that_are_shares_of_the_rounds_are_not_those_of_more_rounds(small, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(plan(tmp_path, *small, "--methods", "fedit,hilora").about))
    with pytest.raises(ValueError, match="hilora divides its rounds into stages"):
        plan(tmp_path, "--resume", "--rounds", "20")


@pytest.mark.usefixtures("untraced")
def test_noise_that_is_given_goes_on_for_more_rounds_and_seeds_and_noise_for_an_epsilon_does_not(
    small, tmp_path, monkeypatch
):
    """Where it is solved for, rounds are spent, and of seeds the smallest client that trains decides."""
    pytest.importorskip("dp_accounting")
    dealt = ("--partition", "dirichlet:0.5", "--minimum", "1", "--holdout-clients", "5")
    first = plan(tmp_path, *small, *dealt, "--seeds", "2", "--methods", "fedit")
    sizes = np.asarray(first.problem.clients.population.sizes)
    assert first.problem.fewest == tuple(sizes[:, :3].min(1)) > (sizes[:, 3:].min(),) * 2
    about = first.about | {"config": first.about["config"] | {"seeds": [0]}}

    def go_on(methods, sizes, *more):
        """From the first seed, where the smallest clients that train have so many images."""
        about["config"]["methods"] = methods.split(",")
        (tmp_path / "config.json").write_text(json.dumps(about))
        monkeypatch.setattr(compare.prelude, "built", lambda *_, **__: first.problem._replace(fewest=sizes))
        return plan(tmp_path, "--resume", *more).config.methods

    go_on("fedit+dp:noise=2.0,fedit+dp_sgd:noise=2.0", (16, 3), "--seeds", "2", "--rounds", "20")
    assert go_on("fedit+dp_sgd:epsilon=8.0", (16, 15), "--seeds", "2") == ("fedit+dp_sgd:epsilon=8.0",)
    for given in ("dp:epsilon=8.0", "dp_sgd:epsilon=8.0"):
        with pytest.raises(ValueError, match="spends its epsilon over its rounds"):
            go_on(f"fedit+{given}", (16, 16), "--rounds", "20")
    with pytest.raises(ValueError, match=r"noise for clients of 16 training images, .* the smallest has 3:"):
        go_on("fedit+dp_sgd:epsilon=8.0", (16, 3), "--seeds", "2")


@pytest.mark.long
def test_accounts_of_noise_that_is_given_go_on_to_more_rounds(small, tmp_path):
    """Both accounts, a bound that follows norms, and noise: the same bytes as if all rounds had been planned."""
    pytest.importorskip("dp_accounting")
    options = (*small, *PLAIN, "--local-steps", "1", "--seeds", "1")
    options += ("--clients-per-round", "2", "--sampling", "poisson", "--dropouts", "0.2")
    options += ("--methods", "fedit+dp_sgd:noise=2.0+dp:noise=2.0:delta=0.01:quantile=0.5")
    run(tmp_path / "on", *options, "--rounds", "2")
    run(tmp_path / "on", "--resume", "--rounds", "4")
    rows, summary = run(tmp_path / "whole", *options, "--rounds", "4")
    assert_as_if_at_first(tmp_path / "on", tmp_path / "whole")
    rows = [json.loads(line) for line in rows.splitlines()]
    for key in ("epsilon", "example_epsilon"):
        assert (np.diff([row[key] for row in rows]) > 0).all()
    account = accountant.epsilons(rows[0]["noise_multiplier"], Sampling(3, 3, 2 / 3), 4, 0.01)
    np.testing.assert_allclose([row["epsilon"] for row in rows], account[1:], rtol=1e-5)
    assert len({row["clipping"] for row in rows}) > 1
    (entry,) = summary["methods"].values()
    assert entry["privacy"]["epsilon"] == rows[-1]["epsilon"]


@pytest.mark.usefixtures("untraced")
def test_an_option_that_is_newer_than_a_run_is_as_by_default_there(small, tmp_path):
    about = plan(tmp_path, *small, "--methods", "fedit").about
    del about["config"]["clip_norm"]
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert plan(tmp_path, "--resume").config.clip_norm is None
    with pytest.raises(ValueError, match=r"clip_norm was null, is 1\.0"):
        plan(tmp_path, "--resume", "--clip-norm", "1")


@pytest.mark.usefixtures("untraced")
def test_rates_that_go_down_to_the_last_round_are_not_those_of_more_rounds(small, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(plan(tmp_path, *small, "--schedule", "cosine").about))
    with pytest.raises(ValueError, match="--schedule cosine knows the last round"):
        plan(tmp_path, "--resume", "--rounds", "20")


@pytest.mark.long
@pytest.mark.usefixtures("untraced")
def test_seeds_that_would_change_the_draws_of_others_are_refused(small, tmp_path):
    """Batches are permutations of lists as long as the largest client of any seed, so that a larger one changes all."""
    split = ("--partition", "dirichlet:1.0", "--methods", "fedit")
    about = plan(tmp_path, *small, *split, "--seeds", "1").about
    (tmp_path / "config.json").write_text(json.dumps(about))
    size = lambda seed: plan(tmp_path / "x", *small, *split, "--seeds", f"{seed},").problem.record["largest"]
    larger = next(seed for seed in range(1, 20) if size(seed) > about["record"]["largest"])
    with pytest.raises(ValueError, match="the largest client has"):
        plan(tmp_path, "--resume", "--seeds", f"0,{larger}")
