"""The clients of a round shared by several devices, of one process or of two: the same results as on one.

Devices are CPU devices here; each case is a process of its own, because their number is fixed when jax starts.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from input_helpers import SMALL, change, refused
from process_helpers import Process
from quick import QUICK

from experiments.__main__ import main
from experiments.commands import compare
from experiments.config import Config

HERE = Path(__file__).parent

ROUNDS = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from helpers import *
from fedlora_jax.method import models

def results(name, mesh, place=lambda x: x):
    method = METHODS[name]()
    round_fn = rounds.make_round(method, loss_fn, OPTIMIZER, chunk=1, mesh=mesh)
    def two_rounds(base, state, cohorts):
        def one(state, i):
            state, _, info = round_fn(base, state, jax.tree.map(lambda x: x[i], cohorts), jax.random.key(i))
            return state, info.loss
        state, losses = jax.lax.scan(one, state, jnp.arange(2))
        sent = method.dispatch(base, state, average_client(jax.tree.map(lambda x: x[1], cohorts)))
        return models(method, sent), losses
    cohorts = jax.tree.map(lambda *x: np.stack(x), cohort(0), cohort(1))
    arguments = place((BASE, method.init(jax.random.key(1), ADAPTER), cohorts))
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.device_get(jit(two_rounds, out_shardings=whole)(*arguments))

def mesh_of(devices):
    return jax.make_mesh((len(devices),), ("clients",), axis_types=(AxisType.Auto,), devices=devices)
"""


def processes(code, count=1, devices=1, **arguments):
    """Run the code in ``count`` processes at once; all must succeed."""
    flags = f"{QUICK['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    env = os.environ | QUICK | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent)])
    written = lambda i: code.format(i=i, **arguments) if arguments else code
    call = lambda i: subprocess.Popen([sys.executable, "-c", written(i)], env=env, stderr=subprocess.PIPE, text=True)
    running = [call(i) for i in range(count)]
    try:
        for process in running:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in running:
            process.kill()
            process.communicate()


@pytest.mark.long
def test_devices_share_a_cohort():
    processes(
        ROUNDS
        + """
assert_near(results("pfedhn", mesh_of(jax.devices())), results("pfedhn", None), 1e-5)  # a server that learns
explicit = jax.make_mesh((2,), ("clients",), devices=jax.devices()[:2])  # jax's default type of axes
assert_near(results("fedit", explicit), results("fedit", None), 1e-5)

def scores(mesh):
    method, own = METHODS["flexlora"](), take(examples(), jnp.arange(CLIENTS * 3).reshape(CLIENTS, 3))
    evaluate = rounds.make_evaluate(method, lambda base, adapter, x: logits(base, adapter, x["x"]), mesh=mesh)
    return jit(evaluate)(BASE, method.init(KEY, ADAPTER), cohort()._replace(batches=()), own, KEY).before

method = METHODS["flexlora"]()
def after(scale, mesh):
    round_fn = rounds.make_round(method, lambda *args: scale * loss_fn(*args), OPTIMIZER, mesh=mesh)
    state, _, info = round_fn(BASE, method.init(KEY, ADAPTER), cohort(), KEY)
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(state)) + info.loss.sum()
gradient = lambda mesh: jit(jax.grad(lambda scale: after(scale, mesh)))(1.0)

# 4 clients of unequal weights and ranks on 3 devices, models of 4 of them, and what is differentiated
assert_near(results("flexlora", mesh_of(jax.devices()[:3])), results("flexlora", None), 1e-5)
assert_near(scores(mesh_of(jax.devices()[:3])), scores(None), 1e-5)
assert_near(gradient(mesh_of(jax.devices()[:3])), gradient(None), 1e-5)
""",
        devices=4,
    )


@pytest.mark.long
def test_processes_share_a_cohort():
    """Two processes that talk over the loopback interface, as two hosts would."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes(
        """
import jax
jax.distributed.initialize("localhost:{port}", 2, {i})
"""
        + ROUNDS.replace("{", "{{").replace("}", "}}")
        + """
assert jax.process_count() == 2 and len(jax.devices()) == 2 and len(jax.local_devices()) == 1
mesh = mesh_of(jax.devices())
whole = NamedSharding(mesh, PartitionSpec())
everywhere = lambda tree: jax.tree.map(lambda x: jax.device_put(np.asarray(x), whole), tree)
shared = results("flexlora", mesh, everywhere)
assert_near(shared, results("flexlora", None), 1e-5)
""",
        count=2,
        port=port,
    )


@pytest.mark.long
def test_devices_share_seeds_where_fewer_are_idle_then(tmp_path):
    """Of five seeds, of three clients a round: images that are there or staged, and a sweep, whose points are runs."""
    processes(
        """
