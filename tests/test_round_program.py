"""A whole round, sampling included, is one program: compiled once, blind to chunks, honest about who saw what."""

from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ADAPTER,
    BASE,
    BATCH,
    CLIENTS,
    EVERY,
    KEY,
    METHODS,
    OPTIMIZER,
    STEPS,
    assert_near,
    cohort,
    effective,
    examples,
    jit,
    logits,
    loss_fn,
    normalised,
    nudged,
    population,
    problem,
    take,
    train,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.config import Config
from experiments.engine.programs import make_block
from fedlora_jax import rounds
from fedlora_jax.attacks import NOBODY
from fedlora_jax.checks import refuse_twice
from fedlora_jax.clients import sample_batches, sample_ids, sample_rows
from fedlora_jax.method import Method, average_client
from fedlora_jax.methods.fedit import FedITState, fedit
from fedlora_jax.signatures import Signature

SIZES = (5, 9, 3, 7, 4)


class Kept(NamedTuple):
    """What a client of ``keeping`` remembers."""

    visits: jax.Array
    head: jax.Array


def keeping() -> Method:
    """FedIT whose clients count their visits and keep the head they trained last."""
    return fedit()._replace(
        init_client=lambda adapter: Kept(jnp.zeros((), int), jnp.full_like(adapter["head"]["kernel"], -1.0)),
        remember=lambda memory, context, sent, received: Kept(memory.visits + 1, received["head"]["kernel"]),
    )


def make_step(method, loss=loss_fn, participants=3, chunk=None):
    round_fn = rounds.make_round(method, loss, OPTIMIZER, chunk=chunk)
    return rounds.make_step(round_fn, participants=participants, steps=STEPS, batch=BATCH, smallest=min(SIZES))


# --- who takes part, and with which examples


def test_cohorts_are_different_clients_and_everybody_comes_at_last():
    draw = jax.jit(jax.vmap(lambda key: sample_ids(key, 7, 3)))
    ids = draw(jax.random.split(KEY, 200))
    assert all(len(set(row)) == 3 for row in ids.tolist())
    share = np.bincount(ids.ravel(), minlength=7) / 200
    np.testing.assert_allclose(share, 3 / 7, atol=0.15)
    np.testing.assert_array_equal(sample_ids(KEY, 4, 4), np.arange(4))
    for wrong in (0, 5):
        with pytest.raises(ValueError, match="choose 1 to 4"):
            sample_ids(KEY, 4, wrong)


@pytest.mark.long
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([1, 2, 5, 9]), batch=st.integers(1, 3))
def test_every_epoch_visits_each_of_a_clients_rows_once_and_never_padding(seed, size, batch):
    """Each epoch in the order of its row of one table of uniform numbers, which is never drawn as a whole."""
    rows = np.full(9, 999)
    rows[:size] = 10 + np.arange(size)
    steps, key = 6, jax.random.key(seed)
    drawn = jit(sample_rows, static_argnums=(3, 4))(key, jnp.asarray(rows), jnp.asarray(size), steps, batch)
    assert drawn.shape == (steps, batch)
    table = np.asarray(jax.random.uniform(key, (18, 9), jnp.float32))[:, :size]
    np.testing.assert_array_equal(drawn.ravel(), rows[table.argsort(1)].ravel()[: steps * batch])
    visits = np.asarray(drawn).ravel()
    for start in range(0, len(visits), size):
        epoch = visits[start : start + size]
        assert len(set(epoch.tolist())) == len(epoch)
        assert set(epoch.tolist()) <= set(rows[:size].tolist())


def test_epochs_are_shuffled_anew():
    drawn = sample_rows(KEY, jnp.arange(8), jnp.asarray(8), 4, 8)
    assert len({tuple(epoch) for epoch in np.asarray(drawn).tolist()}) == 4


def test_a_tiny_client_makes_nobodys_draw_large():
    """640 examples of one client are 640 epochs of one example; the other 15 have 5,000."""
    data, clients = {"x": np.zeros((6000, 1), np.float32)}, population((1, *[5000] * 2))
    program = jax.jit(sample_batches, static_argnums=(4, 5, 6))
    memory = program.lower(KEY, data, clients, np.arange(3), 20, 32, 1).compile().memory_analysis()
    if memory is not None:
        assert memory.temp_size_in_bytes < 3 * 200 * (640 + 5000)


