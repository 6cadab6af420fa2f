"""Clients in a plane: from the distances of their models' subspaces to positions and clusters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedlora_jax import clustering

MOST = 9  # clusters that a picture can still tell apart


def positions(apart: np.ndarray) -> np.ndarray:
    """``[N, 2]`` points whose distances are as near to ``apart [N, N]`` as a plane allows: classical scaling.

    Source: Torgerson, *Multidimensional scaling: I*, Psychometrika 1952.
    """
    square = np.asarray(apart, np.float64) ** 2
    centred = square - square.mean(0) - square.mean(1)[:, None] + square.mean()
    values, vectors = np.linalg.eigh(-centred / 2)  # ascending
    points = (vectors * np.sqrt(np.maximum(values, 0)))[:, :-3:-1]
    return np.pad(points, ((0, 0), (0, 2 - points.shape[1])))  # one client alone has no second direction


def clusters(apart: np.ndarray) -> np.ndarray:
    """``[N]`` what spectral clustering makes of the distances, as HiLoRA does; the largest cluster is 0."""
    labels = np.asarray(_spectral(jnp.asarray(apart, jnp.float32)))
    found, sizes = np.unique(labels, return_counts=True)
    order = found[np.argsort(-sizes, kind="stable")]
    return np.argmax(labels[:, None] == order, axis=1)


@jax.jit
def _spectral(apart: Array) -> Array:
    everybody = jnp.ones(len(apart), bool)
    return clustering.spectral(jax.random.key(0), apart, everybody, 2, MOST).assignment
