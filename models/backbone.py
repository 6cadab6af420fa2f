"""The one door for models: what an experiment needs of one, whatever it is made of.

A *family* is a function that makes a ``Backbone`` (``FAMILIES`` in ``models/families.py``, or one of your own); it is
given what it asks for by name: ``classes`` (the names of the classes to come), ``image_size`` (their images' side),
``weights`` (a path), and whatever else the weights' owner may set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
from jax import Array

from fedlora_jax.lora import Adapter, Params, flatten, refuse_unnamed

NO_ADAPTER: Adapter = {}


class Apply(Protocol):
    """Images to what a model makes of them."""

    def __call__(
        self, params: Params, adapter: Adapter, images: Array, *, training: bool = False
    ) -> tuple[Array, Array]:
        """``(logits [n, classes], features [n, width])`` of uint8 ``images [n, H, W, 3]``, or of a stem's tokens.

        Args:
          params: of the model.
          adapter: ``lora.new`` of them, or ``NO_ADAPTER``.
          images: as they are stored; the model normalises them.
          training: the result is about to be differentiated: a model may compute in another way, with the same result.

        Layers of ``fedlora_jax.Dense`` read ``lora.variables(params, adapter)``; any other model computes with
        ``lora.merge(params, adapter)``, which is ``params`` where the adapter is empty.
        """
        ...


class Stem(NamedTuple):
    """What comes before the adapted blocks of a model: the same in every step and round."""

    params: Params  # on the host
    apply: Callable[[Params, Array], Array]  # uint8 images -> tokens [n, ...], what the rest of the model begins with


class Published(NamedTuple):
    """What goes into a weight file, and beside it."""

    arrays: dict[str, np.ndarray]  # under the names by which the family reads them
    said: dict[str, Any]  # what the arrays do not say, for the file's metadata
    beside: Mapping[str, bytes] = MappingProxyType({})  # files by name; with any, all are a folder


class Linear(NamedTuple):
    """A linear layer of a published network, and where it is in ours.

    Attributes:
      kernels: ours, ``[in, out]`` or of all blocks ``[blocks, in, out]``, side by side along ``out``.
      row: which of the blocks it is in; ``None``: in none.
      gain: ``[out]``, what its output is multiplied by there and which is in our kernel; ``None``: nothing.
      extra: inputs that it has there behind ours, and that do not count here.
    """

    kernels: tuple[str, ...]
    row: int | None = None
    gain: np.ndarray | None = None
    extra: int = 0


class Layout(NamedTuple):
    """A published network as PyTorch sees it, for adapters that leave or come in (``models.peft``).

    Attributes:
      linears: its linear layers, by the names of their modules.
      base: how it is made, as code with ``{classes}`` for their number.
      elsewhere: further linear layers of it, which nothing here adapts (a tower for text) -> whether an adapter that
        came in had an update of it, which is in the model by now.
    """

    linears: Mapping[str, Linear]
    base: str
    elsewhere: Mapping[str, bool] = MappingProxyType({})


class Backbone(NamedTuple):
    """A frozen model that adapters are put into.

    Attributes:
      name: of the model.
      params: on the host, nested dicts of arrays with string keys.
      apply: see ``Apply``.
      targets: sets of kernels by name, each as regular expressions for ``lora.new``; that called ``default`` is adapted
        where nothing else is asked for.
      facts: what was used beside the arrays, and where it was found.
      depth: blocks that it has; 0 where there is nothing to count.
      cut: ``(blocks) -> (stem, rest)``, the model in two before its last ``blocks``, fewer than all of them; ``None``:
        it cannot be.
      publish: ``(params) -> Published``, parameters like its own as its family reads them again, of the whole model
        where it was cut; ``None``: they have no other names than here.
      layouts: the published network, by whose names; adapters leave under the first where nothing else is asked for.
      texts: ``(params, adapter) -> [classes, d]`` what it makes of the texts of the classes, each of length 1;
        ``None``: it reads none while it is trained.
    """

    name: str
    params: Params
    apply: Apply
    targets: Mapping[str, Sequence[str]] = MappingProxyType({})
    facts: Mapping[str, str] = MappingProxyType({})
    depth: int = 0
    cut: Callable[[int], tuple[Stem, Backbone]] | None = None
    publish: Callable[[Params], Published] | None = None
    layouts: Mapping[str, Layout] = MappingProxyType({})
    texts: Callable[[Params, Adapter], Array] | None = None

    def patterns(self, targets: Sequence[str]) -> tuple[str, ...]:
        """Regular expressions of kernels, for names of this model's sets or expressions of one's own.

        Raises:
          ValueError: ``default`` is asked for, and the model has no set of that name; or a word that is neither a set
            nor in the name of a parameter.
        """
        if "default" in targets and "default" not in self.targets:
            sets = f"one of its sets ({', '.join(self.targets)})" if self.targets else "its kernels"
            raise ValueError(
                f"{self.name} does not say which kernels get adapters: name {sets} in --targets, or give regular "
                "expressions"
            )
        names = flatten(self.params)
        for word in targets:
            if word.isidentifier() and word not in self.targets and not any(word in name for name in names):
                raise ValueError(
                    f"no parameter matches {word!r}, and the sets of {self.name} are "
                    f"{', '.join(self.targets) or 'none'}: see --targets"
                )
        return tuple(pattern for target in targets for pattern in self.targets.get(target, (target,)))


def checked(made: Any, origin: str) -> Backbone:
    """What a family's function made, if it is a backbone.

    Raises:
      ValueError: it is something else, or its parameters are not nested dicts of finite arrays.
    """
    if getattr(made, "_fields", None) != Backbone._fields:  # it may come from here under either of its names
        raise ValueError(
            f"{origin} returned {type(made).__name__}: expected models.backbone.Backbone(name, params, apply)"
        )
    if not isinstance(made.targets, Mapping) or any(
        isinstance(x, str) or not all(isinstance(pattern, str) for pattern in x) for x in made.targets.values()
    ):
        raise ValueError(
            f"{origin}: targets is {made.targets!r}: expected lists of regular expressions by name, as in "
            '{"default": ["attn/query/kernel"]}'
        )

    try:
        refuse_unnamed(made.params)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from None
    for name, x in flatten(made.params).items():
        if not np.isfinite(np.asarray(x, np.float32)).all():
            raise ValueError(f"{origin}: params/{name} holds NaN or infinite values")
    if not isinstance(made.name, str) or not callable(made.apply) or not isinstance(made.facts, Mapping):
        raise ValueError(
            f"{origin}: expected a name, a function apply and a dict of facts; got {made.name!r}, {made.apply!r} and "
            f"{made.facts!r}"
        )
    return made
