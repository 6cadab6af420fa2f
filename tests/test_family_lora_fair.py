"""LoRA-FAIR's options: columns, the other factor, the other norm, the noisy start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import BASE, aggregated, assert_near, cohort, dense, jit, mean_product
from numpy.linalg import norm

from fedlora_jax import lora
from fedlora_jax.lora import LoRA
from fedlora_jax.methods import lora_fair as fair
from fedlora_jax.methods.fedit import fedit
from fedlora_jax.methods.lora_fair import lora_fair

KERNELS = ["blocks/kernel", "mix/kernel"]


def averages(seed, size=1.0, clients=4, n_in=7, n_out=5, rank=3):
    """Dense float64 ``(abar, bbar, M)`` of a cohort."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(1, n_in, rank)) + 0.5 * rng.normal(size=(clients, n_in, rank))
    b = size * (rng.normal(size=(1, rank, n_out)) + 0.5 * rng.normal(size=(clients, rank, n_out)))
    p = rng.dirichlet(np.ones(clients))
    return np.tensordot(p, a, 1), np.tensordot(p, b, 1), np.tensordot(p, a @ b, 1)


def objective(abar, bbar, m, lam, *, columns, squared, rows=-2):
    """Of ``d``, written with dense matrices."""
    axis = -3 - rows if columns else None

    def value(d):
        product = abar @ (bbar + d)
        cosine = jnp.sum(m * product, axis) / (jnp.linalg.norm(m, axis=axis) * jnp.linalg.norm(product, axis=axis))
        return 1 - jnp.mean(cosine) + lam * (jnp.sum(d**2) if squared else jnp.linalg.norm(d))

    return value


def solve(abar, bbar, m, lam, steps, lr, *, columns, **options):
    if columns:
        return fair.column_cosine(abar, bbar, m, lam, steps, lr, **options)
    return fair.cosine(abar.T @ abar, abar.T @ m, bbar, norm(m), lam, steps, lr, **options)


CASES = [(columns, squared) for columns in (False, True) for squared in (False, True)]


@pytest.mark.parametrize(("columns", "squared"), CASES)
def test_steps_follow_the_gradient_of_the_dense_objective(x64, columns, squared):
    """From a start that is not zero, where ``|d|`` has a derivative."""
    lam, (abar, bbar, m) = 0.3, averages(0)
    start = 0.1 * np.random.default_rng(1).normal(size=bbar.shape)
    one, two = (solve(abar, bbar, m, lam, n, 1e-3, columns=columns, squared=squared, start=start) for n in (1, 2))
    gradient = jax.grad(objective(abar, bbar, m, lam, columns=columns, squared=squared))
    assert_near(one - start, -1e-3 * gradient(jnp.asarray(start)), 1e-8)
    assert_near(two - one, -1e-3 * gradient(one), 1e-8)


@pytest.mark.parametrize("size", [1.0, 0.05, 1e-3])
@pytest.mark.parametrize("rows", [-2, -1])
def test_the_column_objective_only_falls(x64, size, rows):
    abar, bbar, m = averages(1, size)
    if rows == -1:
        abar, bbar, m = bbar.T, abar.T, m.T
    value = objective(abar, bbar, m, 0.01, columns=True, squared=True, rows=rows)
    run = jit(lambda steps: solve(abar, bbar, m, 0.01, steps, 0.01, columns=True, rows=rows), static_argnums=0)
    path = [value(run(steps)) for steps in (0, 1, 5, 50, 500)]
    assert (np.diff(path) < 1e-12).all()
    assert path[-1] < path[0] * (1 - 1e-6)


@pytest.mark.long
def test_correcting_a_is_correcting_b_of_the_transposed_problem():
    _, _, _, received, new = aggregated(lora_fair(solver="ridge", on="a"))
    c, state, *_ = aggregated(fedit())
    flip = lambda tree: lora.tree_map(lambda x: LoRA(x.b.mT, x.a.mT, x.scale), tree)
    turned = state._replace(adapter=flip(state.adapter))
    other = lora_fair(solver="ridge").aggregate(BASE, turned, c, None, flip(received))  # type: ignore[arg-type]
    assert_near(new.adapter, flip(other.adapter))


@pytest.mark.parametrize("on", ["a", "b", "both"])
@pytest.mark.parametrize("solver", ["ridge", "cosine"])
def test_no_correction_is_worse_than_fedit_and_both_are_better_than_one(solver, on):
    c, _, _, received, new = aggregated(lora_fair(solver=solver, on=on))
    *_, plain = aggregated(fedit())
    *_, one = aggregated(lora_fair(solver=solver))
    for name in KERNELS:
        m = mean_product(lora.flatten(received)[name], c.weights)

        def far(state, name=name, m=m):
            product = dense(lora.flatten(state.adapter)[name])
            if solver == "ridge":
                return norm(m - product)
            layers = (x.reshape(-1, *x.shape[-2:]) for x in (m, product))
            return sum(1 - np.vdot(x, y) / (norm(x) * norm(y)) for x, y in zip(*layers, strict=True))

        assert far(new) < far(plain)
        assert on != "both" or far(new) < far(one)


@pytest.mark.parametrize("on", ["a", "b"])
def test_without_a_penalty_columns_that_nobody_holds_are_harmless(on):
    *_, new = aggregated(lora_fair(lam=0.0, solver="ridge", on=on), cohort(ranks=[1, 1, 1, 1]))
    for x in lora.low_rank_leaves(new.adapter):
        assert all(np.isfinite(factor).all() for factor in (x.a, x.b))
        assert x.a[..., 1].any()


@pytest.mark.parametrize("lam", [0.01, 1.0])
def test_a_noisy_start_outlives_a_light_penalty(lam):
    """The trap of the published solver: after 1000 steps of 0.01 the noise is still there, unless lam is large."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(4, 60, 4)) / 8 + rng.normal(size=(60, 4)) / 8
    b = 0.05 * (rng.normal(size=(4, 4, 50)) + rng.normal(size=(4, 50)))
    abar, bbar, m = a.mean(0), b.mean(0), (a @ b).mean(0)
    error = lambda d: norm(abar @ (bbar + d) - m) / norm(m)
    args = map(jnp.float32, (abar.T @ abar, abar.T @ m, bbar))
    d = jit(fair.cosine, static_argnums=(5,))(*args, norm(m), lam, 1000, 0.01, start=fair.xavier(jnp.float32(bbar)))
    assert (error(d) > 2 * error(0)) == (lam == 0.01)


def test_xavier_is_uniform_within_its_limit():
    draw = np.asarray(fair.xavier(jnp.zeros((16, 752))))
    limit = (6 / 768) ** 0.5
    assert np.abs(draw).max() <= limit
    np.testing.assert_allclose(draw.std(), limit / 3**0.5, rtol=0.02)
