"""FedVLM: *Scalable Personalized Vision-Language Models through Federated Learning*, Mitra et al., ECAI 2025, arXiv
2507.17088 (its adapter is called pLoRA).

    b = sum_c p_c b_c        a_c stays with client c

The mirror image of FedSA-LoRA: both factors are trained, only b and the head travel. Rank, scale and learning rate are
not public, nor is what becomes of a head: here it is shared.
"""

from __future__ import annotations

from fedlora_jax.method import About, Method
from fedlora_jax.methods.fedsa_lora import Head, partial_share

ABOUT = About("FedVLM", "Mitra et al. ECAI 2025", "2507.17088", "a, b, head", "b, head", "n/a (personal)", "a")


def fedvlm(head: Head = "shared") -> Method:
    """FedVLM.

    Args:
      head: parameters trained in full are ``shared``, averaged like ``b``, or ``personal``, kept like ``a``.

    Raises:
      ValueError: another head.
    """

    return partial_share("b", head)
