"""Methods whose server model is the mean of the clients' models, and what makes it so."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    ADAPTER,
    BASE,
    KEY,
    SCALE,
    aggregated,
    assert_near,
    cohort,
    dense,
    effective,
    jit,
    loss_fn,
    mean_weights,
    members,
    normalised,
    problem,
    take,
    uploads,
)
from numpy.linalg import norm

from fedlora_jax import lora, rounds
from fedlora_jax.lora import LoRA
from fedlora_jax.method import models
from fedlora_jax.methods import fed_sb as sb
from fedlora_jax.methods.fed_sb import fed_sb
from fedlora_jax.methods.fed_talora import accuracy_and_forgetting, fed_talora, task_of_class
from fedlora_jax.methods.fedex_lora import fedex_lora
from fedlora_jax.methods.ffa_lora import ffa_lora
from fedlora_jax.methods.rac_lora import rac_lora
from fedlora_jax.methods.rolora import rolora

KERNELS = ["blocks/kernel", "mix/kernel"]


def rounds_of(method, state, count: int, seed: int = 1):
    """The states after each of ``count`` aggregations of clients that move at random."""
    c, aggregate, states = normalised(members(method, ranks=[1, 2, 2, 2])), jit(method.aggregate), []
    for t in range(count):
        sent = method.dispatch(BASE, state, c)
        received = uploads(sent, seed + t)
        theirs = models(method, sent._replace(adapter=received))
        state = aggregate(BASE, state, c, sent, received)
        assert_near(effective(method, BASE, state, c), mean_weights(sent.base, theirs, c.weights))  # exact every round
        states.append(state)
    return states


# --- RoLoRA


def test_rolora_trains_b_first_then_a_and_the_other_factor_is_still():
    start = rolora().init(KEY, ADAPTER)
    states = [start, *rounds_of(rolora(), start, 4)]
    for t, (old, new) in enumerate(itertools.pairwise(states)):
        for x, y in zip(*map(lora.low_rank_leaves, (old.adapter, new.adapter)), strict=True):
            moved, still = ((x.b, y.b), (x.a, y.a)) if t % 2 == 0 else ((x.a, y.a), (x.b, y.b))
            np.testing.assert_array_equal(*still)
            assert (moved[0] != moved[1]).any()


# --- Fed-SB


def test_fed_sb_keeps_orthonormal_bases_for_ever():
    start = fed_sb().init(KEY, ADAPTER)
    states = rounds_of(fed_sb(), start, 2)
    for old, new in zip(*map(lora.low_rank_leaves, (start.bases, states[-1].bases)), strict=True):
        assert_near(old.a.mT @ old.a, np.broadcast_to(np.eye(2), (*old.a.shape[:-2], 2, 2)))
        assert_near(old.b @ old.b.mT, np.broadcast_to(np.eye(2), (*old.a.shape[:-2], 2, 2)))
        np.testing.assert_array_equal(old.a, new.a)
        np.testing.assert_array_equal(old.b, new.b)


def test_fed_sb_starts_from_the_first_update_of_the_cohort():
    """The truncated SVD of the mean gradient step, which here has rank 1 for every client."""
    rng, lr = np.random.default_rng(0), 0.3
    base, adapter = {"kernel": jnp.zeros((6, 4))}, {"kernel": LoRA(jnp.ones((6, 2)), jnp.zeros((2, 4)), SCALE)}
    x, y = jnp.asarray(rng.normal(size=(3, 2, 6))), jnp.asarray(rng.normal(size=(3, 2, 4)))
    linear = lambda base, adapter, batch, key: jnp.vdot(batch[0] @ base["kernel"], batch[1])
    weights = jnp.asarray([1.0, 2.0, 3.0])
    update = sb.first_update(linear, base, adapter, (x[:, :, None, :], y[:, :, None, :]), weights, lr, KEY)

    rank_two = np.einsum("ctb,cti,cto->cbio", np.ones((3, 2, 1)), x, y)[:, 0] / 2  # each client's gradient
    step = -lr * np.tensordot(np.asarray(weights) / 6, rank_two, 1)
    u, s, vt = np.linalg.svd(step)
    best = (u[:, :2] * s[:2]) @ vt[:2]
    assert_near(SCALE * dense(update["kernel"]), best)

    state = fed_sb(update).init(KEY, adapter)
    assert_near(lora.delta(sb.with_bases(state.adapter, state.bases)["kernel"]), best)
    assert_near(np.abs(state.adapter["kernel"]), np.diag(s[:2]) / SCALE, 1e-4)


def test_fed_sb_refuses_an_update_of_another_rank():
    with pytest.raises(ValueError, match="an adapter of the same rank"):
        fed_sb(problem(rank=1).adapter).init(KEY, ADAPTER)


# --- RAC-LoRA


def test_one_block_of_rac_lora_is_ffa_lora():
    method, inner = rac_lora(block=100), ffa_lora()
    states = rounds_of(method, method.init(KEY, ADAPTER), 2)
    others = rounds_of(inner, inner.init(KEY, ADAPTER), 2)
    for x, y in zip(states, others, strict=True):
        assert_near(x.adapter, y.adapter, 1e-6)


def test_at_the_end_of_a_block_rac_lora_folds_it_in_and_draws_a_anew():
    method = rac_lora(block=2)
    first, second = rounds_of(method, method.init(KEY, ADAPTER), 2)
    assert not any(x.any() for x in jax.tree.leaves(first.residual))
    for name in KERNELS:
        old, new = lora.flatten(first.adapter)[name], lora.flatten(second.adapter)[name]
        assert not new.b.any()
        assert (new.a != old.a).all()
        assert lora.flatten(second.residual)[name].any()


@pytest.mark.long
def test_a_step_of_rac_lora_is_a_projected_gradient_step():
    """One SGD step from b = 0 moves the weights by -lr s^2 a a^T G, G the gradient at the weights."""
    method, lr, c = rac_lora(), 0.1, normalised(cohort(clients=1, steps=1))
    state = method.init(KEY, ADAPTER)
    new, _, _ = jit(rounds.make_round(method, loss_fn, optax.sgd(lr)))(BASE, state, c, KEY)
    key = jax.random.fold_in(jax.random.fold_in(KEY, c.ids[0]), 0)
    at = lambda kernels: loss_fn(lora.add(BASE, kernels), ADAPTER, take(c.batches, (0, 0)), key)
    gradient = jax.grad(at)(lora.zero_deltas(ADAPTER))
    for name in KERNELS:
        a = np.float64(lora.flatten(ADAPTER)[name].a)
        expected = -lr * SCALE**2 * a @ a.mT @ np.float64(lora.flatten(gradient)[name])
        assert_near(lora.flatten(new.residual)[name], expected, 1e-4)


# --- Fed-TaLoRA


def test_one_task_of_fed_talora_is_fedex_lora():
    *_, new = aggregated(fed_talora())
    *_, other = aggregated(fedex_lora())
    assert_near((new.adapter, new.residual), (other.adapter, other.residual), 1e-6)


def test_each_task_of_fed_talora_trains_its_own_columns_of_the_head():
    method = fed_talora(tasks=2, rounds_per_task=2)
    np.testing.assert_array_equal(task_of_class(3, 2), [0, 0, 1])
    start = method.init(KEY, ADAPTER)
    states = [start, *rounds_of(method, start, 6)]
    for t, (old, new) in enumerate(itertools.pairwise(states)):
        columns = [0, 1] if t < 2 else [2]
        for x, y in zip(*(jax.tree.leaves(s.adapter["head"]) for s in (old, new)), strict=True):
            moved = np.asarray(x != y).reshape(-1, 3).any(0)
            np.testing.assert_array_equal(np.flatnonzero(moved), columns)
        assert (old.adapter["mix"]["kernel"].a != new.adapter["mix"]["kernel"].a).any()


def test_forgetting_is_the_fall_from_the_best():
    accuracy = np.asarray([[0.9, 0.1, 0.0], [0.8, 0.7, 0.0], [0.5, 0.75, 0.6]])
    mean, forgetting = accuracy_and_forgetting(accuracy)
    assert_near(mean, (0.5 + 0.75 + 0.6) / 3, 1e-6)
    assert_near(forgetting, ((0.9 - 0.5) + (0.7 - 0.75)) / 2, 1e-6)
    assert accuracy_and_forgetting([[0.7]])[1] == 0


@pytest.mark.parametrize(("make", "options"), [(rac_lora, {"block": 0}), (fed_talora, {"tasks": 0})])
def test_what_cannot_be_done_is_refused(make, options):
    with pytest.raises(ValueError, match="at least 1"):
        make(**options)
    with pytest.raises(ValueError, match="as many classes"):
        fed_talora(tasks=9).init(KEY, ADAPTER)


def test_the_bias_of_a_mean_of_factors_is_not_small_here():
    """Else the tests above would show nothing."""
    c, _, sent, received, new = aggregated(fedex_lora())
    mean = mean_weights(sent.base, received, c.weights)
    without = lora.flatten(lora.merge(BASE, new.adapter))
    assert all(norm(without[name] - mean[name]) > 1e-2 * norm(mean[name]) for name in KERNELS)
