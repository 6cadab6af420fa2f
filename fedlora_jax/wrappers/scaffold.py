"""SCAFFOLD: *SCAFFOLD: Stochastic Controlled Averaging for Federated Learning*, Karimireddy et al., ICML 2020, arXiv
1910.06378, eq. 3 to 5 (option II).

    y <- y - eta (g(y) + c - c_i)        K steps from x        c_i+ = c_i - c + (x - y) / (K eta)      K: client i's
    c <- c + sum_S q_i (c_i+ - c_i)                            all controls start at zero, so that c = sum_i q_i c_i

The correction is the gradient of the penalty ``<w, c - c_i>``. ``(x - y) / (K eta)`` is a mean gradient under plain SGD
only: no momentum, no Adam inside. A client sends its control's change beside its adapter and receives c.

Ours: q_i is the part of the population's weight that client i has, as the mean of models is weighted too; with the
published ``q_i = 1 / N`` (``weights="uniform"``) rounds settle where the plain mean of all f_i is least, whatever
weighs the models. Controls are made of what clients send: what changes that stands outside (``wrappers/order.py``).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax.batches import steps_taken
from fedlora_jax.checks import refuse_outside
from fedlora_jax.lora import Adapter
from fedlora_jax.method import Method, mean, per_client
from fedlora_jax.wrappers.around import AboutWrapper, Wrapper, around
from fedlora_jax.wrappers.refusals import needs_an_adapter, same_structure
from fedlora_jax.wrappers.updates import control_weights, updates

ABOUT = {
    "scaffold": AboutWrapper(
        "SCAFFOLD",
        "Karimireddy et al. ICML 2020",
        "1910.06378",
        "control variates; SGD inside",
        "how many steps it took",
    )
}


class Context(NamedTuple):
    """c: [C, ...] the server's control. shift: c - c_i. mask: what is shared, all else is 0. way: [C] K eta."""

    c: Adapter
    shift: Adapter
    mask: Adapter
    way: Array


def scaffold(
    inner: Method, population: int, local_lr: float, weights: Literal["counts", "uniform"] = "counts"
) -> Method:
    """SCAFFOLD around ``inner``.

    Args:
      inner: a method whose server holds one adapter and whose clients carry one like it.
      population: number of clients N.
      local_lr: eta, of the clients' SGD.
      weights: q_i, ``counts``: as clients weigh in the population; ``uniform``: 1 / N, as published.

    Raises:
      ValueError: N or eta not above 0, other weights, or (at init or dispatch) another inner method; (when a round is
        traced) a part of the population that does not say how much of all weight it has (``Cohort.shares``).
    """
    q = control_weights("scaffold", weights, population)
    refuse_outside("[1, inf)", population=population)
    refuse_outside("(0, inf)", local_lr=local_lr)
    zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)

    def client_context(c, cohort, sent):
        same_structure("scaffold", c, sent.adapter, cohort.memory)
        trains = len(jax.tree.leaves(cohort.batches)) > 0
        steps = steps_taken(cohort.batches, 1) if trains else 1  # where nobody trains any number does
        shift = jax.tree.map(lambda c, ci, m: (c - ci) * m, c, cohort.memory, sent.mask)
        own = jax.tree.map(lambda c, x, m: jnp.broadcast_to(c, x.shape) * m, c, sent.adapter, sent.mask)
        return Context(own, shift, sent.mask, jnp.full(len(cohort.ids), steps * local_lr))

    def penalty(w, context):
        return sum(
            (jnp.sum(x * d) for x, d in zip(*map(jax.tree.leaves, (w, context.shift)), strict=True)), jnp.zeros(())
        )

    def remember(ci, context, x, y):
        step = lambda ci, c, x, y, m: ci - c + m * (x - y) / context.way
        return jax.tree.map(step, ci, context.c, x, y, context.mask)

    def finish(old, new, cohort, sent, received):
        context = sent.context
        moved = jax.tree.map(lambda d, c: -d / per_client(context.way, d) - c, updates(sent, received), context.c)
        return new, jax.tree.map(jnp.add, old.own, mean(moved, q(cohort)))

    def traffic(own, cohort):
        theirs = inner.traffic(own, cohort)
        return theirs._replace(up=(theirs.up, theirs.up), down=(theirs.down, theirs.up))  # controls of what is shared

    wrapper = Wrapper(
        "scaffold",
        init=lambda key, state, adapter: zeros(needs_an_adapter("scaffold", state)),
        init_client=zeros,
        client_context=client_context,
        penalty=penalty,
        remember=remember,
        finish=finish,
    )
    return around(inner, wrapper)._replace(traffic=traffic)
