"""Each method computes the equation it is named for, checked against dense float64 matrices."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ADAPTER,
    BASE,
    CLASSES,
    CLASSICS,
    CLIENTS,
    EXACT,
    RANK,
    SCALE,
    UNLEARNED,
    aggregated,
    aggregation,
    assert_near,
    cohort,
    copies,
    dense,
    dispatched,
    effective,
    jit,
    mean_product,
    mean_weights,
    members,
    models_of,
    normalised,
    nudged,
    server,
    take,
    weights_of,
)
from numpy.linalg import norm

from experiments.engine import methods
from fedlora_jax import diagnostics, lora
from fedlora_jax.hyper import corrector, synthesizer
from fedlora_jax.lora import LoRA
from fedlora_jax.method import average_client
from fedlora_jax.methods import lora_fair as fair
from fedlora_jax.methods.fedex_lora import fedex_lora
from fedlora_jax.methods.fedit import fedit
from fedlora_jax.methods.ffa_lora import ffa_lora
from fedlora_jax.methods.flexlora import flexlora
from fedlora_jax.methods.flora import flora
from fedlora_jax.methods.lora_fair import lora_fair
from fedlora_jax.wrappers.scaffold import scaffold

ROOT = Path(__file__).parents[1]
AGGREGATORS = [name for name in UNLEARNED if name not in CLASSICS]
KERNELS = ["blocks/kernel", "mix/kernel"]
LONG = pytest.mark.long


def dense_truncation(m: np.ndarray, rank: int) -> np.ndarray:
    u, s, vt = np.linalg.svd(m)
    return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def test_fedit_is_the_mean_of_factors():
    c, _, _, received, new = aggregated(fedit())
    means = jax.tree.map(lambda x: np.tensordot(np.float64(c.weights), np.float64(x), 1), received)
    assert_near(new.adapter, means, 1e-6)


def test_under_several_ranks_fedit_counts_what_is_missing_as_zero():
    ranks = [1, 2, 1, 2]
    c, _, _, received, new = aggregated(fedit(), cohort(ranks=ranks))
    for name in KERNELS:
        b = np.float64(lora.flatten(received)[name].b)
        p = np.float64(c.weights) * (np.asarray(ranks) == 2)
        assert_near(lora.flatten(new.adapter)[name].b[..., 1, :], np.tensordot(p, b[..., 1, :], 1), 1e-6)


def test_ffa_never_touches_a_and_is_exact():
    c, state, sent, received, new = aggregated(ffa_lora())
    for old, x, y in zip(*map(lora.low_rank_leaves, (state.adapter, received, new.adapter)), strict=True):
        np.testing.assert_array_equal(y.a, old.a)
        for client in range(CLIENTS):
            np.testing.assert_array_equal(x.a[client], old.a)
    assert_near(effective(ffa_lora(), BASE, new, c), mean_weights(sent.base, received, c.weights), 1e-6)


@pytest.mark.parametrize("ranks", [[2, 2, 2, 2], [1, 2, 1, 2]])
def test_flora_merges_the_stack_and_starts_anew(ranks):
    c, state, sent, received, new = aggregated(flora(), cohort(ranks=ranks))
    for name in KERNELS:
        merged = SCALE * mean_product(lora.flatten(received)[name], c.weights)
        assert_near(lora.flatten(new.residual)[name], merged)
        fresh, old = lora.flatten(new.adapter)[name], lora.flatten(state.adapter)[name]
        assert not fresh.b.any()
        assert (fresh.a != old.a).all()
    assert_near(effective(flora(), BASE, new, c), mean_weights(sent.base, received, c.weights))


@pytest.mark.parametrize("method", [flexlora(), flexlora("right"), flexlora("balanced", gauge=True)])
def test_flexlora_is_the_truncated_svd_of_the_mean_product(method):
    c, _, _, received, new = aggregated(method)
    for name in KERNELS:
        m = mean_product(lora.flatten(received)[name], c.weights)
        assert norm(dense_truncation(m, RANK) - m) > 0.05 * norm(m)  # there is something to lose
        assert_near(dense(lora.flatten(new.adapter)[name]), dense_truncation(m, RANK))


def test_flexlora_gives_each_client_the_truncation_to_its_own_rank():
    c, _, _, received, new = aggregated(flexlora(), cohort(ranks=[1, 2, 1, 2]))
    sent = flexlora().dispatch(BASE, new, c)
    for name in KERNELS:
        m = mean_product(lora.flatten(received)[name], c.weights)
        for client, rank in enumerate(c.ranks):
            assert_near(dense(take(lora.flatten(sent.adapter)[name], client)), dense_truncation(m, int(rank)))


@pytest.mark.parametrize("gauge", [True, False])
def test_flexlora_with_balanced_factors_goes_on_with_the_old_a_where_nothing_was_learned(gauge):
    _, _, _, received, new = aggregated(flexlora("balanced", gauge), cohort(clients=1, ranks=[1]))
    for name in KERNELS:
        x, sent = lora.flatten(new.adapter)[name], lora.flatten(received)[name]
        assert_near(dense(x), dense(take(sent, 0)))
        assert (x.a.any(-2) | x.b.any(-1)).all()


@pytest.mark.parametrize("ranks", [[2, 2, 2, 2], [1, 2, 1, 2]])
def test_fedex_is_exact(ranks):
    c, _, sent, received, new = aggregated(fedex_lora(), cohort(ranks=ranks))
    assert_near(effective(fedex_lora(), BASE, new, c), mean_weights(sent.base, received, c.weights))


def test_a_transposed_residual_would_not_be_exact():
    """The published code's error, which only a square layer lets pass."""
    rng, p = np.random.default_rng(0), np.full(3, 1 / 3)
    x = LoRA(jnp.asarray(rng.normal(size=(3, 5, 2))), jnp.asarray(rng.normal(size=(3, 2, 5))), SCALE)
    adapter = {"kernel": x}
    method, base = fedex_lora(), {"kernel": jnp.zeros((5, 5))}
    c = cohort(clients=3)._replace(weights=jnp.asarray(p))
    state = method.init(jax.random.key(0), take(adapter, 0))
    new = method.aggregate(base, state, c, method.dispatch(base, state, c), adapter)
    exact = SCALE * mean_product(x, p)
    error = lambda residual: norm(residual + lora.delta(new.adapter["kernel"]) - exact) / norm(exact)
    assert error(new.residual["kernel"]) < 1e-6
    assert error(new.residual["kernel"].T) > 0.1
    assert error(0) > 0.1


