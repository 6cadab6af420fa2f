"""Clients that do badly count more.

    q-FFL   minimise sum_i p_i F_i(w)^(q+1) / (q + 1)
            w <- w + sum_i p_i F_i^q (w_i - w) / sum_i p_i (F_i^q + q F_i^(q-1) L |w_i - w|^2)
    AFL     minimise over w the largest sum_i lam_i F_i(w) over lam
            w <- sum_i lam_i w_i        lam_i <- lam_i e^(lr F_i) / sum_j lam_j e^(lr F_j)

Li et al., *Fair Resource Allocation in Federated Learning*, ICLR 2020, arXiv 1905.10497, algorithm 2 with L = curvature
/ eta (q-FedAvg); Mohri et al., *Agnostic Federated Learning*, ICML 2019, arXiv 1902.00146.

F_i is client i's loss of the model as sent, before its first local step: one number more beside its adapter. Ours: it
is that of the first batch (``Cohort.losses``); p_i weighs the terms, as q-FedAvg's draw of clients does; AFL takes
multiplicative steps, where the paper projects on the simplex, so that nobody's weight is ever zero, and who is away
keeps its lam_i. A client whose loss is not finite is left out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax.checks import refuse_outside
from fedlora_jax.method import Cohort, Method
from fedlora_jax.wrappers.around import AboutWrapper, Wrapper, around
from fedlora_jax.wrappers.updates import changed, square_norms, updates

ABOUT = {
    "qffl": AboutWrapper(
        "q-FFL", "Li et al. ICLR 2020", "1905.10497", "clients weigh by their loss to the power q", "its loss"
    ),
    "afl": AboutWrapper(
        "AFL", "Mohri et al. ICML 2019", "1902.00146", "weights towards the worst mixture of clients", "its loss"
    ),
}
LEAST = 1e-6  # a loss below it counts as this


def qffl(inner: Method, local_lr: float, q: float = 1.0, curvature: float = 1.0) -> Method:
    """q-FFL around ``inner``; ``q = 0`` is ``inner``.

    Args:
      inner: a method that aggregates adapters.
      local_lr: eta, of the clients' SGD; the larger, the smaller the step where q is not 0.
      q: how much fairness counts, at least 0.
      curvature: the loss's, in units of 1 / eta: 1 as published; 0 takes no account of it, and weighs clients alone.

    Raises:
      ValueError: a number out of range.
    """
    refuse_outside("[0, inf)", q=q, curvature=curvature)
    refuse_outside("(0, inf)", local_lr=local_lr)

    def receive(own, cohort, sent, received):
        loss, there = losses_as_sent(cohort)
        d = updates(sent, received)
        fair, bent = there * loss**q, there * q * loss ** (q - 1) * curvature * square_norms(d) / local_lr
        step = fair.sum() / jnp.maximum(fair.sum() + bent.sum(), 1e-30)
        return scaled_to_one(fair, cohort.weights), changed(
            sent.mask, sent.adapter, received, jax.tree.map(lambda x: step.astype(x.dtype) * x, d)
        )

    return _with_a_loss(inner, Wrapper("qffl", receive=receive))


def afl(inner: Method, population: int, lr: float = 0.1) -> Method:
    """AFL around ``inner``; ``lr = 0`` is ``inner`` of clients that weigh alike.

    Args:
      inner: a method that aggregates adapters.
      population: number of clients N; ``Cohort.ids`` are below it.
      lr: of lam, at least 0.

    Raises:
      ValueError: a number out of range.
    """
    refuse_outside("[1, inf)", population=population)
    refuse_outside("[0, inf)", lr=lr)

    def receive(lam, cohort, sent, received):
        return scaled_to_one(jnp.where(losses_as_sent(cohort)[1] > 0, lam[cohort.ids], 0.0), cohort.weights), received

    def finish(old, new, cohort, sent, received):
        loss, there = losses_as_sent(cohort)
        rows = jnp.where(there > 0, cohort.ids, population)  # of nobody: it is dropped
        grown = jnp.log(old.own).at[rows].add(lr * loss, mode="drop")
        return new, jax.nn.softmax(grown)

    wrapper = Wrapper(
        "afl",
        init=lambda key, state, adapter: jnp.full(population, 1 / population, jnp.float32),
        receive=receive,
        finish=finish,
        report=lambda lam: {"largest_weight": lam.max()},
    )
    return _with_a_loss(inner, wrapper)


def losses_as_sent(cohort: Cohort) -> tuple[Array, Array]:
    """``[C]`` each client's loss of its first batch, at least ``LEAST``, and its weight, 0 where that is not finite.

    Raises:
      ValueError: the cohort has none: it is not from ``make_round``.
    """
    if isinstance(cohort.losses, tuple):
        raise ValueError("the cohort has no losses of local steps: make_round gives them, or Cohort(losses=[C, T])")
    loss = cohort.losses[:, 0].astype(jnp.float32)
    fine = jnp.isfinite(loss)
    return jnp.maximum(jnp.where(fine, loss, 1.0), LEAST), jnp.where(fine, cohort.weights, 0.0)


def scaled_to_one(weights: Array, otherwise: Array) -> Array:
    """``[C]`` weights that sum to one; ``otherwise`` where none is above zero."""
    total = weights.sum()
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), otherwise)


def _with_a_loss(inner: Method, own: Wrapper) -> Method:
    def traffic(mine, cohort):
        theirs = inner.traffic(mine, cohort)
        return theirs._replace(up=(theirs.up, jnp.zeros(())))

    return around(inner, own)._replace(traffic=traffic)
