"""Servers that choose bases, and who chooses ranks: FedSVD, FLoRIST, Ravan, LoRA-A2 against their equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ADAPTER,
    BASE,
    CLIENTS,
    KEY,
    SCALE,
    assert_near,
    cohort,
    copies,
    dense,
    host,
    jit,
    mean_product,
    members,
    normalised,
    nudged,
    take,
    train,
)

from fedlora_jax import lora
from fedlora_jax.lora import LoRA
from fedlora_jax.methods.fedit import FedITState
from fedlora_jax.methods.fedsvd import fedsvd
from fedlora_jax.methods.ffa_lora import ffa_lora
from fedlora_jax.methods.flexlora import flexlora
from fedlora_jax.methods.florist import florist, thresholded
from fedlora_jax.methods.lora_a2 import best, lora_a2, moved, scores
from fedlora_jax.methods.ravan import Heads, ravan, with_bases
from fedlora_jax.methods.rolora import RoLoRAState, rolora
from fedlora_jax.methods.spectral import screenot, spectral

KERNELS = ["blocks/kernel", "mix/kernel"]


def moved_by(method, state, seed=1):
    """One aggregation of whatever clients sent that may move."""
    c = normalised(members(method))
    sent = host(method.dispatch(BASE, state, c))
    far = nudged(sent.adapter, seed)
    received = jax.tree.map(
        lambda x, y, m: np.where(np.broadcast_to(m, x.shape) > 0, y, x), sent.adapter, far, sent.mask
    )
    return c, sent, received, host(jit(method.aggregate)(BASE, state, c, sent, received))


# --- FedSVD


def test_fedsvd_keeps_ffa_loras_product_in_new_bases():
    method, state = fedsvd(), FedITState(nudged(ADAPTER))
    c, sent, received, new = moved_by(method, state)
    plain = ffa_lora().aggregate(BASE, state, c, sent, received)
    for name in KERNELS:
        x, y = (lora.flatten(s.adapter)[name] for s in (new, plain))
        assert_near(dense(x), dense(y), 1e-5)
        gram = np.swapaxes(x.a, -1, -2) @ x.a
        assert_near(gram, np.broadcast_to(np.eye(2), gram.shape), 1e-5)
        singular = np.linalg.svd(dense(y), compute_uv=False)[..., :2]
        assert_near(np.linalg.norm(x.b, axis=-1), singular, 1e-5)
    assert_near(lora.split(new.adapter)[1], lora.split(plain.adapter)[1], 0)


def test_an_empty_product_keeps_its_directions():
    state = FedITState(ADAPTER)
    c = normalised(cohort())
    sent = fedsvd().dispatch(BASE, state, c)
    new = fedsvd().aggregate(BASE, state, c, sent, sent.adapter)
    assert_near(new.adapter, ADAPTER, 0)


# --- FLoRIST


def test_florist_keeps_a_share_of_the_energy_of_every_layer():
    state, tau = FedITState(nudged(ADAPTER)), 0.7
    c, _, received, new = moved_by(florist(tau), state)
    kept = []
    for name in KERNELS:
        whole = mean_product(lora.flatten(received)[name], c.weights)
        squares = np.linalg.svd(whole, compute_uv=False) ** 2
        p = np.minimum((np.cumsum(squares, -1) < tau * squares.sum(-1, keepdims=True)).sum(-1) + 1, 2)
        x = lora.flatten(new.adapter)[name]
        np.testing.assert_array_equal(np.any(x.b, -1).sum(-1), p)
        u, s, v = np.linalg.svd(whole, full_matrices=False)
        cut = np.where(np.arange(s.shape[-1]) < p[..., None], s, 0)
        assert_near(SCALE * dense(x), SCALE * (u * cut[..., None, :]) @ v, 1e-4)
        kept.append(np.ravel(p))
    assert_near(florist(tau).report(new)["rank"], np.concatenate(kept).mean(), 1e-6)
    assert 1 <= np.concatenate(kept).mean() < 2, "a threshold that does nothing shows nothing"


def test_all_of_the_energy_is_flexlora():
    state = FedITState(nudged(ADAPTER))
    c, sent, received, new = moved_by(florist(1.0), state)
    assert_near(new, flexlora().aggregate(BASE, state, c, sent, received), 1e-6)
    zero = LoRA(jnp.ones((4, 2)), jnp.zeros((2, 3)))
    assert not thresholded(zero, jnp.zeros(()), 0.5).b.any()
    with pytest.raises(ValueError, match="at most 1"):
        florist(1.5)


def test_screenots_threshold_is_the_best_for_white_noise():
    """(4 / sqrt 3) sigma sqrt n of a square matrix (Gavish and Donoho, 2014), whatever sigma is; 0 of zeros."""
    rng, n = np.random.default_rng(0), 200
    for sigma in (1.0, 1e-3):
        u, v = (np.linalg.qr(rng.normal(size=(n, 3)))[0] for _ in range(2))
        y = sigma * (rng.normal(size=(n, n)) + n**0.5 * (u * np.array([6, 5, 4])) @ v.T)
        sizes = np.float32(np.linalg.svd(y, compute_uv=False))
        theta = float(screenot(sizes, 8))
        np.testing.assert_allclose(theta, 4 / 3**0.5 * sigma * n**0.5, rtol=0.04)
        assert (sizes > theta).sum() == 3
    assert screenot(jnp.zeros(6), 2) == 0


def test_spectral_keeps_what_stands_out_and_begins_the_rest_anew():
    state = spectral().init(KEY, nudged(ADAPTER))
    c, _, received, new = moved_by(spectral(), state)
    for name in KERNELS:
        x = lora.flatten(new.adapter)[name]
        whole = mean_product(lora.flatten(received)[name], c.weights)
        u, s, v = np.linalg.svd(SCALE * whole, full_matrices=False)
        theta = np.asarray(screenot(np.float32(s), 1))
        kept = (s > theta[..., None])[..., :2]
        np.testing.assert_array_equal(np.any(x.b, -1), kept)
        cut = np.where(s > theta[..., None], s, 0)[..., :2]
        assert_near(SCALE * dense(x), (u[..., :2] * cut[..., None, :]) @ v[..., :2, :], 1e-4)
        assert np.all(np.any(x.a, -2)), "what is dropped can be trained again"
    assert_near(
        spectral().report(new)["rank"], np.mean([np.any(x.b, -1).sum(-1).mean() for x in two_layers(new)]), 1e-6
    )


def two_layers(state):
    """Every kernel of every layer."""
    for x in lora.low_rank_leaves(state.adapter):
        for i in range(len(x.a) if x.a.ndim > 2 else 1):
            yield LoRA(x.a[i], x.b[i]) if x.a.ndim > 2 else x


# --- Ravan


def test_ravans_model_is_the_sum_of_its_heads():
    method = ravan(2)
    state = method.init(KEY, ADAPTER)
    own = nudged(state.adapter)
    for name in KERNELS:
        x = lora.flatten(state.bases)[name]
        a, b, core, gain = (np.float64(y) for y in (x.a, x.b, own.cores[name], own.gains[name]))
        k = a.shape[-1] // 2
        heads = [
            gain[..., h, None, None] * a[..., h * k : h * k + k] @ core[..., h, :, :] @ b[..., h * k : h * k + k, :]
            for h in range(2)
        ]
        assert_near(dense(lora.flatten(with_bases(own, state.bases))[name]), sum(heads), 1e-5)
        assert_near(np.swapaxes(a, -1, -2) @ a, np.broadcast_to(np.eye(2), (*a.shape[:-2], 2, 2)), 1e-5)


def test_ravans_server_averages_products_of_gains_and_cores():
    method = ravan(2)
    c, _, received, new = moved_by(method, method.init(KEY, ADAPTER))
    for name in KERNELS:
        products = np.float64(received.gains[name])[..., None, None] * received.cores[name]
        assert_near(new.adapter.cores[name], np.tensordot(np.float64(c.weights), products, 1), 1e-5)
        np.testing.assert_array_equal(new.adapter.gains[name], np.ones_like(new.adapter.gains[name]))
    assert isinstance(new.adapter, Heads)


def test_ravan_refuses_heads_that_do_not_divide_the_rank():
    with pytest.raises(ValueError, match="3 heads do not divide the rank 2"):
        ravan(3).init(KEY, ADAPTER)


# --- LoRA-A2


def test_ranks_are_chosen_over_all_modules_by_how_far_they_move_the_product():
    """The largest norms of each rank's change of the product, b's phase and a's, dense in float64."""
    for factor in ("a", "b"):
        x = nudged(ADAPTER)
        only = lambda u, v, factor=factor: u.replace(**{factor: getattr(v, factor)})
        far = lora.tree_map(only, x, nudged(x, 3))
        told = scores(x, far)
        for name in KERNELS:
            old, new = (lora.flatten(t)[name] for t in (x, far))
            for i in range(2):
                rank = lambda u, i=i: np.float64(u.a)[..., :, i : i + 1] @ np.float64(u.b)[..., i : i + 1, :]
                assert_near(told[name][..., i], np.linalg.norm(rank(new) - rank(old), axis=(-2, -1)), 1e-5)
        every = np.sort(np.concatenate([np.ravel(s) for s in told.values()]))[::-1]
        for budget in (1, 4, 6):
            chosen = best(told, jnp.asarray(budget))
            assert sum(int(m.sum()) for m in chosen.values()) == budget
            assert all(
                ((s >= every[budget - 1]) == m).all() for s, m in zip(told.values(), chosen.values(), strict=True)
            )


