"""What leaves a run computes what was evaluated in it: read by the door for weights alone, in another program."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from input_helpers import PLAIN, change, refused
from peft_helpers import applied, random_adapter

from experiments.cli import parse
from experiments.commands.compare import Plan
from experiments.commands.export import Model, as_adapter, restored, served
from experiments.commands.export import Plan as Export
from experiments.commands.pool import Plan as Pool
from experiments.engine import chunking, evaluation
from experiments.setup.backbone import NANO, cut, frozen_features
from experiments.setup.local_training import make_optimizer
from fedlora_jax import lora, rounds
from fedlora_jax.lora import LoRA
from fedlora_jax.method import average_client
from models.backbone import NO_ADAPTER
from models.families import find
from models.pretrained import vit_backbone

CLIENTS, UNSEEN, ROUNDS, SEED = 4, 1, 3, 1
OPTIONS = f"--clients {CLIENTS} --holdout-clients {UNSEEN} --minimum 2 --rounds {ROUNDS} --eval-every {ROUNDS}".split()
OPTIONS += "--seeds 2 --local-steps 2 --batch 4 --data data.npz --out run".split()
QUICK = "ditto"  # a second model that each client keeps
TIERS = "hilora:root=0.3:cluster=0.3:tau=0"  # three, one a round, and a trial of newcomers; all: test_every_method


def run_of(method, folder, *more):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        change()(folder / "data.npz")
        Plan(*parse(["compare", "--methods", method, *OPTIONS, *more])).execute()
    return folder


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return run_of(QUICK, tmp_path_factory.mktemp("quick"))


def export(out, *options):
    plan = Export(parse(["export", "run", "--out", str(out), "--seed", str(SEED), *options])[1])
    plan.execute()
    return plan


def evaluated(plan, name, x):
    """Logits of the global model and of every client's on images, as the library evaluates the run's state."""
    config, problem, n = plan.config, plan.problem, plan.config.clients
    method, seed, run = restored(config, problem, name, SEED)
    chunk = chunking.choose(config, problem)[0]
    serving = evaluation.make_serving(config, problem, method, make_optimizer(config), chunk)
    score = jax.jit(rounds.make_evaluate(method, lambda base, adapter, x: problem.backbone.apply(base, adapter, x)[0]))

    def logits(cohort):
        shown = jnp.broadcast_to(x, (len(cohort.ids), *x.shape))
        return score(problem.base, run.state, cohort, shown, seed.key).before

    nobody = average_client(seed.clients.training(n).cohort(jnp.arange(n), run.memory))
    memory = jax.jit(serving.onboard)(problem.arrays(), seed, run)
    everyone = seed.clients.population.cohort(jnp.arange(n + UNSEEN), memory)
    rows = {f"client-{i}": row for i, row in enumerate(logits(everyone))}
    return {"global": logits(nobody)[0], **rows}, seed.clients


@pytest.mark.long
def test_weights_compute_what_was_evaluated(tmp_path, monkeypatch):
    """Logits are the evaluation's, and right answers as many as the run's own rows say."""
    monkeypatch.chdir(run_of(TIERS, tmp_path))
    name, out = TIERS, tmp_path / "out"
    plan = export(out, "--method", name, "--model", "all")
    (x, y), classes = plan.problem.test[:2], plan.problem.images.classes
    expected, clients = evaluated(plan, name, x)
    assert {path.stem for path in out.iterdir()} == expected.keys()
    right = {}
    for key in expected:
        path = out / f"{key}.safetensors"
        read = find(None, path)(path, classes, x.shape[1])
        assert read.facts["head"] == "kept, for these classes"
        assert "guess" not in str(read.facts)
        logits = read.apply(read.params, NO_ADAPTER, x)[0]
        np.testing.assert_allclose(logits, expected[key], atol=2e-5)
        right[key] = np.asarray(logits.argmax(-1) == y)
    frozen = plan.problem.backbone.apply(plan.problem.base, NO_ADAPTER, x)[0]
    assert np.abs(expected["global"] - frozen).max() > 1e-3
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    (last,) = (row for row in rows if (row["method"], row["seed"], row["round"]) == (name, SEED, ROUNDS))
    assert right["global"].mean() == pytest.approx(last["pooled_accuracy"])
    own = [right[f"client-{i}"][clients.test_rows[i, : clients.test_counts[i]]].mean() for i in range(CLIENTS + UNSEEN)]
    assert own[:CLIENTS] == pytest.approx(last["client_accuracies"])
    assert own[CLIENTS] == pytest.approx(last["unseen_accuracy"])


@pytest.mark.parametrize(("to", "last"), [("merged", None), ("peft", None), ("npz", 2)])
def test_a_head_that_no_layout_holds_does_not_leave_unsaid(to, last, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(quick / "run", "run")
    said = json.loads(Path("run/config.json").read_text())
    said["config"] |= {"head": "cosine", "adapt_last": last}
    Path("run/config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=f"--to {to}: no published layout has a head of cosines"):
        export(tmp_path / "out", "--method", "ditto", "--to", to)
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_an_adapter_is_its_arrays(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(quick)
    plan = export(tmp_path / "out", "--method", "ditto", "--model", "client:2", "--to", "npz")
    with np.load(tmp_path / "out" / "client-2.npz") as file:
        arrays = dict(file)
    meta = json.loads(arrays.pop("meta").item())
    assert meta["weights_hash"] == plan.problem.record["weights_hash"]
    factors = {name: (arrays.pop(f"{name}/a"), arrays.pop(f"{name}/b")) for name in meta["scale"]}
    assert arrays.keys() == {"head/kernel", "head/bias"}
    assert {name: a.shape[-1] for name, (a, _) in factors.items()} == meta["rank"]
    low_rank = {name: LoRA(jnp.asarray(a), jnp.asarray(b), meta["scale"][name]) for name, (a, b) in factors.items()}
    x = plan.problem.test[0]
    logits = plan.problem.backbone.apply(plan.problem.base, lora.unflatten({**arrays, **low_rank}), x)[0]
    np.testing.assert_allclose(logits, evaluated(plan, "ditto", x)[0]["client-2"], atol=1e-5)


@pytest.mark.long
def test_a_folder_of_peft_computes_what_was_evaluated(quick, tmp_path, monkeypatch, capsys):
    """Put onto the published arrays, in their own layout."""
    monkeypatch.chdir(quick)
    plan = export(tmp_path / "out", "--method", "ditto", "--model", "client:2", "--to", "peft")
    name = "client-2"
    held, x = tmp_path / "out" / name, plan.problem.test[0]
    assert "for timm.create_model(MODEL, pretrained=True, num_classes=3)" in capsys.readouterr().out
    assert {path.name for path in held.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    with np.load(NANO) as file:
        arrays = {name: file[name] for name in file if name not in ("meta", "head.weight", "head.bias")}
        new = {"head.weight": np.zeros((3, 64)), "head.bias": np.zeros(3)}
        merged = {name: np.float32(y) for name, y in applied(arrays | new, held).items()}
        np.savez(tmp_path / "merged.npz", meta=file["meta"], **merged)
    path = tmp_path / "merged.npz"
    read = find(None, path)(path, 3, keep_head=True)
    logits = read.apply(read.params, NO_ADAPTER, x)[0]
    np.testing.assert_allclose(logits, evaluated(plan, "ditto", x)[0][name], atol=2e-5)


@pytest.mark.parametrize("trained", [True, False], ids=["and an adapter", "alone"])
def test_another_base_is_an_adapter_where_it_differs_by_a_low_rank(trained):
    """In one layer an update of rank 5, in two blocks; together with what the adapter has, exactly."""
    rng = np.random.default_rng(0)
    base = {"blocks": {"fc": {"kernel": rng.normal(size=(2, 24, 32)).astype(np.float32)}}}
    adapter = random_adapter(base, "fc", full=()) if trained else {}
    update = np.matmul(rng.normal(size=(2, 24, 5)), rng.normal(size=(2, 5, 32)))
    sent = {"blocks": {"fc": {"kernel": np.float32(base["blocks"]["fc"]["kernel"] + update)}}}
    found, beyond = as_adapter(base, Model("global", sent, adapter))
    assert not beyond
    assert lora.max_rank(found) == 5 + 3 * trained
    now, then = (lora.merge(*pair)["blocks"]["fc"]["kernel"] for pair in ((base, found), (sent, adapter)))
    np.testing.assert_allclose(now, then, atol=2e-6)
    dense = {
        "blocks": {"fc": {"kernel": sent["blocks"]["fc"]["kernel"] + np.float32(1e-5 * rng.normal(size=(24, 32)))}}
    }
    assert as_adapter(base, Model("global", dense, adapter))[1] == ["blocks/fc/kernel"]


@pytest.mark.long
def test_what_is_more_than_an_adapter_is_one_of_higher_rank_where_that_is_exact(tmp_path, monkeypatch, capsys):
    """Of a method that leaves a residual in the base."""
    monkeypatch.chdir(run_of("fedex_lora", tmp_path, *PLAIN, "--rank", "1"))
    export(tmp_path / "out", "--method", "fedex_lora", "--to", "npz")
    assert "global of fedex_lora is more than its adapter, and exactly one of rank" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["global.npz"]
    with np.load(tmp_path / "out" / "global.npz") as file:
        ranks = json.loads(file["meta"].item())["rank"]
    trained = json.loads(Path("run/config.json").read_text())["config"]["rank"]
    assert min(ranks.values()) > max(trained)


@pytest.mark.parametrize("last", [None, 1])
def test_a_vit_goes_out_as_it_came(last):
    """Cut or not, every array of the file is there again, and nothing else."""
    whole = vit_backbone(NANO)
    stem, top = cut(whole, last)
    assert (stem is None) == (last is None)
    published = top.publish(top.params)
    with np.load(NANO) as file:
        assert published.arrays.keys() == set(file) - {"meta"}
        for name, x in published.arrays.items():
            np.testing.assert_array_equal(x, np.float32(file[name]))
        meta = json.loads(file["meta"].item())
    assert published.said == {key: meta[key] for key in ("mean", "std", "heads", "ln_eps")}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("nowhere", "no run in nowhere: expected a folder that compare or run has written"),
        ("run --method fedit", "is a run of ditto: got --method fedit"),
        ("run --method ditto --seed 7", "the run has the seeds 0,1: got --seed 7"),
        ("run --method ditto --model client:5", "--model must be global, all or client:ID with ID from 0 to 4"),
        ("run --method ditto --model mine", "client:ID with ID from 0 to 4; got mine"),
        ("run --method ditto --to onnx", "--to must be one of merged, peft, npz; got onnx"),
        ("run --method ditto --to peft --layout jax", "--layout must be one of timm for these weights; got jax"),
        ("run --method ditto --layout timm", "--layout timm is of --to peft: leave it out, or use --to peft"),
        ("run --method ditto --out run", "run exists and is not empty: use another --out"),
    ],
)
def test_what_cannot_be_exported_is_refused(options, said, quick, capsys, monkeypatch):
    monkeypatch.chdir(quick)
    assert said in refused(["export", *options.split()], capsys, monkeypatch)
    assert not (quick / "runs").exists()


def test_other_data_and_missing_rounds_are_refused(quick, capsys, monkeypatch):
    monkeypatch.chdir(quick)
    data, original = Path("data.npz"), Path("data.npz").read_bytes()
    last = Path("run/checkpoints/ditto/0-2") / str(ROUNDS)
    try:
        change(y=np.arange(96)[::-1] % 3)(data)
        said = refused(["export", "run", "--method", "ditto"], capsys, monkeypatch)
        assert "cannot go by what was computed with other data, weights or code" in said
        assert "data_hash was" in said
        data.write_bytes(original)
        last.rename("away")
        said = refused(["export", "run", "--method", "ditto"], capsys, monkeypatch)
        assert f"ditto is not finished on seed 0: it has no whole checkpoint of {ROUNDS}; go on with --out run" in said
    finally:
        data.write_bytes(original)
        if Path("away").exists():
            Path("away").rename(last)


# --- a pool of adapters


@pytest.mark.long
def test_unseen_clients_are_served_by_the_model_of_the_nearest_client(quick, tmp_path, capsys, monkeypatch):
    """What each client keeps is looked up by NumPy; what the run serves is what it was scored by."""
    monkeypatch.chdir(quick)
    plan = Pool(parse(["pool", "run", "--router", "nearest", "--local-steps", "0", "--out", str(tmp_path / "a")])[1])
    plan.execute()
    told = json.loads((tmp_path / "a" / "pool.json").read_text())["unseen_accuracy"]
    assert "accuracy of unseen clients" in capsys.readouterr().out
    rows = [json.loads(line) for line in (quick / "run" / "metrics.jsonl").read_text().splitlines()]
    scored = [row["unseen_accuracy"] for row in rows if row["round"] == ROUNDS]
    np.testing.assert_allclose(np.mean(told["as the run serves them"], 1), scored, atol=1e-6)
    p, (method, seed, run) = plan.problem, plan.restored[SEED]
    models = served(plan.config, p, method, seed, run, list(range(CLIENTS)))
    features = np.float64(frozen_features(p.backbone, p.images.x[~p.images.test]))
    own, n = jax.tree.map(np.asarray, seed.clients), CLIENTS
    of = [features[r[:size]].mean(0) for r, size in zip(own.population.rows, own.population.sizes, strict=True)]
    far = np.array(of) - np.mean(of[:n], 0)
    far /= np.linalg.norm(far, axis=1)[:, None]
    for i in range(n, n + UNSEEN):
        model, rows = models[int(np.argmax(far[:n] @ far[i]))], own.test_rows[i, : own.test_counts[i]]
        right = p.correct_fn(model.base, model.adapter, (p.test[0][rows], p.test[1][rows]))
        np.testing.assert_allclose(told["nearest"][SEED][i - n], np.mean(right), atol=1e-6)
    options = [["--router", "near"], ["--by", "hand"], ["--count", "0"]]
    for option in options:
        with pytest.raises(ValueError, match=f"{option[0]} must be"):
            Pool(parse(["pool", "run", *option])[1])