import json, sys
from pathlib import Path
import jax
import numpy as np
from input_helpers import PLAIN, SMALL, change
from experiments.__main__ import main
from experiments.results import report

folder = Path({folder!r})
change()(folder / "data.npz")
report.write = lambda *_: ""

shared, real = [], jax.shard_map
jax.shard_map = lambda *args, **how: (shared.append(how), real(*args, **how))[1]

def summary(*more):
    shared.clear()
    out = folder / "-".join(more)
    own = [*SMALL, *PLAIN, "--seeds", "5", "--partition", "iid", "--clients-per-round", "3", "--lr", "0.3"]
    sys.argv = ["experiments", *more, "--data", str(folder / "data.npz"), "--out", str(out)]
    sys.argv += own[:-2] if more[0] == "sweep" else own
    main()
    assert bool(shared) == ("--devices" in more)
    return json.loads((out / "summary.json").read_text())

run = lambda *more: summary("run", "--method", "flexlora", *more)["methods"]["flexlora"]
one, two = run(), ("--devices", "2")
(point,) = summary("sweep", "--methods", "flexlora", "--lrs", "0.3", *two)["entries"]
for other in (run(*two), run(*two, "--images", "staged"), point):
    for name in ("global_accuracy", "personal_accuracy", "personal_accuracy_tuned", "bias"):
        np.testing.assert_allclose(other[name]["last5"]["seeds"], one[name]["last5"]["seeds"], atol=1e-4)

# Goes on with more seeds on two devices, which share the clients of the one that is left.
out = folder / "on"
for more in (["--seeds", "4", "--chunk", "3"], ["--seeds", "5", "--chunk", "3", "--devices", "2", "--resume"]):
    sys.argv = ["experiments", "run", "--method", "flexlora", "--data", str(folder / "data.npz"), "--out", str(out)]
    sys.argv += [*SMALL, *PLAIN, "--partition", "iid", "--clients-per-round", "3", "--lr", "0.3", *more]
    main()
on = json.loads((out / "summary.json").read_text())["methods"]["flexlora"]
np.testing.assert_allclose(on["bias"]["last5"]["seeds"], one["bias"]["last5"]["seeds"], atol=1e-4)
""",
        devices=2,
        folder=str(tmp_path),
    )


@pytest.mark.parametrize(
    ("options", "sharing"),
    [
        ({"devices": 2, "clients": 12}, (1, 2)),  # 12 clients divide, 5 seeds do not
        ({"devices": 2, "clients": 5, "seeds": (0, 1)}, (2, 1)),
        ({"devices": 2, "clients": 4, "seeds": (0, 1)}, (1, 2)),
        ({"devices": 8, "clients": 12, "clients_per_round": 3}, (8, 1)),
    ],
)
def test_who_is_shared_is_what_leaves_fewer_devices_idle(options, sharing):
    config = Config(**options)
    assert (config.sharing_seeds, config.sharing) == sharing


@pytest.mark.long
def test_a_comparison_on_two_devices(tmp_path, monkeypatch, capsys):
    """The command line: the numbers of one device, and a word where there are too few; a run moves between them."""
    change()(tmp_path / "data.npz")
    command = ["run", "--method", "flexlora", *SMALL, "--partition", "iid", "--adapt-last", "1"]
    command += ["--data", str(tmp_path / "data.npz"), "--checkpoint-every", "1"]
    monkeypatch.setattr(compare.report, "write", lambda *_: "")
    of = lambda name, options: [*command, "--out", str(tmp_path / name), *options.split()]
    assert "--devices 2: jax finds 1" in refused(of("few", "--devices 2"), capsys, monkeypatch)

    def here(name, options):
        monkeypatch.setattr(sys, "argv", ["experiments", *of(name, options)])
        main()
        assert "note: " not in capsys.readouterr().err, "every checkpoint is gone on from"

    def two(name, options):
        done = Process(of(name, f"--devices 2 {options}")).end()
        assert done.code == 0, done.errors
        assert "note: " not in done.errors

    here("one", "--rounds 3")
    two("two", "--rounds 1")
    here("two", "--resume --rounds 2 --devices 1")
    two("two", "--resume --rounds 3 --chunk 1")
    read = lambda name: map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
    assert json.loads((tmp_path / "two" / "config.json").read_text())["speed"]["devices"] == 2
    for row, other in zip(read("two"), read("one"), strict=True):
        for key in ("loss", "update", "bias", "personal_accuracy", "worst_accuracy", "global_accuracy"):
            rounding = 1e-4 if key == "bias" else 1e-5  # a difference of nearly equal products
            assert row[key] == pytest.approx(other[key], abs=rounding), key