@pytest.mark.long
def test_what_is_not_chosen_stays_and_the_rest_is_trained_as_alone():
    """Of six ranks three; under weight decay, too. A client's end is that of a trial, and then of its mask."""
    method = lora_a2(0.5)
    c = normalised(members(method))
    state = RoLoRAState(nudged(ADAPTER), jnp.zeros((), jnp.int32))
    sent = host(method.dispatch(BASE, state, c))
    assert_near(sent.adapter.budget, np.full(CLIENTS, 3.0), 0)
    for i in range(2):
        start, rest = take((sent.adapter, (sent.mask, sent.context, c.batches)), i)

        def tune(start, rest=rest, i=i):
            one = sent._replace(adapter=copies(start), mask=copies(rest[0]), context=copies(rest[1]))
            ends, losses = train(method, one, c, KEY)
            return jax.tree.map(jnp.asarray, take(ends, i)), take(losses, i)

        end, _, _ = method.meta_gradient.train(tune, None, jax.tree.map(jnp.asarray, start))
        trial, _ = tune(start)
        chosen = best(scores(start.adapter, trial.adapter), jnp.asarray(3))
        assert_near(end.chosen, chosen, 0)
        expected = moved(tune(start._replace(chosen=chosen))[0], start.adapter)
        assert_near(end.adapter, expected, 0)
        for name, m in chosen.items():
            x, y = lora.flatten(start.adapter)[name], lora.flatten(end.adapter)[name]
            np.testing.assert_array_equal(x.a, y.a)  # b's round
            np.testing.assert_array_equal(np.any(x.b != y.b, -1), m > 0)


def test_all_ranks_are_rolora():
    state = RoLoRAState(nudged(ADAPTER), jnp.zeros((), jnp.int32))
    method, c = lora_a2(1.0), normalised(cohort())
    sent, plain = method.dispatch(BASE, state, c), rolora().dispatch(BASE, state, c)
    assert_near(sent.adapter.adapter, plain.adapter, 0)
    assert_near(sent.mask.adapter, plain.mask, 0)
    received = sent.adapter._replace(adapter=nudged(plain.adapter))
    new, expected = (
        m.aggregate(BASE, state, c, s, r) for m, s, r in ((method, sent, received), (rolora(), plain, received.adapter))
    )
    assert_near(new, expected, 0)
    held = method.held(take(sent.mask, 0), (), take(received._replace(chosen=nudged(received.chosen, 0, 0.0)), 0))
    assert_near(held.adapter, jax.tree.map(jnp.add, take(plain.mask, 0), jax.tree.map(jnp.zeros_like, held.adapter)), 0)
