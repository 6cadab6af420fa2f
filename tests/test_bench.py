"""Benches measure what they say: the same fields everywhere, operations counted right, every bench runs."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import jit
from jax.extend.core import jaxprs_in_params
from quick import QUICK

from experiments import bench, cli
from experiments.bench import (
    bench_forecast,
    bench_peers,
    bench_profile,
    bench_staging,
    children,
    machine,
    measure,
    works,
)
from experiments.bench.contenders import INSTALL, NEEDS
from experiments.bench.contenders import fedlora_jax as ours
from experiments.bench.options import BENCHES, BY_DEFAULT, CONTENDERS, RUNS, USES, Options, interpreter
from experiments.engine import process
from experiments.engine.facts import describe
from fedlora_jax import lora
from models.vit import SIZES, vit

TOY = works.find("toy")
SMALL = {  # of each bench: options that make it quick ("round" is "peers" of one, "population" is below)
    "learning": {"methods": ("fedit", "flexlora")},
    "peers": {"contenders": ("fedlora_jax", "torch_peft")},
    "scaling": {"clients": (TOY.clients,), "ranks": (TOY.rank,), "local_steps": (TOY.steps,), "depths": (TOY.depth,)},
    "memory": {"chunks": (2,)},
    "server": {"kernels": "toy", "clients": (2,), "methods": ("fedit", "flexlora")},
    "compile": {"methods": ("fedit",)},
    "prefix": {"last": 1},
    "profile": {},
    "staging": {"images": 60},
    "forecast": {"runs": ("toy",)},
    "gpu": {"works": ("toy", "base"), "contenders": ("fedlora_jax",)},
}


@pytest.mark.long
@pytest.mark.parametrize("name", SMALL)
def test_every_bench_gives_lines_with_the_same_fields(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ours, "jit", jit)
    for variable, value in (QUICK | {"GLIBC_TUNABLES": ""}).items():  # of the processes that a bench starts, once
        monkeypatch.setenv(variable, value)
    # Whole runs are those of ``compare``; what is told of one is looked at below.
    took = {"cpu_seconds": 9.0, "peak_memory_mb": 300.0, "seconds_per_round": 0.1, "compile_seconds": 2.0}
    for module in (bench_staging, bench_forecast):
        monkeypatch.setattr(module, "whole_run", lambda typed, **_: cli.parse(["compare", *typed]) and took)
    options = Options(name, work="toy", repeats=1, out=f"{tmp_path / 'new'}")
    lines = bench.execute(dataclasses.replace(options, **SMALL[name]))
    assert lines
    assert [json.loads(text) for text in capsys.readouterr().out.splitlines()] == lines
    assert [json.loads(text) for text in (tmp_path / "new/bench.jsonl").read_text().splitlines()] == lines
    assert (tmp_path / f"new/{name}.png").read_bytes().startswith(b"\x89PNG")
    for line in lines:
        assert list(line)[: len(measure.FIELDS)] == list(measure.FIELDS)
        assert (line["bench"], line["date"][:2]) == (name, "20")
        assert "failed" not in line
    ran = [line for line in lines if "skipped" not in line]
    assert ran
    assert all(line["versions"]["jax"] and line["device"] for line in ran if line["contender"] == "fedlora_jax")
    if name == "peers":
        (own,) = (line for line in ran if line["contender"] == "fedlora_jax")
        assert own["spread"][0] <= own["seconds_per_round"] <= own["spread"][1]


@pytest.mark.long
def test_a_round_of_ten_thousand_clients_costs_little_more_than_one_of_a_hundred(monkeypatch):
    """The bars are 1.1 times and 4 GB (docs/speed.md); even a busy machine notices what grows with the population."""
    monkeypatch.setattr(ours, "jit", jit)
    few, many = bench.execute(Options("population", work="toy", repeats=5, clients=(100, 10_000)))
    assert all(list(line)[: len(measure.FIELDS)] == list(measure.FIELDS) for line in (few, many))
    assert many["seconds_per_round"] < 3 * few["seconds_per_round"]
    assert many["peak_memory_mb"] < 4096


def test_of_a_whole_run_its_process_and_its_summary_tell(tmp_path, monkeypatch):
    """A command that takes half a second and 200 MB."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "__init__.py").touch()
    (tmp_path / "experiments" / "__main__.py").write_text(COMMAND)
    monkeypatch.setattr(children, "ROOT", tmp_path)
    found = children.whole_run(["--rounds", "3"], ASKED="5")
    assert 0.5 <= found.pop("cpu_seconds") < 20
    assert 200 <= found.pop("peak_memory_mb") < 600
    assert found == {"seconds_per_round": 0.1, "compile_seconds": 5.0}


