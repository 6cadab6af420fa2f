"""Clients with unequal numbers of local steps, or that stop within a batch: each as if alone, in one program."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    ADAPTER,
    BASE,
    BATCH,
    CLIENTS,
    KEY,
    LOCAL_LR,
    METHODS,
    OPTIMIZER,
    WRAPPED,
    assert_near,
    cohort,
    examples,
    jit,
    logits,
    loss_fn,
    members,
    nudged,
    population,
    take,
)

from fedlora_jax import meta, rounds, training
from fedlora_jax.batches import Padded, pooled, steps_taken
from fedlora_jax.clients import sample_answers, sample_batches, sample_rounds, sample_stops
from fedlora_jax.methods.fed_sb import first_update
from fedlora_jax.methods.fedit import fedit
from fedlora_jax.methods.fedrep import fedrep

T = 3
TAKEN = np.array([2, 3, 2, 3])
SCHEDULED = optax.adamw(lambda step: 0.05 / (1 + step), eps=0.01, eps_root=1e-4, weight_decay=0.1)


def losses(base, adapter, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits(base, adapter, batch["x"]), batch["y"])


def any_loss(base, adapter, batch, key):
    """The tests' loss, which draws noise from its key, of whole batches and of padded ones."""
    if not isinstance(batch, Padded):
        return loss_fn(base, adapter, batch, key)
    noisy = batch.examples["x"] + 0.1 * jax.random.normal(key, batch.examples["x"].shape)
    return batch.mean(losses(base, adapter, batch.examples | {"x": noisy}))


def short(c, taken=TAKEN):
    """The cohort whose clients take so many of their steps."""
    steps, batch = c.batches["y"].shape[1:]
    present = np.arange(steps)[:, None] < np.asarray(taken)[:, None, None]
    return c._replace(batches=Padded(c.batches, jnp.asarray(np.broadcast_to(present, (len(taken), steps, batch)))))


def one(c, i, steps):
    """Client ``i`` of the cohort, with its first steps alone."""
    own = jax.tree.map(lambda x: x[i : i + 1], c)
    return own._replace(batches=jax.tree.map(lambda x: x[:, :steps], own.batches), weights=np.ones(1))


@pytest.mark.long
@pytest.mark.parametrize("name", ["fedit", "fedrep", "scaffold"])
def test_each_client_does_what_it_would_do_alone(name):
    """Unequal weights and ranks; moments and decay, schedules, memories, control variates and phases included."""
    method = (METHODS | WRAPPED)[name]()
    optimizer = optax.sgd(LOCAL_LR) if name == "scaffold" else SCHEDULED
    c = members(method, 3, steps=T, ranks=[1, 2, 2, 1])
    state = method.init(KEY, nudged(ADAPTER))
    round_fn = jit(rounds.make_round(method, any_loss, optimizer))
    new, memory, info = round_fn(BASE, state, short(c), KEY)
    alone = [round_fn(BASE, state, one(c, i, k), KEY) for i, k in enumerate(TAKEN)]
    for i, (_, kept, told) in enumerate(alone):
        assert_near(take(memory, i), take(kept, 0), 1e-4)
        assert_near(take(info.loss, i), take(told.loss, 0), 1e-5)
        assert_near(take(info.moved, i), take(told.moved, 0), 1e-4)
    if name == "fedit":
        weights = c.weights / c.weights.sum()
        mask = method.dispatch(BASE, state, c).mask  # a client alone keeps what nobody else holds
        ends = [jax.tree.map(lambda x, m, i=i: x * m[i], own.adapter, mask) for i, (own, _, _) in enumerate(alone)]
        mean = jax.tree.map(lambda *x: sum(p * np.float64(y) for p, y in zip(weights, x, strict=True)), *ends)
        assert_near(new.adapter, mean, 1e-5)
        for chunk in (1, 2):  # alone a step that is not taken is not computed
            other = jit(rounds.make_round(method, any_loss, optimizer, chunk=chunk))(BASE, state, short(c), KEY)
            assert_near(other, (new, memory, info), 1e-5)


@pytest.mark.long
def test_whoever_takes_all_steps_takes_those_of_a_program_without_padding():
    method, c = fedit(), cohort(1, steps=T)
    state = method.init(KEY, nudged(ADAPTER))
    round_fn = jit(rounds.make_round(method, any_loss, OPTIMIZER))
    assert_near(round_fn(BASE, state, short(c, [T] * CLIENTS), KEY), round_fn(BASE, state, c, KEY), 1e-5)


