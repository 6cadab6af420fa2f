"""FedDyn: *Federated Learning Based on Dynamic Regularization*, Acar et al., ICLR 2021, arXiv 2111.04263, algorithm 1.

    minimise  f_i(w) - <h_i, w> + al / 2 |w - w_g|^2        h_i <- h_i - al (w_i - w_g)
    h <- h - al sum_S q_i (w_i - w_g)                       w_g = mean of w_i - h / al

The mean is that of the inner method. The norm is squared, over what clients share. Ours: h waits where no
client of the cohort may move an entry; and q_i is the part of the population's weight that client i has, so that h is
the mean of the h_i with the weights of the model's mean. Published is ``q_i = 1 / N`` (``weights="uniform"``), which
settles where the plain mean of all f_i is least, whatever weighs the models.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from fedlora_jax.checks import refuse_outside
from fedlora_jax.lora import Adapter
from fedlora_jax.method import Method, mean
from fedlora_jax.wrappers.around import AboutWrapper, Wrapper, around, innermost, with_adapter
from fedlora_jax.wrappers.refusals import needs_an_adapter, same_structure
from fedlora_jax.wrappers.updates import control_weights, updates, where_moved

ABOUT = {"feddyn": AboutWrapper("FedDyn", "Acar et al. ICLR 2021", "2111.04263", "dynamic regularisation")}


class Context(NamedTuple):
    """start: [C, ...] w_g as sent. h: [C, ...] the client's, masked. mask: of what clients share."""

    start: Adapter
    h: Adapter
    mask: Adapter


def feddyn(
    inner: Method, population: int, al: float = 0.01, weights: Literal["counts", "uniform"] = "counts"
) -> Method:
    """FedDyn around ``inner``.

    Args:
      inner: a method whose server holds one adapter and whose clients carry one like it.
      population: number of clients N.
      al: weight of the regularisation.
      weights: q_i, ``counts``: as clients weigh in the population; ``uniform``: 1 / N, as published.

    Raises:
      ValueError: N or al not above 0, other weights, or (at init or dispatch) another inner method; (when a round is
        traced) a part of the population that does not say how much of all weight it has (``Cohort.shares``).
    """
    q = control_weights("feddyn", weights, population)
    refuse_outside("[1, inf)", population=population)
    refuse_outside("(0, inf)", al=al)
    zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)

    def client_context(h, cohort, sent):
        same_structure("feddyn", h, sent.adapter, cohort.memory)
        return Context(sent.adapter, jax.tree.map(jnp.multiply, cohort.memory, sent.mask), sent.mask)

    def penalty(w, context):
        one = lambda w, x, h, m: jnp.sum(m * (al / 2 * (w - x) ** 2) - h * w)
        return sum(jax.tree.leaves(jax.tree.map(one, w, context.start, context.h, context.mask)), jnp.zeros(()))

    def finish(old, new, cohort, sent, received):
        drift = mean(updates(sent, received), q(cohort))
        h = jax.tree.map(lambda h, d: h - al * d, old.own, drift)
        theirs = innermost(new).adapter
        moved = jax.tree.map(lambda w, h: w - h / al, theirs, h)
        return with_adapter(new, where_moved(inner, cohort, sent, moved, theirs)), h

    wrapper = Wrapper(
        "feddyn",
        init=lambda key, state, adapter: zeros(needs_an_adapter("feddyn", state)),
        init_client=zeros,
        client_context=client_context,
        penalty=penalty,
        remember=lambda h, context, x, y: jax.tree.map(lambda h, x, y, m: h - al * m * (y - x), h, x, y, context.mask),
        finish=finish,
    )
    return around(inner, wrapper)
