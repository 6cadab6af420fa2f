"""The signature bias: what it adds, what it learns from, and that the method inside does not notice."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ADAPTER, BASE, CLASSES, CLIENTS, KEY, SIGNATURE, assert_near, cohort, jit, loss_fn, members, nudged

from fedlora_jax import lora, rounds
from fedlora_jax.hyper import generator
from fedlora_jax.hyper.generator import EPSILON
from fedlora_jax.method import models
from fedlora_jax.methods.ditto import ditto
from fedlora_jax.methods.fedit import fedit
from fedlora_jax.methods.hilora import LEAF, hilora
from fedlora_jax.signatures import Signature, label_free
from fedlora_jax.wrappers import Wrapped
from fedlora_jax.wrappers.signature_bias import signature_bias

SGD = optax.sgd(0.5)
LEARNED = jnp.float32(0.7)


def shares(rows, n: float = 20.0) -> Signature:
    rows = np.asarray(rows, np.float32)
    amount = np.full((len(rows), 1), np.log1p(n) / 10, np.float32)
    return Signature(jnp.zeros((len(rows), 4)), jnp.sqrt(rows), jnp.asarray(amount))


def state_of(method, t=LEARNED, center=None):
    state = method.init(KEY, ADAPTER)
    own = state.own._replace(t=t, center=center or jax.tree.map(lambda x: x[0], shares([[0.4, 0.4, 0.2]])))
    return state._replace(own=own)


def test_every_class_is_shifted_by_a_part_of_the_move_to_the_clients_shares():
    rows = [[0.5, 0.3, 0.2], [0.0, 0.1, 0.9]]
    method, z = signature_bias(fedit(), SIGNATURE), shares(rows)
    state = state_of(method)
    c = cohort(clients=2)._replace(signatures=z)
    sent = method.dispatch(BASE, state, c)
    prior = lambda shares: np.log(np.array(shares) + EPSILON)
    by_hand = np.tanh(0.7) * (prior(rows) - prior([0.4, 0.4, 0.2]))
    assert_near(sent.context.own, by_hand, 1e-5)
    served, bare = (lora.flatten(x)["head/bias"] for x in (models(method, sent), sent.adapter))
    assert_near(served - bare, by_hand, 1e-5)
    for name, x in lora.flatten(models(method, sent)).items():
        if name != "head/bias":
            assert_near(x, lora.flatten(sent.adapter)[name], 0)


def test_all_of_the_move_makes_a_calibrated_model_a_bayes_classifier():
    """With ``p(y|x)`` right under the mean client's shares, the shifted model is right under the client's own; both
    counted with EPSILON more of each class."""
    rng = np.random.default_rng(0)
    likelihood, (mean, own) = rng.dirichlet(np.ones(CLASSES), 50), rng.dirichlet(np.ones(CLASSES), 2)
    normal = lambda x: x / x.sum(-1, keepdims=True)
    posterior = lambda shares: normal(likelihood * (shares + EPSILON))
    (shift,) = generator.class_shifts(jnp.float32(20.0), shares([own]), jax.tree.map(lambda x: x[0], shares([mean])))
    assert_near(normal(posterior(mean) * np.exp(shift)), posterior(own), 1e-5)


def test_a_fixed_part_of_the_move_is_made_from_the_first_round_on():
    method, c = signature_bias(fedit(), SIGNATURE, lr=0, warmup=0, start=0.5), cohort()
    round_fn, state = jit(rounds.make_round(method, loss_fn, SGD)), method.init(KEY, ADAPTER)
    prior = lambda z: np.log(np.maximum(z.labels, 0) ** 2 + EPSILON)
    for t in range(3):
        sent = method.dispatch(BASE, state, c)
        assert_near(sent.context.own, 0.5 * (prior(c.signatures) - prior(state.own.center)), 1e-5)
        assert_near(method.report(state)["prior"], 0.5, 1e-6)
        state, *_ = round_fn(BASE, state, cohort(t), KEY)


def test_classes_have_no_names():
    method, z = signature_bias(fedit(), SIGNATURE), shares([[0.5, 0.3, 0.2]])
    state, order = state_of(method, center=jax.tree.map(lambda x: x[0], shares([[1 / 3] * 3]))), np.array([2, 0, 1])
    shift = lambda z: method.dispatch(BASE, state, cohort(clients=1)._replace(signatures=z)).context.own
    assert_near(shift(z._replace(labels=z.labels[:, order])), shift(z)[:, order], 1e-6)


def test_the_mean_client_is_served_the_inner_model():
    method = signature_bias(fedit(), SIGNATURE)
    state = state_of(method)
    c = cohort(clients=1)._replace(signatures=jax.tree.map(lambda x: x[None], state.own.center))
    assert_near(method.dispatch(BASE, state, c).context.own, np.zeros((1, CLASSES)), 0)


@pytest.mark.long
def test_it_learns_what_is_served_without_a_step():
    """Clients of one class each: on fresh examples of that class, models as sent become better than FedIT's."""
    only = np.arange(CLIENTS) % CLASSES
    z = shares(np.eye(CLASSES)[only])

    def trained(method):
        state, round_fn = method.init(KEY, ADAPTER), jit(rounds.make_round(method, loss_fn, SGD))
        for t in range(12):
            c = with_labels(cohort(t), only)._replace(signatures=z)
            state, *_ = round_fn(BASE, state, c, jax.random.fold_in(KEY, t))
        sent = method.dispatch(BASE, state, c)
        judge = lambda row, context, batch: loss_fn(BASE, method.model(row, context), batch, KEY)
        return jax.vmap(judge)(sent.adapter, sent.context, with_labels(cohort(99), only).queries)

    def with_labels(c, labels):
        def one(batch):
            y = batch["y"]
            return {**batch, "y": np.broadcast_to(labels.reshape(-1, *(1,) * (y.ndim - 1)), y.shape)}

        return c._replace(batches=one(c.batches), queries=one(c.queries))

    assert (trained(signature_bias(fedit(), SIGNATURE, warmup=0)) < trained(fedit())).all()