@pytest.mark.long
def test_models_are_scored_after_each_clients_own_steps():
    method, c = METHODS["ditto"](), members(METHODS["ditto"](), 2, steps=T)
    own = jax.tree.map(lambda x: x[:, 0], c.batches)
    evaluate = jit(rounds.make_evaluate(method, lambda *of: losses(*of).mean(), any_loss, OPTIMIZER))
    state = method.init(KEY, nudged(ADAPTER))
    scores = evaluate(BASE, state, short(c), own, KEY)
    for i, k in enumerate(TAKEN):
        alone = evaluate(BASE, state, one(c, i, k), jax.tree.map(lambda x, i=i: x[i : i + 1], own), KEY)
        assert_near(take(scores, i), take(alone, 0), 1e-5)


@pytest.mark.long
def test_a_meta_gradient_goes_through_the_steps_that_are_taken():
    c = cohort(4, steps=T)
    local = training.make_local(fedit(), any_loss, OPTIMIZER)
    mask = jax.tree.map(jnp.ones_like, ADAPTER)
    judge = lambda adapter: losses(BASE, adapter, take(c.queries, 0)).mean()

    def gradient(batches):
        tune = lambda start: local(BASE, start, mask, (), batches, KEY)
        return meta.exact.train(tune, judge, nudged(ADAPTER))[2]

    assert_near(jit(gradient)(take(short(c).batches, 0)), jit(gradient)(take(one(c, 0, 2).batches, 0)), 1e-4)


def test_a_batch_that_is_not_full_means_what_is_there():
    """Two steps, of three examples and of one, by hand."""
    c, sgd = cohort(5, clients=1, steps=2), optax.sgd(0.1, momentum=0.9)
    present = jnp.array([[[True, True, True], [True, False, False]]])
    loss = lambda base, adapter, batch, key: batch.mean(losses(base, adapter, batch.examples))
    c = c._replace(batches=Padded(c.batches, present))
    state = fedit().init(KEY, nudged(ADAPTER))
    new, _, info = jit(rounds.make_round(fedit(), loss, sgd))(BASE, state, c, KEY)

    adapter, opt_state, told = state.adapter, sgd.init(state.adapter), []
    for t, n in enumerate((3, 1)):
        batch = {name: x[0, t, :n] for name, x in c.batches.examples.items()}
        value, grads = jit(jax.value_and_grad(lambda w, batch=batch: losses(BASE, w, batch).mean()))(adapter)
        updates, opt_state = sgd.update(grads, opt_state)
        adapter, told = optax.apply_updates(adapter, updates), [*told, value]
    assert_near(new.adapter, adapter, 1e-5)
    assert_near(info.loss[0], np.mean(told), 1e-5)
    assert Padded(None, jnp.zeros(3, bool)).mean(jnp.full(3, jnp.nan)) == 0


def test_clients_go_through_so_many_of_their_examples_and_draw_as_ever():
    data, clients = examples(), population(sizes=(5, 9, 3, 7, 4))
    counts, draw = np.array([5, 9, 3, 14, 1]), jit(sample_batches, static_argnums=(4, 5, 6))
    ids, steps = jnp.array([1, 4, 3]), 5
    batches = draw(KEY, data, clients._replace(examples=counts), ids, steps, BATCH, 3)
    assert_near(batches.examples, draw(KEY, data, clients, ids, steps, BATCH, 3), 0)
    np.testing.assert_array_equal(batches.present.sum((1, 2)), counts[np.asarray(ids)])
    np.testing.assert_array_equal(steps_taken(batches, 1), [3, 1, 5])
    whole = np.asarray(batches.examples["x"])[0][np.asarray(batches.present)[0]]  # an epoch of client 1
    own = np.asarray(data["x"])[np.asarray(clients.rows)[1, :9]]
    np.testing.assert_array_equal(np.sort(whole, 0), np.sort(own, 0))
    for wrong in (0, 16):
        with pytest.raises(ValueError, match="expected 1 to 15, which is what 5 steps of 3 make"):
            sample_batches(KEY, data, clients._replace(examples=np.full(5, wrong)), ids, steps, BATCH, 3)
    with pytest.raises(ValueError, match="several rounds are drawn at once where all clients take the same steps"):
        sample_rounds(KEY, data, clients._replace(examples=counts), ids[None], steps, BATCH, 3, 0)