def test_a_smallest_client_that_is_smaller_still_is_refused():
    with pytest.raises(ValueError, match="smallest is 4, and the smallest of these clients has 3: give its size"):
        sample_batches(KEY, examples(), population(SIZES), np.arange(5), STEPS, BATCH, 4)
    inside = jit(sample_batches, static_argnums=(4, 5, 6))  # where sizes are traced no draw depends on it
    draws = (inside(KEY, examples(), population(SIZES), np.arange(5), 5, BATCH, smallest) for smallest in (9, 3))
    assert_near(*draws, 0)


def test_what_a_client_draws_depends_on_the_key_and_its_id_alone():
    data, clients = examples(), population(SIZES)
    program = jit(sample_batches, static_argnums=(4, 5, 6))
    draw = lambda ids, key=KEY: program(key, data, clients, jnp.asarray(ids), STEPS, BATCH, 3)
    for ids in ([3], [4, 2, 3]):
        assert_near(take(draw(ids), ids.index(3)), take(draw([0, 1, 2, 3, 4]), 3), 0)
    assert (draw([3], jax.random.key(1))["x"] != draw([3])["x"]).any()


def test_examples_in_the_padding_are_never_seen():
    """A client's rows beyond its size may point anywhere."""
    clients, method = population(SIZES), fedit()
    padding = np.arange(max(SIZES)) >= np.asarray(SIZES)[:, None]
    elsewhere = clients._replace(rows=jnp.where(padding, 39, clients.rows))
    step = jit(make_step(method))
    run = rounds.start(method, KEY, ADAPTER, len(SIZES))
    one, other = (step(BASE, examples(), people, run, KEY) for people in (clients, elsewhere))
    assert_near(other, one, 0)


# --- the round


def test_a_round_is_dispatch_local_steps_aggregation():
    method, c = METHODS["flexlora"](), cohort(1)
    state = method.init(KEY, nudged(ADAPTER))
    new, memory, info = jit(rounds.make_round(method, loss_fn, OPTIMIZER))(BASE, state, c, KEY)
    sent = method.dispatch(BASE, state, c)
    received, losses = train(method, sent, c, KEY)
    by_hand = method.aggregate(BASE, state, normalised(c), sent, received)
    assert_near(effective(method, BASE, new, c), effective(method, BASE, by_hand, c))
    assert_near(info.loss, losses.mean(1))
    np.testing.assert_array_equal(info.ids, c.ids)
    assert memory == ()


def test_weights_count_in_proportion():
    method, c = fedit(), cohort(1)
    state, round_fn = method.init(KEY, ADAPTER), jit(rounds.make_round(method, loss_fn, OPTIMIZER))
    one, _, _ = round_fn(BASE, state, c, KEY)
    other, _, _ = round_fn(BASE, state, c._replace(weights=7 * c.weights), KEY)
    assert_near(other, one, 1e-6)


def test_a_client_that_is_twice_in_a_cohort_is_refused():
    """Some methods count clients and not weights; of what it keeps, one row would be lost."""
    c, method = cohort(), METHODS["fedit"]()
    twice = c._replace(ids=jnp.asarray([3, 1, 3, 0]))
    round_fn = rounds.make_round(method, loss_fn, OPTIMIZER)
    with pytest.raises(ValueError, match=r"client 3 is in the cohort 2 times: give it once"):
        round_fn(BASE, method.init(KEY, ADAPTER), twice, KEY)
    refuse_twice(jnp.full(CLIENTS, -1))  # nobody in particular may be many


@pytest.mark.long
def test_client_keys_do_not_depend_on_chunks():
    """A loss that is nothing but its key."""
    read = lambda adapter: sum(0 * x.sum() for x in jax.tree.leaves(adapter))
    noise = lambda base, adapter, batch, key: jax.random.normal(key) + read(adapter)
    state, c = fedit().init(KEY, ADAPTER), cohort()
    losses = [
        jit(rounds.make_round(fedit(), noise, OPTIMIZER, chunk=chunk))(BASE, state, c, KEY)[2].loss
        for chunk in (None, 1, 2, 4)
    ]
    for loss in losses[1:]:
        np.testing.assert_array_equal(loss, losses[0])
    assert len(set(losses[0].tolist())) == CLIENTS


