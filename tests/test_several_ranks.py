"""What a client of a smaller rank is sent is the best approximation of that rank, whatever the server's gauge."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ADAPTER,
    CLIENTS,
    KEY,
    RANK,
    SIGNATURE,
    aggregated,
    assert_near,
    begin,
    cohort,
    copies,
    dense,
    dispatched,
    host,
    jit,
    nudged,
    take,
)
from hyperlora_helpers import center, everything, learned, uploads
from numpy.linalg import norm

from fedlora_jax import lora, product
from fedlora_jax.hyper.synthesizer import Factors
from fedlora_jax.lora import LoRA
from fedlora_jax.methods.flexlora import flexlora
from fedlora_jax.methods.hyperlora import hyperlora

MIXED = [1, 2, 1, 2]
SPLITS = ["left", "right", "balanced"]


def truncated(m: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(m, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def sent_to(method, state, ranks, c=None):
    return host(dispatched(method, state, (cohort() if c is None else c)._replace(ranks=np.asarray(ranks))))


def are_best(whole, sent, ranks, rel=1e-5):
    """Each client's products against those it would have at full rank, truncated in NumPy."""
    apart = 0.0
    for x, y in zip(lora.low_rank_leaves(whole), lora.low_rank_leaves(sent), strict=True):
        for i, rank in enumerate(ranks):
            best = truncated(dense(take(x, i)), rank)
            assert_near(dense(take(y, i)), best, rel)
            assert not y.a[i, ..., rank:].any()
            assert not y.b[i, ..., rank:, :].any()
            first = dense(LoRA(x.a[i, ..., :rank], x.b[i, ..., :rank, :], x.scale))
            apart = max(apart, norm(first - best) / norm(best))
    return apart


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("layers", [(), (2,)])
def test_a_truncation_to_a_rank_that_is_traced_is_the_best_one_and_so_is_its_derivative(x64, split, layers):
    rng = np.random.default_rng(0)
    draw = lambda: [jnp.asarray(rng.normal(size=(*layers, *shape))) for shape in ((7, 4), (4, 6))]
    (a, b), (da, db) = draw(), draw()
    whole = lambda y: y.scale * y.a @ y.b
    cut = jit(lambda a, b, k: whole(product.within(LoRA(a, b, 0.7), k, split)))
    for k in range(1, 5):
        best = lambda h, k=k: 0.7 * truncated(np.asarray((a + h * da) @ (b + h * db)), k)
        value, tangent = jax.jvp(lambda a, b, k=k: cut(a, b, jnp.asarray(k)), (a, b), (da, db))
        assert_near(value, best(0), 1e-12)
        assert_near(tangent, (best(1e-6) - best(-1e-6)) / 2e-6, 1e-7)


@pytest.mark.parametrize("split", SPLITS)
def test_flexlora_in_a_gauge_sends_the_best_approximation_of_each_rank(split):
    method = flexlora(split, gauge=True)
    *_, new = aggregated(method)
    whole = sent_to(method, new, [RANK] * CLIENTS).adapter
    assert_near(whole, copies(new.adapter), 0)  # as the server holds it: nothing changes where all ranks are equal
    sent = sent_to(method, new, MIXED).adapter
    assert are_best(whole, sent, MIXED) > 0.05
    assert_near(lora.split(sent)[1], lora.split(copies(new.adapter))[1], 0)
    assert_near(take(sent, [1, 3]), take(whole, [1, 3]), 0)  # whoever has the whole rank: whatever others have


@pytest.mark.parametrize("factors", get_args(Factors))
def test_hyperlora_sends_the_best_approximation_of_each_rank(factors):
    method = everything(factors=factors)
    state = begin(method.init, KEY)
    state = state._replace(theta=learned(), center=center(), last=uploads(), adapter=nudged(state.adapter, 0))
    whole, sent = (sent_to(method, state, ranks).adapter for ranks in ([RANK] * CLIENTS, MIXED))
    assert are_best(whole, sent, MIXED) > 0.05
    for x, y in zip(lora.low_rank_leaves(whole), lora.low_rank_leaves(sent), strict=True):
        assert_near((take(y.a, [1, 3]), take(y.b, [1, 3])), (take(x.a, [1, 3]), take(x.b, [1, 3])), 0)
        if factors != "balanced":  # no product, however small, makes a small
            assert_near(norm(y.a[[0, 2]], axis=(-2, -1)), norm(x.a[[0, 2], ..., :1], axis=(-2, -1)), 1e-5)


@pytest.mark.parametrize("method", [flexlora("balanced", gauge=True), hyperlora(CLIENTS, SIGNATURE)])
def test_before_anything_is_learned_a_client_of_a_smaller_rank_holds_the_first_columns(method):
    sent = sent_to(method, begin(method.init, KEY), MIXED)
    assert_near(
        sent.adapter, jax.tree.map(np.multiply, copies(ADAPTER), lora.rank_mask(ADAPTER, jnp.asarray(MIXED))), 0
    )
