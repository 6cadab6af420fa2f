"""Learning through federated rounds: how a client's start should have been different, and derivatives of whole rounds.

A *meta-gradient* is a direction ``[...]`` of the shape of an adapter along which a client's loss rises, taken at the
start it was sent. A method whose starts depend on what the server has learned pulls meta-gradients back through its own
``dispatch`` (``Method.learn``). There are three, in descending order of what they ask of a client:

    exact          (d y / d x)^T grad L(y)     y = x after T local steps, L its loss on examples kept apart
    first_order    grad L(y)                   the local steps count as a constant shift (FOMAML)
    displacement   x - y                       what every server has (Reptile; pFedHN)

Sources: Finn, Abbeel and Levine, *Model-Agnostic Meta-Learning*, ICML 2017, arXiv 1703.03400; Nichol, Achiam and
Schulman, *On First-Order Meta-Learning Algorithms*, 2018, arXiv 1803.02999; Shamsian et al., *Personalized Federated
Learning using Hypernetworks*, ICML 2021, arXiv 2103.04628.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax.lora import Adapter, Params
from fedlora_jax.method import Cohort, MetaGradient, Method, State, models
from fedlora_jax.rounds import make_round
from fedlora_jax.training import LossFn, Optimizer, Trace, map_clients

Tune = Callable[[Adapter], tuple[Adapter, Trace]]  # a start -> (after local steps, trace)
Judge = Callable[[Adapter], Array]  # an adapter -> its loss on the examples kept apart


def _displacement(tune: Tune, judge: Judge, start: Adapter) -> tuple[Adapter, Trace, Adapter]:
    end, trace = tune(start)
    return end, trace, jax.tree.map(lambda x, y: x - y, start, end)


def _first_order(tune: Tune, judge: Judge, start: Adapter) -> tuple[Adapter, Trace, Adapter]:
    end, trace = tune(start)
    return end, trace, jax.grad(judge)(end)


def _exact(tune: Tune, judge: Judge, start: Adapter) -> tuple[Adapter, Trace, Adapter]:
    def outcome(start: Adapter):
        end, trace = tune(start)
        return judge(end), (end, trace)

    meta_gradient, (end, trace) = jax.grad(outcome, has_aux=True)(start)
    return end, trace, meta_gradient


displacement = MetaGradient(_displacement, lambda steps: steps)
"""Needs no examples apart and nothing of the client but what it sends anyway."""

first_order = MetaGradient(_first_order, lambda steps: steps + 1)
"""A gradient that the client sends beside its adapter."""

exact = MetaGradient(_exact, lambda steps: 1 + steps * (2 if steps == 1 else 3))
"""Through all local steps: each is differentiated and, where there are several, computed once more for that."""


def also_at_the_start(meta_gradient: MetaGradient, kappa: float) -> MetaGradient:
    """``meta_gradient + kappa grad L(x)``: the model as sent counts as well, for clients that take no local steps."""

    def train(tune: Tune, judge: Judge, start: Adapter) -> tuple[Adapter, Trace, Adapter]:
        end, trace, after = meta_gradient.train(tune, judge, start)
        return end, trace, jax.tree.map(lambda x, g: x + kappa * g, after, jax.grad(judge)(start))

    return MetaGradient(train, lambda steps: meta_gradient.passes(steps) + 1)


META_GRADIENTS = {"exact": exact, "first_order": first_order, "displacement": displacement}


def outcome(
    method: Method,
    loss_fn: LossFn,
    optimizer: Optimizer,
    *,
    chunk: int | None = None,
    remat: bool = True,
    judge_fn: LossFn | None = None,
) -> Callable[..., tuple[Array, State]]:
    """``(base, state, cohorts, examples, key, first=0) -> (loss, state)``: what federated rounds lead to.

    It is there to be differentiated, in reverse mode (with ``remat=False`` in forward mode, too): in the state, in the
    base, and in any hyper-parameter that the method, the loss or the optimizer was built with (build them inside the
    function that is differentiated). The loss is that of the models the last state sends to the last cohort, each on
    the client's own examples, weighted as in aggregation. Memory is that of one round, and what clients keep between
    rounds (``Method.remember``) is not carried on.

    Args:
      method, loss_fn, optimizer, chunk, remat, judge_fn: as in ``make_round``; the last judges the outcome, too.

    The function's own are ``cohorts`` with a leading axis of rounds on every array, ``[K, C, ...]``; ``examples``
    ``[C, ...]``, one batch for each client of the last cohort, which the local steps of none of these rounds should
    have seen (``clients.sample_rounds``); ``first``, the number of the first round, for an optimizer that follows
    rounds.
    """
    round_fn = make_round(method, loss_fn, optimizer, chunk=chunk, remat=remat, judge_fn=judge_fn)
    outcome_fn = judge_fn or loss_fn

    def after_rounds(base: Params, state: State, cohorts: Cohort, examples: Any, key: Array, first=0):
        rounds = jax.tree.leaves(cohorts.batches)[0].shape[0]

        @jax.checkpoint
        def one(state: State, inputs: tuple[Array, Cohort]):
            t, cohort = inputs
            return round_fn(base, state, cohort, jax.random.fold_in(key, t), first + t)[0], None

        state, _ = jax.lax.scan(one, state, (jnp.arange(rounds), cohorts))
        last = jax.tree.map(lambda x: x[-1], cohorts)
        sent = method.dispatch(base, state, last)
        judge = lambda row: outcome_fn(sent.base, row[0], row[1], jax.random.fold_in(key, rounds))
        losses = map_clients(judge, (models(method, sent), examples), chunk)
        return losses @ last.weights / last.weights.sum(), state

    return after_rounds
