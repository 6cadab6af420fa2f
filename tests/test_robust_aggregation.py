"""Robustness: what is clipped, voted on, chosen or left out, by NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ADAPTER,
    BASE,
    CLIENTS,
    KEY,
    LOCAL_LR,
    assert_near,
    cohort,
    copies,
    dense,
    jit,
    loss_fn,
    members,
    normalised,
    nudged,
    problem,
    replaced,
    take,
)
from wrapper_helpers import SGD, adapter_of, aggregated, flat, uploads

from fedlora_jax import lora, rounds
from fedlora_jax.methods.fedit import FedITState, fedit
from fedlora_jax.methods.fedsa_lora import fedsa_lora
from fedlora_jax.methods.ifca import ifca
from fedlora_jax.methods.rac_lora import rac_lora
from fedlora_jax.wrappers.feddyn import feddyn
from fedlora_jax.wrappers.fedopt import fedadam
from fedlora_jax.wrappers.privacy import clip
from fedlora_jax.wrappers.robust import geometric_median, krum, median, norm_bound, trimmed_mean, trust
from fedlora_jax.wrappers.scaffold import scaffold


def test_clipping_bounds_the_norm_of_every_update():
    c, w = normalised(members(fedit())), uploads()
    w = replaced(w, 0, jax.tree.map(lambda x, y: x + np.float32(1e-3) * (y - x), nudged(ADAPTER, 0), w))  # a short one
    start = flat(nudged(ADAPTER, 0))
    _, new = aggregated(clip(fedit(), 0.5), w, c)
    d = flat(w, clients=True) - start
    factor = np.minimum(1, 0.5 / np.linalg.norm(d, axis=1))
    assert factor[0] == 1
    assert factor[1:].max() < 1
    assert_near(adapter_of(new), start + np.float64(c.weights) @ (factor[:, None] * d), 1e-5)


def with_outlier(size=1e4):
    return replaced(uploads(), 2, size)


KINDS = {
    "median": median,
    "trimmed_mean": lambda m: trimmed_mean(m, 0.25),
    "krum": krum,
    "krum on products": lambda m: krum(m, on="products"),
    "norm_bound": lambda m: norm_bound(m, 1.0),
    "norm_bound on products": lambda m: norm_bound(m, 1.0, on="products"),
    "geometric_median": geometric_median,
    "geometric_median on products": lambda m: geometric_median(m, on="products"),
    "trust": trust,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1e4, jnp.nan])
def test_an_outlier_does_not_carry_the_server_away(kind, size):
    wrap = KINDS[kind]
    if wrap not in (median, krum) and not np.isfinite(size):
        size = 1e6  # what is not a number is left out of a round before
    _, new = aggregated(wrap(fedit()), with_outlier(size))
    _, plain = aggregated(fedit(), with_outlier())
    start = flat(nudged(ADAPTER, 0))
    reach = np.linalg.norm(flat(uploads(), clients=True) - start, axis=1).max()
    far = 8 if kind == "norm_bound on products" else 1.5  # a factor may go far where the other is small
    assert np.linalg.norm(adapter_of(new) - start) < far * reach
    assert np.linalg.norm(adapter_of(plain) - start) > 100 * reach


@pytest.mark.parametrize("weights", [[1, 2, 3, 1], [1, 0, 2, 1]])
def test_median_and_trimmed_mean_are_coordinatewise_over_who_is_there(weights):
    c, w = normalised(cohort(weights=weights)), uploads()
    there = flat(w, clients=True)[np.asarray(weights) > 0]
    _, new = aggregated(median(fedit()), w, c)
    assert_near(adapter_of(new), np.median(there, 0), 1e-5)
    _, new = aggregated(trimmed_mean(fedit(), 0.34), w, c)
    assert_near(adapter_of(new), np.sort(there, 0)[1:-1].mean(0), 1e-5)


def middle(x, share):
    """Of those of the numbers that are none of nan, without the share at both ends; None: their median."""
    x = np.sort(x[~np.isnan(x)])
    cut = (len(x) - 1) // 2 if share is None else int(share * len(x))
    return x[cut : len(x) - cut].mean() if len(x) else 0.0


VOTES = {None: median, 0.25: lambda m: trimmed_mean(m, 0.25)}


@pytest.mark.parametrize("share", VOTES)
def test_who_holds_an_entry_votes_on_it(share):
    """Ranks 3, 3, 1, 1, 1, a third client that is not there, and FedIT, which takes columns that are missing for 0."""
    p, ranks, weights = problem(rank=3), [3, 3, 1, 1, 1], [1, 2, 0, 3, 1]
    c = normalised(cohort(clients=5, ranks=ranks, weights=weights))
    method = VOTES[share](fedit())
    state = FedITState(nudged(p.adapter, 0))
    sent = method.dispatch(p.base, state, c)
    d = nudged(jax.tree.map(np.zeros_like, sent.adapter))
    w = jax.tree.map(lambda x, m, y: x + m * y, sent.adapter, sent.mask, d)
    new = jit(method.aggregate)(p.base, state, c, sent, w)
    mask = jax.tree.map(lambda x, m: np.broadcast_to(m, x.shape), sent.adapter, sent.mask)
    x, y, held = (flat(tree, clients=True) for tree in (sent.adapter, w, mask))
    votes = np.where((held > 0) & (np.asarray(weights) > 0)[:, None], y - x, np.nan)
    expected = np.float64(c.weights) @ (x + held * np.asarray([middle(v, share) for v in votes.T]))
    assert_near(adapter_of(new), expected, 1e-5)


@pytest.mark.parametrize("share", VOTES)
def test_a_model_that_one_client_chose_moves_as_that_client_says(share):
    """Of five clients of IFCA: the others hold the other model, and vote on that."""
    plain = ifca(query=1)
    method, chosen = VOTES[share](plain), np.eye(2)[[0, 0, 1, 0, 0]].astype(np.float32)
    state, c = plain.init(KEY, ADAPTER), normalised(members(plain, clients=5))
    sent = method.dispatch(BASE, state, c)
    moved = nudged(jax.tree.map(np.zeros_like, sent.adapter.models), 1)
    pick = lambda x, d: x + d * chosen.reshape(5, 2, *(1,) * (x.ndim - 2))
    received = sent.adapter._replace(models=jax.tree.map(pick, sent.adapter.models, moved), chosen=chosen)
    new = jit(method.aggregate)(BASE, state, c, sent, received)
    for k, who in enumerate(([0, 1, 3, 4], [2])):
        d = flat(take(moved, (slice(None), k)), clients=True)[who]
        expected = flat(take(state.models, k)) + [middle(v, share) for v in d.T]
        assert_near(flat(take(new.models, k)), expected, 1e-5)


@pytest.mark.long
def test_krum_does_not_prefer_clients_that_hold_less():
    """Of updates alike in size, by what two clients both hold; whoever holds less is no nearer for that."""
    picked = []
    for seed in range(12):
        c = normalised(cohort(clients=6, ranks=[2, 2, 2, 1, 1, 1], weights=[1] * 6))
        spy = fedit()._replace(aggregate=lambda base, state, c, sent, received: picked.append(c.weights) or state)
        sent = krum(spy).dispatch(BASE, FedITState(ADAPTER), c)
        d = nudged(jax.tree.map(np.zeros_like, sent.adapter), seed)
        w = jax.tree.map(lambda x, m, y: x + m * y, sent.adapter, sent.mask, d)
        krum(spy).aggregate(BASE, FedITState(ADAPTER), c, sent, w)
    full = sum(int(np.argmax(p) < 3) for p in picked)
    assert 2 <= full <= 10


@pytest.mark.parametrize("weights", [[1, 2, 3, 1], [1, 0, 2, 1]])
def test_norm_bound_shortens_to_the_median_of_the_norms(weights):
    """Of an even number of clients it is the mean of the two in the middle."""
    c, w, start = normalised(cohort(weights=weights)), uploads(), flat(nudged(ADAPTER, 0))
    w = jax.tree.map(
        lambda x, y: x + jnp.asarray([0.2, 1, 2, 4]).reshape(-1, *(1,) * x.ndim) * (y - x), nudged(ADAPTER, 0), w
    )
    _, new = aggregated(norm_bound(fedit(), 0.9), w, c)
    d = flat(w, clients=True) - start
    norms = np.linalg.norm(d, axis=1)
    factor = np.minimum(1, 0.9 * np.median(norms[np.asarray(weights) > 0]) / norms)
    assert_near(adapter_of(new), start + np.float64(c.weights) @ (factor[:, None] * d), 1e-5)


def test_krum_picks_the_update_with_the_nearest_others():
    w, c = uploads(), normalised(cohort())
    rows = flat(w, clients=True)
    far = np.sum((rows[:, None] - rows[None]) ** 2, -1)
    scores = np.sort(far, 1)[:, 1 : 1 + CLIENTS - 1 - 2].sum(1)
    _, new = aggregated(krum(fedit(), 1), w, c)
    assert_near(adapter_of(new), rows[scores.argmin()], 1e-6)
    best = np.argsort(scores)[:2]
    _, new = aggregated(krum(fedit(), 1, kept=2), w, c)
    p = np.float64(c.weights)[best]
    assert_near(adapter_of(new), p @ rows[best] / p.sum(), 1e-5)
    with pytest.raises(ValueError, match="at least 5 clients, got 4"):
        aggregated(krum(fedit(), 2), w, c)
    with pytest.raises(ValueError, match="keeps 100 of a cohort of 4 clients"):
        aggregated(krum(fedit(), kept=100), w, c)


def weiszfeld(points, p, steps=200):
    """The geometric median of points ``[C, n]``, by the plain algorithm."""
    v = p @ points / p.sum()
    for _ in range(steps):
        w = p / np.maximum(np.linalg.norm(points - v, axis=1), 1e-9)
        v = w @ points / w.sum()
    return v


def products(tree):
    """``[C, n]`` of an adapter: the products of low-rank updates, dense, and the rest."""
    leaves = jax.tree.leaves(tree, is_leaf=lora.is_lora)
    rows = [x.scale * dense(x) if lora.is_lora(x) else np.float64(x) for x in leaves]
    return np.concatenate([x.reshape(len(x), -1) for x in rows], 1)


def handed_on(make, c, *uploads):
    """Weights and uploads that FedIT is given of each of these uploads of clients that were sent the same."""
    seen, state = [], FedITState(nudged(ADAPTER, 0))
    spy = fedit()._replace(aggregate=lambda base, state, c, sent, received: seen.append((c.weights, received)) or state)
    method = make(spy)
    sent = method.dispatch(BASE, state, c)
    for received in uploads:
        method.aggregate(BASE, state, c, sent, received)
    return sent, seen


@pytest.mark.parametrize("weights", [[1, 2, 3, 1, 2, 1], [1, 0, 2, 1, 1, 3]])
def test_the_weights_make_the_mean_the_geometric_median(weights):
    """Of factors, and of products, whose mean is then up to the inner method."""
    c, w = normalised(cohort(clients=6, weights=weights)), nudged(copies(nudged(ADAPTER, 0), 6), 1)
    w = replaced(w, 2, jax.tree.map(lambda x: 30 * x, w))
    for on, points in ("factors", flat(w, clients=True)), ("products", products(w)):
        _, [(found, _)] = handed_on(lambda m, on=on: geometric_median(m, on=on), c, w)
        assert_near(np.float64(found) @ points, weiszfeld(points, np.float64(c.weights), 32), 1e-3)
        assert (np.asarray(found)[np.asarray(weights) == 0] == 0).all()


def test_of_several_ranks_the_geometric_median_is_of_who_holds_an_entry():
    """Distances are means over what a client holds, times what the largest holds."""
    c, state = normalised(cohort(clients=5, ranks=[2, 1, 2, 1, 2])), FedITState(nudged(ADAPTER, 0))
    sent = fedit().dispatch(BASE, state, c)
    d = nudged(jax.tree.map(np.zeros_like, sent.adapter), 1, 0.5)
    w = jax.tree.map(lambda x, m, y: x + m * y, sent.adapter, sent.mask, d)
    _, [(found, _)] = handed_on(geometric_median, c, w)
    held = flat(jax.tree.map(lambda x, m: np.broadcast_to(m, x.shape), sent.adapter, sent.mask), clients=True)
    d, p = (flat(w, clients=True) - flat(sent.adapter, clients=True)) * held, np.float64(c.weights)
    beta = p
    for _ in range(32):
        v = beta @ (held * d) / np.maximum(beta @ held, 1e-12)
        beta = p / np.sqrt((held * (d - v) ** 2).sum(1) / held.sum(1) * held.sum(1).max())
        beta /= beta.sum()
    np.testing.assert_allclose(found, beta, rtol=1e-3)


@pytest.mark.long
def test_on_products_it_does_not_matter_how_they_are_factored():
    w, c = nudged(copies(nudged(ADAPTER, 0), 6), 1), normalised(cohort(clients=6))
    size = lambda x: np.float32([4, 0.5, 1, 2, 0.25, 1]).reshape(6, *(1,) * (x.ndim - 1))
    other = lora.tree_map(lambda x: lora.LoRA(x.a * size(x.a), x.b / size(x.b), x.scale), w, full=lambda x: x)
    for make in (geometric_median, lambda m, on: krum(m, kept=3, on=on)):
        _, ((one, _), (two, _)) = handed_on(lambda m, make=make: make(m, on="products"), c, w, other)
        np.testing.assert_allclose(one, two, atol=1e-4)
    _, ((one, _), (two, _)) = handed_on(geometric_median, c, w, other)
    assert np.abs(one - two).max() > 0.02, "of factors it does"


@pytest.mark.long
def test_products_are_bounded_by_the_median_of_their_norms():
    """On the straight way of factors, against products that are formed; who is shorter sends what it has trained."""
    c, state = normalised(cohort(clients=5, ranks=[2, 1, 2, 1, 2])), FedITState(nudged(ADAPTER, 0))
    sent = fedit().dispatch(BASE, state, c)
    d = nudged(jax.tree.map(np.zeros_like, sent.adapter), 1, 0.5)
    w = jax.tree.map(lambda x, m, y: x + m * y, sent.adapter, sent.mask, d)
    _, [(_, bounded)] = handed_on(lambda m: norm_bound(m, 1.0, on="products"), c, w)
    norms = lambda tree: np.linalg.norm(products(tree) - products(sent.adapter), axis=1)
    before, after = norms(w), norms(bounded)
    np.testing.assert_allclose(after, np.minimum(before, np.median(before)), rtol=1e-4)
    short = before < np.median(before)
    assert_near(take(bounded, short), take(w, short), 1e-6)
    start, ends = flat(sent.adapter, clients=True), [flat(x, clients=True) for x in (bounded, w)]
    part = (ends[0] - start) / np.where(ends[1] == start, 1, ends[1] - start)
    for row, moved in zip(part, ends[1] != start, strict=True):
        np.testing.assert_allclose(row[moved], row[moved][0], rtol=2e-3)


def test_krum_on_products_picks_the_product_with_the_nearest_others():
    w, c = uploads(), normalised(cohort())
    rows = products(w)
    scores = np.sort(np.sum((rows[:, None] - rows[None]) ** 2, -1), 1)[:, 1 : 1 + CLIENTS - 1 - 2].sum(1)
    _, new = aggregated(krum(fedit(), 1, on="products"), w, c)
    assert_near(adapter_of(new), flat(w, clients=True)[scores.argmin()], 1e-6)


@pytest.mark.parametrize("root", [-1, 12])
def test_trust_weighs_by_the_cosine_to_the_reference_and_makes_all_as_long(root):
    """To the coordinate-wise median, or to the update of the trusted client."""
    c, w, start = normalised(cohort(weights=[1, 2, 3, 0])), uploads(), flat(nudged(ADAPTER, 0))
    d = (flat(w, clients=True) - start)[:3]
    reference = d[2] if root == 12 else np.median(d, 0)
    norms, goal = np.linalg.norm(d, axis=1), np.linalg.norm(reference)
    trusted = np.maximum(0, d @ reference / (norms * goal))
    _, new = aggregated(trust(fedit(), root), w, c)
    assert_near(adapter_of(new), start + trusted @ (d * goal / norms[:, None]) / trusted.sum(), 1e-5)


def test_where_nobody_is_trusted_nothing_moves():
    """The trusted client has not moved, so that nobody goes its way."""
    w, c = uploads(), normalised(cohort())
    w = replaced(w, 2, jax.tree.map(lambda x: np.stack([x] * CLIENTS), nudged(ADAPTER, 0)))
    _, new = aggregated(trust(fedit(), 12), w, c)
    assert_near(adapter_of(new), flat(nudged(ADAPTER, 0)), 1e-6)


@pytest.mark.parametrize("make", [krum, geometric_median, norm_bound])
def test_products_of_which_a_part_is_sent_are_refused(make):
    with pytest.raises(ValueError, match="needs both factors, and clients of this method keep a part"):
        make(fedsa_lora(), on="products")
    with pytest.raises(ValueError, match="on='factors' or on='products', got 'weights'"):
        make(fedit(), on="weights")


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_client_that_fails_changes_nothing_and_is_counted(bad):
    """A whole round in which one client's data are no numbers, or huge, against one in which it has no weight."""
    method = scaffold(fedit(), 8, LOCAL_LR)
    round_fn = jit(rounds.make_round(method, loss_fn, SGD))
    state, c = method.init(KEY, ADAPTER), members(method)
    broken = c._replace(batches=c.batches | {"x": replaced(c.batches["x"], 2, bad)})
    new, memory, info = round_fn(BASE, state, broken, KEY)
    without, kept, report = round_fn(BASE, state, c._replace(weights=replaced(c.weights, 2, 0.0)), KEY)
    assert_near((new, memory), (without, kept), 1e-6)
    assert_near(take(memory, 2), take(c.memory, 2), 0)
    assert info.dropped == report.dropped == 1
    assert np.isfinite(info.aggregation).all()
    assert_near(info.aggregation, report.aggregation, 1e-3, floor=1e-3)
    assert not 0 < info.loss[2] < 1e9


@pytest.mark.long
@pytest.mark.parametrize("make", [rac_lora, lambda: clip(fedadam(feddyn(fedit(), 8)))])
def test_if_all_clients_fail_the_servers_state_stays(make):
    """With momenta, keys, counts of rounds and residuals; after a round that went well."""
    method = make()
    round_fn = jit(rounds.make_round(method, loss_fn, SGD))
    c = members(method)
    start, memory, _ = round_fn(BASE, method.init(KEY, ADAPTER), c, KEY)
    broken = c._replace(batches=c.batches | {"x": c.batches["x"] * jnp.nan}, memory=memory)
    for own in (broken, broken._replace(batches=c.batches, weights=c.weights * 0)):
        state, after, info = round_fn(BASE, start, own, KEY)
        assert_near((state, after), (start, memory), 0)
        assert info.dropped == CLIENTS