def test_the_gradient_is_that_of_the_bias_clients_gave_back():
    """One step of t is AdamW on sum_c p_c <shift_c(t), sent - received>, and the inner method aggregates as ever."""
    method, inner = signature_bias(fedit(), SIGNATURE, lr=0.03, warmup=0), fedit()
    state, c = state_of(method), cohort()
    z = shares(np.random.default_rng(1).dirichlet([1] * CLASSES, CLIENTS))
    c = c._replace(weights=c.weights / c.weights.sum(), signatures=z)
    sent = method.dispatch(BASE, state, c)
    received = nudged(sent.adapter, 5)
    new = method.aggregate(BASE, state, c, sent, received)
    assert_near(new.inner, inner.aggregate(BASE, state.inner, c, inner.dispatch(BASE, state.inner, c), received), 1e-6)
    slope = lora.flatten(sent.adapter)["head/bias"] - lora.flatten(received)["head/bias"]
    shifts = lambda t: generator.class_shifts(t, z, state.own.center)
    value = lambda t: jnp.sum(c.weights[:, None] * slope * shifts(t))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.03, weight_decay=1e-4))
    updates, _ = tx.update(jax.grad(value)(LEARNED), tx.init(LEARNED), LEARNED)
    assert_near(new.own.t, optax.apply_updates(LEARNED, updates), 1e-5)


@pytest.mark.long
def test_a_hierarchy_keeps_its_tiers_and_t_rests_while_nothing_is_sent():
    make = lambda: hilora(CLIENTS, 3, root=0.34, cluster=0.33, newcomers="signature", signature=SIGNATURE)
    method = signature_bias(make(), SIGNATURE, warmup=0)
    c = members(method)._replace(ids=jnp.arange(CLIENTS), signatures=cohort().signatures)
    round_fn, state = jit(rounds.make_round(method, loss_fn, SGD)), method.init(KEY, ADAPTER)
    learned = []
    for t in range(3):
        state, *_ = round_fn(BASE, state, c, jax.random.fold_in(KEY, t))
        learned.append(float(state.own.t))
    assert int(state.inner.last) == LEAF
    assert learned[0] != learned[1] == learned[2]
    strangers = c._replace(ids=c.ids + CLIENTS)
    sent = method.dispatch(BASE, state, strangers)
    alone = make().dispatch(BASE, state.inner, strangers)
    assert isinstance(sent.context, Wrapped)
    assert_near(sent.adapter, alone.adapter, 0)
    assert np.abs(sent.context.own).max() > 0  # and it reaches clients that never took part


def test_beside_two_models_it_learns_from_the_one_that_is_sent():
    method, c = signature_bias(ditto(), SIGNATURE, warmup=0), members(ditto())
    state = state_of(method)
    sent = method.dispatch(BASE, state, c)
    received = nudged(sent.adapter, 5)
    other = {**received, "personal": nudged(received["personal"], 6)}
    assert sent.adapter.keys() == {"shared", "personal"}
    one, two = (method.aggregate(BASE, state, c, sent, x).own.t for x in (received, other))
    assert_near(one, two, 0)
    assert one != LEARNED
    served, bare = (lora.flatten(x)["head/bias"] for x in (models(method, sent), models(ditto(), inner_of(sent))))
    assert_near(served - bare, sent.context.own, 1e-6)


def inner_of(sent):
    return sent._replace(context=sent.context.inner)


def test_signatures_without_labels_and_models_without_a_bias_are_refused():
    with pytest.raises(ValueError, match="says nothing of labels"):
        signature_bias(fedit(), label_free(SIGNATURE))
    with pytest.raises(ValueError, match="at least 0, got -1"):
        signature_bias(fedit(), SIGNATURE, lr=-1)
    with pytest.raises(ValueError, match="above -1 and below 1, got 1"):
        signature_bias(fedit(), SIGNATURE, start=1)
    bare = lora.new(KEY, BASE, 2, targets="blocks/kernel")
    with pytest.raises(ValueError, match="add the head's bias"):
        signature_bias(fedit(), SIGNATURE).init(KEY, bare)
