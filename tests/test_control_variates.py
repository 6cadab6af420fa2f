"""Penalties and control variates follow their equations, and settle where the weighted objective is least."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    ADAPTER,
    BASE,
    CLIENTS,
    KEY,
    LOCAL_LR,
    OPTIMIZER,
    STEPS,
    assert_near,
    cohort,
    jit,
    loss_fn,
    members,
    normalised,
    nudged,
    take,
)
from wrapper_helpers import SGD, adapter_of, aggregated, flat, run, uploads

from fedlora_jax import lora, rounds, training
from fedlora_jax.clients import Population
from fedlora_jax.methods.fedit import FedITState, fedit
from fedlora_jax.wrappers import innermost
from fedlora_jax.wrappers.around import with_adapter
from fedlora_jax.wrappers.fedbc import fedbc
from fedlora_jax.wrappers.feddyn import feddyn
from fedlora_jax.wrappers.fedopt import fedadam, fedavgm
from fedlora_jax.wrappers.proximal import proximal
from fedlora_jax.wrappers.scaffold import scaffold


def test_the_proximal_term_has_its_gradient():
    method, start, w = proximal(fedit(), 0.3), nudged(ADAPTER, 0), nudged(ADAPTER, 1)
    state = FedITState(start)
    context = take(method.dispatch(BASE, state, cohort()).context, 0)
    value, grads = jit(jax.value_and_grad(method.penalty))(w, context)
    assert_near(grads, jax.tree.map(lambda w, x: 0.3 * (w - x), w, start), 1e-5)
    np.testing.assert_allclose(value, 0.15 * np.sum((flat(w) - flat(start)) ** 2), rtol=1e-5)


def test_in_scaffolds_first_round_a_control_is_the_mean_gradient():
    method = scaffold(fedit(), population=8, local_lr=LOCAL_LR)
    c = members(method)
    state, memory, _ = run(method, 1, SGD)
    local = training.make_local(fedit(), loss_fn, SGD, watch=lambda base, adapter: adapter)
    mask = take(fedit().dispatch(BASE, FedITState(ADAPTER), c).mask, 0)
    local, gradient = jit(local), jit(jax.grad(loss_fn, 1))
    for i in range(CLIENTS):
        own, batches = jax.random.fold_in(jax.random.fold_in(KEY, 0), c.ids[i]), take(c.batches, i)
        _, trace = local(BASE, ADAPTER, mask, (), batches, own)
        path = [ADAPTER, *(take(trace.seen, t) for t in range(STEPS - 1))]
        slopes = [gradient(BASE, x, take(batches, t), jax.random.fold_in(own, t)) for t, x in enumerate(path)]
        grads = np.mean([flat(g) for g in slopes], 0)
        assert_near(flat(take(memory.own, i)), grads, 1e-3)
    assert_near(flat(state.own), np.float64(c.shares) @ flat(memory.own, clients=True), 1e-5)


PARTS = {  # q_i in a population of 8
    "counts": lambda c: np.float64(c.shares),
    "uniform": lambda c: np.full(CLIENTS, 1 / 8),
}


@pytest.mark.parametrize("weights", PARTS)
def test_scaffolds_second_round_follows_its_equations(weights):
    """From controls that are not zero: the step of one client, then both controls, in NumPy."""
    method, x = scaffold(fedit(), 8, LOCAL_LR, weights), nudged(ADAPTER, 0)
    state = with_adapter(method.init(KEY, ADAPTER), x)._replace(own=nudged(jax.tree.map(jnp.zeros_like, ADAPTER), 2))
    c = members(method, steps=1)
    c = c._replace(memory=c.memory._replace(own=nudged(c.memory.own, 3)))
    new, memory, _ = jit(rounds.make_round(method, loss_fn, SGD))(BASE, state, c, KEY)
    y, gradient = [], jit(jax.grad(loss_fn, 1))
    for i in range(CLIENTS):
        key = jax.random.fold_in(jax.random.fold_in(KEY, c.ids[i]), 0)
        g = flat(gradient(BASE, x, take(c.batches, (i, 0)), key))
        y.append(flat(x) - LOCAL_LR * (g + flat(state.own) - flat(take(c.memory.own, i))))
    ci = flat(c.memory.own, clients=True)
    plus = ci - flat(state.own) + (flat(x) - np.stack(y)) / LOCAL_LR
    assert_near(flat(memory.own, clients=True), plus, 1e-4)
    assert_near(flat(new.own), flat(state.own) + PARTS[weights](c) @ (plus - ci), 1e-4)
    assert_near(adapter_of(new), np.float64(normalised(c).weights) @ np.stack(y), 1e-5)


@pytest.mark.parametrize("weights", PARTS)
def test_feddyn_follows_its_equations(weights):
    al, x = 0.3, nudged(ADAPTER, 0)
    method = feddyn(fedit(), 8, al, weights)
    state = with_adapter(method.init(KEY, ADAPTER), x)._replace(own=nudged(jax.tree.map(jnp.zeros_like, ADAPTER), 2))
    c = normalised(members(method))
    c = c._replace(memory=c.memory._replace(own=nudged(c.memory.own, 3)))
    sent, w = method.dispatch(BASE, state, c), uploads()
    h, d = flat(state.own), flat(w, clients=True) - flat(x)
    h = h - al * PARTS[weights](c) @ d
    new = jit(method.aggregate)(BASE, state, c, sent, w)
    assert_near(flat(new.own), h, 1e-5)
    assert_near(adapter_of(new), np.float64(c.weights) @ flat(w, clients=True) - h / al, 1e-5)
    memory = jax.vmap(method.remember)(c.memory, sent.context, sent.adapter, w)
    assert_near(flat(memory.own, clients=True), flat(c.memory.own, clients=True) - al * d, 1e-5)
    grads = jit(jax.grad(method.penalty))(take(w, 0), take(sent.context, 0))
    assert_near(flat(grads), al * d[0] - flat(take(c.memory.own, 0)), 1e-5)


@pytest.mark.parametrize("wrap", [fedadam, fedavgm, lambda m: feddyn(m, 8, 0.1)])
def test_what_no_client_may_move_has_no_momentum(wrap):
    """A round of full ranks, then one of rank 1: the second column is as the inner method leaves it."""
    method = wrap(fedit())
    round_fn = jit(rounds.make_round(method, loss_fn, OPTIMIZER))
    full, few = members(method, 0), members(method, 1, ranks=[1] * CLIENTS)
    state, *_ = round_fn(BASE, method.init(KEY, ADAPTER), full, KEY)
    new, *_ = round_fn(BASE, state, few, KEY)
    for x, old in zip(*(lora.low_rank_leaves(innermost(s).adapter) for s in (new, state)), strict=True):
        assert_near(x.a[..., 1], old.a[..., 1], 0)
        assert not x.b[..., 1, :].any()
        assert (x.a[..., 0] != old.a[..., 0]).all()


def test_feddyn_stays_finite_over_fifty_rounds():
    method = feddyn(fedit(), CLIENTS, 0.1)
    round_fn, c = rounds.make_round(method, loss_fn, SGD), members(method)

    def one(carry, t):
        state, memory, info = round_fn(BASE, carry[0], c._replace(memory=carry[1]), jax.random.fold_in(KEY, t))
        return (state, memory), info.loss.mean()

    (state, memory), losses = jit(lambda x: jax.lax.scan(one, x, jnp.arange(50)))((method.init(KEY, ADAPTER), c.memory))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state, memory)))
    assert losses[-1] < losses[0]


def test_fedbc_weighs_by_multipliers_that_grow_with_distance():
    method = fedbc(fedit(), lr=0.1, gam=0.5, lam=0.2)
    c, w = normalised(members(method, weights=[1, 2, 3, 0])), uploads()
    sent, new = aggregated(method, w, c)
    far = np.sum((flat(w, clients=True) - flat(take(sent.adapter, 0))) ** 2, 1)
    lam = np.maximum(0.2 + 0.1 * (far - 0.5), 0)
    memory = jax.vmap(method.remember)(c.memory, sent.context, sent.adapter, w)
    assert_near(memory.own, lam, 1e-5)
    lam[3] = 0  # it is not there
    assert_near(adapter_of(new), lam @ flat(w, clients=True) / lam.sum(), 1e-5)
    penalty = method.penalty(take(w, 1), take(sent.context, 1))
    np.testing.assert_allclose(penalty, 0.2 * (far[1] - 0.5), rtol=1e-4)


# --- which objective it is


COUNTS, CURVED, BEST = np.asarray([10, 1, 1, 1]), np.asarray([1.0, 2.0, 0.5, 1.5]), np.eye(4)[:, :3]


def slopes(w):
    """``[4, 3]`` of f_i(w) = curved_i / 2 |w - best_i|^2 at a model of three numbers."""
    return CURVED[:, None] * (np.float64(w) - BEST)


def settled(method, participants, rounds_=800):
    """The model and the run after many rounds on four clients of unequal weight."""
    adapter = {"w": jnp.zeros(3), "idle": lora.LoRA(jnp.zeros((2, 1)), jnp.zeros((1, 2)))}
    rows = np.minimum(np.arange(10) + np.cumsum([0, *COUNTS[:-1]])[:, None], 12)
    clients = Population(jnp.asarray(rows), jnp.asarray(COUNTS), jnp.ones(4, int))
    who = np.repeat(np.arange(4), COUNTS)
    data = {"curved": jnp.asarray(CURVED[who], jnp.float32), "best": jnp.asarray(BEST[who], jnp.float32)}

    def loss(base, adapter, batch, key):
        far = jnp.sum((adapter["w"] - batch["best"]) ** 2, -1)
        return jnp.mean(batch["curved"] * far) / 2 + 0 * (adapter["idle"].a @ adapter["idle"].b).sum()

    round_fn = rounds.make_round(method, loss, optax.sgd(0.1))
    step = rounds.make_step(round_fn, participants=participants, steps=6, batch=1, smallest=1)
    many = jit(rounds.scan_rounds(step, rounds_))
    run, _ = many(
        {"w": jnp.zeros(3), "idle": jnp.zeros((2, 2))}, data, clients, rounds.start(method, KEY, adapter, 4), KEY
    )
    return np.float64(run.state.inner.adapter["w"]), run


@pytest.mark.parametrize("participants", [4, 2])
@pytest.mark.parametrize("weights", ["counts", "uniform"])
@pytest.mark.parametrize("make", [lambda w: scaffold(fedit(), 4, 0.1, w), lambda w: feddyn(fedit(), 4, 1.0, w)])
def test_rounds_settle_where_the_objective_of_the_weights_is_least(make, weights, participants):
    """Weights 10, 1, 1, 1, and all or half of the clients in a round; the published form has the plain objective."""
    w, run = settled(make(weights), participants)
    q = {"counts": COUNTS / COUNTS.sum(), "uniform": np.full(4, 0.25)}
    other = {"counts": "uniform", "uniform": "counts"}[weights]
    assert np.linalg.norm(q[weights] @ slopes(w)) < 1e-3
    assert np.linalg.norm(q[other] @ slopes(w)) > 0.1
    assert_near(run.state.own["w"], q[weights] @ np.float64(run.memory.own["w"]), 1e-3, floor=1e-3)


@pytest.mark.parametrize("wrap", [lambda m, **o: scaffold(m, 8, 0.1, **o), lambda m, **o: feddyn(m, 8, **o)])
def test_a_part_of_the_population_that_does_not_say_its_weight_is_refused(wrap):
    method = wrap(fedit())
    c = members(method)._replace(shares=())
    state = method.init(KEY, ADAPTER)
    sent = method.dispatch(BASE, state, c)
    with pytest.raises(ValueError, match=r"4 of 8 clients .* Population\.cohort"):
        method.aggregate(BASE, state, c, sent, sent.adapter)
    with pytest.raises(ValueError, match="'counts' or 'uniform'"):
        wrap(fedit(), weights="equal")
