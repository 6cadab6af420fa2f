"""FedGLOMO and MimeLite take the published steps, and are FedIT where they should be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ADAPTER,
    BASE,
    BATCH,
    KEY,
    LOCAL_LR,
    assert_near,
    cohort,
    copies,
    jit,
    loss_fn,
    normalised,
    nudged,
    take,
    train,
)
from wrapper_helpers import SGD, flat

from fedlora_jax import rounds
from fedlora_jax.methods.fedglomo import fedglomo
from fedlora_jax.methods.fedit import FedITState, fedit
from fedlora_jax.methods.mime import mime
from fedlora_jax.task import of_batch


def test_the_step_is_the_published_one():
    """Three aggregations in float64: u = beta D(w) + (1 - beta) u + (1 - beta) (D(w) - D(w_before))."""
    beta, method, c = 0.3, fedglomo(0.3), normalised(cohort())
    state, p = method.init(KEY, nudged(ADAPTER)), np.float64(c.weights)
    w, before, u = flat(state.adapter), flat(state.before), None
    for t in range(3):
        sent = method.dispatch(BASE, state, c)
        received = {k: nudged(sent.adapter[k], 10 * t + i) for i, k in enumerate(("now", "before"))}
        state = jit(method.aggregate)(BASE, state, c, sent, received)
        d, d_before = w - p @ flat(received["now"], True), before - p @ flat(received["before"], True)
        u = d if u is None else beta * d + (1 - beta) * u + (1 - beta) * (d - d_before)
        before, w = w, w - u
        assert_near(flat(state.adapter), w, 1e-5)
        assert_near(flat(state.before), before, 1e-5)


def test_without_memory_it_is_fedit():
    method, c = fedglomo(1.0), normalised(cohort(ranks=[1, 2, 2, 1]))
    state = method.init(KEY, nudged(ADAPTER))
    for t in range(2):
        sent, plain = method.dispatch(BASE, state, c), fedit().dispatch(BASE, FedITState(state.adapter), c)
        assert_near(sent.adapter["now"], plain.adapter, 0)
        ends = jax.tree.map(lambda x, m: x * m, nudged(plain.adapter, t), plain.mask)
        new = method.aggregate(BASE, state, c, sent, {"now": ends, "before": copies(ADAPTER)})
        expected = fedit().aggregate(BASE, FedITState(state.adapter), c, plain, ends)
        assert_near(new.adapter, expected.adapter, 1e-6)
        state = new


def test_clients_take_the_same_steps_from_both_adapters():
    """Each end is what a client of FedIT sends that starts there, on the same batches."""
    method, c = fedglomo(), normalised(cohort())
    state = method.init(KEY, nudged(ADAPTER, 1))._replace(before=nudged(ADAPTER, 2))
    ends, losses = train(method, method.dispatch(BASE, state, c), c, KEY)
    for name, w in (("now", state.adapter), ("before", state.before)):
        plain, reported = train(fedit(), fedit().dispatch(BASE, FedITState(w), c), c, KEY)
        assert_near(ends[name], plain)
        if name == "now":
            assert_near(losses, reported)
    assert method.meta_gradient.passes(5) == 10
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        fedglomo(0.0)
    assert jnp.all(state.rounds == 0)


def test_mimelite_steps_along_a_momentum_that_no_local_step_changes():
    """Two rounds of plain SGD in float64 gradients of each step; m is made of gradients at the model that was sent."""
    beta, c, method = 0.6, normalised(cohort()), mime(0.6, query=BATCH)
    state = method.init(KEY, nudged(ADAPTER))
    round_fn, grad = jit(rounds.make_round(method, loss_fn, SGD)), jit(jax.grad(loss_fn, 1))
    w, m, p = state.adapter, jax.tree.map(jnp.zeros_like, ADAPTER), c.weights
    for _ in range(2):
        state, _, _ = round_fn(BASE, state, c, KEY)
        ends, at_w = [], []
        for i in range(len(p)):
            key, y = jax.random.fold_in(KEY, c.ids[i]), w
            last = jax.random.fold_in(key, np.iinfo(np.int32).max)
            at_w.append(grad(BASE, w, take(c.queries, i), last))
            for t in range(len(c.batches["y"][i])):
                g = grad(BASE, y, take(c.batches, (i, t)), jax.random.fold_in(key, t))
                y = jax.tree.map(lambda y, g, m: y - LOCAL_LR * ((1 - beta) * g + beta * m), y, g, m)
            ends.append(y)
        mean = lambda trees: jax.tree.map(lambda *x: sum(q * y for q, y in zip(p, x, strict=True)), *trees)
        w, m = mean(ends), jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, m, mean(at_w))
        assert_near(state.adapter, w, 1e-4)
        assert_near(state.momentum, m, 1e-4)
    task = of_batch(loss_fn, BASE, take(c.batches, (0, 0)), KEY)
    assert_near(mime(0.0).objective(task, w, m)[0], task(w), 0)
    with pytest.raises(ValueError, match="below 1"):
        mime(1.0)
