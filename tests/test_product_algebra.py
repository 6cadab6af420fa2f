"""The algebra of factored products agrees with dense float64 matrices, and its derivative with finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_near, float64, jit, take
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora_jax import product
from fedlora_jax.decomposition import eigh, rotation, solve
from fedlora_jax.lora import LoRA, delta
from fedlora_jax.method import mean

IN, OUT, SCALE = 7, 5, 0.7
SPLITS = ["left", "right", "balanced"]
few = settings(max_examples=12, deadline=None)
seeds = st.integers(0, 10**6)
truncate = jit(product.truncate, static_argnums=1, static_argnames="split")


def lora(seed, *lead, rank=2, n_in=IN, n_out=OUT, scale=SCALE) -> LoRA:
    draw = np.random.default_rng(seed).normal
    a, b = draw(size=(*lead, n_in, rank)), draw(size=(*lead, rank, n_out))
    return LoRA(jnp.asarray(a), jnp.asarray(b), scale)


def dense(x: LoRA) -> np.ndarray:
    return x.scale * np.asarray(x.a, np.float64) @ np.asarray(x.b, np.float64)


def weights(seed, clients) -> jax.Array:
    """Weights that sum to one, one of them zero."""
    p = np.random.default_rng(seed).dirichlet(np.ones(clients))
    p[seed % clients] = 0
    return jnp.asarray(p / p.sum())


def dense_truncation(m: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(m)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


# --- sums, inner products, norms


@few
@given(seed=seeds, clients=st.sampled_from([2, 5]), rank=st.sampled_from([1, 3]))
def test_sums_and_differences_are_those_of_dense_matrices(seed, clients, rank):
    x, y, p = lora(seed, clients, 3, rank=rank), lora(seed + 1, clients, 3, rank=rank), weights(seed, clients)
    assert_near(delta(product.total(x, p)), np.einsum("c,clio->lio", p, dense(x)))
    one, other = take(x, 0), take(y, 1)
    assert_near(delta(product.plus(one, other)), dense(one) + dense(other))
    assert_near(delta(product.plus(one, other, -0.3)), dense(one) - 0.3 * dense(other))
    assert_near(delta(product.difference(one, other)), dense(one) - dense(other))


def test_layers_may_weigh_clients_differently():
    x, p = lora(0, 4, 3), jnp.asarray(np.random.default_rng(0).uniform(size=(4, 3)))
    assert_near(delta(product.total(x, p)), np.einsum("cl,clio->lio", p, dense(x)))


@few
@given(seed=seeds, rank=st.sampled_from([1, 2, 6]))
def test_inner_products_norms_and_cosines_are_dense_ones(seed, rank):
    x, y = lora(seed, 3, rank=rank), lora(seed + 1, 3, rank=2)
    dot = np.sum(dense(x) * dense(y), (-2, -1))
    norms = np.linalg.norm(dense(x), axis=(-2, -1)), np.linalg.norm(dense(y), axis=(-2, -1))
    scale = norms[0] * norms[1]
    np.testing.assert_allclose(product.inner(x, y), dot, atol=1e-5 * scale.max())
    assert_near(product.norm(x), norms[0])
    np.testing.assert_allclose(product.cosine(x, y), dot / scale, atol=1e-5)


def test_both_ways_to_a_norm_agree():
    """A narrow product goes through Grams, a wide one is formed."""
    for rank in (1, 2, 3, 9):
        x = lora(rank, rank=rank)
        assert_near(product.norm(x), np.linalg.norm(dense(x)))


@few
@given(seed=seeds, size=st.sampled_from([1e-4, 1.0, 1e3]))
def test_participation_is_the_participation_ratio_of_singular_values(seed, size):
    x = lora(seed, 3, rank=3)
    x = LoRA(size * x.a, x.b, x.scale)
    s2 = np.linalg.svd(dense(x), compute_uv=False) ** 2
    assert_near(product.participation(x), s2.sum(-1) ** 2 / (s2**2).sum(-1), 1e-4)


@pytest.mark.parametrize("f", [product.norm, product.participation, lambda x: product.cosine(x, x)])
def test_at_zero_values_are_zero_and_derivatives_finite(f):
    x = lora(0)
    zero = LoRA(x.a, 0 * x.b, x.scale)
    value, grads = jax.value_and_grad(f)(zero)
    assert value == 0
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_safe_sqrt():
    x = jnp.asarray([4.0, 0.0, -1.0])
    np.testing.assert_allclose(product.safe_sqrt(x), [2, 0, 0])
    np.testing.assert_allclose(jax.vmap(jax.grad(product.safe_sqrt))(x), [0.25, 0, 0])
    assert jnp.isnan(product.safe_sqrt(jnp.nan))  # a diverged model must not look exact


def test_products_of_two_scales_cannot_be_combined():
    x, y = lora(0), lora(1, scale=0.5)
    for f in (product.plus, product.difference, product.inner, product.cosine):
        with pytest.raises(ValueError, match=r"scale 0.7 and 0.5"):
            f(x, y)
    with pytest.raises(ValueError, match=r"scale 0.7 and 0.5"):
        truncate(x, 2, like=y)


# --- the aggregation bias


@few
@given(seed=seeds, clients=st.sampled_from([2, 5]))
def test_the_bias_is_a_covariance_and_a_sum_over_pairs(seed, clients):
    x, p = lora(seed, clients, 3), weights(seed, clients)
    center = LoRA(mean(x.a, p), mean(x.b, p), SCALE)
    a, b = np.float64(x.a), np.float64(x.b)
    bias = np.einsum("c,clio->lio", p, dense(x)) - dense(center)
    covariance = product.total(LoRA(x.a - center.a, x.b - center.b, SCALE), p)
    pairs = np.einsum("i,j,ijlnr,ijlrm->lnm", p, p, a[:, None] - a, b[:, None] - b) * SCALE / 2
    assert_near(delta(covariance), bias, 1e-4)
    assert_near(pairs, bias, 1e-6)
    assert_near(product.norm(covariance), np.linalg.norm(bias, axis=(-2, -1)), 1e-4)
    live = int((p > 0).sum())
    assert np.linalg.matrix_rank(bias, tol=1e-6).max() <= (live - 1) * 2


# --- truncation


@pytest.mark.long
@few
@given(
    seed=seeds,
    clients=st.sampled_from([1, 2, 5]),
    shape=st.sampled_from([(7, 5), (5, 7), (12, 9)]),
    rank=st.sampled_from([1, 3]),
    split=st.sampled_from(SPLITS),
)
def test_truncation_is_the_dense_truncated_svd(seed, clients, shape, rank, split):
    """Stacks narrower and wider than the layer, ranks above and below the stack's, one client of weight zero."""
    x = lora(seed, clients, 2, rank=2, n_in=shape[0], n_out=shape[1])
    p = weights(seed, clients) if clients > 1 else jnp.ones(1)
    m = np.einsum("c,clio->lio", p, dense(x))
    short = truncate(product.total(x, p), rank, split=split)
    assert short.a.shape == (2, shape[0], rank)
    assert short.b.shape == (2, rank, shape[1])
    assert np.linalg.norm(delta(short) - dense_truncation(m, rank)) <= 1e-5 * np.linalg.norm(m)


