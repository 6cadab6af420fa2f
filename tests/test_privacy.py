"""Client-level privacy: what is clipped, added up and noised, by NumPy; what it costs, by dp-accounting itself."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ADAPTER,
    BASE,
    BATCH,
    CLIENTS,
    EVERYBODY,
    KEY,
    METHODS,
    STEPS,
    assert_near,
    cohort,
    jit,
    loss_fn,
    members,
    normalised,
    nudged,
    replaced,
)
from jax.interpreters.partial_eval import dce_jaxpr
from scipy import optimize, stats
from test_wrapper_order import built
from wrapper_helpers import SGD, adapter_of, aggregated, flat, uploads

from experiments.config import Config, check
from experiments.engine import methods
from experiments.engine.facts import acceptable
from experiments.results import spent
from experiments.setup import descriptions
from fedlora_jax import accountant, lora, rounds
from fedlora_jax.batches import Padded
from fedlora_jax.clients import Population, Sampling
from fedlora_jax.method import all_held, no_learning
from fedlora_jax.methods.fedit import FedITState, fedit
from fedlora_jax.methods.ffa_lora import ffa_lora
from fedlora_jax.methods.ifca import ifca
from fedlora_jax.wrappers import Wrapped, innermost
from fedlora_jax.wrappers.privacy import Private, dp, shared_noise

SETTINGS = [
    ("pld", 1.0, Sampling(100, 100), 10, 1e-5),
    ("pld", 4.0, Sampling(1000, 1000), 200, 1e-6),
    ("pld", 0.7, Sampling(100, 100, 0.1), 3, 1e-3),
    ("pld", 1.1, Sampling(100, 60, 0.3), 5, 1e-4),  # cut off, now and then
    ("pld", 2.0, Sampling(50, 5), 4, 1e-5),
    ("rdp", 1.0, Sampling(100, 100), 10, 1e-5),
    ("rdp", 1.0, Sampling(100, 100, 0.1), 30, 1e-5),
    ("rdp", 3.0, Sampling(1000, 1000, 0.02), 300, 1e-7),
    ("rdp", 2.0, Sampling(50, 5), 4, 1e-5),
    ("rdp", 6.0, Sampling(20, 10), 10, 1e-4),
]


@pytest.mark.parametrize(("by", "noise", "sampling", "count", "delta"), SETTINGS)
def test_epsilon_is_that_of_dp_accounting(by, noise, sampling, count, delta):
    library = pytest.importorskip("dp_accounting")
    n, most, rate = sampling
    event, between = library.GaussianDpEvent(noise), library.NeighboringRelation.ADD_OR_REMOVE_ONE
    if by == "pld":
        if (most, rate) != (n, 1):
            event = library.TruncatedSubsampledGaussianDpEvent(n, rate, most, noise)
        theirs = library.pld.PLDAccountant(between, accountant.INTERVAL)
    else:
        if rate < 1:
            event = library.PoissonSampledDpEvent(rate, event)
        elif most < n:
            event = library.SampledWithoutReplacementDpEvent(n, most, library.GaussianDpEvent(noise / 2))
            between = library.NeighboringRelation.REPLACE_ONE
        theirs = library.rdp.RdpAccountant(accountant.ORDERS, between)
    theirs.compose(event, count)
    ours = accountant.epsilons(noise, sampling, count, delta, by)
    assert (len(ours), ours[0]) == (count + 1, 0)
    assert (np.diff(ours) > 0).all()
    np.testing.assert_allclose(ours[-1], theirs.get_epsilon(delta), rtol=1e-5)


@pytest.mark.parametrize("count", [1, 7])
def test_epsilon_of_everybody_is_the_closed_form(count):
    """delta = F(1 / 2m - eps m) - e^eps F(-1 / 2m - eps m) at m = z / sqrt(T): Balle and Wang 2018, theorem 8."""
    pytest.importorskip("dp_accounting")
    m, F = 1.3 / math.sqrt(count), stats.norm.cdf
    delta = lambda e: F(1 / (2 * m) - e * m) - math.exp(e) * F(-1 / (2 * m) - e * m)
    expected = optimize.brentq(lambda e: delta(e) - 1e-4, 0, 100)
    np.testing.assert_allclose(accountant.epsilons(1.3, Sampling(40, 40), count, 1e-4)[-1], expected, rtol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("sampling", [Sampling(30, 30), Sampling(30, 30, 0.2), Sampling(30, 6)])
def test_the_noise_that_is_found_spends_what_was_asked_for_and_no_more(sampling):
    pytest.importorskip("dp_accounting")
    z = accountant.noise_for(2.0, sampling, 4, 1e-3)
    assert accountant.epsilons(z, sampling, 4, 1e-3)[-1] <= 2.0 < accountant.epsilons(0.99 * z, sampling, 4, 1e-3)[-1]
    method = dp(fedit(), sampling, 4, epsilon=2.0, delta=1e-3)
    told = [method.report(method.init(KEY, ADAPTER)._replace(own=Private(KEY, t, 1.0)))["epsilon"] for t in (0, 4, 9)]
    assert told[0] == 0
    assert told[1] == told[2] <= 2.0


def test_what_cannot_be_accounted_for_is_refused():
    with pytest.raises(ValueError, match="pld or rdp, got 'ad'"):
        accountant.epsilons(1.0, EVERYBODY, 1, 1e-5, "ad")
    for bad, message in (
        ({"bound": 0.0}, "bound must be above 0"),
        ({"noise": -1.0}, "noise must be at least 0"),
        ({"delta": 0.0, "noise": 0.0}, "delta must be above 0"),
        ({"quantile": 1.0}, "quantile must be at least 0 and below 1"),
        ({"on": "models"}, "factors or products, got 'models'"),
        ({"noise": 2.0, "epsilon": 1.0}, "give one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            dp(fedit(), EVERYBODY, 1, **bad)
    with pytest.raises(ValueError, match="choose what they send"):
        dp(ifca(query=1), EVERYBODY, 1, noise=0.0)
    with pytest.raises(ValueError, match="keep some to themselves"):
        dp(METHODS["fedsa_lora"](), EVERYBODY, 1, noise=0.0, on="products")
    pytest.importorskip("dp_accounting")
    with pytest.raises(ValueError, match="cut off at 5 of 9"):
        accountant.epsilons(1.0, Sampling(9, 5, 0.1), 1, 1e-5, "rdp")


# --- what the server makes of it


def test_the_mean_is_of_clipped_updates_over_a_fixed_number_whatever_clients_weigh():
    """One does not take part; six are expected."""
    w, c, start = uploads(), cohort(weights=[1, 0, 5, 2]), flat(nudged(ADAPTER, 0))
    method = dp(fedit(), Sampling(60, CLIENTS, 0.1), 4, bound=0.7, noise=0.0)
    _, new = aggregated(method, w, c)
    d = flat(w, clients=True)[[0, 2, 3]] - start
    d *= np.minimum(1, 0.7 / np.linalg.norm(d, axis=1))[:, None]
    assert_near(adapter_of(new), start + d.sum(0) / Sampling(60, CLIENTS, 0.1).expected, 1e-5)


@pytest.fixture
def free(monkeypatch):
    """Noise that nobody accounts for, where the library is not there."""
    monkeypatch.setattr(accountant, "epsilons", lambda z, sampling, rounds, delta, by: (0.0,) * (rounds + 1))


def test_noise_is_of_the_cohorts_size_one_draw_for_all_and_ends_with_the_plan(free):
    w = jax.tree.map(lambda x: jnp.broadcast_to(x, (CLIENTS, *x.shape)), nudged(ADAPTER, 0))  # nobody moved
    method = dp(fedit(), EVERYBODY, 2, bound=0.5, noise=3.0)
    start, drawn, state = flat(nudged(ADAPTER, 0)), [], None
    for t in range(3):
        _, state = aggregated(method, w, state=None if state is None else state)
        drawn.append(adapter_of(state) - start)
        state = Wrapped(FedITState(nudged(ADAPTER, 0)), state.own)
        assert state.own.round == t + 1
    assert drawn[2].max() < 1e-6  # the third of two
    np.testing.assert_allclose([d.std() for d in drawn[:2]], 3 * 0.5 / CLIENTS, rtol=0.2)
    assert abs(np.corrcoef(drawn[:2])[0, 1]) < 0.3


@pytest.mark.long
def test_neither_noise_nor_what_it_is_over_tells_who_failed_or_never_answered(free):
    """Whole rounds: those of nobody are noise alone, the same as beside the updates of two or of all."""
    ends = {}
    for noise in (0.0, 3.0):
        method = dp(fedit(), EVERYBODY, 2, bound=0.05, noise=noise)
        round_fn, c, start = jit(rounds.make_round(method, loss_fn, SGD)), members(method), method.init(KEY, ADAPTER)
        for who in ((1, 1, 1, 1), (1, 0, 0, 1), (0, 0, 0, 0)):
            out = np.flatnonzero(1 - np.asarray(who))
            broken = c._replace(batches=c.batches | {"x": replaced(c.batches["x"], out, np.nan)})
            for own in (c._replace(weights=c.weights * np.float32(who)), broken):
                state, _, info = round_fn(BASE, start, own, KEY)
                assert (info.dropped, state.own.round) == (len(out), 1)
                ends.setdefault((noise, who), []).append(adapter_of(state) - adapter_of(start))
    drawn = ends[3.0, (0, 0, 0, 0)][0]
    np.testing.assert_allclose(drawn.std(), 3 * 0.05 / CLIENTS, rtol=0.2)
    for (noise, who), changes in ends.items():
        assert_near(changes[0], changes[1], 1e-5)
        assert_near(changes[0] - ends[0.0, who][0], drawn if noise else 0 * drawn, 1e-4, floor=1e-6)
    assert not ends[0.0, (0, 0, 0, 0)][0].any()


@pytest.mark.long
def test_frozen_factors_get_no_noise(free):
    method = dp(ffa_lora(), EVERYBODY, 2, noise=3.0)
    state = method.init(KEY, ADAPTER)
    c = normalised(cohort())
    sent = method.dispatch(BASE, state, c)
    new = method.aggregate(BASE, state, c, sent, sent.adapter)
    for old, x in zip(*(lora.low_rank_leaves(innermost(s).adapter) for s in (state, new)), strict=True):
        assert_near(x.a, old.a, 0)
        assert np.abs(x.b - old.b).min() > 0


def test_the_bound_follows_the_quantile():
    """Of four norms two are within the bound: at gamma 0.75 it grows, by exp(-eta (1/2 - 3/4))."""
    w, start = uploads(), flat(nudged(ADAPTER, 0))
    norms = np.linalg.norm(flat(w, clients=True) - start, axis=1)
    bound = float(np.sort(norms)[1:3].mean())
    method = dp(fedit(), EVERYBODY, 9, bound=bound, noise=0.0, quantile=0.75, eta=0.4)
    _, state = aggregated(method, w)
    np.testing.assert_allclose(state.own.bound, bound * np.exp(0.4 * 0.25), rtol=1e-5)


@pytest.mark.parametrize(("z", "n"), [(1.0, 100), (1.0, 10), (0.3, 1000), (20.0, 10)])
def test_both_noises_together_are_one_gaussian(z, n):
    of_bound, of_update = shared_noise(z, n)
    np.testing.assert_allclose(of_update**-2 + (2 * of_bound) ** -2, z**-2)
    assert of_bound >= n / 20 - 1e-9
    assert of_update <= z / np.sqrt(0.9) + 1e-9


def products(adapter):
    return [np.float64(x.scale) * np.float64(x.a) @ np.float64(x.b) for x in lora.low_rank_leaves(adapter)]


def turned(adapter, g):
    """The same products of other factors."""
    return lora.tree_map(lambda x: lora.LoRA(x.a @ g, jnp.linalg.inv(g) @ x.b, x.scale), adapter, full=lambda x: x)


def test_on_products_nothing_depends_on_how_they_are_split(free):
    """Clipping, noise and the new product, with clients' factors turned by any matrix."""
    method, new = dp(fedit(), EVERYBODY, 2, bound=0.3, noise=0.1, on="products"), []
    g = jnp.asarray([[2.0, 0.5], [-0.3, 0.4]])
    for turn in (lambda x: x, lambda x: turned(x, g)):
        w = turn(uploads())
        state = method.init(jax.random.key(1), ADAPTER)._replace(inner=FedITState(turn(nudged(ADAPTER, 0))))
        _, state = aggregated(method, w, state=state)
        new.append(products(innermost(state).adapter))
    assert_near(new[1], new[0], 1e-3)


