"""Each wrapper computes the equation it is named for, and around a method it is neutral where it should be."""

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
    SIGNATURE,
    STEPS,
    WRAPPED,
    assert_near,
    cohort,
    copies,
    jit,
    logits,
    loss_fn,
    members,
    normalised,
    nudged,
    problem,
    replaced,
    take,
)

import experiments.methods
from experiments import overview
from experiments.config import Config
from experiments.methods import wrappers
from fedlora_jax import lora, rounds
from fedlora_jax.losses import fedga
from fedlora_jax.methods.ditto import ditto
from fedlora_jax.methods.fed_sb import fed_sb
from fedlora_jax.methods.fedex_lora import fedex_lora
from fedlora_jax.methods.fedit import FedITState, fedit
from fedlora_jax.methods.flexlora import flexlora
from fedlora_jax.methods.flora import flora
from fedlora_jax.methods.ifca import ifca
from fedlora_jax.methods.pfedhn import pfedhn
from fedlora_jax.methods.rac_lora import rac_lora
from fedlora_jax.signatures import Signature, label_free
from fedlora_jax.wrappers import innermost
from fedlora_jax.wrappers.around import with_adapter
from fedlora_jax.wrappers.fedbc import fedbc
from fedlora_jax.wrappers.feddyn import feddyn
from fedlora_jax.wrappers.fedlc import ABSENT, fedlc
from fedlora_jax.wrappers.fedopt import fedadagrad, fedadam, fedavgm, fedyogi, server
from fedlora_jax.wrappers.nonfinite import nonfinite
from fedlora_jax.wrappers.privacy import clip, noise
from fedlora_jax.wrappers.proximal import proximal
from fedlora_jax.wrappers.robust import krum, median, norm_bound, trimmed_mean
from fedlora_jax.wrappers.scaffold import scaffold
from fedlora_jax.wrappers.signature_bias import signature_bias

SGD = optax.sgd(LOCAL_LR)


def run(method, count=2, optimizer=OPTIMIZER, ranks=None):
    """Some rounds of all clients, from a fresh state: the state, memory and info of the last."""
    round_fn = jit(rounds.make_round(method, loss_fn, optimizer))
    state, memory, info = method.init(jax.random.key(1), ADAPTER), members(method).memory, None
    for t in range(count):
        c = cohort(t, ranks=ranks)._replace(memory=memory)
        state, memory, info = round_fn(BASE, state, c, jax.random.fold_in(KEY, t))
    return state, memory, info


def aggregated(method, received, c=None, state=None):
    """One aggregation of uploads from a state in the middle of a run; the global adapter after it."""
    c = normalised(members(method) if c is None else c)
    state = with_adapter(method.init(jax.random.key(1), ADAPTER), nudged(ADAPTER, 0)) if state is None else state
    sent = method.dispatch(BASE, state, c)
    return sent, jit(method.aggregate)(BASE, state, c, sent, received)


def uploads(seed=1, size=0.3):
    """What clients send back that were all sent ``nudged(ADAPTER, 0)``."""
    return nudged(copies(nudged(ADAPTER, 0)), seed, size)