# --- LoRA-FAIR

SOLVERS = ["cosine", "column_cosine", "ridge"]


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_heavy_penalty_makes_lora_fair_fedit(solver):
    _, _, _, _, new = aggregated(lora_fair(lam=1e7, solver=solver))
    _, _, _, _, plain = aggregated(fedit())
    assert_near(new.adapter, plain.adapter)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("case", ["one client", "identical clients", "a shared"])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_lora_fair_corrects_nothing_where_nothing_is_wrong(solver, case, size):
    """Also for a small b, where a step of fixed length would throw it away."""
    c = normalised(cohort(clients=1 if case == "one client" else CLIENTS))
    method, rows = lora_fair(solver=solver), len(c.ids)
    received = nudged(copies(nudged(ADAPTER), rows), 2)
    if case == "identical clients":
        received = copies(take(received, 0), rows)
    same_a = lambda x: jnp.broadcast_to(x.a[:1], x.a.shape) if case == "a shared" else x.a
    received = lora.tree_map(lambda x: LoRA(same_a(x), size * x.b, x.scale), received)
    state = server(method)
    sent = method.dispatch(BASE, state, c)
    new = jit(method.aggregate)(BASE, state, c, sent, received)
    plain = fedit().aggregate(BASE, state, c, sent, received)
    assert_near(new.adapter, plain.adapter, 1e-4)


