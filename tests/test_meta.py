"""Derivatives of whole federated rounds, in anything: against finite differences, and with no memory of the rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    BATCH,
    CLIENTS,
    KEY,
    assert_near,
    cohort,
    examples,
    jit,
    labelled,
    loss_fn,
    normalised,
    nudged,
    population,
    problem,
    take,
)
from hyperlora_helpers import doubles, everything
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_jax import meta, rounds
from fedlora_jax.clients import padded, sample_held_out, sample_rounds, sample_views
from fedlora_jax.methods.fedit import fedit
from fedlora_jax.methods.flexlora import flexlora
from fedlora_jax.methods.lora_fair import lora_fair

ROUNDS = 2


def cohorts():
    return jax.tree.map(lambda *xs: jnp.stack(xs), *(normalised(cohort(t)) for t in range(ROUNDS)))


def queries():
    return labelled(np.random.default_rng(5), CLIENTS, BATCH)


def slope_along(f, x, way, h=1e-6):
    moved = lambda t: jax.tree.map(lambda a, d: np.asarray(a) + t * d, x, way)
    return (f(moved(h)) - f(moved(-h))) / (2 * h)


def direction(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=np.shape(x)), tree)


def inner(x, y) -> float:
    return float(sum(np.vdot(a, b) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)))


@pytest.mark.long
def test_the_loss_is_that_of_the_rounds_run_one_by_one(x64):
    base, adapter = problem()
    method, optimizer = fedit(), optax.sgd(0.1)
    outcome = jit(meta.outcome(method, loss_fn, optimizer, chunk=2))
    loss, state = outcome(base, method.init(KEY, adapter), cohorts(), queries(), KEY)
    round_fn, one = jit(rounds.make_round(method, loss_fn, optimizer)), method.init(KEY, adapter)
    for t in range(ROUNDS):
        one, _, _ = round_fn(base, one, take(cohorts(), t), jax.random.fold_in(KEY, t))
    assert_near(state, one, 1e-12)
    key = jax.random.fold_in(KEY, ROUNDS)
    own = [jit(loss_fn)(base, one.adapter, take(queries(), c), key) for c in range(CLIENTS)]
    np.testing.assert_allclose(loss, np.asarray(own) @ take(cohorts(), -1).weights, rtol=1e-12)


HYPER = {
    "client learning rate and lambda": (
        {"lr": 0.2, "lam": 0.3},
        lambda h: (lora_fair(h["lam"], solver="ridge"), optax.sgd(h["lr"])),
    ),
    "server's mixing weights": (
        {"mix": jnp.asarray([0.1, 0.5, 0.3, 0.2])},
        lambda h: (_weighted(flexlora(), h["mix"]), optax.sgd(0.2)),
    ),
    "weight of a penalty and Adam's epsilon": (
        {"mu": 0.4, "eps": 0.05},
        lambda h: (_proximal(fedit(), h["mu"]), optax.adam(0.05, eps=h["eps"], eps_root=1e-4)),
    ),
}


def _weighted(method, mix):
    aggregate = lambda base, state, c, *rest: method.aggregate(base, state, c._replace(weights=mix), *rest)
    return method._replace(aggregate=aggregate)


def _proximal(method, mu):
    square = lambda x, y: 0.5 * sum(jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (x, y)), strict=True))
    return method._replace(penalty=lambda adapter, context: mu * square(adapter, context))


@pytest.mark.long
@pytest.mark.parametrize("names", HYPER)
def test_it_differentiates_in_hyper_parameters(names, x64):
    base, adapter = problem()
    values, build = HYPER[names]
    values = jax.tree.map(jnp.float64, values)

    def outcome(values):
        method, optimizer = build(values)
        start = fedit().init(KEY, nudged(doubles(adapter)))
        return meta.outcome(method, loss_fn, optimizer)(base, start, cohorts(), queries(), KEY)[0]

    both = jit(jax.value_and_grad(outcome))
    grads = both(values)[1]
    for name, value in values.items():
        way = direction(value)
        slope = slope_along(lambda x: both(values | {name: x})[0], value, way)  # noqa: B023
        assert abs(slope) > 1e-6, name
        np.testing.assert_allclose(inner(grads[name], way), slope, rtol=1e-5, atol=1e-9, err_msg=name)


@pytest.mark.long
def test_it_differentiates_in_the_state_generator_synthesizer_and_corrector_included(x64):
    """Two rounds of HyperLoRA: what theta does in the first aggregation is felt in the second round."""
    base, adapter = problem()
    method = everything(mode="frozen")
    start = doubles(jit(method.init)(KEY, nudged(doubles(adapter))))
    start = start._replace(theta=nudged(start.theta, 3, 0.1))

    def outcome(theta):
        after = meta.outcome(method, loss_fn, optax.sgd(0.2))
        return after(base, start._replace(theta=theta), cohorts(), queries(), KEY)[0]

    both = jit(jax.value_and_grad(outcome))
    grads, f = both(start.theta)[1], lambda theta: both(theta)[0]
    for part in start.theta._fields:
        own = getattr(start.theta, part)
        way = direction(own)
        slope = slope_along(lambda x: f(start.theta._replace(**{part: x})), own, way)  # noqa: B023
        assert abs(slope) > 1e-9, part
        np.testing.assert_allclose(inner(getattr(grads, part), way), slope, rtol=1e-4, atol=1e-9, err_msg=part)


# --- slopes


@pytest.mark.long
def test_forward_mode_gives_the_same_derivative_where_steps_are_not_computed_again(x64):
    """So that computing steps and rounds again, as is done for reverse mode, changes no gradient."""
    base, adapter = problem()
    start = fedit().init(KEY, nudged(doubles(adapter)))

    def outcome(lr, remat):
        return meta.outcome(fedit(), loss_fn, optax.sgd(lr), remat=remat)(base, start, cohorts(), queries(), KEY)[0]

    program = str(jax.make_jaxpr(lambda lr: outcome(lr, False))(0.2))
    assert "checkpoint" in program or "remat" in program, "rounds are computed again"
    reverse = jit(jax.grad(lambda lr: outcome(lr, True)))(0.2)
    forward = jit(lambda lr: jax.jvp(lambda lr: outcome(lr, False), (lr,), (1.0,))[1])(0.2)
    np.testing.assert_allclose(forward, reverse, rtol=1e-9)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda lr: outcome(lr, True), (0.2,), (1.0,))


def test_passes_count_the_local_steps_and_what_is_differentiated():
    assert [meta.displacement.passes(t) for t in (1, 5)] == [1, 5]
    assert [meta.first_order.passes(t) for t in (1, 5)] == [2, 6]
    assert [meta.exact.passes(t) for t in (1, 5)] == [3, 16]
    assert meta.also_at_the_start(meta.exact, 1.0).passes(5) == 17


def test_the_start_can_count_too(x64):
    """With L(x) = |x|^2 / 2 and one step of rate 0.1: the end is 0.9 x."""
    tune = lambda x: (0.9 * x, jnp.zeros(1))
    judge, x = lambda x: jnp.sum(x**2) / 2, jnp.asarray([1.0, -2.0])
    slopes = {name: slope.train(tune, judge, x)[2] for name, slope in meta.META_GRADIENTS.items()}
    np.testing.assert_allclose(slopes["displacement"], 0.1 * x)
    np.testing.assert_allclose(slopes["first_order"], 0.9 * x)
    np.testing.assert_allclose(slopes["exact"], 0.81 * x)
    both = meta.also_at_the_start(meta.exact, 0.5).train(tune, judge, x)[2]
    np.testing.assert_allclose(both, 0.81 * x + 0.5 * x)


# --- examples kept apart, and views


@pytest.mark.long
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), query=st.integers(1, 6))
def test_what_is_kept_apart_is_the_clients_own_and_in_no_batch(seed, query):
    sizes = (5, 9, 2, 7, 4)
    clients, ids = population(sizes), jnp.arange(len(sizes))
    draw = jit(sample_held_out, static_argnums=(4, 5, 6, 7))
    rows = {"row": jnp.arange(sum(sizes))}
    batches, queries = draw(jax.random.key(seed), rows, clients, ids, 4, 3, min(sizes), query)
    for c, size in enumerate(sizes):
        own = set(clients.rows[c, :size].tolist())
        trained, apart = set(np.ravel(batches["row"][c]).tolist()), set(queries["row"][c].tolist())
        assert trained | apart <= own
        assert not trained & apart
        assert len(apart) == max(1, min(query, size // 4))
        assert trained == own - apart  # 12 draws pass through everything that is left


@pytest.mark.long
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), query=st.integers(1, 6))
def test_what_judges_several_rounds_is_in_no_batch_of_any_of_them(seed, query):
    """Clients that come again, that come once, that come in the last round alone."""
    sizes, clients = (5, 9, 2, 7, 4), population((5, 9, 2, 7, 4))
    ids = jnp.asarray([[0, 1, 2], [3, 1, 0], [1, 4, 0]])
    draw = jit(sample_rounds, static_argnums=(4, 5, 6, 7))
    rows = {"row": jnp.arange(sum(sizes))}
    batches, queries = draw(jax.random.key(seed), rows, clients, ids, 4, 3, min(sizes), query)
    assert batches["row"].shape == (3, 3, 4, 3)
    for c, client in enumerate(ids[-1].tolist()):
        own = set(clients.rows[client, : sizes[client]].tolist())
        trained, apart = set(batches["row"][ids == client].ravel().tolist()), set(queries["row"][c].tolist())
        assert trained | apart == own  # 12 draws pass through everything that is left
        assert not trained & apart
    alone, judged = draw(jax.random.key(seed), rows, clients, ids[-1:], 12, 3, min(sizes), query)
    np.testing.assert_array_equal(judged["row"], queries["row"])  # a client's draw depends on nobody else
    np.testing.assert_array_equal(alone["row"][0, :, 8:], batches["row"][-1])  # and goes on where it stood


def test_a_client_of_one_example_has_none_to_spare():
    with pytest.raises(ValueError, match="minimum"):
        sample_held_out(KEY, examples(), population((5, 1)), jnp.arange(2), 2, 2, 1, 3)
    with pytest.raises(ValueError, match=r"client\(s\) \[1\] of 3 have no examples"):
        padded([np.arange(3), np.arange(0), np.arange(2)])
    np.testing.assert_array_equal(padded([np.arange(3), np.arange(5, 6)]), [[0, 1, 2], [5, 5, 5]])


def test_training_shows_parts_of_signatures_and_serving_the_whole():
    clients, ids = population(), jnp.arange(5)
    many = jax.tree.map(lambda x: jnp.concatenate([x, x + 1, x + 2], 1), clients.signatures)
    clients = clients._replace(signatures=many)
    seen = np.stack([sample_views(jax.random.key(i), clients, ids) for i in range(20)])
    assert set(seen.ravel().tolist()) == {1, 2}
    assert_near(clients.cohort(ids, ()).signatures, jax.tree.map(lambda x: x[:, 0], many), 0)
    shown = clients.cohort(ids, (), views=jnp.asarray(seen[0])).signatures.amount
    np.testing.assert_allclose(shown, many.amount[np.arange(5), seen[0]])
