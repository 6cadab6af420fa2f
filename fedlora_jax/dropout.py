"""Dropout on the inputs of low-rank updates: Hu et al., 2021, arXiv 2106.09685, table 11 ("LoRA dropout"), as in PEFT.

    x @ W + s * (drop(x) @ a) @ b,    drop(x) = x m / (1 - rate),  m = 1 with probability 1 - rate, else 0

It is a switch of the forward pass, which ``lora.Dense`` looks for beside its adapter. A model that computes with
``lora.merge(params, adapter)`` has no such input, and leaves it out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from fedlora_jax import lora
from fedlora_jax.keys import stable_hash
from fedlora_jax.lora import Adapter


@struct.dataclass
class Dropout:
    """Of one kernel; ``rate`` is static."""

    key: Array  # [...] typed; leading axes (layers) as those of the kernel
    rate: float = struct.field(pytree_node=False)

    def __call__(self, x: Array) -> Array:
        kept = jax.random.bernoulli(self.key, 1 - self.rate, x.shape)
        return jnp.where(kept, x / (1 - self.rate), 0)


def switched_on(adapter: Adapter, key: Array, rate: float) -> Adapter:
    """The adapter with a ``Dropout`` beside each of its updates, to compute a loss with.

    Args:
      adapter: of one client.
      key: of the step; each kernel and each layer draws from its own.
      rate: share of the inputs that are dropped, at least 0 and below 1.
    """
    flat = lora.flatten(adapter)
    for name, x in list(flat.items()):
        if lora.is_lora(x):
            own, layers = jax.random.fold_in(key, stable_hash(name)), x.a.shape[:-2]
            beside = "/".join([*name.split("/")[:-1], "dropout"])
            flat[beside] = Dropout(jax.random.split(own, layers) if layers else own, rate)
    return lora.unflatten(flat)
