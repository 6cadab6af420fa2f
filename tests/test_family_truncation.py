"""Clients of several ranks: what truncation to their ranks costs the server, and what it does not (FedHL, HetLoRA)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ADAPTER,
    BASE,
    RANK,
    SCALE,
    aggregated,
    assert_near,
    cohort,
    dense,
    effective,
    jit,
    mean_product,
    members,
    normalised,
    nudged,
    take,
    weights_of,
)
from numpy.linalg import norm

from fedlora_jax import lora, product
from fedlora_jax.lora import LoRA
from fedlora_jax.method import Cohort
from fedlora_jax.methods import fedhl as hl
from fedlora_jax.methods import hetlora as het
from fedlora_jax.methods.fedhl import FedHLState, fedhl
from fedlora_jax.methods.fedit import FedITState, fedit
from fedlora_jax.methods.flexlora import flexlora
from fedlora_jax.methods.hetlora import hetlora

MIXED = [1, 2, 1, 2]


def truncated(w: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(np.float64(w), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def holding(method, w: dict, adapter: lora.Adapter = ADAPTER) -> FedHLState:
    """FedHL in the middle of a run: ``w`` is its dense update, by name."""
    best = {name: product.best(x, lora.flatten(adapter)[name].a.shape[-1], SCALE) for name, x in w.items()}
    head = lora.flatten(lora.split(adapter)[1])
    return FedHLState(lora.unflatten(best | head), lora.unflatten(w))


def updates(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    shapes = {name: x.shape for name, x in lora.flatten(lora.zero_deltas(ADAPTER)).items()}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


# --- FedHL


def idle(method, state, base, ranks: list[int], rounds: int = 5):
    """The state after rounds in which every client returns what it was sent."""
    c = Cohort(jnp.arange(len(ranks)), jnp.ones(len(ranks)) / len(ranks), jnp.asarray(ranks), ())

    @jit
    def one(state):
        sent = method.dispatch(base, state, c)
        return method.aggregate(base, state, c, sent, sent.adapter)

    for _ in range(rounds):
        state = one(state)
    return state


def test_idle_clients_cost_fedhl_nothing_and_flexlora_a_third():
    """Singular values 1/k, clients of ranks 4, 8 and 16."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 128)))[0] for n in (160, 128))
    w = (u / np.arange(1, 129)) @ v.T
    ranks = [4] * 3 + [8] * 5 + [16] * 2
    w32 = jnp.asarray(w, jnp.float32)
    start, base = product.best(w32, 16, SCALE), {"kernel": jnp.zeros_like(w32)}
    after = idle(fedhl(), FedHLState({"kernel": start}, {"kernel": w32}), base, ranks)
    assert norm(after.residual["kernel"] - w) < 2e-6 * norm(w)

    flex = idle(flexlora(), FedITState({"kernel": start}), base, ranks).adapter["kernel"]
    lost = norm(SCALE * dense(flex) - w) / norm(w)
    assert 0.3 < lost < 0.4


@pytest.mark.parametrize("weighting", ["2", "1", "data"])
def test_the_scaled_decomposition_is_the_sum_over_clients(weighting):
    """Wt + sum_c p_c (P_c - T_rc(Wt)), client by client in float64."""
    method, w = fedhl(weighting), updates()
    state, c = holding(fedhl(), w), normalised(cohort(ranks=MIXED))
    sent = method.dispatch(BASE, state, c)
    received = nudged(sent.adapter, 1)
    received = jax.tree.map(lambda x, y, m: jnp.where(m > 0, y, x), sent.adapter, received, sent.mask)
    new = jit(method.aggregate)(BASE, state, c, sent, received)

    errors = [sum(norm(x - truncated(x, r)) ** 2 for x in w.values()) for r in MIXED]
    q = {"2": 1 / (np.square(errors) + 1e-6), "1": 1 / (np.asarray(errors) + 1e-6), "data": np.float64(c.weights)}
    p = q[weighting] / q[weighting].sum()
    for name, old in w.items():
        x, expected = lora.flatten(received)[name], np.float64(old)
        for i, rank in enumerate(MIXED):
            expected = expected + p[i] * (SCALE * dense(take(x, i)) - truncated(old, rank))
        assert_near(lora.flatten(new.residual)[name], expected)
        assert_near(SCALE * dense(lora.flatten(new.adapter)[name]), truncated(expected, RANK), 1e-4)


