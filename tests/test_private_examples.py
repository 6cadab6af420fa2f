"""Example-level privacy: local gradients by a loop over examples in float64; their cost, by dp-accounting itself."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ADAPTER, BASE, BATCH, CLIENTS, EVERYBODY, KEY, METHODS, assert_near, float64, jit, members, nudged
from test_unequal_steps import any_loss, losses

from experiments.config import Config
from experiments.engine.accounts import Accounts
from experiments.engine.facts import acceptable, facts_of
from experiments.results import spent
from experiments.setup import descriptions
from fedlora_jax import audit, clients, rounds, training
from fedlora_jax.batches import Padded
from fedlora_jax.methods.fedit import fedit
from fedlora_jax.wrappers import dp_sgd as wrapper
from fedlora_jax.wrappers.dp_sgd import dp_sgd, private_sum, uses
from fedlora_jax.wrappers.privacy import dp
from fedlora_jax.wrappers.proximal import proximal

T, BOUND, LR = 3, 4.0, 0.1
PRESENT = np.array([[1, 1, 1], [1, 1, 0], [0, 0, 0]], bool)  # a step that is not full, one that is not taken


def doubles(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64 if x.dtype == jnp.float32 else x.dtype), tree)


def by_hand(base, adapter, mask, batches, key, mu):
    """SGD with clipped gradients of one example at a time, of those that are there, each with a key of its own."""
    grad = jit(jax.grad(lambda adapter, batch, key: any_loss(base, adapter, batch, key)))
    start, fits = adapter, []
    for t, there in enumerate(PRESENT):
        if not there.any():
            continue
        total = jax.tree.map(np.zeros_like, adapter)
        for i in np.flatnonzero(there):
            batch = jax.tree.map(lambda x, t=t, i=i: x[t, i : i + 1], batches)
            g = grad(adapter, batch, jax.random.fold_in(jax.random.fold_in(key, t), i))
            g = jax.tree.map(lambda x, m: np.float64(x) * np.float64(m), g, mask)
            size = math.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(g)))
            fits.append(size <= BOUND)
            total = jax.tree.map(lambda x, y, size=size: x + y * min(1, BOUND / size), total, g)
        mean = jax.tree.map(lambda x, n=there.sum(): x / n, total)  # noqa: B008
        adapter = jax.tree.map(lambda w, g, w0, m: w - LR * m * (g + mu * (w - w0)), adapter, mean, start, mask)
    assert 0 < np.mean(fits) < 1  # some gradients are cut, and some are not
    return adapter


@pytest.mark.parametrize("padded", [True, False])
def test_local_steps_are_a_loop_over_examples(padded, monkeypatch):
    """In float64: what is masked counts neither in norms nor in steps, what only fills up a batch counts as none, a
    penalty is outside of the bound."""
    with float64():
        method = dp_sgd(proximal(fedit(), 0.5), 1, 1, bound=BOUND, noise=0.0)
        monkeypatch.setattr("test_private_examples.PRESENT", PRESENT if padded else np.ones_like(PRESENT))
        base, adapter = doubles(BASE), doubles(nudged(ADAPTER))
        mask = jax.tree.map(lambda x: jnp.arange(x.size).reshape(x.shape) % 4 > 0, adapter)
        data = jax.tree.map(lambda x: x[0], members(method, 2, steps=T).batches)
        batches = Padded(data, jnp.asarray(PRESENT)) if padded else data
        local = jit(training.make_local(method, any_loss, optax.sgd(LR)))
        context = jax.tree.map(
            lambda x: x[0], method.dispatch(base, method.init(KEY, adapter), members(method)).context
        )
        got, trace = local(base, adapter, mask, context, batches, KEY)
        context = jax.tree.leaves(context)[: len(jax.tree.leaves(adapter))]
        assert_near(context, jax.tree.leaves(adapter), 1e-12)  # the proximal term pulls to where clients start
        assert_near(got, by_hand(base, adapter, mask, data, KEY, 0.5), 1e-10)
        assert (np.asarray(trace.loss) > 0).tolist() == PRESENT.any(1).tolist()


def quiet_loss(base, adapter, batch, key):
    """The tests' loss without noise from its key."""
    padded = isinstance(batch, Padded)
    values = losses(base, adapter, batch.examples if padded else batch)
    return batch.mean(values) if padded else values.mean()


LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("ditto", "fedsa_lora")]


@pytest.mark.parametrize("name", ["fedit", *LONG])
def test_without_noise_and_bound_it_is_plain_training(name):
    """Over whole rounds: clients stop within a batch, some do not answer, ranks differ."""
    make = METHODS[name]
    c = members(make(), 1, steps=T, ranks=[1, 2, 2, 1])
    there = np.arange(T * BATCH) < np.array([9, 4, 3, 7])[:, None]
    c = c._replace(batches=Padded(c.batches, there.reshape(CLIENTS, T, BATCH)), weights=c.weights * [1, 1, 0, 1])
    ends = []
    for method in (make(), dp_sgd(make(), 1, 1, bound=1e9, noise=0.0)):
        round_fn = jit(rounds.make_round(method, quiet_loss, optax.adam(0.01, eps=0.1)))
        ends.append(round_fn(BASE, method.init(KEY, nudged(ADAPTER)), c, KEY))
    (plain, kept, info), (state, memory, told) = ends
    assert_near((state, memory, told.loss, told.moved), (plain, kept, info.loss, info.moved), 1e-5)


