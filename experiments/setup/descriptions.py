"""What the server is told of clients: signatures of their data, or controls in their place."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.setup import columns
from fedlora_jax import signatures
from fedlora_jax.keys import purpose
from fedlora_jax.signatures import Signature

VIEWS = 16  # random halves of its data that describe each client in training
PROTOTYPES = 8  # directions in which the means of classes are told, where they are


def of_clients(
    features: Array, labels: Array, rows: Array, sizes: Array, key: Array, training: int, classes: int, kind: str
):
    """What the server is told of all clients, in all views: a Signature ``[N + K, 1 + VIEWS, ...]``.

    Args:
      features: ``[n, width]`` of all training images, by the frozen model, or their ``basis``; ``labels [n]``.
      rows, sizes: of clients, as in ``Population``; the first ``training`` of them are those that train.
      key: of the views, and of what is not told as it is.
      training: clients over which features are standardised.
      classes: there are.
      kind: ``--signature``.
    """
    true = signatures.of_clients(
        features, labels, rows, sizes, classes, key, training=training, parts=VIEWS, prototypes=_directions(kind)
    )
    return _told(true, purpose(key, "what is told"), training, kind)


def refuse_without_groups(images: Any, kind: str) -> None:
    """Refuse an oracle of groups where images have no column ``group``."""
    if kind == "group":
        columns.of(images, "group", "--signature group")


def basis(kind: str, images: Any, rows: np.ndarray, features: np.ndarray) -> np.ndarray:
    """What signatures are made of, of the images in ``rows``: their features, or which group they are of, as an oracle
    knows, ``[n, groups]``."""
    if kind != "group":
        return features
    values = columns.of(images, "group", "--signature group")[rows]
    return (values[:, None] == np.unique(values)).astype(np.float32)


def shapes_of_one(kind: str, classes: int) -> Signature:
    """Zeros in the shapes of one client's signature."""
    told = signatures.SIZE * 2 + _directions(kind) * classes, 0 if kind == "label_free" else classes, 1
    return Signature(*(np.zeros(size, np.float32) for size in told))  # type: ignore[arg-type]


def _directions(kind: str) -> int:
    return PROTOTYPES if kind.startswith("prototypes") else 0


def _told(true: Signature, key: Array, training: int, kind: str) -> Signature:
    """What the server is told instead of the true signatures ``[N + K, 1 + V, ...]``."""
    match kind.removeprefix("prototypes+"):
        case "label_free":
            return signatures.label_free(true)
        case "noisy":
            return signatures.noisy(key, true, 0.3)
        case "constant":  # everybody is the mean training client
            return jax.tree.map(lambda x: jnp.broadcast_to(x[:training, :1].mean(0), x.shape), true)
        case "shuffled":  # everybody is somebody else, training and unseen clients among themselves
            around = lambda x: jnp.concatenate([jnp.roll(x[:training], 1, 0), jnp.roll(x[training:], 1, 0)])
            return jax.tree.map(around, true)
        case "random":  # a name tag: fixed, and of the right size and spread, but about nothing
            keys = jax.random.split(key, len(true))
            tag = lambda key, x: x.mean() + x.std() * jax.random.normal(key, (x.shape[0], 1, x.shape[2]))
            return Signature(*(jnp.broadcast_to(tag(k, x), x.shape) for k, x in zip(keys, true, strict=True)))
    return true