@pytest.mark.parametrize("split", SPLITS)
def test_splits_are_what_they_are_called(split):
    x = lora(0, 2, rank=4)
    y = truncate(x, 3, split=split)
    s = np.linalg.svd(dense(x) / SCALE, compute_uv=False)[..., :3]
    power = {"left": (0, 2), "right": (2, 0), "balanced": (1, 1)}[split]
    diagonal = lambda p: s[..., None] ** p * np.eye(3)
    np.testing.assert_allclose(y.a.mT @ y.a, diagonal(power[0]), atol=1e-5 * s.max() ** 2)
    np.testing.assert_allclose(y.b @ y.b.mT, diagonal(power[1]), atol=1e-5 * s.max() ** 2)


def test_without_a_reference_the_first_columns_are_the_smaller_truncation():
    x = lora(0, rank=4)
    three, two = truncate(x, 3), truncate(x, 2)
    assert_near(three.a[:, :2] @ three.b[:2], two.a @ two.b)


@few
@given(seed=seeds, split=st.sampled_from(SPLITS))
def test_the_gauge_keeps_the_product_and_comes_nearer_to_the_reference(seed, split):
    x, like = lora(seed, rank=6), lora(seed + 1, rank=3)
    free, near = (truncate(x, 3, split=split, like=y) for y in (None, like))
    distance = lambda y: float(jnp.sum((y.a - like.a) ** 2) + jnp.sum((y.b - like.b) ** 2))
    assert_near(delta(near), np.asarray(delta(free)))
    assert distance(near) <= distance(free) * (1 + 1e-5)
    for angle in np.random.default_rng(seed).uniform(-1, 1, 5):  # and no other rotation comes nearer still
        turn = np.eye(3)
        turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        assert distance(near) <= distance(LoRA(near.a @ turn, turn.T @ near.b, SCALE)) * (1 + 1e-5)


