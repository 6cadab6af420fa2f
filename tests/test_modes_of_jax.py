"""Modes of jax that a program may have switched on for reasons of its own."""

import jax
import jax.numpy as jnp
import optax
import pytest

import fedlora_jax as fl
from fedlora_jax import Population, lora, rounds

CLIENTS = Population(rows=jnp.arange(12).reshape(4, 3), sizes=jnp.full(4, 3), ranks=jnp.full(4, 2))
X, Y = jnp.ones((12, 3), jnp.float32), jnp.ones((12, 3), jnp.float32)


def square_error(base, adapter, batch, key):
    return jnp.mean((batch[0] @ lora.merge(base, adapter)["kernel"] - batch[1]) ** 2)


BASE = {"kernel": jnp.eye(3, dtype=jnp.float32)}
ADAPTER = lora.new(jax.random.key(1), BASE, 2, targets="kernel")


def one_round(method):
    """The run before and after a round of four clients, as shapes and types: nothing is computed."""
    run = rounds.start(method, jax.random.key(0), ADAPTER, clients=4)
    round_fn = fl.make_round(method, square_error, optax.sgd(0.1))
    step = fl.make_step(round_fn, participants=4, steps=1, batch=2, smallest=3)
    return run, jax.eval_shape(step, BASE, (X, Y), CLIENTS, run, jax.random.key(2))[0]


@pytest.mark.parametrize("method", [fl.fedhl(), fl.fedbc(fl.fedit()), fl.geometric_median(fl.fedit())])
def test_a_state_of_float32_stays_one_where_jax_has_64_bits(method):
    """Else rounds could not be scanned."""
    types = lambda run: [x.dtype for x in jax.tree.leaves((run.state, run.memory))]
    with jax.enable_x64(True):
        before, after = one_round(method)
    assert types(after) == types(before)


def test_strict_promotion_is_allowed_around_a_round():
    """As docs/sharp_edges.md says."""
    strict = jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict")
    with strict[0], strict[1], jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        before, after = one_round(fl.fedit())
    assert jax.tree.structure(before) == jax.tree.structure(after)