def test_a_chunk_that_does_not_divide_the_cohort_is_refused():
    for chunk in (0, 3, 8):
        round_fn = rounds.make_round(fedit(), loss_fn, OPTIMIZER, chunk=chunk)
        with pytest.raises(ValueError, match=r"choose one of \[1, 2, 4\]"):
            round_fn(BASE, fedit().init(KEY, ADAPTER), cohort(), KEY)


# --- the loop


@pytest.mark.long
def test_a_run_compiles_once_counts_its_rounds_and_donates_its_state():
    """Step by step and as scans; what was given to ``start`` lives on."""
    traces = []

    def counted(*args):
        traces.append(1)
        return loss_fn(*args)

    key, adapter, method = jax.random.key(3), problem().adapter, keeping()
    data, clients = examples(), population(SIZES)
    step = make_step(method, counted)
    one = jit(step, donate_argnums=3)
    many = jit(rounds.scan_rounds(step, 3), donate_argnums=3)

    run, losses = rounds.start(method, key, adapter, len(SIZES)), []
    for _ in range(6):
        run, info = one(BASE, data, clients, run, key)
        losses.append(info.loss)
    first = len(traces)
    other = rounds.start(method, key, adapter, len(SIZES))
    other, early = many(BASE, data, clients, other, key)
    second = len(traces)
    other, late = many(BASE, data, clients, other, key)

    assert (first, len(traces)) == (len(traces) - second + first, second)
    assert second - first <= first
    assert run.round == other.round == 6
    assert_near(jnp.concatenate([early.loss, late.loss]), jnp.stack(losses))
    assert_near(other.state, run.state)
    assert not any(x.is_deleted() for x in jax.tree.leaves((adapter, key)))


@pytest.mark.parametrize("name", EVERY)
def test_a_run_owns_its_arrays(name):
    """It can be donated: no array is in it twice, none is its caller's."""
    key, adapter = jax.random.key(3), problem().adapter
    run = jax.tree.leaves(rounds.start(EVERY[name](), key, adapter, 5))
    for x in run:  # the second time, it would be gone
        donated(x)
    assert all(x.is_deleted() for x in run)
    assert not any(x.is_deleted() for x in jax.tree.leaves((adapter, key)))


donated = jit(jnp.copy, donate_argnums=0)  # compiled once for each shape


def test_only_who_takes_part_remembers():
    method, data, clients = keeping(), examples(), population(SIZES)
    step = jit(make_step(method))
    run = rounds.start(method, KEY, ADAPTER, len(SIZES))
    np.testing.assert_array_equal(run.memory.visits, np.zeros(5))
    visits = np.zeros(5, int)
    for _ in range(4):
        before, (run, info) = run, step(BASE, data, clients, run, KEY)
        visits[info.ids] += 1
        away = np.setdiff1d(np.arange(5), info.ids)
        np.testing.assert_array_equal(run.memory.visits, visits)
        np.testing.assert_array_equal(run.memory.head[away], before.memory.head[away])
        assert (run.memory.head[info.ids] != before.memory.head[info.ids]).all()


# --- evaluation


def accuracy_and_loss(base, adapter, own):
    scores = logits(base, adapter, own["x"])
    return {"accuracy": jnp.mean(scores.argmax(-1) == own["y"]), "scores": scores}


@pytest.mark.long
def test_evaluation_scores_what_is_dispatched_before_and_after_local_steps():
    method, c = METHODS["flora"](), cohort(2, ranks=[1, 2, 2, 1])
    state = method.init(KEY, ADAPTER)._replace(adapter=nudged(ADAPTER))
    own = jax.tree.map(lambda x: x.reshape(CLIENTS, 10, *x.shape[1:]), examples())
    sent = method.dispatch(BASE, state, c)
    tuned, _ = train(method, sent, c, KEY)

    evaluate = rounds.make_evaluate(method, accuracy_and_loss, loss_fn, OPTIMIZER)
    chunked = rounds.make_evaluate(method, accuracy_and_loss, loss_fn, OPTIMIZER, chunk=2)
    scores = jit(evaluate)(BASE, state, c, own, KEY)
    for i in range(CLIENTS):
        for part, adapters in ((scores.before, sent.adapter), (scores.after, tuned)):
            assert_near(take(part, i), accuracy_and_loss(sent.base, take(adapters, i), take(own, i)), 1e-4)
    assert_near(jit(chunked)(BASE, state, c, own, KEY), scores)
    untuned = evaluate(BASE, state, c._replace(batches=()), own, KEY)
    assert untuned.after is None
    assert_near(untuned.before, scores.before)