def test_noise_has_the_deviation_that_is_accounted_for_and_is_drawn_anew():
    zeros = {"a": jnp.zeros((5, 40, 50)), "b": jnp.zeros((5, 3000))}
    present = jnp.array([1, 1, 1, 1, 0], bool)
    draw = jit(lambda key: private_sum(0.5, 3.0, zeros, present, key))
    one, other = (draw(key) for key in jax.random.split(KEY))
    values = np.concatenate([np.ravel(x) for x in jax.tree.leaves(one)])
    np.testing.assert_allclose(values.std(), 3 * 0.5 / 4, rtol=0.03)
    np.testing.assert_allclose(values.mean(), 0, atol=4 * values.std() / len(values) ** 0.5)
    pairs = (one["a"].ravel(), other["a"].ravel()), (one["a"].ravel(), one["b"].ravel()[:2000])
    assert max(abs(np.corrcoef(*pair)[0, 1]) for pair in pairs) < 0.1


def test_no_example_moves_the_sum_by_more_than_the_bound_whatever_its_gradient():
    rng = np.random.default_rng(0)
    g = {"a": rng.normal(size=(4, 3, 2)), "b": rng.normal(size=(4, 5))}
    small = {name: jnp.asarray(x * 1e-3) for name, x in g.items()}
    for bad in (1e12, 1e30, np.inf, np.nan):
        worse = {name: x.at[1].set(bad) for name, x in small.items()}
        whose = [jit(lambda g: private_sum(0.7, 0.0, g, jnp.ones(4, bool), KEY))(tree) for tree in (small, worse)]
        d = [4 * (np.asarray(x, np.float64) - y) for x, y in zip(*map(jax.tree.leaves, whose), strict=True)]
        assert math.sqrt(sum(np.sum(x**2) for x in d)) <= 0.7 + 0.01


@pytest.mark.parametrize(("noise", "count", "delta"), [(1.1, 7, 1e-3), (4.0, 60, 1e-5)])
def test_epsilon_is_that_of_dp_accounting(noise, count, delta):
    library = pytest.importorskip("dp_accounting")
    theirs = library.pld.PLDAccountant(library.NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-4)
    theirs.compose(library.GaussianDpEvent(noise), count)
    np.testing.assert_allclose(wrapper.spent(noise, count, delta), theirs.get_epsilon(delta), rtol=1e-3)
    found = wrapper.noise_for(2.0, count, delta)
    assert wrapper.spent(found, count, delta) <= 2 < wrapper.spent(0.99 * found, count, delta)


def test_what_a_canary_measures_lies_below_what_is_claimed_of_an_example_that_is_in_a_batch_twice():
    """In both of two rounds, and above what would be claimed if twice in a batch were one use; a quarter of the noise
    breaks the claim.

    Counted or not at its place, the number of examples stays; all others have gradients of zero.
    """
    pytest.importorskip("dp_accounting")
    z, bound, delta, width, trials = 2.0, 0.5, 1e-2, 50, 4000

    def sums(z, there):
        one = jnp.full(width, 3 * bound / width**0.5) * there  # longer than it may be: it is cut
        g = {"a": jnp.zeros((6, width)).at[:2].set(one)}
        draw = lambda key: 6 * private_sum(bound, z, g, jnp.ones(6, bool), key)["a"].sum() / (bound * width**0.5)
        both = lambda key: sum(draw(k) for k in jax.random.split(key))
        return np.asarray(jit(jax.vmap(both))(jax.random.split(jax.random.fold_in(KEY, there), trials)))

    audited = lambda z: audit.epsilon_at_least(sums(z, 1), sums(z, 0), delta)
    count = 2 * uses(1, 2, 2)  # a client of one example, whose batch has it twice
    assert count == 8
    assert wrapper.spent(z, 2, delta) < audited(z) < wrapper.spent(z, count, delta)
    assert audited(z / 4) > wrapper.spent(z, count, delta)


def test_uses_are_at_least_those_of_what_is_drawn():
    """A batch in which an example is m times costs m^2; where no epoch ends, an example has one use."""
    drawn = jit(jax.vmap(clients.sample_rows, (0, None, None, None, None)), static_argnums=(3, 4))
    rng, most = np.random.default_rng(0), []
    for _ in range(12):
        size, steps, batch = (int(rng.integers(1, most)) for most in (12, 5, 9))
        rows = np.asarray(drawn(jax.random.split(KEY, 40), jnp.arange(12), size, steps, batch))
        times = (rows[..., None] == np.arange(size)).sum(2)  # [draws, steps, size] of an example in a batch
        most.append(((times**2).sum(1).max(), uses(size, steps * batch, batch)))
    assert all(seen <= counted for seen, counted in most)
    assert np.mean([seen == counted for seen, counted in most]) > 0.3
    np.testing.assert_array_equal(uses(np.array([80, 79, 40, 5]), 80, 16), [1, 4, 4, 16 * 4])
    for more in range(1, 30):
        assert uses(more + 1, 40, 16) <= uses(more, 40, 16)


