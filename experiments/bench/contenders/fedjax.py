"""fedjax: its ``for_each_client`` (one compiled step, a Python loop over clients and steps) on our model in JAX.

fedjax 0.0.17 calls ``jax.tree_map``, which JAX has removed: it needs an environment with an older JAX,

    python -m venv old && old/bin/pip install "jax<0.6" "flax<0.12" optax orbax-checkpoint scikit-learn matplotlib \\
        safetensors tqdm psutil fedjax
    python -m experiments bench peers --python fedjax=old/bin/python
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import importlib.metadata
import time
from typing import Any

import fedjax
import jax

from experiments.bench.contenders import fedlora_jax as ours
from experiments.bench.measure import Contender
from experiments.bench.works import Work
from experiments.engine.facts import describe

_VERSION = importlib.metadata.version("fedjax")


def contender(work: Work, chunk: int | None = None) -> Contender:
    if not hasattr(jax, "tree_map"):
        raise ImportError(f"fedjax {_VERSION} calls jax.tree_map, which is not in jax {jax.__version__}")
    p, key = ours.problem(work), jax.random.key(0)
    images, labels = p.cohort.batches
    one = lambda c, steps: [(images[c, t], labels[c, t]) for t in range(steps)]
    clients = [(b"%d" % c, one(c, work.steps), key) for c in range(work.clients)]

    def client_init(sent: Any, key: Any) -> Any:
        return sent

    def client_step(carried: Any, batch: Any) -> Any:
        base, adapter = carried
        gradient = jax.grad(lambda adapter: p.loss_fn(base, adapter, batch, key))(adapter)
        return base, jax.tree.map(lambda x, g: x - work.lr * g, adapter, gradient)

    def client_final(sent: Any, carried: Any) -> Any:
        return carried[1]

    train = fedjax.for_each_client(client_init, client_step, client_final)

    def round_(clients: list = clients) -> Any:
        received = [(adapter, 1.0) for _, adapter in train((p.base, p.adapter), clients)]
        return jax.block_until_ready(fedjax.tree_util.tree_mean(received))

    begin = time.perf_counter()
    round_([(b"0", one(0, 1), key)])
    described = describe()
    versions = {**described.pop("versions"), "fedjax": _VERSION}
    about = {**described, "versions": versions, "compile_seconds": time.perf_counter() - begin}
    return Contender(round_, ours.flat, ours.matmul(work), about, ours.device_memory_mb)
