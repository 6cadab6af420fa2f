"""Derivatives written by hand are those of the plain formula, in every argument, once and twice."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_near, float64, jit

from fedlora_jax.matmul import low_rank, matmul
from models.parts import LayerNorm, attend, gelu, layer_norm


def plain_layer_norm(x, scale, bias):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + bias


def plain_attention(query, key, value):
    return jax.nn.softmax(query @ key.mT / np.sqrt(query.shape[-1])) @ value


# name: (by hand, plain, shapes of the arguments)
RULES = {
    "layer_norm": (lambda *args: layer_norm(*args, 1e-6), plain_layer_norm, [(2, 5, 6), (6,), (6,)]),
    "gelu": (gelu, lambda x: jax.nn.gelu(x, approximate=False), [(3, 7)]),
    "attention": (attend, plain_attention, [(2, 3, 5, 4)] * 3),
    "low_rank": (low_rank, lambda x, a, b: x @ a @ b, [(2, 5, 6), (6, 2), (2, 4)]),
}


@pytest.fixture(params=RULES)
def rule(request):
    by_hand, plain, shapes = RULES[request.param]
    with float64():
        draw = np.random.default_rng(0).normal
        yield by_hand, plain, [jnp.asarray(draw(size=shape)) for shape in shapes]


def pulled(f, arguments):
    """All arguments' derivatives of a sum of f in which no two entries count alike."""
    weighted = lambda *args: jnp.sum(jnp.sin(f(*args)) * jnp.arange(1, f(*args).size + 1).reshape(f(*args).shape))
    return jax.grad(weighted, tuple(range(len(arguments))))(*arguments)


@pytest.mark.long
def test_values_and_derivatives(rule):
    by_hand, plain, arguments = rule
    assert_near(by_hand(*arguments), plain(*arguments), 1e-12)
    assert_near(pulled(by_hand, arguments), pulled(plain, arguments), 1e-10)


def test_derivatives_of_derivatives(rule):
    """Backwards over backwards and forwards over backwards."""
    by_hand, plain, arguments = rule
    sums = lambda f: lambda *args: sum(jnp.sum(jnp.cos(g)) for g in pulled(f, args))
    every = tuple(range(len(arguments)))
    assert_near(jit(jax.grad(sums(by_hand), every))(*arguments), jit(jax.grad(sums(plain), every))(*arguments), 1e-9)
    push = lambda f: jit(lambda args: jax.jvp(lambda *xs: pulled(f, xs), args, args)[1])(tuple(arguments))
    assert_near(push(by_hand), push(plain), 1e-9)


@pytest.mark.long
def test_stacked_clients(rule):
    """The vmapped rule is the rule of every row; what is shared by all stays shared."""
    by_hand, _, arguments = rule
    stacked = [jnp.stack([x, 2 * x]) for x in arguments[1:]]
    one = lambda x, *own: pulled(by_hand, (x, *own))
    rows = jax.vmap(one, (None, *[0] * len(stacked)))(arguments[0], *stacked) if stacked else None
    for i in range(2 if stacked else 0):
        assert_near(jax.tree.map(lambda r, i=i: r[i], rows), one(arguments[0], *[x[i] for x in stacked]), 1e-10)


def test_layer_norm_is_flax_layer_norm():
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (4, 9, 6)), jnp.float32)
    ours, theirs = LayerNorm(1e-6), nn.LayerNorm(epsilon=1e-6)
    variables = theirs.init(jax.random.key(0), x)
    assert jax.tree.structure(ours.init(jax.random.key(0), x)) == jax.tree.structure(variables)
    assert_near(ours.apply(variables, x), theirs.apply(variables, x), 1e-6)
    half = x.astype(jnp.bfloat16)
    assert ours.apply(variables, half).dtype == jnp.bfloat16
    assert_near(ours.apply(variables, half).astype(jnp.float32), theirs.apply(variables, x), 1e-2)


def test_products_of_16_bits_are_rounded_once_and_so_are_their_derivatives():
    """By float64 on the same numbers: off by half a unit in the last of eight bits, as nothing that was summed in 16
    bits is; clients one by one or at once."""
    draw = np.random.default_rng(0).normal
    x, y, ct = (jnp.asarray(draw(size=shape), jnp.bfloat16) for shape in ((3, 5, 300), (300, 7), (3, 5, 7)))
    exact = lambda *args: np.matmul(*(np.asarray(a, np.float64) for a in args))
    dy = exact(np.asarray(x, np.float64).reshape(15, 300).T, ct.reshape(15, 7))
    expected = exact(x, y), exact(ct, y.T), dy

    @jit
    def found(x, y, ct):
        out, pull = jax.vjp(matmul, x, y)
        return out, *pull(ct)

    for got, right in zip(found(x, y, ct), expected, strict=True):
        assert got.dtype == jnp.bfloat16
        assert np.all(np.abs(np.asarray(got, np.float64) - right) <= 2.0**-8 * np.abs(right) + 1e-5)
    assert_near(jit(jax.vmap(matmul, (0, None)))(x, y), found(x, y, ct)[0], 0)


@pytest.mark.parametrize("second", ["backwards", "forwards"])
def test_second_derivatives_of_products_of_16_bits(second):
    draw = np.random.default_rng(0).normal
    x, y = (jnp.asarray(draw(size=shape), jnp.bfloat16) for shape in ((3, 5, 30), (30, 7)))

    def found(dtype):
        wide, y_ = x.astype(dtype), (0.1 * y).astype(dtype)
        first = jax.grad(lambda x: jnp.sum(jnp.sin(matmul(x, y_))))
        twice = {
            "backwards": jax.grad(lambda x: jnp.sum(first(x))),
            "forwards": lambda x: jax.jvp(first, (x,), (x,))[1],
        }
        return np.asarray(jit(twice[second])(wide), np.float32)

    exact, half = found(jnp.float32), found(jnp.bfloat16)
    assert 0 < np.linalg.norm(half - exact) < 0.02 * np.linalg.norm(exact)
