"""What clients do in a round, as the options say: how much, and with which optimizer: its kind, what clips and decays,
its rate over rounds and within one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments.config import Config
from experiments.setup.augment import augmentation
from fedlora_jax.checks import refuse_outside
from fedlora_jax.training import Optimizer

Shape = Callable[[Array | int, int], Array | float]  # (i, of how many) -> factor of the rate, 1 at i = 0

SHAPES: dict[str, Shape] = {
    "constant": lambda i, n: 1.0,
    "linear": lambda i, n: 1 - i / n,
    "cosine": lambda i, n: 0.5 * (1 + jnp.cos(math.pi * i / n)),  # Loshchilov and Hutter, 2017, arXiv 1608.03983, eq. 5
}


def are_unequal(config: Config) -> bool:
    """Do clients take local steps of their own number?"""
    return config.local_epochs is not None or config.local_steps_from is not None


def examples_of_a_round(config: Config, sizes: np.ndarray, seed: int) -> np.ndarray:
    """``[N]`` how many of its images each client goes through in a round, of clients that have ``sizes [N]``.

    A client's number of steps is drawn once for a run (system heterogeneity as in FedProx, Li et al., 2020, arXiv
    1812.06127, and FedNova, Wang et al., 2020, arXiv 2007.07481); an epoch follows the end of another within a batch.
    """
    if config.local_epochs is not None:
        whole = np.ceil(config.local_epochs * sizes - 1e-9).astype(np.int32)
        if config.local_cap is None:
            return whole
        steps = -(-whole[: config.clients] // config.batch)
        return np.minimum(whole, config.batch * _cap(config.local_cap, int(steps.min())))
    rng, least = np.random.default_rng([seed, 2]), config.local_steps_from or config.local_steps
    return (config.batch * rng.integers(least, config.local_steps + 1, len(sizes))).astype(np.int32)


def most_examples(config: Config, size: int) -> int:
    """How many a client of so many goes through in a round, at most."""
    return config.local_steps * config.batch if config.local_epochs is None else math.ceil(config.local_epochs) * size


def _cap(text: str, smallest: int) -> int:
    """The most steps of a client.

    Raises:
      ValueError: the text is no ``N`` or ``smallest+N``.
    """
    match = re.fullmatch(r"(smallest\+)?(\d{1,7})", text)
    if match is None or (not match[1] and int(match[2]) < 1):
        raise ValueError(f"--local-cap must be a number of steps or smallest+N, as in smallest+1; got {text}")
    return int(match[2]) + (smallest if match[1] else 0)


def longest(config: Config, examples: Any) -> int | None:
    """Local steps of the client that goes through the most of ``examples [S, N]``; ``None``: all take the same."""
    return -(-int(np.max(examples)) // config.batch) if are_unequal(config) else None


def record(config: Config, examples: Any) -> dict[str, Any]:
    """What a run says of the numbers of local steps, where they differ."""
    if not are_unequal(config):
        return {}
    steps = -(-np.asarray(examples) // config.batch)
    by_seed = [[int(own.min()), round(float(own.mean()), 2), int(own.max())] for own in steps]  # fewest, mean, most
    return {"longest": int(steps.max()), "local_steps": by_seed}


def make_optimizer(config: Config, lr: float | Array | None = None) -> Optimizer:
    """The local optimizer, at the configured learning rate or at another (which may be traced).

    Its rate is that of ``round`` and of the local step, where their numbers differ of the client's progress. After the
    last round clients go on at the rate of the last.
    """
    lr = config.lr if lr is None else lr
    over_rounds, within = shape(config.schedule), SHAPES[config.local_schedule]
    if config.schedule == config.local_schedule == "constant":
        return transformation(config, lr)

    def of_round(round: Array | int) -> optax.GradientTransformation:
        peak = lr * over_rounds(jnp.minimum(round, config.rounds - 1), config.rounds)
        if are_unequal(config) and config.local_schedule != "constant":
            return optax.chain(transformation(config, peak), _scaled_by_progress(within))
        last = config.local_steps - 1
        rate = lambda step: peak * within(jnp.minimum(step, last), config.local_steps)
        return transformation(config, peak if config.local_schedule == "constant" else rate)

    return of_round


def _scaled_by_progress(factor: Shape) -> optax.GradientTransformationExtraArgs:
    """Updates times the factor of how far a client is in its local steps (``training.make_local``)."""

    def update(updates, state, params=None, *, progress, **_):
        return jax.tree.map(lambda u: factor(progress, 1) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)  # type: ignore[arg-type]


def transformation(config: Config, rate: float | Array | optax.Schedule) -> optax.GradientTransformation:
    """Clipping, decay and the optimizer itself, in PyTorch's order; decay pulls adapters and full differences to 0."""
    decay, beta = config.weight_decay, 0.9 if config.momentum is None else config.momentum
    makers = {
        "sgd": optax.sgd,
        "momentum": lambda rate: optax.sgd(rate, momentum=beta),
        "adam": optax.adam,
        "adamw": lambda rate: optax.adamw(rate, weight_decay=1e-4 if decay is None else decay),
    }
    parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    if decay is not None and config.optimizer != "adamw":
        parts.append(optax.add_decayed_weights(decay))
    own = makers[config.optimizer](rate)
    return optax.chain(*parts, own) if parts else own


def shape(schedule: str) -> Shape:
    """The factor that a text means.

    Raises:
      ValueError: it means none.
    """
    name, colon, number = schedule.partition(":")
    if name in SHAPES and not colon:
        return SHAPES[name]
    try:
        gamma = float(number) if name == "exponential" else math.nan
    except ValueError:
        gamma = math.nan
    if math.isnan(gamma):
        raise ValueError(
            f"--schedule must be {', '.join(SHAPES)} or exponential:G, as in exponential:0.99; got {schedule}"
        )
    refuse_outside("(0, 1]", **{"--schedule exponential": gamma})
    return lambda i, n: gamma**i


def check(config: Config) -> None:
    """Refuse options of local training that do not go together."""
    shape(config.schedule)
    augmentation(config.augment)
    if config.local_cap is not None:
        _cap(config.local_cap, 1)
        if config.local_epochs is None:
            raise ValueError("--local-cap ends epochs early: it goes with --local-epochs")
    if config.momentum is not None and config.optimizer != "momentum":
        raise ValueError(f"--momentum is of --optimizer momentum, got --optimizer {config.optimizer}")


def refuse_batches_as_a_whole(config: Config, name: str) -> None:
    """Refuse what is of several examples of a batch at once, for a method that looks at one at a time."""
    mixes = [way for way in config.augment if way.partition(":")[0] in ("mixup", "cutmix")]
    if config.task == "pairs" or mixes:
        what = "--task pairs" if config.task == "pairs" else f"--augment {mixes[0]}"
        raise ValueError(f"{name} takes the gradient of each example alone, {what} is of whole batches: leave it out")


def is_plain_sgd(config: Config) -> bool:
    """Is an update of every local step the learning rate times the gradient?"""
    extras = (config.weight_decay, config.clip_norm)
    constant = config.schedule == config.local_schedule == "constant"
    return config.optimizer == "sgd" and constant and extras == (None, None)
