"""Adapters in the last blocks of both towers of a CLIP, whose middle projection the two towers share.

    block(x) + s U relu(M relu(D x'))        x': what the attention of the block is given, the norm of x

Yang et al., *MMA: Multi-Modal Adapter for Vision-Language Models*, CVPR 2024, eq. 5-7, and its code; M and its bias are
one and the same in the j-th last block of both towers. In a federation M alone travels (Ghiasvand et al., *pFedMMA*,
2025, arXiv 2507.05394): ``--full ^bridge/,bridge/(down|up)/`` with ``fedper:stays=blocks.bridge``. M stands under
``bridge [blocks, ..]``, D and U of a tower under ``blocks/bridge [depth, ..]``, with s, 0 in blocks without adapter.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedlora_jax import lora
from fedlora_jax.lora import Adapter, Dense, Params

BRIDGE, MIDDLE = "bridge", "shared"


class Bridge(nn.Module):
    """``s U relu(M relu(D x))`` of one block."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = self.get_variable("params", MIDDLE)["bias"].shape[-1]
        h = nn.relu(Dense(width, name="down")(x))
        h = nn.relu(Dense(width, name=MIDDLE)(h))
        return self.param("scale", nn.initializers.zeros, ()).astype(x.dtype) * Dense(x.shape[-1], name="up")(h)


def bridged(block: nn.Module, x: Array, h: Array) -> Array:
    """``h``, and what the adapter makes of ``x`` where a block is given the parameters of a whole one."""
    if MIDDLE not in block.get_variable("params", BRIDGE, {}):
        return h
    return h + Bridge(name=BRIDGE)(x)


class Asked(NamedTuple):
    """What was asked for: of the last ``blocks`` of both towers, adapters of ``width``, times ``scale``."""

    blocks: int
    width: int
    scale: float


def asked(text: str, depth: int) -> Asked:
    """``BLOCKS:WIDTH:SCALE``, of towers whose shallower one has ``depth`` blocks.

    Raises:
      ValueError: it is not of that form, or there are fewer blocks.
    """
    found = re.fullmatch(r"(\d+):(\d+):(\d*\.?\d+(?:e-?\d+)?)", text)
    made = found and Asked(int(found[1]), int(found[2]), float(found[3]))
    if not made or not 1 <= made.blocks <= depth or not made.width or not made.scale:
        raise ValueError(
            f"--bridge {text}: expected BLOCKS:WIDTH:SCALE, as in 2:32:0.1, with 1 to {depth} blocks of both towers"
        )
    return made


def drawn(bridge: Asked, tower: Params, seed: int) -> Params:
    """D, U and s of one tower with the parameters ``tower``, as He et al., ICCV 2015, eq. 10 draws them."""
    depth, width = np.shape(tower["blocks"]["norm1"]["scale"])
    draw = np.random.default_rng(seed).normal
    linear = lambda i, o: {"kernel": draw(size=(depth, i, o)) * (2 / o) ** 0.5, "bias": np.zeros((depth, o))}
    scale = np.where(np.arange(depth) < depth - bridge.blocks, 0, bridge.scale)
    return _float32({"down": linear(width, bridge.width), "up": linear(bridge.width, width), "scale": scale})


def middle(bridge: Asked, seed: int) -> Params:
    """M, drawn in the same way."""
    shape = (bridge.blocks, bridge.width, bridge.width)
    kernel = np.random.default_rng(seed).normal(size=shape) * (2 / bridge.width) ** 0.5
    return _float32({"kernel": kernel, "bias": np.zeros(shape[:-1])})


def joined(tower: Params, params: Params, adapter: Adapter) -> Params:
    """The parameters of a tower with those of M, and what ``adapter`` adds to them, in its last blocks."""
    if BRIDGE not in params:
        return tower
    shared = lora.merge(params[BRIDGE], adapter.get(BRIDGE, {}))
    depth = len(tower["blocks"][BRIDGE]["scale"])
    fitted = {name: jnp.pad(x, [(depth, 0), *[(0, 0)] * (x.ndim - 1)])[-depth:] for name, x in shared.items()}
    blocks = {**tower["blocks"], BRIDGE: {**tower["blocks"][BRIDGE], MIDDLE: fitted}}
    return {**tower, "blocks": blocks}


def _float32(tree: Any) -> Any:
    return lora.unflatten({name: np.asarray(x, np.float32) for name, x in lora.flatten(tree).items()})
