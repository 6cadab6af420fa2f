"""The clients of a round, or seeds, shared by several devices: the same results as on one.

Devices are CPU devices here; each case is a process of its own, because their number is fixed when jax starts.
Those of two processes: ``test_hosts``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from input_helpers import refused
from quick import QUICK

from experiments.config import Config

HERE = Path(__file__).parent


def on_devices(count, code, **arguments):
    """Run the code in a process that has so many; it must succeed."""
    flags = f"{QUICK['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
    env = os.environ | QUICK | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent)])
    code = code.format(**arguments) if arguments else code
    done = subprocess.run([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.long
def test_devices_share_a_cohort():
    """4 clients of unequal weights and ranks on 3 devices: of a server that learns, by jax's default type of axes; and
    of one that decomposes, its models, and what is differentiated."""
    on_devices(
        4,
        """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from helpers import *
from fedlora_jax.method import models

def results(name, mesh):
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
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    start = method.init(jax.random.key(1), ADAPTER)
    return jax.device_get(jit(two_rounds, out_shardings=whole)(BASE, start, cohorts))

method = METHODS["flexlora"]()
def scores(mesh):
    own = take(examples(), jnp.arange(CLIENTS * 3).reshape(CLIENTS, 3))
    evaluate = rounds.make_evaluate(method, lambda base, adapter, x: logits(base, adapter, x["x"]), mesh=mesh)
    return jit(evaluate)(BASE, method.init(KEY, ADAPTER), cohort()._replace(batches=()), own, KEY).before

def after(scale, mesh):
    round_fn = rounds.make_round(method, lambda *args: scale * loss_fn(*args), OPTIMIZER, mesh=mesh)
    state, _, info = round_fn(BASE, method.init(KEY, ADAPTER), cohort(), KEY)
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(state)) + info.loss.sum()
gradient = lambda mesh: jit(jax.value_and_grad(lambda scale: after(scale, mesh)))(1.0)

devices = jax.devices()[:3]
explicit = jax.make_mesh((3,), ("clients",), devices=devices)
mesh = jax.make_mesh((3,), ("clients",), axis_types=(AxisType.Auto,), devices=devices)
assert_near(results("pfedhn", explicit), results("pfedhn", None), 1e-5)
assert_near(scores(mesh), scores(None), 1e-5)
assert_near(gradient(mesh), gradient(None), 1e-5)
""",
    )


@pytest.mark.long
def test_devices_share_seeds_where_fewer_are_idle_then(tmp_path):
    """Of five seeds, of three clients a round: images that are there or staged, and a sweep, whose points are runs."""
    on_devices(
        2,
        """
import contextlib, io, json, sys
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

# Goes on with more seeds on two devices, which share the clients of the one that is left, and ends on one device.
out = folder / "on"
for more in ("--seeds 4 --rounds 1", "--seeds 5 --rounds 1 --devices 2 --resume", "--seeds 5 --devices 1 --resume"):
    sys.argv = ["experiments", "run", "--method", "flexlora", "--data", str(folder / "data.npz"), "--out", str(out)]
    sys.argv += [*SMALL, *PLAIN, "--partition", "iid", "--clients-per-round", "3", "--lr", "0.3", "--chunk", "3"]
    sys.argv += more.split()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        main()
    assert "note: " not in said.getvalue(), said.getvalue()  # every checkpoint is gone on from
    devices = json.loads((out / "config.json").read_text())["speed"]["devices"]
    assert devices == 1 + ("--devices 2" in more)
on = json.loads((out / "summary.json").read_text())["methods"]["flexlora"]
for name in ("global_accuracy", "personal_accuracy", "bias"):
    np.testing.assert_allclose(on[name]["last5"]["seeds"], one[name]["last5"]["seeds"], atol=1e-4)
""",
        folder=str(tmp_path),
    )


def test_devices_that_are_not_there_are_refused(capsys, monkeypatch):
    assert "--devices 2: jax finds 1" in refused(["run", "--method", "fedit", "--devices", "2"], capsys, monkeypatch)


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
