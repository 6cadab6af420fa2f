"""Clients of several ranks under partial participation: what is reported and scored is the server's whole model."""

import jax
import numpy as np
import pytest
from helpers import (
    ADAPTER,
    BASE,
    KEY,
    METHODS,
    OPTIMIZER,
    RANK,
    SCALE,
    built,
    copies,
    dense,
    examples,
    jit,
    logits,
    loss_fn,
    members,
    normalised,
    nudged,
    take,
    train,
)

from fedlora_jax import lora, rounds
from fedlora_jax.method import average_client
from fedlora_jax.methods.fedit import fedit
from fedlora_jax.methods.flexlora import flexlora


def norms(rows) -> float:
    return np.sqrt(sum(np.sum(np.square(x)) for x in rows))


def products(adapter) -> list[np.ndarray]:
    return [SCALE * dense(x) for x in lora.low_rank_leaves(adapter)]


@pytest.mark.parametrize("make", [flexlora, fedit])
def test_the_bias_of_a_cohort_of_small_ranks_is_that_of_the_whole_server(make):
    """No client of this round has the server's rank: its last column is missing in all of them, not in the server."""
    method = make()
    c = normalised(members(method, ranks=[1] * 4))
    state = method.init(KEY, nudged(ADAPTER))
    new, _, info = jit(rounds.make_round(method, loss_fn, OPTIMIZER))(BASE, state, c, KEY)
    sent = method.dispatch(BASE, state, c)
    received, _ = train(method, sent, c, KEY)
    clients = [sum(np.float64(p) * x[i] for i, p in enumerate(c.weights)) for x in products(received)]
    starts = [sum(np.float64(p) * x[i] for i, p in enumerate(c.weights)) for x in products(sent.adapter)]
    bias = norms(x - y for x, y in zip(products(new.adapter), clients, strict=True))
    np.testing.assert_allclose(info.aggregation.bias, bias, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(
        info.aggregation.update, norms(np.subtract(clients[i], starts[i]) for i in (0, 1)), rtol=1e-3
    )
    if make is flexlora:  # the best approximation of rank 2: of singular values all but two are lost
        best = norms(np.linalg.svd(x, compute_uv=False)[..., RANK:] for x in clients)
        np.testing.assert_allclose(bias, best, rtol=1e-3, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("name", ["fedit", "hetlora", "fslora", "ifca", "hyperlora"])
def test_the_global_model_does_not_depend_on_who_takes_part(name):
    """Nobody in particular is sent what is sent to a client of the server's rank, whoever else is there."""
    method = built(METHODS[name])
    state = jit(method.init)(KEY, nudged(ADAPTER))
    send = jit(method.dispatch)
    of = lambda ranks: take(send(BASE, state, average_client(members(method, ranks=ranks))).adapter, 0)
    for x, y in zip(*map(jax.tree.leaves, (of([1, 1, 1, 1]), of([1, RANK, 1, 1]))), strict=True):
        np.testing.assert_array_equal(x, y)


def test_scores_of_the_global_model_are_those_of_all_its_columns():
    state = fedit().init(KEY, nudged(ADAPTER))
    c, x = members(fedit(), ranks=[1] * 4), examples()
    metric = lambda base, adapter, x: logits(base, adapter, x["x"])
    scores = rounds.make_evaluate(fedit(), metric)(BASE, state, average_client(c), copies(x, 1), KEY)
    np.testing.assert_allclose(scores.before[0], logits(BASE, state.adapter, x["x"]), rtol=1e-5, atol=1e-5)
