"""Some rounds of a method whose clients keep something, and parts of what they keep."""

import jax
import optax
from helpers import (
    ADAPTER,
    BASE,
    KEY,
    OPTIMIZER,
    cohort,
    jit,
    loss_fn,
    members,
)

from fedlora_jax import lora, rounds
from fedlora_jax.method import models

SGD = optax.sgd(0.05)


def run(method, count=2, optimizer=OPTIMIZER, adapter=ADAPTER):
    """Some rounds of all clients from a fresh state: the state, the last cohort with its new memory, and info."""
    round_fn = jit(rounds.make_round(method, loss_fn, optimizer))
    state, memory = method.init(jax.random.key(1), adapter), members(method).memory
    for t in range(count):
        c = cohort(t)._replace(memory=memory)
        state, memory, info = round_fn(BASE, state, c, jax.random.fold_in(KEY, t))
    return state, c._replace(memory=memory), info


def personal(method, state, c):
    """The models ``[C, ...]`` that clients use."""
    return models(method, method.dispatch(BASE, state, c))


def head(adapter):
    return lora.split(adapter)[1]


def body(adapter):
    return lora.split(adapter)[0]


def task(model, batch, key):
    return loss_fn(BASE, model, batch, key)


def step_key(c, i, t):
    return jax.random.fold_in(jax.random.fold_in(KEY, c.ids[i]), t)
