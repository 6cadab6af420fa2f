"""The signature adapter: what it adds, what it learns from, and that the mean client does not notice."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ADAPTER, BASE, CLIENTS, KEY, SIGNATURE, assert_near, cohort, jit, loss_fn, nudged

from fedlora_jax import lora, rounds
from fedlora_jax.method import models
from fedlora_jax.methods.ditto import ditto
from fedlora_jax.methods.fedit import fedit
from fedlora_jax.signatures import Signature
from fedlora_jax.wrappers.signature_adapter import signature_adapter

RNG = np.random.default_rng(0)
M = sum(x.shape[-1] for x in SIGNATURE)


def told(rows) -> Signature:
    rows = jnp.asarray(rows, jnp.float32)
    sizes = np.cumsum([x.shape[-1] for x in SIGNATURE])[:-1]
    return Signature(*jnp.split(rows, sizes, -1))


def learned_state(method):
    """A state in which something is generated."""
    state = method.init(KEY, ADAPTER)
    draw = lambda x: jnp.asarray(0.1 * RNG.normal(size=x.shape), x.dtype)
    return state._replace(own=state.own._replace(maps=jax.tree.map(draw, state.own.maps), second=jnp.eye(M)))


def test_what_is_generated_stands_beside_the_models_and_is_linear_in_the_signature():
    method, z = signature_adapter(fedit(), SIGNATURE, CLIENTS, rank=2), RNG.normal(size=(CLIENTS, M))
    state = learned_state(method)
    state = state._replace(own=state.own._replace(center=told(z.mean(0))))
    c = cohort()._replace(signatures=told(z))
    sent = method.dispatch(BASE, state, c)
    served, bare = lora.flatten(models(method, sent)), lora.flatten(sent.adapter)
    phi, own = np.float64(z - z.mean(0)), jax.tree.map(np.float64, (state.own.basis, state.own.maps))
    for name, x in bare.items():
        if lora.is_lora(x):
            by_hand = lora.delta(x) + np.einsum("...ik,cm,m...ko->c...io", own[0][name], phi, own[1][name])
            assert_near(lora.delta(served[name]), by_hand, 1e-5)
        else:
            assert_near(served[name], x + np.tensordot(phi, own[1][name], 1), 1e-5)


def test_the_mean_client_is_served_the_inner_model():
    method = signature_adapter(fedit(), SIGNATURE, CLIENTS, rank=2)
    state = learned_state(method)
    c = cohort(clients=1)._replace(signatures=jax.tree.map(lambda x: x[None], state.own.center))
    for x in jax.tree.leaves(method.dispatch(BASE, state, c).context.own.own):
        assert_near(x, np.zeros(x.shape), 0)


@pytest.mark.long
def test_one_round_is_one_step_of_ridge_regression_of_clients_moves_on_their_signatures():
    """With eta = 1 and nothing known before, in float64 NumPy; the inner method aggregates as ever."""
    inner, ridge = fedit(), 0.5
    method = signature_adapter(inner, SIGNATURE, CLIENTS, rank=2, lr=1.0, ridge=ridge, warmup=0)
    state, z = method.init(KEY, ADAPTER), RNG.normal(size=(CLIENTS, M))
    c = cohort()._replace(signatures=told(z))
    c = c._replace(weights=c.weights / c.weights.sum())
    sent = method.dispatch(BASE, state, c)
    received = nudged(sent.adapter, 5)
    new = method.aggregate(BASE, state, c, sent, received)
    assert_near(new.inner, inner.aggregate(BASE, state.inner, c, inner.dispatch(BASE, state.inner, c), received), 1e-6)
    p = np.float64(c.weights)
    beyond = lambda x: x - np.tensordot(p, x, 1)
    phi = beyond(z)
    second = np.einsum("c,ci,cj->ij", p, phi, phi)
    gain = np.linalg.inv(second + ridge * np.trace(second) / CLIENTS * np.eye(M)) @ (p[:, None] * phi).T
    before, after = lora.flatten(sent.adapter), lora.flatten(received)
    for name, x in new.own.maps.items():
        if name in new.own.basis:
            moved = np.float64(lora.delta(after[name])) - np.float64(lora.delta(before[name]))
            moved = np.einsum("...ik,c...io->c...ko", np.float64(state.own.basis[name]), moved)
        else:
            moved = np.float64(after[name]) - np.float64(before[name])
        assert_near(x, np.tensordot(gain, beyond(moved), 1), 1e-5)


@pytest.mark.long
def test_the_basis_turns_to_where_clients_move_and_stays_after_the_warm_up():
    """Clients that move along two directions each: after some rounds of warm-up these are what the basis spans."""
    method, c = signature_adapter(fedit(), SIGNATURE, CLIENTS, rank=2, warmup=4), cohort()
    state = method.init(KEY, ADAPTER)
    name = next(iter(state.own.basis))
    width = lora.flatten(ADAPTER)[name].a.shape[-2]
    plane = np.linalg.qr(RNG.normal(size=(width, 2)))[0]

    def moved(x, y):  # b under an a within the plane
        a = jnp.broadcast_to(jnp.asarray(plane, jnp.float32), x.a.shape)
        return lora.LoRA(a, y.b, x.scale)

    bases = []
    for t in range(6):
        sent = method.dispatch(BASE, state, c)
        still = lora.flatten(sent.adapter)
        still[name] = lora.LoRA(moved(still[name], still[name]).a, 0 * still[name].b, still[name].scale)
        sent = sent._replace(adapter=lora.unflatten(still))
        end = {**still, name: moved(still[name], lora.flatten(nudged(sent.adapter, t))[name])}
        state = method.aggregate(BASE, state, c, sent, lora.unflatten(end))
        bases.append(np.asarray(state.own.basis[name]))
    inside = bases[3] @ np.swapaxes(bases[3], -1, -2) @ plane
    assert_near(inside, np.broadcast_to(plane, inside.shape), 1e-4)
    assert_near(bases[3], bases[5], 0)


@pytest.mark.long
def test_clients_of_two_kinds_are_served_better_at_once_even_if_they_never_trained():
    """Kinds name what they see differently; signatures say who is of which."""
    kind = np.arange(CLIENTS) % 2
    z = told(np.where(kind[:, None], 1.0, -1.0) * np.ones((CLIENTS, M)))

    def trained(method):
        state, round_fn = method.init(KEY, ADAPTER), jit(rounds.make_round(method, loss_fn, optax.sgd(0.5)))
        for t in range(20):
            state, *_ = round_fn(BASE, state, renamed(cohort(t))._replace(signatures=z), jax.random.fold_in(KEY, t))
        c = renamed(cohort(99))._replace(ids=jnp.arange(CLIENTS) + 1000, signatures=z)
        sent = method.dispatch(BASE, state, c)
        judge = lambda row, context, batch: loss_fn(BASE, method.model(row, context), batch, KEY)
        return jax.vmap(judge)(sent.adapter, sent.context, c.queries).mean()

    def renamed(c):
        one = lambda batch: {
            **batch,
            "y": np.broadcast_to(kind.reshape(-1, *(1,) * (batch["y"].ndim - 1)), batch["y"].shape),
        }
        return c._replace(batches=one(c.batches), queries=one(c.queries))

    assert trained(signature_adapter(fedit(), SIGNATURE, CLIENTS, rank=2)) < 0.5 * trained(fedit())


def test_numbers_and_methods_that_have_no_meaning_are_refused():
    for wrong in ({"lr": 1.5}, {"ridge": 0}, {"rank": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            signature_adapter(fedit(), SIGNATURE, CLIENTS, **wrong)
    with pytest.raises(ValueError, match="generates nothing"):
        signature_adapter(fedit(), SIGNATURE, CLIENTS, rank=0, head=False)
    pair = signature_adapter(ditto(), SIGNATURE, CLIENTS)
    rows = cohort()._replace(memory=jax.vmap(lambda i: pair.init_client(ADAPTER))(jnp.arange(CLIENTS)))
    with pytest.raises(ValueError, match="wrap a method whose clients carry one adapter"):
        pair.dispatch(BASE, pair.init(KEY, ADAPTER), rows)