def test_the_gauge_leaves_balanced_factors_where_they_are():
    x = truncate(lora(0, rank=3), 3, like=lora(1, rank=3))
    again = truncate(x, 3, like=x)
    assert_near((again.a, again.b), (x.a, x.b))


@pytest.mark.parametrize("live", [0, 1, 2])
def test_dead_directions_continue_with_the_references_a(live):
    """The product stays what it is, and each column can be trained: its row of b gets a gradient."""
    x, like, rank = lora(0, 2, rank=max(live, 1)), lora(1, 2, rank=3), 3
    x = LoRA(x.a, x.b * (live > 0), x.scale)
    y = truncate(x, rank, like=like)
    np.testing.assert_allclose(delta(y), dense(x), atol=1e-5)
    grad = jax.grad(lambda b: jnp.sum(delta(LoRA(y.a, b, y.scale)) * np.random.default_rng(2).normal(size=(2, 7, 5))))
    assert (jnp.linalg.norm(grad(y.b), axis=-1) > 1e-2).all()
    if live == 0:
        assert_near(y.a, like.a, 1e-6)
        assert not y.b.any()


def test_a_truncation_that_cannot_be_is_refused():
    for rank in (0, 6):
        with pytest.raises(ValueError, match="choose 1 to 5"):
            truncate(lora(0), rank)
    with pytest.raises(ValueError, match="they must agree"):
        truncate(lora(0), 2, like=lora(0, rank=3))
    with pytest.raises(ValueError, match="must be 'left', 'right' or 'balanced'"):
        truncate(lora(0), 2, split="middle")


# --- the derivative of truncation, in float64


def jvp_and_difference(f, x, dx, h=1e-6):
    shifted = lambda sign: f(jax.tree.map(lambda u, v: u + sign * h * v, x, dx))
    return jax.jvp(f, (x,), (dx,))[1], jax.tree.map(lambda u, v: (u - v) / (2 * h), shifted(1), shifted(-1))


def factors(x: LoRA):
    return x.a, x.b, x.a @ x.b


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("rank", [2, 4])
def test_the_derivative_of_the_product_is_a_finite_difference(x64, split, rank):
    """Also the truncation to the full rank of the sum, where the derivative is the sum's own."""
    x, dx = lora(0, 2, rank=4), lora(1, 2, rank=4)
    f = jit(lambda x: (lambda y: y.a @ y.b)(product.truncate(x, rank, split=split)))
    exact, difference = jvp_and_difference(f, x, dx)
    assert_near(exact, difference, 1e-7, floor=1)
    if rank == 4:
        assert_near(exact, dx.a @ x.b + x.a @ dx.b, 1e-10)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("moves", ["x", "like", "both"])
