"""Server optimizers: *Adaptive Federated Optimization*, Reddi et al., ICLR 2021, arXiv 2003.00295, algorithm 2, and
FedAvgM: *Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification*, Hsu et al.,
2019, arXiv 1909.06335.

    D = new adapter of the inner method - old        m = b1 m + (1 - b1) D        w <- w + lr m / (sqrt(v) + tau)

    fedadagrad  v + D^2        fedyogi  v - (1 - b2) D^2 sign(v - D^2)        fedadam  b2 v + (1 - b2) D^2
    fedavgm     m = b1 m + D,  w <- w + lr m

As published: v starts at tau^2 and nothing is corrected for bias, unlike optax's own adam and yogi. An entry that no
client of the cohort may move has D = 0 and is the inner method's, whatever its momentum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fedlora_jax.checks import refuse_outside
from fedlora_jax.lora import Adapter
from fedlora_jax.method import Method
from fedlora_jax.wrappers.around import AboutWrapper, Wrapper, around, innermost, with_adapter
from fedlora_jax.wrappers.refusals import needs_an_adapter
from fedlora_jax.wrappers.updates import where_moved

_REDDI = "Reddi et al. ICLR 2021", "2003.00295"
ABOUT = {
    "fedavgm": AboutWrapper("FedAvgM", "Hsu et al. 2019", "1909.06335", "server momentum"),
    "fedadagrad": AboutWrapper("FedAdagrad", *_REDDI, "server Adagrad"),
    "fedyogi": AboutWrapper("FedYogi", *_REDDI, "server Yogi"),
    "fedadam": AboutWrapper("FedAdam", *_REDDI, "server Adam"),
}


def server(inner: Method, tx: optax.GradientTransformation, name: str = "server") -> Method:
    """``inner`` whose server takes steps of ``tx`` on the pseudo-gradient ``old adapter - new adapter``.

    Args:
      inner: a method whose server holds one adapter.
      tx: any optax transformation; ``optax.sgd(1.0)`` is ``inner``.
      name: of the wrapper, for what is said when it does not fit.

    Raises:
      ValueError: (at init) another inner method.
    """

    def finish(old, new, cohort, sent, received):
        w = innermost(old.inner).adapter
        theirs = innermost(new).adapter
        gradient = where_moved(
            inner, cohort, sent, jax.tree.map(jnp.subtract, w, theirs), jax.tree.map(jnp.zeros_like, w)
        )
        steps, own = tx.update(gradient, old.own, w)
        return with_adapter(new, where_moved(inner, cohort, sent, optax.apply_updates(w, steps), theirs)), own

    return around(
        inner, Wrapper(name, init=lambda key, state, adapter: tx.init(needs_an_adapter(name, state)), finish=finish)
    )


def fedavgm(inner: Method, lr: float = 1.0, b1: float = 0.9) -> Method:
    """FedAvgM around ``inner``: server SGD with momentum.

    Args:
      inner: a method whose server holds one adapter.
      lr: the server's, above 0; 1 with ``b1 = 0`` is ``inner``.
      b1: momentum, from 0 to below 1.

    Raises:
      ValueError: a number out of its range, or (at init) another inner method.
    """
    refuse_outside("(0, inf)", lr=lr)
    refuse_outside("[0, 1)", b1=b1)
    return server(inner, optax.sgd(lr, momentum=b1), "fedavgm")


def fedadagrad(inner: Method, lr: float = 0.01, b1: float = 0.0, tau: float = 1e-3) -> Method:
    """FedAdagrad around ``inner``.

    Args:
      inner, lr, b1, tau: as for ``fedadam``; the published experiments use ``b1 = 0``.

    Raises:
      ValueError: a number out of its range, or (at init) another inner method.
    """
    return server(inner, adaptive(lambda v, d2: v + d2, lr, b1, tau), "fedadagrad")


def fedyogi(inner: Method, lr: float = 0.01, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3) -> Method:
    """FedYogi around ``inner``.

    Args:
      inner, lr, b1, b2, tau: as for ``fedadam``.

    Raises:
      ValueError: a number out of its range, or (at init) another inner method.
    """
    refuse_outside("[0, 1)", b2=b2)
    return server(inner, adaptive(lambda v, d2: v - (1 - b2) * d2 * jnp.sign(v - d2), lr, b1, tau), "fedyogi")


def fedadam(inner: Method, lr: float = 0.01, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3) -> Method:
    """FedAdam around ``inner``.

    Args:
      inner: a method whose server holds one adapter.
      lr: the server's, above 0, in units of the parameters: about how far an entry moves in a round.
      b1, b2: how much of the first and second moments stays each round, from 0 to below 1.
      tau: added to the root of the second moment, above 0: entries that change less than that move less.

    Raises:
      ValueError: a number out of its range, or (at init) another inner method.
    """
    refuse_outside("[0, 1)", b2=b2)
    return server(inner, adaptive(lambda v, d2: b2 * v + (1 - b2) * d2, lr, b1, tau), "fedadam")


class AdaptiveState(NamedTuple):
    """m, v: of the shape of the adapter."""

    m: Adapter
    v: Adapter


def adaptive(second: Callable[[Array, Array], Array], lr: float, b1: float, tau: float) -> optax.GradientTransformation:
    """``-lr m / (sqrt(v) + tau)`` with ``v <- second(v, g^2)`` from ``v = tau^2``.

    Raises:
      ValueError: lr or tau not above 0, or b1 not at least 0 and below 1.
    """
    refuse_outside("(0, inf)", lr=lr, tau=tau)
    refuse_outside("[0, 1)", b1=b1)

    def init(params):
        v = jax.tree.map(lambda x: jnp.full_like(x, tau**2), params)
        return AdaptiveState(jax.tree.map(jnp.zeros_like, params), v)

    def update(updates, state, params=None):
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.m, updates)
        v = jax.tree.map(lambda v, g: second(v, g**2), state.v, updates)
        return jax.tree.map(lambda m, v: -lr * m / (jnp.sqrt(v) + tau), m, v), AdaptiveState(m, v)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]
