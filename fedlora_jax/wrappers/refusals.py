"""Methods, models and signatures that a wrapper cannot do with, refused with what to do instead."""

from __future__ import annotations

from typing import Any

import jax

from fedlora_jax import lora
from fedlora_jax.lora import Adapter
from fedlora_jax.method import Method, State, no_learning
from fedlora_jax.signatures import Signature
from fedlora_jax.wrappers.around import innermost


def needs_an_adapter(wrapper: str, state: State) -> Adapter:
    """The global adapter of a method, if that is where all that it learned is.

    Raises:
      ValueError: it has none, or keeps a residual on the base besides.
    """
    state = innermost(state)
    if not hasattr(state, "adapter") or hasattr(state, "residual"):
        why = "keeps a residual on the base" if hasattr(state, "residual") else "has no global adapter"
        raise ValueError(
            f"{wrapper} keeps something in the coordinates of the server's adapter, and a method with "
            f"{type(state).__name__} {why}: wrap one whose server holds one adapter, such as fedit or flexlora"
        )
    return state.adapter


def needs_plain_uploads(wrapper: str, inner: Method) -> None:
    """Refuse a method that learns from what clients send beside their adapters."""
    if inner.learn is not no_learning:
        raise ValueError(
            f"{wrapper} acts on the adapters that clients send, and this method also learns from meta-gradients, which "
            "it would not reach: wrap a method that aggregates adapters only, such as fedit"
        )


def same_structure(wrapper: str, mine: Adapter, *theirs: Adapter) -> None:
    """Refuse a method whose clients carry or keep something else than an adapter like the server's."""
    if any(jax.tree.structure(mine) != jax.tree.structure(x) for x in theirs):
        raise ValueError(
            f"{wrapper} keeps a number for every entry of the server's adapter, and clients of this method carry a "
            "tree of another structure: wrap a method whose clients carry one adapter, such as fedit"
        )


def class_bias(wrapper: str, model: Adapter, classes: int) -> str:
    """The name of the head's bias.

    Raises:
      ValueError: there is not exactly one bias of that many classes that is trained in full.
    """
    flat = lora.flatten(model)
    names = [k for k, x in flat.items() if not lora.is_lora(x) and x.shape == (classes,) and k.endswith("bias")]
    if len(names) != 1:
        raise ValueError(
            f"{wrapper} shifts the bias of the {classes} classes, trained in full; the adapter has "
            f"{', '.join(names) or 'none'}: add the head's bias to full in lora.new"
        )
    return names[0]


def tells_of_labels(wrapper: str, signatures: Any) -> Signature:
    """The signatures, if they say what a client's labels are.

    Raises:
      ValueError: they do not.
    """
    if not isinstance(signatures, Signature) or signatures.labels.shape[-1] == 0:
        raise ValueError(
            f"{wrapper} needs to know how many examples of each class a client holds, and its signature says nothing "
            "of labels: use full signatures (fedlora_jax.signatures), or another wrapper"
        )
    return signatures