def averages(seed, size=1.0, lam=0.01, clients=4, n_in=7, n_out=5, rank=3):
    """Dense float64 factors of a cohort and what LoRA-FAIR computes from them: ``(abar, bbar, M, G, Y)``."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(1, n_in, rank)) + 0.5 * rng.normal(size=(clients, n_in, rank))
    b = size * (rng.normal(size=(1, rank, n_out)) + 0.5 * rng.normal(size=(clients, rank, n_out)))
    p = rng.dirichlet(np.ones(clients))
    abar, bbar = np.tensordot(p, a, 1), np.tensordot(p, b, 1)
    m = np.tensordot(p, a @ b, 1)
    return abar, bbar, m, abar.T @ abar, abar.T @ m


@pytest.mark.parametrize("lam", [0.0, 0.01, 1.0, 100.0])
def test_ridge_is_dense_least_squares_and_never_worse_than_fedit(lam):
    for seed in range(5):
        abar, bbar, m, g, y = averages(seed)
        d = fair.ridge(*map(jnp.float32, (g, y, bbar)), lam)
        tall = np.vstack([abar, lam**0.5 * np.eye(3)])
        rest = np.vstack([m - abar @ bbar, np.zeros((3, 5))])
        assert_near(d, np.linalg.lstsq(tall, rest, rcond=None)[0], 1e-4)
        assert norm(m - abar @ (bbar + d)) <= norm(m - abar @ bbar)


def test_ridge_leaves_what_its_formula_says():
    """|M - abar b'|^2 = |(I - P) E|^2 + sum_i (lam / (sigma_i^2 + lam))^2 |u_i^T E|^2."""
    lam = 0.5
    _, _, _, received, new = aggregated(lora_fair(lam=lam, solver="ridge"))
    p = normalised(cohort()).weights
    for name in KERNELS:
        x, y = lora.flatten(received)[name], lora.flatten(new.adapter)[name]
        m, abar = mean_product(x, p), np.tensordot(np.float64(p), np.float64(x.a), 1)
        e = m - abar @ np.tensordot(np.float64(p), np.float64(x.b), 1)
        u, s, _ = np.linalg.svd(abar, full_matrices=False)
        inside = u.mT @ e
        left = norm(e) ** 2 - norm(inside) ** 2 + norm((lam / (s**2 + lam))[..., None] * inside) ** 2
        np.testing.assert_allclose(norm(m - dense(y)) ** 2, left, rtol=1e-4)


def dense_objective(abar, bbar, m, lam):
    def objective(d):
        product = abar @ (bbar + d)
        return 1 - jnp.sum(m * product) / (jnp.linalg.norm(m) * jnp.linalg.norm(product)) + lam * jnp.sum(d**2)

    return objective


def test_a_cosine_step_follows_the_gradient_of_the_dense_objective(x64):
    lam = 0.3
    abar, bbar, m, g, y = averages(0)
    steps = [fair.cosine(g, y, bbar, norm(m), lam, steps, 1e-3) for steps in (1, 2)]
    gradient = jax.grad(dense_objective(abar, bbar, m, lam))
    assert_near(steps[0], -1e-3 * gradient(jnp.zeros_like(bbar)), 1e-10)
    assert_near(steps[1] - steps[0], -1e-3 * gradient(steps[0]), 1e-8)


@pytest.mark.parametrize("size", [1.0, 0.05, 1e-3])
@pytest.mark.parametrize("lam", [0.0, 0.01, 10.0])
def test_the_cosine_objective_only_falls(x64, size, lam):
    abar, bbar, m, g, y = averages(1, size)
    objective = dense_objective(abar, bbar, m, lam)
    solve = jit(fair.cosine, static_argnums=(4, 5, 6))
    path = [objective(solve(g, y, bbar, norm(m), lam, steps, 0.01)) for steps in (0, 1, 2, 5, 20, 100, 1000)]
    assert (np.diff(path) < 1e-12).all()
    assert path[-1] < path[0] * (1 - 1e-6)


def test_lora_fair_starts_where_b_is_zero():
    """Before anything is trained M is zero and there is no cosine to improve."""
    for solver in SOLVERS:
        method = lora_fair(solver=solver)
        state, c = method.init(jax.random.key(0), ADAPTER), normalised(cohort())
        sent = method.dispatch(BASE, state, c)
        assert_near(jit(method.aggregate)(BASE, state, c, sent, sent.adapter).adapter, ADAPTER, 1e-6)


def test_lora_fair_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="lam must be at least 0"):
        lora_fair(lam=-1)
    with pytest.raises(ValueError, match="must be 'cosine', 'column_cosine' or 'ridge'"):
        lora_fair(solver="newton")
    with pytest.raises(ValueError, match="start must be"):
        lora_fair(on="head")
    with pytest.raises(ValueError, match="ridge is solved exactly"):
        lora_fair(solver="ridge", squared=False)


# --- what a round reports


measure = jit(diagnostics.measure)


def measured(name, size=0.3):
    method, _, aggregate = aggregation(name)
    c, _, sent, received, new = aggregated(method, size=size, aggregate=aggregate)
    after = dispatched(method, new, average_client(c))
    as_models = lambda x: x._replace(adapter=models_of(method, x), mask=(), context=())
    sent, ends, after = as_models(sent), models_of(method, sent._replace(adapter=received)), as_models(after)
    return c, sent, ends, after, measure(sent, ends, c.weights, after)


