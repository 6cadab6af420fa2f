"""The loss of one local step as methods are given it, and what else of a batch they may look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax.lora import Adapter, Params


class Seen(NamedTuple):
    """What a model makes of one batch."""

    features: Array  # [B, width] what the head reads
    logits: Array  # [B, classes]
    labels: Array  # [B], or shares of classes [B, classes]
    present: Array  # [B] 1 for an example that counts

    @property
    def one_hot(self) -> Array:
        """``[B, classes]``; of shares of classes the largest."""
        labels = self.labels if self.labels.ndim < self.logits.ndim else self.labels.argmax(-1)
        return jax.nn.one_hot(labels, self.logits.shape[-1], dtype=self.logits.dtype)

    def mean(self, values: Array) -> Array:
        """The mean of ``values [B]`` over the examples that count; 0 where there are none."""
        return jnp.sum(jnp.where(self.present > 0, values, 0.0)) / jnp.maximum(self.present.sum(), 1)


@dataclass(frozen=True)
class Shown:
    """A loss (``LossFn``) that also shows what it is made of, to methods that look at more than a number."""

    loss: Callable[[Params, Adapter, Any, Array], Array]
    seen: Callable[[Params, Adapter, Any, Array], Seen]

    def __call__(self, base: Params, adapter: Adapter, batch: Any, key: Array, /) -> Array:
        return self.loss(base, adapter, batch, key)


def unseen(model: Adapter) -> Seen:
    """Of a loss that shows nothing.

    Raises:
      ValueError: always.
    """
    raise ValueError(
        "the method looks at features, logits or labels of a batch, and the loss shows none: give make_round "
        "fedlora_jax.task.Shown(loss_fn, seen), where seen(base, adapter, batch, key) is a Seen"
    )


class Task(NamedTuple):
    """One batch of one client, to be called with a model: its mean loss."""

    loss: Callable[[Adapter], Array]
    seen: Callable[[Adapter], Seen] = unseen

    def __call__(self, model: Adapter) -> Array:
        return self.loss(model)


def of_batch(loss_fn: Callable, base: Params, batch: Any, key: Array) -> Task:
    """The task of one local step."""
    seen = getattr(loss_fn, "seen", None)
    look = (lambda model: seen(base, model, batch, key)) if seen else unseen
    return Task(lambda model: loss_fn(base, model, batch, key), look)


def of_model(task: Callable[[Adapter], Array], model: Callable[[Adapter], Adapter]) -> Task:
    """The task of what ``model`` makes of an adapter."""
    seen = getattr(task, "seen", unseen)
    return Task(lambda adapter: task(model(adapter)), lambda adapter: seen(model(adapter)))


def on_batches(loss_fn: Callable, read: Callable[[Any], Any]) -> Callable:
    """The loss of what ``read`` makes of a batch."""
    of = lambda f: lambda base, adapter, batch, key: f(base, adapter, read(batch), key)
    seen = getattr(loss_fn, "seen", None)
    return Shown(of(loss_fn), of(seen)) if seen else of(loss_fn)