def test_with_a_reference_the_derivative_of_the_factors_is_a_finite_difference(x64, split, moves):
    x, dx = (lora(0, rank=4), lora(2, rank=3)), (lora(1, rank=4), lora(3, rank=3))
    keep = (moves != "like", moves != "x")
    dx = tuple(LoRA(k * d.a, k * d.b, SCALE) for k, d in zip(keep, dx, strict=True))
    f = jit(lambda x: factors(product.truncate(x[0], 3, split=split, like=x[1])))
    assert_near(*jvp_and_difference(f, x, dx), 1e-7, floor=1)


@pytest.mark.parametrize("moves", ["x", "like"])
def test_sums_that_stay_below_the_rank_have_a_derivative_too(x64, moves):
    """Two of three directions live: the third is the reference's, turned out of the way of the other two."""
    x, dx = (lora(0, rank=2), lora(2, rank=3)), (lora(1, rank=2), lora(3, rank=3))
    dx = tuple(LoRA(k * d.a, k * d.b, SCALE) for k, d in zip((moves == "x", moves == "like"), dx, strict=True))
    f = jit(lambda x: factors(product.truncate(x[0], 3, like=x[1])))
    assert_near(*jvp_and_difference(f, x, dx), 1e-7, floor=1)


def test_small_singular_values_keep_their_derivative(x64):
    """Values a ten-thousandth of the largest, but far from one another in proportion."""
    u, v = (np.linalg.qr(np.random.default_rng(n).normal(size=(n, 4)))[0] for n in (9, 8))
    x = LoRA(jnp.asarray(u * [1, 0.5, 1e-4, 3e-5]), jnp.asarray(v.T), SCALE)
    dx = lora(1, rank=4, n_in=9, n_out=8)
    f = jit(lambda x: (lambda y: y.a @ y.b)(product.truncate(x, 3)))
    assert_near(*jvp_and_difference(f, x, LoRA(1e-3 * dx.a, 1e-3 * dx.b, SCALE), 1e-5), 1e-6)


def test_the_derivative_agrees_with_ordinary_differentiation_of_an_svd(x64):
    """Where singular values differ and nothing is zero, JAX's own derivative of a dense SVD is right, too."""

    def ordinary(x):
        u, s, vt = jnp.linalg.svd(x.a @ x.b, full_matrices=False)
        return (u[:, :2] * s[:2]) @ vt[:2]

    target = jnp.asarray(np.random.default_rng(3).normal(size=(IN, OUT)))
    loss = lambda f: jit(jax.grad(lambda x: jnp.sum(f(x) * target) ** 2))(lora(0, rank=OUT))
    assert_near(loss(lambda x: (lambda y: y.a @ y.b)(product.truncate(x, 2))), loss(ordinary), 1e-8)


def where(case: str) -> LoRA:
    """Stacked factors of four clients where a naive derivative divides by zero."""
    x = lora(0, 4)
    a = {"b = 0": x.a, "clients coincide": x.a[:1], "a shared": x.a[:1], "rank-deficient": x.a * jnp.asarray([1, 0])}
    b = {"b = 0": 0 * x.b, "clients coincide": x.b[:1], "a shared": x.b, "rank-deficient": x.b[:1]}
    return LoRA(jnp.broadcast_to(a[case], x.a.shape), jnp.broadcast_to(b[case], x.b.shape), SCALE)


CASES = ["b = 0", "clients coincide", "a shared", "rank-deficient"]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("gauge", [False, True])
def test_the_derivative_is_finite_where_every_run_passes(split, gauge):
    @jit
    def slope(x, like):
        def loss(x, like, p):
            y = product.truncate(product.total(x, p), 2, split=split, like=like if gauge else None)
            return jnp.sum(jnp.sin(y.a)) + jnp.sum(jnp.cos(y.b))

        return jax.grad(loss, argnums=(0, 1, 2))(x, like, jnp.full(4, 0.25))

    for case in CASES:
        grads = slope(where(case), lora(5))
        assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads)), case


