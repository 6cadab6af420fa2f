"""Leave out clients whose training failed. Ours; every production server has some such rule.

A client that sends a number that is not finite is treated as if it had sent what it was sent, with weight zero; the
others share its weight. It keeps the memory it had, and its meta-gradients count as zero. If nobody is left the
server's state stays as it was, with all that wrappers inside keep. ``dropped`` in the round's report is how many
clients that were. It belongs outermost (last on the command line): wrappers around it would see what it leaves out,
and are refused.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax.diagnostics import finite
from fedlora_jax.method import Method, State, no_learning, per_client
from fedlora_jax.wrappers.around import AboutWrapper, Wrapped, Wrapper, around

ABOUT = {"nonfinite": AboutWrapper("Non-finite out", "ours", "-", "clients that send nan or inf are left out, counted")}


class Dropped(NamedTuple):
    """last: [] clients left out of the last round. total: [] of all rounds."""

    last: Array
    total: Array


def nonfinite(inner: Method) -> Method:
    """``inner`` without clients that send anything that is not finite.

    Args:
      inner: any method; outermost, so that no other wrapper sees what is left out.
    """

    def receive(own, cohort, sent, received):
        fine = finite(received)
        kept = lambda x, y: jnp.where(per_client(fine, x) > 0, y, x)
        return _weights(cohort.weights, fine), jax.tree.map(kept, sent.adapter, received)

    def finish(old, new, cohort, sent, received):
        fine, there = finite(received), cohort.weights > 0
        last = jnp.sum(~fine & there).astype(jnp.int32)
        return _if_any(fine & there, new, old.inner), Dropped(last, old.own.total + last)

    wrapper = Wrapper(
        "nonfinite",
        init=lambda key, state, adapter: Dropped(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)),
        receive=receive,
        finish=finish,
        report=lambda own: {"dropped": own.last},
    )
    method = around(inner, wrapper)

    def remember(memory, context, sent, received):
        fine = finite(jax.tree.map(lambda x: x[None], received))[0]
        new = inner.remember(memory, context, sent, received)
        return jax.tree.map(lambda old, x: jnp.where(fine, x, old), memory, new)

    def learn(state, cohort, meta_gradients):
        fine = finite(meta_gradients)
        meta_gradients = jax.tree.map(lambda x: jnp.where(per_client(fine, x) > 0, x, 0.0), meta_gradients)
        there = fine & (cohort.weights > 0)
        cohort = cohort._replace(weights=_weights(cohort.weights, fine))
        return Wrapped(_if_any(there, inner.learn(state.inner, cohort, meta_gradients), state.inner), state.own)

    learns = inner.learn is not no_learning
    return method._replace(remember=remember, learn=learn if learns else no_learning)


def _if_any(there: Array, new: State, old: State) -> State:
    return jax.tree.map(lambda x, y: jnp.where(there.any(), x, y), new, old)


def _weights(weights: Array, fine: Array) -> Array:
    left = weights * fine
    total = left.sum()
    return jnp.where(total > 0, left / jnp.where(total > 0, total, 1.0), weights)