@pytest.mark.parametrize("name", [pytest.param(x, marks=LONG) if x.startswith("hyperlora") else x for x in AGGREGATORS])
def test_update_and_bias_are_norms_of_dense_differences(name):
    c, sent, received, after, report = measured(name)
    new = weights_of(after.base, take(after.adapter, 0))
    ends = mean_weights(sent.base, received, c.weights)
    starts = mean_weights(sent.base, sent.adapter, c.weights)
    size = lambda x, y: norm([norm(x[k] - y[k]) for k in KERNELS])
    assert_near(report.update, size(ends, starts))
    bias = size(new, ends)
    np.testing.assert_allclose(report.bias, bias, atol=2e-5 * float(report.update))
    np.testing.assert_allclose(report.bias_share, bias / report.update, atol=2e-5)


@pytest.mark.parametrize("name", EXACT)
def test_exact_methods_report_no_bias(name):
    *_, report = measured(name)
    assert report.bias_share < 1e-5


def operators(name):
    """Which of the operators of docs/methods.md a server's new products are, by their distance from each."""
    c, sent, received, after, report = measured(name)
    new, means = weights_of(after.base, take(after.adapter, 0)), mean_weights(sent.base, received, c.weights)
    p, away = np.float64(c.weights), dict.fromkeys(("PS", "SP", "PS to rank r"), 0.0)
    for k in KERNELS:
        x, base = lora.flatten(received)[k], np.float64(lora.flatten(sent.base)[k])
        a, b = np.float64(x.a), np.float64(x.b)
        cut = dense_truncation(np.tensordot(p, a @ b, 1), RANK)
        ways = (means[k], base + SCALE * np.tensordot(p, a, 1) @ np.tensordot(p, b, 1), base + SCALE * cut)
        for way, product in zip(away, ways, strict=True):
            away[way] += norm(new[k] - product) ** 2
    return {way for way, square in away.items() if square**0.5 < 1e-4 * report.update}


ROWS = {  # of the table
    "PS and SP": {"PS", "SP", "PS to rank r"},
    "PS, beyond the factors": {"PS"},
    "PS to rank r": {"PS to rank r"},
    "SP": {"SP"},
    "neither": set(),
}


def test_what_servers_make_of_products_is_what_the_table_of_operators_says():
    rows = dict(re.findall(r"^\| \*([^*|]+)\* \| ([^|]+) \|", (ROOT / "docs/methods.md").read_text(), re.MULTILINE))
    assert rows.keys() == ROWS.keys()
    told = {name: row for row, names in rows.items() for name in re.findall(r"`(\w+)`", names)}
    assert told.keys() == {name for name in AGGREGATORS if name in methods.names()}
    for name, row in told.items():
        assert operators(name) == ROWS[row], name


def test_fedit_reports_the_bias_of_a_mean_of_factors():
    *_, report = measured("fedit")
    assert_near(report.bias, report.factor_bias)
    assert report.factor_bias > 0.01


def test_the_bias_of_factors_is_exact_where_clients_hardly_move():
    """It is centred first: for steps of 1e-3 a difference of products would have no digit left."""
    c, _, received, _, report = measured("fedit", size=1e-3)
    squares = 0
    for name in KERNELS:
        x = lora.flatten(received)[name]
        a, b, p = (np.float64(y) for y in (x.a, x.b, c.weights))
        a, b = a - np.tensordot(p, a, 1), b - np.tensordot(p, b, 1)
        squares += norm(SCALE * np.tensordot(p, a @ b, 1)) ** 2
    assert_near(report.factor_bias, squares**0.5, 1e-4)


# --- on accelerators


def test_aggregation_never_rounds_to_tf32():
    """Every product of the server asks for full precision; accelerators would otherwise keep ten bits."""
    x = jnp.ones((RANK, RANK))
    gain = jax.make_jaxpr(synthesizer._gain)(jnp.ones(3), x)
    ridge = jax.make_jaxpr(lambda t, x: corrector._ridge(jnp.ones(()), jnp.ones(()), t, x, jnp.ones(1)))
    programs = {"_gain": gain, "_ridge": ridge(LoRA(x, x), LoRA(x[None], x[None]))}
    for name in (name for name in AGGREGATORS if not name.startswith("hyperlora")):  # its networks may round
        method, state, _ = aggregation(name)
        c = members(method)
        sent = dispatched(method, state, c)
        programs[name] = jax.make_jaxpr(method.aggregate)(BASE, state, c, sent, sent.adapter)
    for name, program in programs.items():
        text = str(program)
        assert text.count("dot_general[") == text.count("precision=(Precision.HIGHEST") > 0, name


