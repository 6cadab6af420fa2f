"""FedSA-LoRA: *Selective Aggregation for Low-Rank Adaptation in Federated Learning*, Guo et al., ICLR 2025, arXiv
2410.01463.

    a = sum_c p_c a_c        b_c stays with client c

Both factors are trained; a is said to hold what clients have in common, b what they have not. Only a and the head
travel. The head is shared or personal, depending on the paper's task: an option here.

``partial_share`` is the idea with either factor; FedVLM shares the other one.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from fedlora_jax import lora
from fedlora_jax.lora import Adapter, LoRA
from fedlora_jax.method import About, Method, Traffic, mean, memory_of, revived
from fedlora_jax.methods.fedit import FedITState, fedit

ABOUT = About("FedSA-LoRA", "Guo et al. ICLR 2025", "2410.01463", "a, b, head", "a, head", "n/a (personal)", "b")

Share = Literal["a", "b", "none"]
Head = Literal["shared", "personal"]

_OWN = {"a": lambda x: x.b, "b": lambda x: x.a, "none": lambda x: x}
_UPLOADED = {"a": lambda x: x.a, "b": lambda x: x.b, "none": lambda x: ()}
_WITH = {"a": lambda x, b: LoRA(x.a, b, x.scale), "b": lambda x, a: LoRA(a, x.b, x.scale), "none": lambda x, own: own}


def fedsa_lora(head: Head = "shared") -> Method:
    """FedSA-LoRA.

    Args:
      head: parameters trained in full are ``shared``, averaged like ``a``, or ``personal``, kept like ``b``.

    Raises:
      ValueError: another head.
    """

    return partial_share("a", head)


def partial_share(share: Share, head: Head = "shared") -> Method:
    """Share one factor of every product (``none``: neither), keep the other with each client.

    A client that never took part begins with what everybody began with. What is dispatched to nobody in particular has
    the mean of the cohort's personal parts (``average_client``): our stand-in for a global model, which no real server
    could compute.

    Args:
      share: the factor that travels and is averaged.
      head: parameters trained in full are ``shared`` or ``personal``.
    """
    if share not in _OWN:
        raise ValueError(f"share must be 'a', 'b' or 'none', got {share!r}")
    if head not in ("shared", "personal"):
        raise ValueError(f"head must be 'shared' or 'personal', got {head!r}")
    inner = fedit()

    def own(adapter: Adapter) -> Adapter:
        """What stays with a client, by name."""
        flat = lora.flatten(adapter)
        parts = {name: _OWN[share](x) if lora.is_lora(x) else x for name, x in flat.items()}
        return {name: part for name, part in parts.items() if lora.is_lora(flat[name]) or head == "personal"}

    def with_own(adapter: Adapter, parts: Adapter) -> Adapter:
        flat = lora.flatten(adapter)
        put = lambda x, part: _WITH[share](x, part) if lora.is_lora(x) else part
        return lora.unflatten(flat | {name: put(flat[name], part) for name, part in parts.items()})

    def dispatch(base, state, cohort):
        sent = inner.dispatch(base, state, cohort)
        rows = jax.tree.map(jnp.multiply, with_own(sent.adapter, memory_of(cohort)), sent.mask)
        return sent._replace(adapter=rows, context=rows)

    def aggregate(base, state, cohort, sent, received):
        new = revived(state.adapter, mean(received, cohort.weights), cohort.ranks, cohort.weights)
        return FedITState(with_own(new, own(state.adapter)))

    def remember(memory, context, sent, received):
        return own(received)

    def traffic(own_adapter, cohort):
        uploaded = lora.tree_map(_UPLOADED[share], own_adapter, full=lambda x: x if head == "shared" else ())
        return Traffic(up=uploaded, down=uploaded)

    return Method(
        inner.init,
        dispatch,
        aggregate,
        init_client=own,
        remember=remember,
        traffic=traffic,
        upload_mask=lambda mask: with_own(mask, jax.tree.map(jnp.zeros_like, own(mask))),
    )
