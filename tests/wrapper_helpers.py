"""Uploads as they come from clients that were all sent the same, and what a wrapped method makes of them."""

import jax
import numpy as np
import optax
from helpers import (
    ADAPTER,
    BASE,
    KEY,
    LOCAL_LR,
    OPTIMIZER,
    cohort,
    copies,
    jit,
    loss_fn,
    members,
    normalised,
    nudged,
)

from fedlora_jax import rounds
from fedlora_jax.wrappers import innermost
from fedlora_jax.wrappers.around import with_adapter

SGD = optax.sgd(LOCAL_LR)


def run(method, count=2, optimizer=OPTIMIZER, ranks=None):
    """Some rounds of all clients, from a fresh state: the state, memory and info of the last."""
    round_fn = jit(rounds.make_round(method, loss_fn, optimizer))
    state, memory, info = method.init(jax.random.key(1), ADAPTER), members(method).memory, None
    for t in range(count):
        c = cohort(t, ranks=ranks)._replace(memory=memory)
        state, memory, info = round_fn(BASE, state, c, jax.random.fold_in(KEY, t))
    return state, memory, info


def aggregated(method, received, c=None, state=None):
    """One aggregation of uploads from a state in the middle of a run; the global adapter after it."""
    c = normalised(members(method) if c is None else c)
    state = with_adapter(method.init(jax.random.key(1), ADAPTER), nudged(ADAPTER, 0)) if state is None else state
    sent = method.dispatch(BASE, state, c)
    return sent, jit(method.aggregate)(BASE, state, c, sent, received)


def uploads(seed=1, size=0.3):
    """What clients send back that were all sent ``nudged(ADAPTER, 0)``."""
    return nudged(copies(nudged(ADAPTER, 0)), seed, size)


def flat(tree, clients=False) -> np.ndarray:
    """All numbers of a tree in float64, ``[n]`` or ``[C, n]``."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    if clients:
        return np.concatenate([x.reshape(len(x), -1) for x in leaves], 1)
    return np.concatenate([x.ravel() for x in leaves])


def adapter_of(state) -> np.ndarray:
    return flat(innermost(state).adapter)
