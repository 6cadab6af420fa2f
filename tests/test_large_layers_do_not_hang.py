"""Aggregation of real sizes ends. Batched QR inside a larger program has hung for ever on CPU (jaxlib 0.10.2).

All cases run in one process under a time limit: 24 layers of 768 x 768, 32 clients, rank 16. Of servers there is
HyperLoRA's, which truncates and differentiates through it; that no method gives a CPU two batches of LAPACK at once is
looked at in the text of every program (``test_every_method``).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PREAMBLE = """
import jax, jax.numpy as jnp
from experiments.engine.evaluation import subspaces
from fedlora_jax import clustering
from fedlora_jax.decomposition import solve
from fedlora_jax.lora import LoRA
from fedlora_jax.method import Cohort
from fedlora_jax.methods.hyperlora import hyperlora
from fedlora_jax.signatures import Signature

LAYERS, SIZE, CLIENTS, RANK = 24, 768, 32, 16
p = jnp.ones(CLIENTS) / CLIENTS

def told(lead):
    return Signature(jnp.ones((*lead, 2)), jnp.ones((*lead, 3)), jnp.ones((*lead, 1)))

def factors(key, *lead):
    a, b = jax.random.split(jax.random.key(key))
    return LoRA(jax.random.normal(a, (*lead, LAYERS, SIZE, RANK)) / SIZE**0.5,
                jax.random.normal(b, (*lead, LAYERS, RANK, SIZE)) / SIZE**0.5, 0.5)

def aggregate(method):
    adapter, received = {"kernel": factors(0)}, {"kernel": factors(1, CLIENTS)}
    cohort = Cohort(jnp.arange(CLIENTS), p, jnp.full(CLIENTS, RANK), told((CLIENTS,)))
    state = method.init(jax.random.key(0), adapter)
    sent = method.dispatch({"kernel": jnp.zeros((LAYERS, SIZE, SIZE))}, state, cohort)
    def server(state, sent, received):
        slopes = jax.tree.map(jnp.subtract, sent.adapter, received)
        return method.aggregate({}, method.learn(state, cohort, slopes), cohort, sent, received).adapter
    return jax.jit(server)(state, sent, received)
"""

CASES = {
    "bases of clients' models, as a run's last scores": """
adapter = {name: factors(i, 8) for i, name in enumerate(("query", "value", "out", "fc2"))}
scores = jax.jit(lambda x: clustering.distances(q := jax.vmap(lambda model: subspaces({}, model))(x), q))
for _ in range(5):
    out = jax.block_until_ready(scores(adapter))
""",
    "equations of several kernels at once": """
keys = jax.random.split(jax.random.key(0), 4)
matrices = [jax.random.normal(key, (24, 64, 64)) for key in keys]
steps = jax.jit(lambda xs: [solve(x @ x.mT + jnp.eye(64), x) for x in xs])
for _ in range(20):
    out = jax.block_until_ready(steps(matrices))
""",
    "hyperlora": "out = aggregate(hyperlora(CLIENTS, told(()), warmup=0))",
}


CHECK = """
assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(out))
print({case!r}, "finished", flush=True)
"""


@pytest.mark.long
def test_they_end():
    code = PREAMBLE + "".join(program + CHECK.format(case=case) for case, program in CASES.items())
    run = subprocess.run(
        [sys.executable, "-c", code],
        timeout=250,
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert run.stdout.splitlines() == [f"{case} finished" for case in CASES], run.stderr[-2000:]
