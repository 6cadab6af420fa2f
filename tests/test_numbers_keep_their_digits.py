"""Small numbers, many clients and 16 bits: what is computed of them is right, or refused with what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ADAPTER, BASE, EVERY, KEY, cohort, copies, dense, is_float, loss_fn, nudged

from fedlora_jax import lora, product, rounds
from fedlora_jax.lora import LoRA
from fedlora_jax.method import mean

X, Y = (lora.low_rank_leaves(nudged(ADAPTER, seed))[0] for seed in (1, 2))
HALF = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16) if is_float(x) else x, tree)


@pytest.mark.long
@pytest.mark.parametrize("size", [1e-18, 7e-7, 1.0, 1e12])
def test_cosines_and_effective_ranks_do_not_depend_on_the_size(size):
    small = LoRA(X.a * size**0.5, X.b * size**0.5, X.scale)
    x, y = dense(X), dense(Y)
    expected = np.sum(x * y, (1, 2)) / np.sqrt(np.sum(x**2, (1, 2)) * np.sum(y**2, (1, 2)))
    np.testing.assert_allclose(product.cosine(small, Y), expected, atol=1e-6)
    np.testing.assert_allclose(product.cosine(small, small), 1.0, rtol=1e-5)
    s = np.linalg.svd(x, compute_uv=False)
    np.testing.assert_allclose(product.participation(small), (s**2).sum(1) ** 2 / (s**4).sum(1), rtol=1e-4)
    slope = jax.grad(lambda a: product.cosine(LoRA(a * size**0.5, small.b, X.scale), Y).sum())(X.a)
    whole = jax.grad(lambda a: product.cosine(LoRA(a, X.b, X.scale), Y).sum())(X.a)
    np.testing.assert_allclose(slope, whole, rtol=1e-3, atol=1e-5)


def test_a_cosine_with_nothing_is_zero_and_has_no_slope():
    f = lambda b: product.cosine(LoRA(X.a, b, X.scale), Y).sum()
    value, slope = jax.value_and_grad(f)(jnp.zeros_like(X.b))
    assert value == 0
    assert not slope.any()


@pytest.mark.parametrize("clients", [3, 256, 10_007])
def test_a_mean_over_thousands_of_clients_keeps_its_digits(clients):
    rng = np.random.default_rng(0)
    x, p = (1 + 0.01 * rng.normal(size=(clients, 8, 3))).astype(np.float32), rng.uniform(1, 3, clients)
    p = (p / p.sum()).astype(np.float32)
    expected = np.tensordot(np.float64(p), np.float64(x), 1)
    np.testing.assert_allclose(mean({"x": jnp.asarray(x)}, jnp.asarray(p))["x"], expected, atol=6e-7)


def of_16_bits(name):
    method, base, adapter = EVERY[name](), HALF(BASE), HALF(ADAPTER)
    c = cohort()._replace(memory=copies(method.init_client(adapter)))

    def loss(base, adapter, batch, key):
        return loss_fn(base, adapter, {**batch, "x": batch["x"].astype(jnp.bfloat16)}, key).astype(jnp.float32)

    return jax.jit(rounds.make_round(method, loss, optax.sgd(0.1))), (base, method.init(KEY, adapter), c, KEY)


@pytest.mark.parametrize("name", ["flexlora", "flexlora_balanced", "lora_fair_ridge"])
def test_an_adapter_of_16_bits_is_decomposed_in_32(name):
    round_fn, arguments = of_16_bits(name)
    state, _, info = round_fn(*arguments)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(state.adapter))
    assert jnp.isfinite(info.aggregation.bias)


def test_a_method_that_needs_32_bits_says_so():
    round_fn, arguments = of_16_bits("fedhl")
    with pytest.raises(
        ValueError, match="computes in float32 what it was given in bfloat16: give it a float32 adapter"
    ):
        round_fn.lower(*arguments)