def test_pooled_batches_hold_what_is_there_and_no_more():
    """In the order of the batches of whole clients; the last one alone is not full."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(CLIENTS, T, BATCH, 2)))
    present = jnp.asarray(rng.random((CLIENTS, T, BATCH)) < 0.6)
    whole, own = pooled(x), pooled(Padded(x, present))
    order = np.asarray(pooled(present)).ravel()
    np.testing.assert_array_equal(
        np.asarray(own.examples).reshape(-1, 2)[: order.sum()], np.asarray(whole).reshape(-1, 2)[order]
    )
    np.testing.assert_array_equal(np.asarray(own.present).ravel(), np.arange(order.size) < order.sum())
    assert steps_taken(own, 1).tolist() == [-(-int(order.sum()) // BATCH)]


def test_a_first_update_is_of_the_steps_that_are_taken():
    c = short(cohort(6, clients=1, steps=T), [2])
    make = lambda batches: first_update(any_loss, BASE, ADAPTER, batches, jnp.ones(1), 0.1, KEY)
    first = lambda tree: jax.tree.map(lambda x: x[:, :2], tree)
    assert_near(jit(make)(c.batches), jit(make)(first(c.batches.examples)), 1e-4)


def test_a_method_in_phases_wants_a_step_of_each_from_everybody():
    c = short(cohort(steps=T), [3, 1, 3, 3])
    with pytest.raises(ValueError, match=r"0\.5 of 1 local steps for the head leaves none"):
        fedrep().pool(c)
    assert fedrep().pool(short(cohort(steps=T))) is not None


@pytest.mark.long
def test_stragglers_stop_after_some_of_their_steps():
    """As many as are asked for, after any step; the round is that of clients that had no more to do, FedNova's too."""
    steps, many = 5, np.arange(4000)
    whole = jnp.full(len(many), steps * BATCH)
    own = np.asarray(sample_stops(KEY, many, 0.4, whole, BATCH))
    assert abs(np.mean(own < steps * BATCH) - 0.4) < 0.03
    counts = np.bincount(own // BATCH, minlength=steps + 1)
    assert counts[0] == 0
    np.testing.assert_allclose(counts[1:steps] / len(many), 0.1, atol=0.02)
    assert set(np.asarray(sample_stops(KEY, many, 1.0, jnp.full(len(many), 2), BATCH))) == {2}, "one step is taken"
    assert np.asarray(sample_stops(KEY, many, 0.0, whole, BATCH)).min() == steps * BATCH

    data, clients = examples(), population()
    draw = jax.random.split(jax.random.fold_in(KEY, 0), 3)[1]
    own = sample_stops(draw, np.arange(5), 0.6, jnp.full(5, T * BATCH), BATCH)
    assert len(set(own.tolist())) > 1
    for name in ("fedit", "fednova"):
        method = (METHODS | WRAPPED)[name]()
        run = rounds.start(method, KEY, nudged(ADAPTER), 5)
        round_fn = rounds.make_round(method, any_loss, optax.sgd(LOCAL_LR))
        make = lambda round_fn=round_fn, **options: jit(
            rounds.make_step(round_fn, participants=5, steps=T, batch=BATCH, smallest=0, **options)
        )
        found = make(stragglers=0.6)(BASE, data, clients, run, KEY)
        assert_near(found, make()(BASE, data, clients._replace(examples=own), run, KEY), 1e-6)


@pytest.mark.long
def test_who_never_answers_or_has_nothing_is_as_if_not_drawn():
    data, clients, ids = examples(), population(), np.arange(5)
    run = rounds.start(fedit(), KEY, nudged(ADAPTER), 5)
    make = lambda **options: jit(
        rounds.make_step(
            rounds.make_round(fedit(), loss_fn, OPTIMIZER), participants=5, steps=2, batch=BATCH, smallest=0, **options
        )
    )
    plain, unsure = make(), make(dropouts=0.4)
    draw = jax.random.split(jax.random.fold_in(KEY, 0), 3)[1]
    answers = np.asarray(sample_answers(draw, ids, 0.4))
    assert 0 < answers.sum() < 5
    new, info = unsure(BASE, data, clients, run, KEY)
    without, _ = plain(BASE, data, clients._replace(weights=clients.sizes * answers), run, KEY)
    assert_near(new.state, without.state, 1e-6)
    assert info.dropped == 5 - answers.sum()
    assert abs(np.mean(sample_answers(KEY, np.arange(2000), 0.4)) - 0.6) < 0.04
    with pytest.raises(ValueError, match=r"dropouts must be at least 0 and below 1, got 1\.0"):
        sample_answers(KEY, ids, 1.0)

    empty, info = plain(BASE, data, clients._replace(sizes=clients.sizes * (ids != 2)), run, KEY)
    without, _ = plain(BASE, data, clients._replace(weights=clients.sizes * (ids != 2)), run, KEY)
    assert_near(empty.state, without.state, 1e-6)
    assert info.dropped == 1