def flat(tree, clients=False) -> np.ndarray:
    """All numbers of a tree in float64, ``[n]`` or ``[C, n]``."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    if clients:
        return np.concatenate([x.reshape(len(x), -1) for x in leaves], 1)
    return np.concatenate([x.ravel() for x in leaves])


def adapter_of(state) -> np.ndarray:
    return flat(innermost(state).adapter)


def test_every_wrapper_is_in_the_battery():
    same_but_for_the_transformation = {"fedavgm", "fedyogi", "fedadagrad"}  # as ``server`` and ``fedadam``, which are
    assert set(wrappers()) - same_but_for_the_transformation < set(WRAPPED)


NEUTRAL = {
    "proximal": lambda inner: proximal(inner, 0.0),
    "server": lambda inner: server(inner, optax.sgd(1.0)),
    "fedavgm": lambda inner: fedavgm(inner, b1=0.0),
    "fedlc": lambda inner: fedlc(inner, 0.0),
    "fedbc": lambda inner: fedbc(inner, lr=0.0, lam=0.0),
    "signature_bias": lambda inner: signature_bias(inner, SIGNATURE, lr=0.0, warmup=0),
    "clip": lambda inner: clip(inner, 1e6),
    "noise": lambda inner: noise(inner, 0.0),
    "norm_bound": lambda inner: norm_bound(inner, 1e6),
    "nonfinite": nonfinite,
    "krum": lambda inner: krum(inner, kept=CLIENTS),
}


@pytest.fixture(scope="module")
def plain():
    return {make: run(make()) for make in (fedit, flexlora)}


@pytest.mark.parametrize("make", [fedit, flexlora])
def test_a_neutral_wrapper_is_the_method_inside(make, plain):
    """All of them together, over two rounds; each alone where they do not compile in one go."""
    method = make()
    for wrap in NEUTRAL.values():
        method = wrap(method)
    state, _, info = run(method)
    expected, _, report = plain[make]
    assert_near(innermost(state), expected, 1e-5)
    assert_near(info.loss, report.loss, 1e-5)


@pytest.mark.parametrize("name", NEUTRAL)
def test_each_neutral_wrapper_aggregates_as_the_method_inside(name):
    method, c = NEUTRAL[name](fedit()), normalised(cohort())
    _, state = aggregated(method, uploads())
    _, expected = aggregated(fedit(), uploads(), c)
    assert_near(innermost(state), expected, 1e-6)


# --- penalties and control variates


def test_the_proximal_term_has_its_gradient():
    method, start, w = proximal(fedit(), 0.3), nudged(ADAPTER, 0), nudged(ADAPTER, 1)
    state = FedITState(start)
    anchor = take(method.dispatch(BASE, state, cohort()).anchor, 0)
    grads = jax.grad(method.penalty)(w, anchor)
    assert_near(grads, jax.tree.map(lambda w, x: 0.3 * (w - x), w, start), 1e-5)
    np.testing.assert_allclose(method.penalty(w, anchor), 0.15 * np.sum((flat(w) - flat(start)) ** 2), rtol=1e-5)


def test_in_scaffolds_first_round_a_control_is_the_mean_gradient():
    method = scaffold(fedit(), population=8, local_lr=LOCAL_LR)
    c = members(method)
    state, memory, _ = run(method, 1, SGD)
    local = rounds.make_local(fedit(), loss_fn, SGD, watch=lambda base, adapter: adapter)
    mask = take(fedit().dispatch(BASE, FedITState(ADAPTER), c).mask, 0)
    local, gradient = jit(local), jit(jax.grad(loss_fn, 1))
    for i in range(CLIENTS):
        own, batches = jax.random.fold_in(jax.random.fold_in(KEY, 0), c.ids[i]), take(c.batches, i)
        _, trace = local(BASE, ADAPTER, mask, (), batches, own)
        path = [ADAPTER, *(take(trace.seen, t) for t in range(STEPS - 1))]
        slopes = [gradient(BASE, x, take(batches, t), jax.random.fold_in(own, t)) for t, x in enumerate(path)]
        grads = np.mean([flat(g) for g in slopes], 0)
        assert_near(flat(take(memory.own, i)), grads, 1e-3)
    assert_near(flat(state.own), flat(memory.own, clients=True).sum(0) / 8, 1e-5)


def test_scaffolds_second_round_follows_its_equations():
    """From controls that are not zero: the step of one client, then both controls, in NumPy."""
    method, x = scaffold(fedit(), 8, LOCAL_LR), nudged(ADAPTER, 0)
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
    assert_near(flat(new.own), flat(state.own) + (plus - ci).sum(0) / 8, 1e-4)
    assert_near(adapter_of(new), np.float64(normalised(c).weights) @ np.stack(y), 1e-5)


def test_feddyn_follows_its_equations():
    al, x = 0.3, nudged(ADAPTER, 0)
    method = feddyn(fedit(), 8, al)
    state = with_adapter(method.init(KEY, ADAPTER), x)._replace(own=nudged(jax.tree.map(jnp.zeros_like, ADAPTER), 2))
    c = normalised(members(method))
    c = c._replace(memory=c.memory._replace(own=nudged(c.memory.own, 3)))
    sent, w = method.dispatch(BASE, state, c), uploads()
    h, d = flat(state.own), flat(w, clients=True) - flat(x)
    h = h - al / 8 * d.sum(0)
    new = jit(method.aggregate)(BASE, state, c, sent, w)
    assert_near(flat(new.own), h, 1e-5)
    assert_near(adapter_of(new), np.float64(c.weights) @ flat(w, clients=True) - h / al, 1e-5)
    memory = jax.vmap(method.remember)(c.memory, sent.anchor, sent.adapter, w)
    assert_near(flat(memory.own, clients=True), flat(c.memory.own, clients=True) - al * d, 1e-5)
    grads = jax.grad(method.penalty)(take(w, 0), take(sent.anchor, 0))
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
    memory = jax.vmap(method.remember)(c.memory, sent.anchor, sent.adapter, w)
    assert_near(memory.own, lam, 1e-5)
    lam[3] = 0  # it is not there
    assert_near(adapter_of(new), lam @ flat(w, clients=True) / lam.sum(), 1e-5)
    penalty = method.penalty(take(w, 1), take(sent.anchor, 1))
    np.testing.assert_allclose(penalty, 0.2 * (far[1] - 0.5), rtol=1e-4)


# --- server optimizers


SECOND = {
    fedadam: lambda v, d: 0.99 * v + 0.01 * d**2,
    fedyogi: lambda v, d: v - 0.01 * d**2 * np.sign(v - d**2),
    fedadagrad: lambda v, d: v + d**2,
}


@pytest.mark.parametrize("make", SECOND)
def test_adaptive_servers_take_the_published_steps(make):
    """Two of them by hand: v starts at tau^2, nothing is corrected for bias."""
    lr, tau, b1 = 0.1, 1e-3, 0.0 if make is fedadagrad else 0.9
    method = make(fedit(), lr=lr, tau=tau)
    state, c = with_adapter(method.init(KEY, ADAPTER), nudged(ADAPTER, 0)), normalised(cohort())
    w = adapter_of(state)
    m, v = np.zeros_like(w), np.full_like(w, tau**2)
    for t in range(2):
        received = nudged(copies(innermost(state).adapter), t + 1)
        _, state = aggregated(method, received, c, state)
        d = np.float64(c.weights) @ flat(received, clients=True) - w
        m, v = b1 * m + (1 - b1) * d, SECOND[make](v, d)
        w = w + lr * m / (np.sqrt(v) + tau)
        assert_near(adapter_of(state), w, 1e-5)


def test_server_momentum_by_hand():
    method = fedavgm(fedit(), lr=0.5, b1=0.7)
    state, c = with_adapter(method.init(KEY, ADAPTER), nudged(ADAPTER, 0)), normalised(cohort())
    w, m = adapter_of(state), 0
    for t in range(3):
        received = nudged(copies(innermost(state).adapter), t + 1)
        _, state = aggregated(method, received, c, state)
        m = 0.7 * m + np.float64(c.weights) @ flat(received, clients=True) - w
        w = w + 0.5 * m
        assert_near(adapter_of(state), w, 1e-5)


# --- calibrated losses


def told(shares, n=20):
    """Signatures ``[C, ...]`` of clients with these shares of classes."""
    shares = np.asarray(shares, np.float32)
    amount = np.full((len(shares), 1), np.log1p(n) / 10, np.float32)
    return Signature(jnp.zeros((len(shares), 4)), jnp.sqrt(shares), jnp.asarray(amount))


def test_fedlc_is_the_calibrated_cross_entropy():
    shares = np.asarray([[0.5, 0.3, 0.2]] * CLIENTS)
    method, w = fedlc(fedit(), 0.7), nudged(ADAPTER, 0)
    c = cohort()._replace(signatures=told(shares))
    sent = method.dispatch(BASE, FedITState(w), c)
    batch = take(c.batches, (0, 0))
    task = lambda model: optax.softmax_cross_entropy_with_integer_labels(
        logits(BASE, model, batch["x"]), batch["y"]
    ).mean()
    loss, _ = method.objective(task, w, take(sent.anchor, 0))
    z = np.asarray(logits(BASE, w, batch["x"]), np.float64) - 0.7 * (20 * shares[0]) ** -0.25
    by_hand = np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), np.asarray(batch["y"])])
    np.testing.assert_allclose(loss, by_hand, rtol=1e-5)
    assert_near(method.model(w, take(sent.anchor, 0)), w, 0)  # nothing of it where the model is used


def test_fedlc_is_finite_where_a_class_is_absent():
    method = fedlc(fedit(), 1.0)
    c = cohort()._replace(signatures=told([[0.6, 0.4, 0.0]] * CLIENTS))
    round_fn = jit(rounds.make_round(method, loss_fn, OPTIMIZER))
    state, _, info = round_fn(BASE, method.init(KEY, ADAPTER), c, KEY)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state, info)))
    margin = method.dispatch(BASE, state, c).anchor.own
    assert_near(margin[:, 2], np.full(CLIENTS, ABSENT**-0.25), 1e-6)


def test_fedlc_refuses_signatures_without_labels_and_models_without_a_bias():
    method, c = fedlc(fedit()), cohort()
    with pytest.raises(ValueError, match="says nothing of labels"):
        method.dispatch(BASE, FedITState(ADAPTER), c._replace(signatures=label_free(c.signatures)))
    bare = lora.new(KEY, BASE, 2, targets="blocks/kernel")
    sent = method.dispatch(BASE, FedITState(bare), c)
    with pytest.raises(ValueError, match="add the head's bias"):
        method.objective(lambda model: 0.0, bare, take(sent.anchor, 0))


def test_fedga_hardly_suppresses_absent_classes():
    """The gradient of logit j is p_j n_j / n_y (times one example's share), up to the targets' sum."""
    rng = np.random.default_rng(0)
    z, y = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32), jnp.asarray([0, 0, 1, 0, 1])
    loss = fedga(lambda base, adapter, batch, key: (adapter, batch))
    grads = np.asarray(jax.grad(loss, 1)(None, z, y, KEY), np.float64)
    p = np.float64(jax.nn.softmax(z))
    n = np.asarray([3, 2, 0, 0])
    for i, label in enumerate(np.asarray(y)):
        target = p[i] * (n[label] - n) / n[label]
        target[label] = 1
        np.testing.assert_allclose(grads[i], (p[i] * target.sum() - target) / 5, rtol=1e-4, atol=1e-7)


# --- privacy and robustness


def test_clipping_bounds_the_norm_of_every_update():
    c, w = normalised(members(fedit())), uploads()
    w = replaced(w, 0, jax.tree.map(lambda x, y: x + np.float32(1e-3) * (y - x), nudged(ADAPTER, 0), w))  # a short one
    start = flat(nudged(ADAPTER, 0))
    _, new = aggregated(clip(fedit(), 0.5), w, c)
    d = flat(w, clients=True) - start
    factor = np.minimum(1, 0.5 / np.linalg.norm(d, axis=1))
    assert factor[0] == 1
    assert factor[1:].max() < 1
    assert_near(adapter_of(new), start + np.float64(c.weights) @ (factor[:, None] * d), 1e-5)


def test_noise_has_the_stated_deviation_is_new_each_round_and_spares_what_is_masked():
    base = problem().base
    wide = {"kernel": lora.LoRA(jnp.zeros((400, 2)), jnp.zeros((2, 300)))}
    method, c = noise(fedit(), 0.3), normalised(cohort(clients=1, ranks=[1]))
    state = method.init(KEY, wide)
    sent = method.dispatch(base, state, c)
    seen = []
    for _ in range(2):
        state = method.aggregate(base, state, c, sent, sent.adapter)
        seen.append(flat(cut := lora.cut(innermost(state).adapter, 1)))
        rest = jax.tree.map(lambda x, y: x, innermost(state).adapter, wide)["kernel"]
        assert not rest.a[:, 1].any()
        assert not rest.b[1].any()
        assert cut["kernel"].a.shape == (400, 1)
    for x in seen:
        np.testing.assert_allclose(x.std(), 0.3, rtol=0.1)
        assert abs(x.mean()) < 0.05
    assert abs(np.corrcoef(*seen)[0, 1]) < 0.15
    twice = noise(noise(fedit(), 0.3), 0.4)  # of two the variances add: their draws are independent
    state = twice.aggregate(
        base, twice.init(KEY, wide), c, twice.dispatch(base, twice.init(KEY, wide), c), sent.adapter
    )
    np.testing.assert_allclose(flat(lora.cut(innermost(state).adapter, 1)).std(), 0.5, rtol=0.1)


def with_outlier(size=1e4):
    return replaced(uploads(), 2, size)


@pytest.mark.parametrize("wrap", [median, lambda m: trimmed_mean(m, 0.25), krum, lambda m: norm_bound(m, 1.0)])
@pytest.mark.parametrize("size", [1e4, jnp.nan])
def test_an_outlier_does_not_carry_the_server_away(wrap, size):
    if wrap not in (median, krum) and not np.isfinite(size):
        size = 1e6  # what is not a number is for nonfinite
    _, new = aggregated(wrap(fedit()), with_outlier(size))
    _, plain = aggregated(fedit(), with_outlier())
    start = flat(nudged(ADAPTER, 0))
    reach = np.linalg.norm(flat(uploads(), clients=True) - start, axis=1).max()
    assert np.linalg.norm(adapter_of(new) - start) < 1.5 * reach
    assert np.linalg.norm(adapter_of(plain) - start) > 100 * reach


@pytest.mark.parametrize("weights", [[1, 2, 3, 1], [1, 0, 2, 1]])
def test_median_and_trimmed_mean_are_coordinatewise_over_who_is_there(weights):
    c, w = normalised(cohort(weights=weights)), uploads()
    there = flat(w, clients=True)[np.asarray(weights) > 0]
    _, new = aggregated(median(fedit()), w, c)
    assert_near(adapter_of(new), np.median(there, 0), 1e-5)
    _, new = aggregated(trimmed_mean(fedit(), 0.34), w, c)
    assert_near(adapter_of(new), np.sort(there, 0)[1:-1].mean(0), 1e-5)


@pytest.mark.parametrize("weights", [[1, 2, 3, 1], [1, 0, 2, 1]])
def test_norm_bound_shortens_to_the_median_of_the_norms(weights):
    """Of an even number of clients it is the mean of the two in the middle."""
    c, w, start = normalised(cohort(weights=weights)), uploads(), flat(nudged(ADAPTER, 0))
    w = jax.tree.map(
        lambda x, y: x + jnp.asarray([0.2, 1, 2, 4]).reshape(-1, *(1,) * x.ndim) * (y - x), nudged(ADAPTER, 0), w
    )
    _, new = aggregated(norm_bound(fedit(), 0.9), w, c)
    d = flat(w, clients=True) - start
    norms = np.linalg.norm(d, axis=1)
    factor = np.minimum(1, 0.9 * np.median(norms[np.asarray(weights) > 0]) / norms)
    assert_near(adapter_of(new), start + np.float64(c.weights) @ (factor[:, None] * d), 1e-5)


def test_krum_picks_the_update_with_the_nearest_others():
    w, c = uploads(), normalised(cohort())
    rows = flat(w, clients=True)
    far = np.sum((rows[:, None] - rows[None]) ** 2, -1)
    scores = np.sort(far, 1)[:, 1 : 1 + CLIENTS - 1 - 2].sum(1)
    _, new = aggregated(krum(fedit(), 1), w, c)
    assert_near(adapter_of(new), rows[scores.argmin()], 1e-6)
    best = np.argsort(scores)[:2]
    _, new = aggregated(krum(fedit(), 1, kept=2), w, c)
    p = np.float64(c.weights)[best]
    assert_near(adapter_of(new), p @ rows[best] / p.sum(), 1e-5)
    with pytest.raises(ValueError, match="at least 5 clients, got 4"):
        aggregated(krum(fedit(), 2), w, c)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_client_that_is_not_finite_changes_nothing_and_is_counted(bad):
    """A whole round in which one client's data are no numbers, against one in which it has no weight."""
    method = nonfinite(scaffold(fedit(), 8, LOCAL_LR))
    round_fn = jit(rounds.make_round(method, loss_fn, SGD))
    state, c = method.init(KEY, ADAPTER), members(method)
    broken = c._replace(batches=c.batches | {"x": replaced(c.batches["x"], 2, bad)})
    new, memory, info = round_fn(BASE, state, broken, KEY)
    without, _, report = round_fn(BASE, state, c._replace(weights=replaced(c.weights, 2, 0.0)), KEY)
    assert_near(new.inner, without.inner, 1e-6)
    assert_near(take(memory, 2), take(c.memory, 2), 0)
    assert (info.learned["dropped"], report.learned["dropped"]) == (1, 0)
    assert new.own.total == 1
    assert np.isfinite(info.aggregation).all()
    assert_near(info.aggregation, report.aggregation, 1e-3, floor=1e-3)
    assert np.isnan(info.loss[2])


@pytest.mark.parametrize(
    "make",
    [fedit, flexlora, rac_lora, lambda: fedadam(fedit()), lambda: noise(feddyn(fedit(), 8)), lambda: pfedhn(100)],
)
def test_if_all_clients_fail_the_servers_state_stays(make):
    """With momenta inside, keys, counts of rounds and residuals; after a round that went well."""
    method = nonfinite(make())
    round_fn = jit(rounds.make_round(method, loss_fn, SGD))
    c = members(method)
    start, memory, _ = round_fn(BASE, method.init(KEY, ADAPTER), c, KEY)
    broken = c._replace(batches=c.batches | {"x": c.batches["x"] * jnp.nan}, memory=memory)
    state, after, info = round_fn(BASE, start, broken, KEY)
    assert_near((state.inner, after), (start.inner, memory), 0)
    assert info.learned["dropped"] == CLIENTS


def test_without_the_wrapper_a_round_that_failed_says_so():
    c = cohort()
    broken = c._replace(batches=c.batches | {"x": replaced(c.batches["x"], 2, np.nan)})
    _, _, info = jit(rounds.make_round(fedit(), loss_fn, OPTIMIZER))(BASE, fedit().init(KEY, ADAPTER), broken, KEY)
    assert np.isnan(info.aggregation.bias)


# --- what does not go together


@pytest.mark.parametrize("wrap", [lambda m: scaffold(m, 8, 0.1), lambda m: feddyn(m, 8), fedadam, fedavgm])
@pytest.mark.parametrize("make", [fedex_lora, flora, ifca, lambda: pfedhn(8)])
def test_what_lives_in_factor_space_refuses_residuals_and_methods_without_an_adapter(wrap, make):
    with pytest.raises(ValueError, match=r"residual on the base|no global adapter"):
        jax.eval_shape(wrap(make()).init, KEY, ADAPTER)


@pytest.mark.parametrize("wrap", [lambda m: scaffold(m, 8, 0.1), lambda m: feddyn(m, 8)])
@pytest.mark.parametrize("make", [fed_sb, ditto])
def test_what_clients_keep_for_every_entry_refuses_methods_whose_clients_carry_something_else(wrap, make):
    method = wrap(make())
    with pytest.raises(ValueError, match="tree of another structure"):
        method.dispatch(BASE, method.init(KEY, ADAPTER), members(method))


@pytest.mark.parametrize("wrap", [clip, noise, median, trimmed_mean, krum, norm_bound])
def test_what_acts_on_uploads_refuses_methods_that_learn_from_slopes(wrap):
    with pytest.raises(ValueError, match="also learns from slopes"):
        wrap(pfedhn(8))


def test_numbers_out_of_range_are_refused():
    for make, message in (
        (lambda: proximal(fedit(), -1), "at least 0"),
        (lambda: scaffold(fedit(), 0, 0.1), "at least 1"),
        (lambda: feddyn(fedit(), 8, 0.0), "above 0"),
        (lambda: fedadam(fedit(), lr=0.0), "above 0"),
        (lambda: fedbc(fedit(), lr=-1.0), "at least 0"),
        (lambda: fedlc(fedit(), -1.0), "at least 0"),
        (lambda: clip(fedit(), 0.0), "above 0"),
        (lambda: noise(fedit(), -1.0), "at least 0"),
        (lambda: trimmed_mean(fedit(), 0.5), "below 0.5"),
        (lambda: krum(fedit(), kept=0), "at least 1"),
        (lambda: norm_bound(fedit(), 0.0), "above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_cohort_without_memory_is_refused():
    method = scaffold(fedit(), 8, 0.1)
    with pytest.raises(ValueError, match=r"rounds\.start"):
        method.dispatch(BASE, method.init(KEY, ADAPTER), cohort())


# --- on the command line


def test_a_spec_names_wrappers_from_the_inside_out():
    spec = "fedit+proximal:mu=0.5+scaffold+fedadam:lr=0.25"
    method = experiments.methods.build(spec, population=8, local_lr=LOCAL_LR, participants=CLIENTS)
    by_hand = fedadam(scaffold(proximal(fedit(), 0.5), 8, LOCAL_LR), lr=0.25)
    assert_near(run(method, 1, SGD)[0], run(by_hand, 1, SGD)[0], 1e-6)
    assert experiments.methods.about(spec).name == "FedIT + FedProx (mu=0.5) + SCAFFOLD + FedAdam (lr=0.25)"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fedit+proximl", "unknown wrapper 'proximl': did you mean proximal"),
        ("fedit+proximal:m=1", "'m=1' is no option of proximal; it has mu="),
        ("fedit+clip:bound=much", "bound must be float"),
        ("proximal+fedit", "unknown method 'proximal'"),
        ("fedit+", "unknown wrapper ''"),
    ],
)
def test_unknown_wrappers_and_options_are_refused(spec, message):
    with pytest.raises(ValueError, match="^.*" + message.replace("+", r"\+")):
        experiments.methods.check(spec)


def test_the_table_shows_every_wrapper_with_its_options():
    table = overview.table(Config())
    for name, about in wrappers().items():
        row = next(line for line in table.splitlines() if line.startswith(f"{name} "))
        assert about.arxiv in row
    assert "lr=0.01, b1=0.9, b2=0.99, tau=0.001" in table