def test_on_products_a_mean_of_low_rank_is_reached_and_clipped_by_its_norm():
    """All clients send one product; bounded, it is a part of the way there."""
    one = nudged(nudged(ADAPTER, 0), 5)
    w = jax.tree.map(lambda x: jnp.broadcast_to(x, (CLIENTS, *x.shape)), one)
    _, state = aggregated(dp(fedit(), EVERYBODY, 2, bound=1e6, noise=0.0, on="products"), w)
    assert_near(products(innermost(state).adapter), products(one), 1e-2)
    changes = [y - x for x, y in zip(products(nudged(ADAPTER, 0)), products(one), strict=True)]
    in_full = lambda tree: [x for x in jax.tree.leaves(tree, is_leaf=lora.is_lora) if not lora.is_lora(x)]
    begun, rest = in_full(nudged(ADAPTER, 0)), in_full(one)
    changes += [y - x for x, y in zip(begun, rest, strict=True)]
    size = np.sqrt(sum(np.sum(d**2) for d in changes))
    _, state = aggregated(dp(fedit(), EVERYBODY, 2, bound=float(size) / 2, noise=0.0, on="products"), w)
    for x, y, z in zip(begun, rest, in_full(innermost(state).adapter), strict=True):
        assert_near(z, x + (y - x) / 2, 1e-4)


