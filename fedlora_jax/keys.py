"""A key for every purpose.

In jax ``split(key)[i] == fold_in(key, i)``: two purposes that number their keys from one key draw the same numbers.
Clients, rounds, local steps and leaves are numbered; everything else that is drawn from such a key has a name.
"""

from __future__ import annotations

import jax
import numpy as np
from jax import Array


def purpose(key: Array, name: str) -> Array:
    """The key for what is called ``name`` among everything that is derived from ``key``.

    No number that is folded in (from -1 to 2^31 - 1) and no ``split`` gives it, and neither does another name.
    """
    return jax.random.fold_in(key, np.uint32(2**31 + stable_hash(name)))


def stable_hash(name: str) -> int:
    """A number from 0 to 2^31 - 2 that does not change between processes (Python's own hash does)."""
    value = 0
    for byte in name.encode():
        value = (value * 131 + byte) % (2**31 - 1)
    return value
