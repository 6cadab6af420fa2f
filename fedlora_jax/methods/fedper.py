"""FedPer: *Federated Learning with Personalization Layers*, Arivazhagan et al., 2019, arXiv 1912.00818.

    (a, b) = sum_c p_c (a_c, b_c)        head_c stays with client c

All are trained together; the low-rank factors travel, what is trained in full (the head) does not. Which layers are
personal is a choice (there the last K_P): of a CLIP with two prompts one of them, as in FedOTP (Li et al., CVPR 2024,
arXiv 2403.00041, section 4.1), of one with adapters in both towers all but what these share, as in pFedMMA (Ghiasvand
et al., 2025, arXiv 2507.05394). Ours: a client that never took part starts from the base's.
"""

from __future__ import annotations

import re

from fedlora_jax import lora, personal
from fedlora_jax.lora import Adapter
from fedlora_jax.method import About, Method
from fedlora_jax.methods.fedit import fedit

ABOUT = About("FedPer", "Arivazhagan et al. 2019", "1912.00818", "a, b, head", "a, b", "n/a")


def fedper(stays: str = "") -> Method:
    """FedPer.

    Args:
      stays: regular expression, searched in the names of what is trained (``head/kernel``): what it finds stays with
        clients, low-rank or not, and the rest travels; ``""``: what is trained in full (``full`` of ``lora.new``).

    Raises:
      ValueError: (of ``init``) nothing stays.
    """
    inner = fedit()

    def divide(adapter: Adapter) -> tuple[Adapter, Adapter]:
        if not stays:
            return lora.split(adapter)
        flat = lora.flatten(adapter)
        own = {name: x for name, x in flat.items() if re.search(stays, name)}
        return lora.unflatten({name: x for name, x in flat.items() if name not in own}), lora.unflatten(own)

    def init(key, adapter):
        if not stays:
            personal.needs_head(adapter, "personal heads")
        elif not lora.flatten(divide(adapter)[1]):
            raise ValueError(
                f"stays={stays} finds nothing of what is trained, which is {', '.join(lora.flatten(adapter))}: name a "
                "part of it"
            )
        return inner.init(key, adapter)

    return personal.keeping(inner, divide)._replace(init=init)
