"""What learning costs: rounds of HyperLoRA against plain rounds of the same work, and the server's part alone.

Programs take turns, so that a busy moment of the machine hits all of them; figures are medians. Weights and
images are random: speed does not depend on them.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments import methods
from experiments.compare import describe
from experiments.programs import divisor
from fedlora_jax import lora, rounds
from fedlora_jax.method import Cohort
from fedlora_jax.signatures import Signature
from models.vit import normalise, vit

CLIENTS, STEPS, BATCH, RANK, CLASSES, SIDE = 32, 5, 8, 8, 10, 32
CONTENDERS = ("fedit", "flexlora", "hyperlora", "hyperlora:mode=first_order", "hyperlora:mode=exact")
KEPT = "hyperlora:mode=exact, every step kept"  # no step is computed again: more memory, less arithmetic


class Plan:
    """ViT-Ti, 32 x 32 pixels in patches of 4, LoRA of rank 8 on query and value, 32 clients x 5 steps x 8 images."""

    def __init__(self, repeats: int = 3):
        self.repeats = repeats
        model = vit("Ti/4", classes=CLASSES)
        keys = jax.random.split(jax.random.key(0), 3)
        rng = np.random.default_rng(0)
        images = lambda *lead: jnp.asarray(rng.integers(0, 256, (*lead, SIDE, SIDE, 3)), jnp.uint8)
        labels = lambda *lead: jnp.asarray(rng.integers(0, CLASSES, lead))
        self.base = model.init(keys[0], normalise(images(1), 0.5, 0.5))["params"]
        self.adapter = lora.new(keys[1], self.base, RANK, targets="attn/(query|value)/kernel", full="^head/", scale=2.0)
        told = Signature(*(jnp.asarray(rng.normal(size=(CLIENTS, m)), jnp.float32) for m in (128, CLASSES, 1)))
        self.cohort = Cohort(
            ids=jnp.arange(CLIENTS),
            weights=jnp.ones(CLIENTS) / CLIENTS,
            ranks=jnp.full(CLIENTS, RANK),
            signatures=told,
            batches=(images(CLIENTS, STEPS, BATCH), labels(CLIENTS, STEPS, BATCH)),
            queries=(images(CLIENTS, BATCH), labels(CLIENTS, BATCH)),
        )

        def loss_fn(base, adapter, batch, key):
            logits, _ = model.apply(lora.variables(base, adapter), normalise(batch[0], 0.5, 0.5))
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

        self.loss_fn = loss_fn

    def execute(self) -> list[dict[str, Any]]:
        calls: dict[tuple[str, str], Callable[[], Any]] = {}
        for name in tqdm((*CONTENDERS, KEPT), desc="compiling", dynamic_ncols=True):
            calls |= {(name, part): call for part, call in self._programs(name).items()}
        times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
        for _ in tqdm(range(self.repeats), desc="rounds", dynamic_ncols=True):
            for key, call in calls.items():
                begin = time.perf_counter()
                jax.block_until_ready(call())
                times[key].append(time.perf_counter() - begin)
        median = {key: statistics.median(values) for key, values in times.items()}
        rows = [
            {
                "bench": "learning",
                "work": f"Ti/4, {CLIENTS} clients x {STEPS} steps x {BATCH}, rank {RANK}",
                "contender": name,
                "seconds_per_round": round(median[name, "round"], 3),
                "of_a_fedit_round": round(median[name, "round"] / median["fedit", "round"], 3),
                "server_seconds": round(median[name, "server"], 3),
                "server_share": round(median[name, "server"] / median[name, "round"], 4),
                **describe(),
            }
            for name in (*CONTENDERS, KEPT)
        ]
        print("\n".join(json.dumps(row) for row in rows))
        return rows

    def _programs(self, name: str) -> dict[str, Callable[[], Any]]:
        """The compiled round, and all that the server does in it: dispatch, learning, aggregation."""
        one = jax.tree.map(lambda x: np.zeros(x.shape[1:], x.dtype), self.cohort.signatures)
        method = methods.build(
            name.partition(",")[0], participants=CLIENTS, signature=one, population=CLIENTS, theta=None
        )
        state = method.init(jax.random.key(2), self.adapter)
        round_fn = jax.jit(
            rounds.make_round(method, self.loss_fn, optax.sgd(0.1), chunk=divisor(CLIENTS, 4), remat=name != KEPT)
        )
        state = jax.block_until_ready(round_fn(self.base, state, self.cohort, jax.random.key(3))[0])  # b is not 0 now

        def server(base, state, cohort, received):
            sent = method.dispatch(base, state, cohort)
            slopes = jax.tree.map(jnp.subtract, sent.adapter, received)
            return method.aggregate(base, method.learn(state, cohort, slopes), cohort, sent, received)

        sent = method.dispatch(self.base, state, self.cohort).adapter
        leaves, structure = jax.tree.flatten(sent)
        keys = jax.random.split(jax.random.key(4), len(leaves))
        moved = [x + 0.01 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
        arguments = (self.base, state, self.cohort, jax.tree.unflatten(structure, moved))
        alone = jax.jit(server)
        jax.block_until_ready(alone(*arguments))
        return {
            "round": lambda: round_fn(self.base, state, self.cohort, jax.random.key(3)),
            "server": lambda: alone(*arguments),
        }
