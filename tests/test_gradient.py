"""A gradient with a derivative of its own against ``jax.grad``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_near

from fedlora_jax.gradient import forward_over_reverse

W = np.random.default_rng(0).normal(size=(3, 4))
X = {"u": np.asarray([0.3, -0.2, 0.5]), "v": np.asarray(0.7)}
GRADIENTS = {"plain": lambda f: jax.grad(f, has_aux=True), "ours": forward_over_reverse}


def outcome(gradient, x, w, label, key, steps=3):
    """A loss after steps along a gradient whose aux, closed-over floats, integers and keys all matter."""

    def step(x, t):
        def f(x):
            z = jnp.tanh(x["u"] @ w) * x["v"] + 0.1 * jax.random.normal(jax.random.fold_in(key, t), (4,))
            return (z**3).sum() + z[label] ** 2, (z**2).sum() * x["v"]

        slope, aux = gradient(f)(x)
        return jax.tree.map(lambda x, g: x - 0.1 * g, x, slope), aux

    x, aux = jax.lax.scan(step, x, jnp.arange(steps))
    return (x["u"] ** 2).sum() * x["v"] + (aux * jnp.arange(1.0, 1 + steps)).sum()


def of(name):
    return lambda *args: outcome(GRADIENTS[name], *args)


@pytest.mark.long
@pytest.mark.parametrize("transform", ["as it is", "jit", "vmap", "checkpoint", "second derivative"])
def test_its_derivatives_are_those_of_the_plain_gradient(transform, x64):
    x, w, key = *jax.tree.map(jnp.asarray, (X, W)), jax.random.key(0)

    def derivative(name):
        whole = lambda x, w: jax.grad(of(name), (0, 1))(x, w, 2, key)
        match transform:
            case "jit":
                return jax.jit(jax.grad(of(name), (0, 1)))(x, w, jnp.asarray(2), key)
            case "vmap":
                many = jax.vmap(lambda w, label: jax.grad(of(name), (0, 1))(x, w, label, key))
                return many(jnp.stack([w, 2 * w]), jnp.asarray([0, 3]))
            case "checkpoint":
                return jax.grad(jax.checkpoint(lambda x, w: of(name)(x, w, 1, key)), (0, 1))(x, w)
            case "second derivative":
                return jax.grad(lambda x: sum(jnp.sum(g**2) for g in jax.tree.leaves(whole(x, w))))(x)
        return whole(x, w)

    assert_near(derivative("ours"), derivative("plain"), 1e-10)


def test_the_gradient_itself_is_the_plain_one():
    f = lambda x: (jnp.sin(x["u"]).sum() * x["v"], x["v"] ** 2)
    x = jax.tree.map(jnp.float32, X)
    for one, other in zip(*(jax.tree.leaves(g(f)(x)) for g in GRADIENTS.values()), strict=True):
        np.testing.assert_array_equal(one, other)


def test_it_keeps_nothing_of_the_first_backward_pass():
    f, x = lambda x: (jnp.sin(jnp.tile(x, 1000)).sum() ** 2, x.sum()), jnp.ones(3)

    def kept(name):
        pull = jax.eval_shape(lambda x: jax.vjp(GRADIENTS[name](f), x)[1], x)
        return sum(a.size for a in jax.tree.leaves(pull))

    assert kept("ours") <= 2 * x.size < 1000 * x.size <= kept("plain")