@pytest.mark.parametrize("case", ["clients coincide", "a shared"])
def test_the_derivative_is_right_where_clients_coincide(x64, case):
    """The sum has rank 2 there, but is perturbed out of it; only the kept directions count."""
    x, dx, like = where(case), lora(1, 4), lora(2)
    f = jit(lambda x: factors(product.truncate(product.total(x, jnp.full(4, 0.25)), 2, like=like)))
    assert_near(*jvp_and_difference(f, x, dx), 1e-7, floor=1)


def test_truncation_under_vmap_is_truncation_row_by_row():
    with float64():
        x, like = lora(0, 3, 2, rank=4), lora(1, 3, 2, rank=3)
        f = lambda x, like: product.truncate(x, 3, like=like)
        together, f = jit(jax.vmap(f))(x, like), jit(f)
        for i in range(3):
            assert_near(take(together, i), f(take(x, i), take(like, i)), 1e-12)


def assert_followed(f, numpy_f, x: tuple, dx: tuple) -> None:
    """``f`` of stacks of matrices against NumPy, its derivatives against differences and each other."""
    x, dx = (tuple(map(jnp.asarray, tree)) for tree in (x, dx))
    at = lambda t: jax.tree.map(
        np.asarray, numpy_f(*(np.asarray(a) + t * np.asarray(b) for a, b in zip(x, dx, strict=True)))
    )
    assert_near(f(*x), at(0), 1e-10)
    assert_near(jax.vmap(f)(*x), at(0), 1e-10)
    out, moved = jax.jvp(f, x, dx)
    differences = jax.tree.map(lambda a, b: (a - b) / 2e-6, at(1e-6), at(-1e-6))
    assert_near(moved, differences, 1e-6)
    pulled = jax.vjp(f, *x)[1](jax.tree.map(jnp.ones_like, out))
    inner = sum(jnp.sum(a * b) for a, b in zip(pulled, dx, strict=True))
    np.testing.assert_allclose(inner, sum(jnp.sum(y) for y in jax.tree.leaves(moved)), rtol=1e-8)


def stacks(*shapes: tuple[int, int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(2, 3, *shape)) for shape in shapes]


def test_equations_are_solved_and_followed_one_matrix_at_a_time(x64):
    g, y, dg, dy = stacks((4, 4), (4, 2), (4, 4), (4, 2))
    g, dg = g @ g.swapaxes(-1, -2) + np.eye(4), dg + dg.swapaxes(-1, -2)
    assert_followed(solve, np.linalg.solve, (g, y), (dg, dy))


def test_rotations_are_found_and_followed_one_matrix_at_a_time(x64):
    def by_numpy(x):
        u, _, vt = np.linalg.svd(x)
        return u @ vt

    x, dx = stacks((4, 4), (4, 4))
    assert_followed(rotation, by_numpy, (x,), (dx,))


@pytest.mark.long
def test_eigenvectors_are_found_and_followed_one_matrix_at_a_time(x64):
    """Their signs are nobody's: squares are compared. Vectors of equal eigenvalues have no derivative: it is finite."""
    x, dx = (y + y.swapaxes(-1, -2) for y in stacks((4, 4), (4, 4)))
    seen = lambda pair: (pair[0], pair[1] ** 2)
    assert_followed(lambda x: seen(eigh(x)), lambda x: seen(np.linalg.eigh(x)), (x,), (dx,))
    slope = jax.grad(lambda x: sum(jnp.sum(jnp.sin(y)) for y in eigh(x)))(jnp.zeros((2, 3, 3)))
    assert jnp.isfinite(slope).all()