# --- who takes part


def test_in_poisson_sampling_clients_join_on_their_own():
    """Over many draws: how many, and each client as often, together with any other as often as by chance."""
    sampling, draws = Sampling(6, 6, 0.3), 4000

    def one(key):
        ids, there = jax.random.permutation(jax.random.fold_in(key, 7), 6), sampling.joined(key)
        return jnp.zeros(6).at[ids].set(there.astype(jnp.float32))

    there = np.asarray(jit(jax.vmap(one))(jax.random.split(KEY, draws)), np.float64)
    both = there.T @ there / draws
    np.testing.assert_allclose(np.diag(both), 0.3, atol=0.03)
    np.testing.assert_allclose(both[~np.eye(6, dtype=bool)], 0.09, atol=0.02)
    assert Sampling(6, 2).joined(KEY).all()


def test_who_did_not_join_is_not_there():
    """A round over the places of a cohort, of which the last are empty: no loss, no weight, not dropped."""
    seen = lambda base, state, c, key, number: (
        c.weights,
        c.memory,
        rounds.Info(c.ids, jnp.ones(len(c.ids)), (), {}, jnp.ones(len(c.ids)), jnp.sum(c.weights == 0)),
    )
    sampling = Sampling(4, 4, 0.5)
    step = rounds.make_cohort_step(seen, steps=1, batch=1, smallest=1, sampling=sampling)
    population = Population(jnp.zeros((4, 1), int), jnp.ones(4, int), jnp.ones(4, int), weights=jnp.ones(4))
    memory, ids = {"x": jnp.zeros((4, 2))}, jnp.asarray([3, 1, 0, 2])
    counts = set()
    for number in range(8):
        weights, _, info = step({}, jnp.zeros(1), population, ids, (), memory, number, KEY)
        n = int((np.asarray(info.ids) >= 0).sum())
        counts.add(n)
        np.testing.assert_array_equal(info.ids, [*ids[:n], *[-1] * (4 - n)])
        np.testing.assert_array_equal(weights, [1] * n + [0] * (4 - n))
        np.testing.assert_array_equal(np.isnan(info.loss), [False] * n + [True] * (4 - n))
        assert info.dropped == 0
    assert len(counts) > 2