def test_a_client_is_sent_its_truncation_and_nobody_in_particular_the_whole_update():
    method, w = fedhl(), updates()
    state, c = holding(method, w), normalised(cohort(ranks=MIXED))
    sent = method.dispatch(BASE, state, c)
    whole = effective(method, BASE, state, c)
    cut = effective(method, BASE, state, c._replace(ranks=jnp.ones(4, int)))
    for name, x in w.items():
        for i, rank in enumerate(MIXED):
            row = take(lora.flatten(sent.adapter)[name], i)
            assert_near(SCALE * dense(row), truncated(x, rank))
        for model in (whole, cut):
            assert_near(model[name] - lora.flatten(BASE)[name], x)
    assert_near(
        weights_of(sent.base, lora.tree_map(lambda x: LoRA(x.a, 0 * x.b, x.scale), ADAPTER)), weights_of(BASE, {})
    )


@pytest.mark.long
def test_at_full_rank_and_equal_weights_fedhl_is_the_mean_of_products():
    """And so is FlexLoRA, where it truncates nothing."""
    rng = np.random.default_rng(3)
    w = jnp.asarray(rng.normal(size=(7, 4)), jnp.float32)
    state = FedHLState({"kernel": product.best(w, 4, SCALE)}, {"kernel": w})
    c = Cohort(jnp.arange(3), jnp.full(3, 1 / 3), jnp.full(3, 4), ())
    sent = fedhl().dispatch({"kernel": jnp.zeros((7, 4))}, state, c)
    received = nudged(sent.adapter, 1)
    new = fedhl().aggregate({}, state, c, sent, received)
    mean = SCALE * mean_product(received["kernel"], c.weights)
    assert_near(new.residual["kernel"], mean)
    flex = flexlora().aggregate({}, FedITState(state.adapter), c, sent, received)
    assert_near(SCALE * dense(flex.adapter["kernel"]), mean)


def test_fedhl_weights_are_even_for_equal_ranks_grow_with_rank_and_are_finite_without_error():
    state = holding(fedhl(), updates())
    weights = lambda ranks, state=state, power=2: hl.client_weights(state, normalised(cohort(ranks=ranks)), power, 1e-6)
    assert_near(weights([1, 1, 1, 1]), np.full(4, 0.25))
    p = weights(MIXED)
    assert (p[1::2] > 2 * p[::2]).all()
    assert_near(p.sum(), 1.0)
    assert (weights(MIXED, power=1)[1::2] < p[1::2]).all()
    nothing_cut = holding(fedhl(), {name: x * 0 for name, x in updates().items()})
    assert_near(weights(MIXED, nothing_cut), np.full(4, 0.25))
    padded = hl.client_weights(state, normalised(cohort(weights=[1, 0, 1, 1])), 2, 1e-6)
    assert padded[1] == 0
    assert_near(padded.sum(), 1.0)


def test_tail_decay_shrinks_what_no_client_is_sent():
    w = updates()
    state, c = holding(fedhl(), w), normalised(cohort())
    sent = fedhl().dispatch(BASE, state, c)
    plain, decayed = (m.aggregate(BASE, state, c, sent, sent.adapter) for m in (fedhl(), fedhl(tail_decay=0.5)))
    for name in w:
        whole, less = (lora.flatten(x.residual)[name] for x in (plain, decayed))
        kept = truncated(whole, RANK)
        assert_near(less - kept, 0.5 * (whole - kept), 1e-4)
    shares = [fedhl().report(x)["tail"] for x in (plain, decayed)]
    exact = [norm([norm(x - truncated(x, RANK)) for x in lora.flatten(s.residual).values()]) for s in (plain, decayed)]
    sizes = [norm([norm(x) for x in lora.flatten(s.residual).values()]) for s in (plain, decayed)]
    assert_near(np.asarray(shares), np.asarray(exact) / np.asarray(sizes), 1e-4)