# --- what travels


def test_counts_of_what_travels_are_the_formulas():
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    layers, n_in, n_out = 2, 6, 4
    pa, pb, head = RANK * (layers * n_in + n_out), RANK * (layers * n_out + n_in), (6 + 1) * 3
    p, signature = pa + pb, 4 + 3 + 1
    residual, alone = (layers + 1) * n_in * n_out, RANK * (n_in + n_out)  # of mix, which is no layer of the stack
    held = round((p - alone) * (2 + 2 + 1) / 3 / layers)  # depths 1, 0.75 and 0.5 of two layers
    expected = {
        "fedit": (p + head, p + head),
        "ffa_lora": (pb + head, pb + head),
        "flora": (p + head, 4 * p + head),
        "flexlora": (p + head, p + head),
        "fedex_lora": (p + head, p + head + residual),
        "lora_fair": (p + head, p + head),
        "hyperlora": (p + head + CLASSES + 1, p + head),  # of a signature its classes and how many examples
        "hyperlora_exact": (2 * (p + head) + signature, p + head),
        "fedhl": (p + head, p + head),
        "rolora": ((pa + pb) // 2 + head, (pa + pb) // 2 + head),
        "hetlora": (p + head, p + head),
        "fedsa_lora": (pa + head, pa + head),
        "fedvlm": (pb + head, pb + head),
        "fed_sb": ((layers + 1) * RANK**2 + head, (layers + 1) * RANK**2 + head),
        "fedra": (held + alone + head, held + alone + head),
        "fed_hello": (held + alone + head, p + head),
        "fslora": (p + head, p + head),
        "sdflora": (p + head, p + head),
        "rac_lora": (pb + head, pb + head),
        "fed_talora": (p + head, p + head + residual),
        "fedsvd": (pb + head, p + head),
        "florist": (p + head, p + head),
        "spectral": (p + head, p + head),
        "ravan": ((layers + 1) * RANK**2 // 2 + head, (layers + 1) * RANK**2 // 2 + head),
    }
    for name, (up, down) in expected.items():
        traffic = UNLEARNED[name]().traffic(ADAPTER, [ADAPTER] * 4)
        assert (count(traffic.up), count(traffic.down) + count(traffic.missed)) == (up, down), name
        if name == "ffa_lora":  # a control for every entry that is shared, both ways
            around = scaffold(UNLEARNED[name](), 8, 0.1).traffic(ADAPTER, [ADAPTER] * 4)
            assert (count(around.up), count(around.down)) == (2 * up, down + up)
    small, p1 = lora.first_columns(ADAPTER, 1), p // RANK
    mixed = {"fedit": p1 + head, "flora": (2 * p1 + 2 * p) + head, "fedex_lora": p1 + head + residual}
    for name, down in mixed.items():  # of a client of rank 1
        traffic = UNLEARNED[name]().traffic(small, [small, ADAPTER, ADAPTER, small])
        assert (count(traffic.up), count(traffic.down) + count(traffic.missed)) == (p1 + head, down), name


def test_a_residual_of_few_clients_travels_as_factors():
    wide = {"kernel": LoRA(jnp.zeros((60, 2)), jnp.zeros((2, 50)))}
    traffic = fedex_lora().traffic(wide, [wide] * 3)
    assert sum(x.size for x in jax.tree.leaves((traffic.down, traffic.missed))) == 2 * 110 + 2 * 2 * 110
    rng, narrow = np.random.default_rng(0), lora.first_columns(wide, 1)
    rows = [(rng.normal(size=(60, 2)), rng.normal(size=(2, 50))) for _ in range(3)]
    a, b = (np.stack(x) for x in zip(*rows, strict=True))
    a[1:, :, 1], b[1:, 1] = 0, 0  # clients of ranks 2, 1 and 1
    rank = np.linalg.matrix_rank((a @ b).mean(0) - a.mean(0) @ b.mean(0))
    for own, columns in (wide, 2), (narrow, 1):
        traffic = fedex_lora().traffic(own, [wide, narrow, narrow])
        assert sum(x.size for x in jax.tree.leaves((traffic.down, traffic.missed))) == (columns + rank) * 110
