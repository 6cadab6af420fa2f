"""What a method can ask to be given of a run, whether it accepts that, and with what a run is computed."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import jax

from experiments.config import Config
from experiments.engine import kept, methods
from experiments.results import record
from experiments.results.summary import counted
from experiments.setup import backbone as backbones
from experiments.setup import local_training, memory
from fedlora_jax import rounds
from fedlora_jax.clients import Sampling
from fedlora_jax.lora import Adapter
from fedlora_jax.signatures import Signature
from fedlora_jax.wrappers import dp_sgd

NOBODY_YET = 2**30  # images of the smallest client, before any are dealt out


def facts_of(config: Config, signature: Signature, smallest: int) -> dict[str, Any]:
    """What a method can ask to be given of a run whose smallest client that trains has so many images."""
    return {
        "participants": config.cohort,
        "sampling": Sampling(config.clients, config.cohort, config.join_rate),
        "signature": signature,
        "population": config.clients,
        "rounds": config.rounds,
        "uses": uses(config, smallest),
        "theta": record.read_arrays(backbones.theta_of(config)),
        "local_lr": config.lr,
    }


def uses(config: Config, smallest: int) -> int:
    """As how many uses of an image a round counts, at most, for a client that has so many (``dp_sgd.uses``)."""
    return int(dp_sgd.uses(smallest, local_training.most_examples(config, smallest), config.batch))


def acceptable(config: Config, signature: Signature, adapter: Adapter, may_stage: bool = False) -> None:
    """Refuse options that a method does not take, and what it has learned or keeps where that does not fit.

    ``may_stage``: what clients keep may stay on the host.
    """
    for name in config.methods:
        method = methods.build(name, **facts_of(config, signature, NOBODY_YET))
        if method.query and config.minimum < 2:
            raise ValueError(f"{name} keeps examples of every client apart: --minimum must be at least 2, got 1")
        if "scaffold" in method.stack and not local_training.is_plain_sgd(config):
            raise ValueError(
                f"{name} needs local steps of plain SGD: leave --optimizer, --schedule, --local-schedule, "
                "--weight-decay and --clip-norm out"
            )
        if "fedlc" in method.stack and config.task != "softmax":
            raise ValueError(f"{name}: FedLC calibrates a softmax, --task must be softmax, got {config.task}")
        tells = methods.about(name).tells
        if "dp" in method.stack and config.cohort * config.join_rate < config.clients and tells != "-":
            raise ValueError(
                f"{name}: epsilon counts on nobody knowing who is drawn, and this method is told of a client {tells}: "
                "let all clients take part (leave --clients-per-round out), or take a method that is told nothing, as "
                "fedit"
            )
        if "dp" in method.stack and len(set(config.rank)) > 1:
            raise ValueError(f"{name}: a mean over clients of several ranks tells who is among them: give one --rank")
        if "dp_sgd" in method.stack:
            local_training.refuse_batches_as_a_whole(config, name)
        start = lambda key, adapter, method=method: rounds.start(method, key, adapter, config.clients)
        run = jax.eval_shape(start, jax.eval_shape(jax.random.key, 0), adapter)
        rows, rest = (len(config.seeds) * memory.bytes_of(x) for x in (run.memory, run._replace(memory=())))
        hosted = may_stage and kept.is_staged(config.kept, rows)
        clients, seeds = counted(config.clients, "client"), counted(len(config.seeds), "seed")
        what = f"what {name} keeps of {clients} and {seeds} would"
        remedy = "use fewer of them, or smaller options of the method"
        memory.refuse_more_than_there_is(rest if hosted else rows + rest, what, remedy)
        if hosted:
            memory.refuse_more_than_there_is(rows, what, remedy, on_host=True)


def describe() -> dict[str, Any]:
    """With what a run is computed."""
    return {
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()}), {platform.machine()}"
        + f", {jax.process_count()} processes" * (jax.process_count() > 1),
    }