@pytest.mark.long
def test_subspace_iteration_finds_what_the_exact_decomposition_finds(x64):
    """Singular values that fall, on a matrix too large to be taken exactly; the derivative is that of the product."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 270)))[0] for n in (300, 270))
    w = jnp.asarray((u * 0.4 ** np.arange(270)) @ v.T)
    x = product.best(w, 3, 2.0)
    assert_near(2.0 * dense(x), truncated(w, 3), 1e-8)
    assert_near(x.a.T @ x.a, np.eye(3), 1e-10)

    direction = jnp.asarray(rng.normal(size=w.shape)) / 20
    loss = lambda w: jnp.sum(jnp.sin(lora.delta(product.best(w, 3, 2.0)) * 3))
    step = 1e-5
    slope = (loss(w + step * direction) - loss(w - step * direction)) / (2 * step)
    assert_near(jax.jvp(loss, (w,), (direction,))[1], slope, 1e-3)


@pytest.mark.parametrize("options", [{"weighting": "3"}, {"eps": 0.0}, {"tail_decay": 1.5}])
def test_fedhl_refuses_what_it_cannot_do(options):
    with pytest.raises(ValueError, match="got"):
        fedhl(**options)


# --- HetLoRA


def test_hetlora_weighs_clients_by_the_size_of_their_products():
    _, _, _, received, new = aggregated(hetlora(), cohort(ranks=MIXED))
    products = [lora.flatten(received)[name] for name in ("blocks/kernel", "mix/kernel")]
    size = np.asarray([norm([norm(dense(take(x, i))) for x in products]) for i in range(4)])
    p = size / size.sum()
    means = jax.tree.map(lambda x: np.tensordot(p, np.float64(x), 1), received)
    assert_near(new.adapter, means)


@pytest.mark.long
def test_hetlora_of_equal_ranks_and_sizes_without_a_penalty_is_fedit():
    method = hetlora(lam=0.0)
    c = normalised(members(method, weights=[1, 1, 1, 1]))
    state = FedITState(nudged(ADAPTER, 0))
    sent = method.dispatch(BASE, state, c)
    turned = lora.tree_map(  # every client a mirror image of the same products: equal sizes
        lambda x: LoRA(x.a * jnp.asarray([1, -1, 1, 1]).reshape(4, *[1] * (x.a.ndim - 1)), x.b, x.scale), sent.adapter
    )
    new = method.aggregate(BASE, state, c, sent, turned)
    assert_near(new.adapter, fedit().aggregate(BASE, state, c, sent, turned).adapter, 1e-6)


@pytest.mark.long
def test_hetlora_prunes_the_tail_that_shrank():
    """A client whose tail shrank sends and keeps one column less; the others, and clients at the least rank, do not."""
    method = hetlora(min_rank=1)
    c = normalised(members(method, ranks=[2, 2, 1, 2]))
    state = FedITState(nudged(ADAPTER, 0))
    sent = method.dispatch(BASE, state, c)
    factor = jnp.asarray([0.5, 2.0, 0.5, 1.0])
    moved = lora.tree_map(lambda x: LoRA(x.a, x.b * factor.reshape(4, *[1] * (x.b.ndim - 1)), x.scale), sent.adapter)
    memory = jax.vmap(method.remember)(c.memory, sent.context, sent.adapter, moved)
    np.testing.assert_array_equal(memory, [1, 0, 0, 0])

    new = method.aggregate(BASE, state, c, sent, moved)
    cut = jax.tree.map(jnp.multiply, moved, lora.rank_mask(ADAPTER, jnp.asarray([1, 2, 1, 2])))
    again = method.aggregate(BASE, state, c, sent, cut)
    assert_near(new.adapter, again.adapter, 1e-6)
    later = method.dispatch(BASE, new, c._replace(memory=memory))
    for x in lora.low_rank_leaves(later.adapter):
        np.testing.assert_array_equal(np.asarray([x.a[i, ..., 1].any() for i in range(4)]), [False, True, False, True])


@pytest.mark.long
def test_the_penalty_of_hetlora_is_the_product_of_the_tails_norms():
    method, x = hetlora(gamma=0.5, lam=0.1, min_rank=1), take(nudged(ADAPTER, 0), ...)
    c = normalised(members(method))
    context = take(method.dispatch(BASE, FedITState(x), c).context, 0)
    stack, mix = (lora.flatten(x)[name] for name in ("blocks/kernel", "mix/kernel"))
    layers = [(stack.a[0], stack.b[0]), (stack.a[1], stack.b[1]), (mix.a, mix.b)]
    expected = 0.1 * sum(norm(a[:, 1:]) * norm(b[1:]) for a, b in layers)
    assert_near(method.penalty(x, context), expected)
    grads = jax.grad(method.penalty)(ADAPTER, context)  # b = 0
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert het.tail(x, het.Ranks(jnp.asarray(2), jnp.asarray(2))) == 0


def test_hetlora_refuses_what_it_cannot_do():
    for wrong in ({"gamma": 0.0}, {"gamma": 1.5}, {"lam": -1.0}, {"min_rank": 0}):
        with pytest.raises(ValueError, match="must be "):
            hetlora(**wrong)