# --- what else is told


def looks_at(method, c, *fields):
    """Whether the server's program of a round reads these parts of a cohort."""
    told = {key: getattr(c, key) for key in fields}

    def new(told, state):
        own = c._replace(**told)
        sent = method.dispatch(BASE, state, own)
        return method.aggregate(BASE, state, own, sent, jax.tree.map(lambda x: x + 1, sent.adapter))

    program = jax.make_jaxpr(new)(told, jax.eval_shape(method.init, KEY, ADAPTER)).jaxpr
    return any(dce_jaxpr(program, [True] * len(program.outvars))[1][: len(jax.tree.leaves(told))])


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_that_is_told_nothing_does_not_look(name):
    """The server's program reads of a client its upload and its weight, or ``About.tells`` names what else."""
    method = METHODS[name]()
    looks = looks_at(method, normalised(members(method)), "memory", "signatures", "ids", "queries")
    looks |= method.learn is not no_learning or method.held is not all_held or method.uploads == "none"
    spec = next(known for known in sorted(methods.names(), key=len, reverse=True) if name.startswith(known))
    tells = methods.about(spec).tells
    assert (tells != "-") == looks or (name in ("local_only", "frozen") and tells == "-")


@pytest.mark.parametrize("name", sorted(methods.wrappers()))
def test_a_wrapper_that_is_told_nothing_does_not_look(name):
    """Of losses and numbers of steps as well."""
    method = built(name)
    c = members(method)
    there = np.ones((CLIENTS, STEPS, BATCH), bool)
    c = normalised(c._replace(batches=Padded(c.batches, there), losses=jnp.ones((CLIENTS, STEPS)), shares=c.weights))
    looks = looks_at(method, c, "memory", "signatures", "ids", "queries", "losses", "batches")
    assert (methods.about(f"fedit+{name}").tells != "-") == looks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("fedit+dp:noise=0.0",), "rank": (2, 4)}, "give one --rank"),
        ({"methods": ("hetlora+dp:noise=0.0",), "clients_per_round": 4}, "nobody knowing who is drawn"),
    ],
)
def test_runs_of_which_an_epsilon_would_not_hold_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        acceptable(Config(**options), descriptions.shapes_of_one("full", 3), ADAPTER)


def test_places_of_a_cohort():
    assert Config(clients=100, clients_per_round=10).cohort == 10
    config = Config(clients=100, clients_per_round=10, sampling="poisson")
    assert (config.cohort, config.join_rate) == (25, 0.1)
    assert stats.binom.sf(25, 100, 0.1) < 1e-5
    assert Config(clients=12, sampling="poisson").cohort == 12
    check(Config(clients=12, clients_per_round=8, sampling="poisson"))


def test_a_summary_says_what_is_covered_and_what_is_not():
    row = {"round": 3, "epsilon": 2.5, "delta": 1e-3, "noise_multiplier": 1.5, "clipping": 1.0}
    config = {"clients": 50, "clients_per_round": 5, "sampling": "fixed"}
    about = {"name": "FedProto + DP", "tells": "its class counts"}
    entries = {"x": {"about": about, **spent.of([{**row, "round": 2, "epsilon": 2.0}, row])}, "y": {"about": about}}
    (line,) = spent.lines({"methods": entries, "config": config})
    for text in (
        "epsilon 2.5 at delta 0.001 after 3 rounds",
        "one client replaced, 5 of 50",
        "its class counts, losses",
    ):
        assert text in line
    assert spent.of([{"round": 1}]) == {}