COMMAND = """
import json, os, pathlib, sys, time
command, *typed, out, folder = sys.argv[1:]
assert (command, typed, out) == ("compare", ["--rounds", "3"], "--out")
held = bytes(200 * 10**6).replace(b"\\0", b"x")
while time.process_time() < 0.5:
    pass
methods = {name: {"seconds_per_round": x, "compile_seconds": x * 10} for name, x in (("fedit", 0.1), ("flora", 0.4))}
assert os.environ["ASKED"] == "5"
pathlib.Path(folder).mkdir()
(pathlib.Path(folder) / "summary.json").write_text(json.dumps({"failed": {}, "methods": methods}))
"""


def test_every_option_of_the_command_line_belongs_to_a_bench():
    fields = {field.name for field in dataclasses.fields(Options)} - {"bench", "out"}
    assert set(USES) == set(BENCHES) >= set(BY_DEFAULT)
    assert fields == {option for used in USES.values() for option in used}
    for name in BENCHES:
        command, options = cli.parse(["bench", name])
        assert (command, options) == ("bench", Options(name, **BY_DEFAULT.get(name, {})))
    assert cli.parse(["bench", "memory", "--chunks", "1,2", "--work", "toy"])[1] == Options(
        "memory", "toy", chunks=(1, 2)
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"work": "huge"}, "expected one of toy"),
        ({"repeats": 0}, "--repeats must be at least 1 and at most 1000, got 0"),
        ({"contenders": ("torch",)}, "--contenders must be one of fedlora_jax.*; got torch"),
        ({"chunks": (0,)}, "--chunks must be at least 1"),
        ({"work": "base"}, "takes hours on a CPU"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, said):
    if options.get("work") == "base" and jax.default_backend() != "cpu":
        pytest.skip("here it can")
    with pytest.raises(ValueError, match=said):
        bench.execute(Options("round", **options))


def test_a_profile_knows_what_an_operation_is_for_and_of_which_part():
    def f(x, y, a):
        with jax.named_scope("mlp"):
            z = jnp.tanh(x @ y)
        with jax.named_scope("attn"):
            with jax.named_scope("query"):
                z = z @ a
            return z, y.T  # the transpose of a product would become part of it

    program = jax.jit(f).lower(jnp.ones((3, 5)), jnp.ones((5, 7)), jnp.ones((7, 2))).compile()
    found = set(bench_profile.operations(program.as_text(), thin=2).values())
    products = {operation for operation in found if operation.flops}
    assert products == {("products", "mlp", 2 * 3 * 5 * 7), ("thin products", "projections", 2 * 3 * 7 * 2)}
    assert {("entries", "mlp", 0), ("layout", "attention", 0)} <= found


def test_operations_of_tiny_are_as_counted_by_hand():
    """Per image and block, in millions: projections 19.2, MLP 38.3, attention 3.2, LoRA 0.8; once more, with
    attention and LoRA twice, on the way back; 14.8 + 1.6 of that are not needed in the first block."""
    by_hand = 2560 * (12 * (2 * (19.17 + 38.34) + 3 * (3.24 + 0.80)) - 14.78 - 1.62 + 1.18) * 1e6
    assert math.isclose(works.flops(works.find("tiny")), by_hand, rel_tol=1e-3)
    assert math.isclose(works.flops(works.find("tiny")), 3.87e12, rel_tol=0.02)


def test_operations_are_those_of_the_products_in_our_program():
    """But for the first block, of which the loop over blocks cannot know that its inputs need no gradient."""
    work = works.find("tiny")
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    p = jax.eval_shape(lambda: ours.problem(work._replace(clients=1, steps=1))[:2])
    batch = (jax.ShapeDtypeStruct((work.batch, 32, 32, 3), np.uint8), jax.ShapeDtypeStruct((work.batch,), np.int32))
    gradient = jax.grad(lambda adapter, base, batch: ours._loss(work)(base, adapter, batch, None))
    traced = jax.make_jaxpr(gradient)(*jax.tree.map(shape, (p[1], p[0])), batch)
    assert math.isclose(_products(traced.jaxpr) * 80, works.flops(work), rel_tol=0.02)