def test_evaluation_with_local_steps_needs_a_loss():
    evaluate = rounds.make_evaluate(fedit(), accuracy_and_loss)
    with pytest.raises(ValueError, match="make_evaluate needs loss_fn and optimizer"):
        evaluate(BASE, fedit().init(KEY, ADAPTER), cohort(), examples(), KEY)


def test_an_average_client_gets_the_global_model():
    method, c = fedit(), cohort(weights=[1, 0, 2, 1], ranks=[1, 2, 1, 1])
    state = method.init(KEY, nudged(ADAPTER))
    one = average_client(c._replace(memory=Kept(jnp.arange(CLIENTS), jnp.arange(4.0))))
    assert one.ids.tolist() == [-1]
    assert one.batches == ()
    shape, labels, amount = (np.float64(x) for x in c.signatures)
    mean = lambda x: np.float64(c.weights) @ x / 4
    expected = Signature(mean(shape), np.sqrt(mean(np.maximum(labels, 0) ** 2)), mean(amount))  # roots of shares
    assert_near(take(one.signatures, 0), expected, 1e-6)
    assert_near(one.memory.head, jnp.asarray([7 / 4]))
    evaluate = rounds.make_evaluate(method, accuracy_and_loss)
    scores = evaluate(BASE, state, one, jax.tree.map(lambda x: x[None], examples()), KEY)
    assert_near(take(scores.before, 0), accuracy_and_loss(BASE, state.adapter, examples()))


def test_only_servers_that_learn_from_signatures_are_told_of_random_parts():
    """FedLC counts with the label histogram: of all of a client's data, whatever view training would draw."""
    told = jax.tree.map(lambda x: jnp.concatenate([x, x + 1, x + 2], 1), population(SIZES).signatures)
    clients = population(SIZES)._replace(signatures=told)
    config = Config(clients=len(SIZES), local_steps=1, batch=BATCH, seeds=(0,))
    images = examples()
    data = SimpleNamespace(
        loss_fn=loss_fn,
        judge_fn=None,
        smallest=min(SIZES),
        longest=None,
        train=(images["x"], images["y"]),
        attack=NOBODY,
    )

    def keep(base, state, cohort, sent, received):
        return state._replace(adapter=cohort.signatures)

    def seen(**hooks):
        send = lambda base, state, cohort: fedit().dispatch(base, FedITState(ADAPTER), cohort)
        method = fedit()._replace(aggregate=keep, dispatch=send, **hooks)
        block = make_block(config, data, method, OPTIMIZER, None)
        run = rounds.Run(FedITState(jax.tree.map(lambda x: x[:, 0], told)), (), jnp.zeros((), int))
        return jit(block)(BASE, examples(), clients, run, KEY)[0].state.adapter

    assert_near(seen(), jax.tree.map(lambda x: x[:, 0], told), 0)
    learning = seen(learn=lambda state, cohort, slopes: state)
    assert np.all(learning.amount > told.amount[:, 0] + 0.5)


@pytest.mark.parametrize("clients", [1, len(SIZES) - 1, len(SIZES) + 1])
def test_a_run_for_another_number_of_clients_is_refused(clients):
    method = METHODS["ditto"]()
    step = rounds.make_step(
        rounds.make_round(method, loss_fn, OPTIMIZER), participants=2, steps=1, batch=BATCH, smallest=min(SIZES)
    )
    run = rounds.start(method, KEY, ADAPTER, clients=clients)
    with pytest.raises(ValueError, match=f"rows of {clients} clients .* the population has {len(SIZES)}"):
        jax.eval_shape(step, BASE, examples(), population(SIZES), run, KEY)
