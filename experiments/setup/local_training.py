"""The clients' optimizer, as the options say: its kind, what clips and decays, its rate over rounds and within one."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp
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


def make_optimizer(config: Config, lr: float | Array | None = None) -> Optimizer:
    """The local optimizer, at the configured learning rate or at another (which may be traced).

    Its rate is that of ``round`` and of the local step. After the last round clients go on at the rate of the last.
    """
    lr = config.lr if lr is None else lr
    over_rounds, within = shape(config.schedule), SHAPES[config.local_schedule]
    if config.schedule == config.local_schedule == "constant":
        return transformation(config, lr)

    def of_round(round: Array | int) -> optax.GradientTransformation:
        peak = lr * over_rounds(jnp.minimum(round, config.rounds - 1), config.rounds)
        last = config.local_steps - 1
        rate = lambda step: peak * within(jnp.minimum(step, last), config.local_steps)
        return transformation(config, peak if config.local_schedule == "constant" else rate)

    return of_round


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
    if config.momentum is not None and config.optimizer != "momentum":
        raise ValueError(f"--momentum is of --optimizer momentum, got --optimizer {config.optimizer}")


def is_plain_sgd(config: Config) -> bool:
    """Is an update of every local step the learning rate times the gradient?"""
    extras = (config.weight_decay, config.clip_norm)
    constant = config.schedule == config.local_schedule == "constant"
    return config.optimizer == "sgd" and constant and extras == (None, None)