def _products(jaxpr) -> int:
    """FLOPs of all matrix products of a program."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "dot_general":
            (left, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[i] for i in left)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        total += times * sum(map(_products, jaxprs_in_params(equation.params)))
    return total


def test_what_noise_costs_can_be_measured():
    """Methods are given all facts that those of a run can ask for."""
    name = "fedit+dp_sgd:noise=0.0+dp:noise=0.0"
    assert {"dp", "dp_sgd"} <= set(ours.method(TOY, name).stack)


def test_weights_and_adapters_are_those_of_the_model():
    for name, size in (("tiny", "Ti"), ("base", "B"), ("nano", "nano")):
        work = works.find(name)
        assert (work.width, work.depth, work.heads, work.mlp) == SIZES[size]
        if name == "nano":
            model = vit(f"{size}/{work.patch}", work.classes)
            images = jnp.zeros((1, work.side, work.side, 3))
            made = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
            assert {k: x.shape for k, x in lora.flatten(made).items()} == {
                k: x.shape for k, x in works.weights(work).items()
            }
    named = works.adapter(TOY)
    assert {k: x.tolist() for k, x in ours.flat(ours.problem(TOY).adapter).items()} == {
        k: x.tolist() for k, x in named.items()
    }


def test_a_contender_that_is_not_installed_says_so_before_any_other_starts(monkeypatch):
    assert set(INSTALL) == set(NEEDS) == set(CONTENDERS)
    monkeypatch.setitem(NEEDS, "flwr", ("json", "no_such_flower"))
    monkeypatch.setattr(bench_peers, "Child", lambda *_, **__: pytest.fail("a contender was started"))
    lines = bench_peers.run(Options("peers", "toy", contenders=("fedlora_jax", "flwr"), repeats=2))
    first = next(lines)
    assert (first["contender"], first["seconds_per_round"]) == ("flwr", None)
    assert first["skipped"] == f"pip install {INSTALL['flwr']}"
    assert first["reason"] == "there is no module no_such_flower"


def test_every_line_says_what_processor_it_is_of_and_how_wide_its_vectors():
    name, bits = process.processor()
    if Path("/proc/cpuinfo").exists():
        assert bits in (None, 128, 256, 512)
    assert [measure.line("round", TOY, "fedlora_jax")[key] for key in ("processor", "vector_bits")] == [name, bits]
    told = measure.line("peers", TOY, "torch_peft", vector_bits=128)  # what a library says of itself
    assert (told["processor"], told["vector_bits"]) == (name, 128)


def test_runs_that_are_forecast_are_runs():
    assert set(bench_forecast.RUNS) == set(RUNS)
    for options in bench_forecast.RUNS.values():
        cli.parse(["compare", *options.split()])


def test_medians_come_with_the_least_and_the_most():
    assert measure.times([3.0, 1.0, 2.5]) == (2.5, [1.0, 3.0])


def test_a_contender_that_dies_is_told_apart(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    child = children.Child("flwr", TOY, python=f"{tmp_path / 'python'}")
    child.turn()
    child.close()
    assert child.line("peers")["failed"].startswith("ended with exit status 3")


def test_an_interpreter_is_named_for_one_contender_or_for_all_others():
    options = Options("peers", python=("a", "flwr=b"))
    assert [interpreter(options, name) for name in ("fedlora_jax", "torch_peft", "flwr")] == [None, "a", "b"]


def test_what_others_use_makes_a_measurement_unquiet():
    assert machine.others_share(None, 1.0, 1.0) is None
    assert machine.others_share(5.0, 5.0, 2.0) == 0.0
    assert machine.others_share(2.0, 1.0, 0.01) is None  # too short to tell
    turns = [
        {"seconds": 1.0, "cpu_seconds": 1.0, "peak_flops": 1.0, "peak_memory_mb": 1.0, "squares": 1.0, "moved": 1.0}
        | {"others_share": share}
        for share in (0.0, 0.4)
    ]
    assert measure.summary(TOY, turns[:1])["quiet"] is True
    assert measure.summary(TOY, turns)["quiet"] is False
    assert describe()["versions"]