def test_what_no_noise_covers_is_refused():
    for name, message in {
        "mime": "look at examples outside",
        "hyperlora": "look at examples outside",
        "ifca": "look at examples outside",
        "lora_a2": "look at examples outside",
    }.items():
        with pytest.raises(ValueError, match=message):
            dp_sgd(METHODS[name](), 1, 1, noise=0.0)
    with pytest.raises(ValueError, match="clients apart"):
        dp_sgd(METHODS["centralized"](), 1, 1, noise=0.0)
    with pytest.raises(ValueError, match="give one of them"):
        dp_sgd(fedit(), 1, 1, noise=2.0, epsilon=1.0)
    with pytest.raises(ValueError, match="plain numbers"):
        jit(lambda z: dp_sgd(fedit(), 1, 1, noise=z).report(()))(1.0)
    shapes = descriptions.shapes_of_one("full", 3), ADAPTER
    for options, message in (
        ({"task": "pairs"}, "--task pairs is of whole"),
        ({"augment": ("mixup:0.2",)}, "mixup:0.2"),
    ):
        with pytest.raises(ValueError, match=message):
            acceptable(Config(methods=("fedit+dp_sgd:noise=0.0",), **options), *shapes)


def test_it_goes_with_privacy_of_clients():
    method = dp(dp_sgd(fedit(), 1, 1, noise=0.0), EVERYBODY, 1, noise=0.0)
    told = method.report(method.init(KEY, ADAPTER))
    assert {"example_noise", "example_clipping", "noise_multiplier", "clipping"} <= told.keys()


# --- accounts of a run


def accounts(config, sizes, examples=()):
    people = SimpleNamespace(sizes=np.asarray(sizes), examples=examples)
    return Accounts(config, SimpleNamespace(clients=SimpleNamespace(population=people)))


def test_every_client_has_an_account_of_the_rounds_in_which_it_took_part():
    pytest.importorskip("dp_accounting")
    config = Config(clients=3, holdout_clients=1, local_steps=4, batch=5)
    kept = accounts(config, [[40, 10, 25, 1]])
    row = {"example_noise": 2.0, "example_delta": float(np.float32(1e-3))}
    told = [kept.after(0, {**row, "clients": who}) for who in ([0, 2], [0, 1], [0, 2])]
    expected = [(1, 1), (4, 2), (4, 3)]  # 20 examples a round: the second client goes through its ten twice
    for got, counts in zip(told, expected, strict=True):
        most, middle = (wrapper.spent(2.0, count, 1e-3) for count in counts)
        np.testing.assert_allclose([got["example_epsilon"], got["example_epsilon_median"]], [most, middle])
    kept.begin()
    assert kept.after(0, {**row, "clients": [0, 2]}) == told[0]
    assert kept.after(0, {"clients": [0]}) == {}
    assert kept.after(0, {**row, "example_noise": 0.0, "clients": [0]})["example_epsilon"] is None


def test_epsilon_that_is_asked_for_is_not_exceeded_by_the_smallest_client_in_all_rounds():
    pytest.importorskip("dp_accounting")
    for options in ({"local_steps": 4}, {"local_epochs": 1.5}):
        config = Config(clients=2, holdout_clients=0, batch=5, rounds=3, **options)
        facts = facts_of(config, None, smallest=7)
        method = dp_sgd(fedit(), facts["uses"], facts["rounds"], epsilon=3.0, delta=1e-3)
        row = {name: float(x) for name, x in method.report(method.init(KEY, ADAPTER)).items()}
        through = np.array([[11, 14]]) if "local_epochs" in options else ()
        kept = accounts(config, [[7, 9]], through)
        told = [kept.after(0, {**row, "clients": [0, 1]}) for _ in range(3)]
        assert 2.98 < told[-1]["example_epsilon"] <= 3.0


def test_a_summary_says_what_examples_have_spent_and_what_is_not_covered():
    row = {"round": 3, "example_epsilon": 2.5, "example_epsilon_median": 1.5, "example_delta": 1e-3}
    row |= {"example_noise": 1.25, "example_clipping": 1.0}
    entry = {"about": {"name": "FedIT + DP-SGD", "tells": "its signature"}}
    entry |= spent.of([{**row, "round": 2, "example_epsilon": 9.0}, row, {**row, "example_epsilon": 2.75}])
    (line,) = spent.lines({"methods": {"x": entry}, "config": {"head": "prototype"}})
    for text in ("epsilon 2.75 of examples", "epsilon 1.5 of the one in the middle", "delta 0.001 after 3 rounds"):
        assert text in line
    for text in ("not covered: its signature, mean features of classes", "how many examples a client has"):
        assert text in line
    entry |= spent.of([{**row, "example_epsilon": None}])
    assert "no bound on epsilon of examples" in spent.lines({"methods": {"x": entry}, "config": {}})[0]
