"""Each wrapper computes the equation it is named for, and around a method it is neutral where it should be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    ADAPTER,
    BASE,
    CLIENTS,
    EVERYBODY,
    KEY,
    LOCAL_LR,
    OPTIMIZER,
    SIGNATURE,
    WRAPPED,
    assert_near,
    cohort,
    copies,
    jit,
    logits,
    loss_fn,
    members,
    normalised,
    nudged,
    seen,
    take,
)
from wrapper_helpers import SGD, adapter_of, aggregated, flat, run, uploads

import experiments.engine.methods
from experiments.commands import list_methods
from experiments.config import Config
from experiments.engine.methods import wrappers
from fedlora_jax import lora, rounds
from fedlora_jax.methods.ditto import ditto
from fedlora_jax.methods.fed_sb import fed_sb
from fedlora_jax.methods.fedex_lora import fedex_lora
from fedlora_jax.methods.fedit import FedITState, fedit
from fedlora_jax.methods.flexlora import flexlora
from fedlora_jax.methods.flora import flora
from fedlora_jax.methods.ifca import ifca
from fedlora_jax.methods.pfedhn import pfedhn
from fedlora_jax.methods.sdflora import sdflora
from fedlora_jax.signatures import Signature, label_free
from fedlora_jax.task import Seen, Task
from fedlora_jax.wrappers import innermost
from fedlora_jax.wrappers.around import with_adapter
from fedlora_jax.wrappers.fedbc import fedbc
from fedlora_jax.wrappers.feddecorr import correlation, feddecorr
from fedlora_jax.wrappers.feddyn import feddyn
from fedlora_jax.wrappers.fedga import calibrated, fedga
from fedlora_jax.wrappers.fedlc import ABSENT, fedlc
from fedlora_jax.wrappers.fedlesam import fedlesam
from fedlora_jax.wrappers.fedopt import fedadagrad, fedadam, fedavgm, fedyogi, server
from fedlora_jax.wrappers.moon import moon
from fedlora_jax.wrappers.over_the_air import over_the_air
from fedlora_jax.wrappers.privacy import clip, dp
from fedlora_jax.wrappers.proximal import proximal
from fedlora_jax.wrappers.robust import krum, median, norm_bound, trimmed_mean
from fedlora_jax.wrappers.scaffold import scaffold
from fedlora_jax.wrappers.signature_adapter import signature_adapter
from fedlora_jax.wrappers.signature_bias import signature_bias


def test_every_wrapper_is_in_the_battery():
    same_but_for_the_transformation = {"fedavgm", "fedyogi", "fedadagrad", "qffl"}  # as ``fedadam`` and ``afl``
    assert set(wrappers()) - same_but_for_the_transformation < set(WRAPPED)


NEUTRAL = {
    "proximal": lambda inner: proximal(inner, 0.0),
    "server": lambda inner: server(inner, optax.sgd(1.0)),
    "fedavgm": lambda inner: fedavgm(inner, b1=0.0),
    "fedlc": lambda inner: fedlc(inner, 0.0),
    "fedbc": lambda inner: fedbc(inner, lr=0.0, lam=0.0),
    "signature_bias": lambda inner: signature_bias(inner, SIGNATURE, lr=0.0, warmup=0),
    "signature_adapter": lambda inner: signature_adapter(inner, SIGNATURE, CLIENTS, lr=0.0, warmup=0),
    "clip": lambda inner: clip(inner, 1e6),
    "norm_bound": lambda inner: norm_bound(inner, 1e6),
    "krum": lambda inner: krum(inner, kept=CLIENTS),
}


@pytest.fixture(scope="module")
def plain():
    return {make: run(make()) for make in (fedit, flexlora)}


private = lambda inner: dp(inner, EVERYBODY, 1, noise=0.0)
TOGETHER = ("server", "signature_bias", "krum", "norm_bound", "clip", "proximal", "fedlc")
WEIGHED = ("fedavgm", "fedbc", "clip")  # as the table of orders has it


@pytest.mark.parametrize(("make", "stack"), [(fedit, TOGETHER), (flexlora, TOGETHER), (fedit, WEIGHED)])
def test_a_neutral_wrapper_is_the_method_inside(make, stack, plain):
    """All of them together, over two rounds; each alone where they do not compile in one go."""
    method = make()
    for name in stack:
        method = NEUTRAL[name](method)
    state, _, info = run(method)
    expected, _, report = plain[make]
    assert_near(innermost(state), expected, 1e-5)
    assert_near(info.loss, report.loss, 1e-5)


@pytest.mark.parametrize("name", NEUTRAL)
def test_each_neutral_wrapper_aggregates_as_the_method_inside(name):
    method, c = NEUTRAL[name](fedit()), normalised(cohort())
    _, state = aggregated(method, uploads())
    _, expected = aggregated(fedit(), uploads(), c)
    assert_near(innermost(state), expected, 1e-6)


# --- server optimizers


SECOND = {
    fedadam: lambda v, d: 0.99 * v + 0.01 * d**2,
    fedyogi: lambda v, d: v - 0.01 * d**2 * np.sign(v - d**2),
    fedadagrad: lambda v, d: v + d**2,
}


@pytest.mark.parametrize("make", SECOND)
def test_adaptive_servers_take_the_published_steps(make):
    """Two of them by hand: v starts at tau^2, nothing is corrected for bias."""
    lr, tau, b1 = 0.1, 1e-3, 0.0 if make is fedadagrad else 0.9
    method = make(fedit(), lr=lr, tau=tau)
    state, c = with_adapter(method.init(KEY, ADAPTER), nudged(ADAPTER, 0)), normalised(cohort())
    w = adapter_of(state)
    m, v = np.zeros_like(w), np.full_like(w, tau**2)
    for t in range(2):
        received = nudged(copies(innermost(state).adapter), t + 1)
        _, state = aggregated(method, received, c, state)
        d = np.float64(c.weights) @ flat(received, clients=True) - w
        m, v = b1 * m + (1 - b1) * d, SECOND[make](v, d)
        w = w + lr * m / (np.sqrt(v) + tau)
        assert_near(adapter_of(state), w, 1e-5)


def test_server_momentum_by_hand():
    method = fedavgm(fedit(), lr=0.5, b1=0.7)
    state, c = with_adapter(method.init(KEY, ADAPTER), nudged(ADAPTER, 0)), normalised(cohort())
    w, m = adapter_of(state), 0
    for t in range(3):
        received = nudged(copies(innermost(state).adapter), t + 1)
        _, state = aggregated(method, received, c, state)
        m = 0.7 * m + np.float64(c.weights) @ flat(received, clients=True) - w
        w = w + 0.5 * m
        assert_near(adapter_of(state), w, 1e-5)


# --- calibrated losses


def told(shares, n=20):
    """Signatures ``[C, ...]`` of clients with these shares of classes."""
    shares = np.asarray(shares, np.float32)
    amount = np.full((len(shares), 1), np.log1p(n) / 10, np.float32)
    return Signature(jnp.zeros((len(shares), 4)), jnp.sqrt(shares), jnp.asarray(amount))


def test_fedlc_is_the_calibrated_cross_entropy():
    shares = np.asarray([[0.5, 0.3, 0.2]] * CLIENTS)
    method, w = fedlc(fedit(), 0.7), nudged(ADAPTER, 0)
    c = cohort()._replace(signatures=told(shares))
    sent = method.dispatch(BASE, FedITState(w), c)
    batch = take(c.batches, (0, 0))
    task = lambda model: optax.softmax_cross_entropy_with_integer_labels(
        logits(BASE, model, batch["x"]), batch["y"]
    ).mean()
    loss, _ = method.objective(task, w, take(sent.context, 0))
    z = np.asarray(logits(BASE, w, batch["x"]), np.float64) - 0.7 * (20 * shares[0]) ** -0.25
    by_hand = np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), np.asarray(batch["y"])])
    np.testing.assert_allclose(loss, by_hand, rtol=1e-5)
    assert_near(method.model(w, take(sent.context, 0)), w, 0)  # nothing of it where the model is used


def test_fedlc_is_finite_where_a_class_is_absent():
    method = fedlc(fedit(), 1.0)
    c = cohort()._replace(signatures=told([[0.6, 0.4, 0.0]] * CLIENTS))
    round_fn = jit(rounds.make_round(method, loss_fn, OPTIMIZER))
    state, _, info = round_fn(BASE, method.init(KEY, ADAPTER), c, KEY)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state, info)))
    margin = method.dispatch(BASE, state, c).context.own
    assert_near(margin[:, 2], np.full(CLIENTS, ABSENT**-0.25), 1e-6)


def test_fedlc_refuses_signatures_without_labels_and_models_without_a_bias():
    method, c = fedlc(fedit()), cohort()
    with pytest.raises(ValueError, match="says nothing of labels"):
        method.dispatch(BASE, FedITState(ADAPTER), c._replace(signatures=label_free(c.signatures)))
    bare = lora.new(KEY, BASE, 2, targets="blocks/kernel")
    sent = method.dispatch(BASE, FedITState(bare), c)
    with pytest.raises(ValueError, match="add the head's bias"):
        method.objective(lambda model: 0.0, bare, take(sent.context, 0))


def test_fedga_hardly_suppresses_absent_classes():
    """The gradient of logit j is p_j n_j / n_y (times one example's share), up to the targets' sum."""
    rng = np.random.default_rng(0)
    z, y = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32), jnp.asarray([0, 0, 1, 0, 1, 3])
    there = jnp.asarray([1.0, 1, 1, 1, 1, 0])  # the last one only fills up
    grads = np.asarray(jax.grad(lambda z: calibrated(Seen(z, z, y, there)))(z), np.float64)
    p = np.float64(jax.nn.softmax(z))
    n = np.asarray([3, 2, 0, 0])
    for i, label in enumerate(np.asarray(y)[:5]):
        target = p[i] * (n[label] - n) / n[label]
        target[label] = 1
        np.testing.assert_allclose(grads[i], (p[i] * target.sum() - target) / 5, rtol=1e-4, atol=1e-7)
    assert not grads[5].any()
    shares = jnp.asarray(np.eye(4)[np.asarray(y)] * 0.8 + 0.05)
    assert_near(calibrated(Seen(z, z, shares, there)), calibrated(Seen(z, z, y, there)), 1e-6)


def seen_of(batch, key=KEY):
    return Task(lambda w: loss_fn(BASE, w, batch, key), lambda w: seen(BASE, w, batch, key))


@pytest.mark.long
def test_moon_draws_features_to_the_global_model_and_away_from_the_past():
    """Equation 3 in float64; without a past the term is log 2 and has no gradient."""
    mu, t, batch = 0.7, 0.4, take(cohort().batches, (0, 0))
    method, w, start, past = moon(fedit(), mu, t), nudged(ADAPTER, 1), nudged(ADAPTER, 2), nudged(ADAPTER, 3)
    task, c = seen_of(batch), normalised(members(method))
    sent = method.dispatch(BASE, method.init(KEY, ADAPTER)._replace(adapter=start), c)
    context = take(sent.context, 0)
    assert_near(context.own.past, start, 0)
    loss, _ = method.objective(task, w, context)
    assert_near(loss, task(w) + mu * np.log(2), 1e-5)
    assert_near(jax.grad(lambda w: method.objective(task, w, context)[0])(w), jax.grad(task)(w), 1e-4)
    context = context._replace(own=context.own._replace(past=past))
    z, near, far = (np.float64(task.seen(x).features) for x in (w, start, past))
    cos = lambda x, y: (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    pull, push = np.exp(cos(z, near) / t), np.exp(cos(z, far) / t)
    expected = float(task(w)) - mu * np.mean(np.log(pull / (pull + push)))
    np.testing.assert_allclose(method.objective(task, w, context)[0], expected, rtol=1e-5)
    kept = method.remember(take(c.memory, 0), context, start, w)
    assert_near(kept.own.own, w, 0)


@pytest.mark.long
def test_feddecorr_is_the_squared_correlation_of_features():
    """As NumPy has it, over the examples that count; a feature that does not vary has none. FedGA goes outside."""
    x = np.random.default_rng(0).normal(size=(7, 4))
    x[:, 1] += 2 * x[:, 0]
    x[:, 3] = 0.5
    there = np.float32([1, 1, 1, 1, 1, 1, 0])
    of = lambda x: correlation(Seen(jnp.asarray(x, jnp.float32), jnp.zeros((7, 2)), jnp.zeros(7, int), there))
    k = np.corrcoef(x[:6, :3].T)
    np.testing.assert_allclose(of(x), (np.sum(k**2) - 3) / 16, rtol=1e-5)
    assert np.isfinite(jax.grad(of)(jnp.asarray(x))).all()
    batch, w = take(cohort().batches, (0, 0)), nudged(ADAPTER, 1)
    task, alone = seen_of(batch), feddecorr(fedit(), 0.3)
    term = 0.3 * correlation(task.seen(w))
    for method, loss in ((alone, task(w)), (fedga(alone), calibrated(task.seen(w)))):
        assert_near(method.objective(task, w, ())[0], loss + term, 1e-6)


def test_fedlesam_takes_gradients_where_the_server_was():
    """Without a past it is the method inside; with one, gradients are of a model at a distance of rho from its own."""
    rho, batch, old, now = 0.3, take(cohort().batches, (0, 0)), nudged(ADAPTER, 1), nudged(ADAPTER, 2)
    method = fedlesam(fedit(), rho)
    task, c, w = seen_of(batch), normalised(members(method)), nudged(ADAPTER, 3)
    context = lambda w, c: take(method.dispatch(BASE, method.init(KEY, ADAPTER)._replace(adapter=w), c).context, 0)
    first = context(old, c)
    assert_near(method.objective(task, w, first)[0], task(w), 0)
    kept = method.remember(take(c.memory, 0), first, old, w)
    memory = c._replace(memory=copies(kept, CLIENTS))
    way = flat(old) - flat(now)
    at = flat(w) + rho * way / np.linalg.norm(way)
    leaves, structure = jax.tree.flatten(w)
    parts = np.split(np.float32(at), np.cumsum([x.size for x in leaves])[:-1])
    moved = structure.unflatten([part.reshape(x.shape) for part, x in zip(parts, leaves, strict=True)])
    loss, gradient = jax.value_and_grad(lambda w: method.objective(task, w, context(now, memory))[0])(w)
    assert_near((loss, gradient), jax.value_and_grad(task)(moved), 1e-5)
    assert_near(method.model(w, context(now, memory)), w, 0)
    for make in (ditto, lambda: sdflora(2)):
        with pytest.raises(ValueError, match="carry something else"):
            fedlesam(make())


def test_what_looks_at_features_needs_a_loss_that_shows_them():
    for method in (moon(fedit()), fedga(fedit()), feddecorr(fedit())):
        c = normalised(members(method))
        with pytest.raises(ValueError, match=r"fedlora_jax\.task\.Shown"):
            jax.eval_shape(rounds.make_round(method, loss_fn, OPTIMIZER), BASE, method.init(KEY, ADAPTER), c, KEY)
    for make in (ditto, lambda: sdflora(2)):
        with pytest.raises(ValueError, match="carry something else"):
            moon(make())


def test_a_channel_shifts_the_mean_by_noise_of_the_stated_power():
    """One vector for all, of max p rms / |h| over sqrt(snr); the mean of many draws is the mean."""
    method, c, snr = over_the_air(fedit(), 4.0), normalised(cohort()), 4.0
    _, plain = aggregated(fedit(), uploads(), c)
    start = with_adapter(method.init(KEY, ADAPTER), nudged(ADAPTER, 0))
    sent = method.dispatch(BASE, start, c)
    heard = jit(jax.vmap(lambda key: method.aggregate(BASE, start._replace(own=key), c, sent, uploads())))
    keys = jax.random.split(KEY, 400)
    off = flat(heard(keys).inner, clients=True) - flat(plain)
    gain = np.sqrt(np.asarray([jax.random.exponential(jax.random.split(k)[0], (CLIENTS,)) for k in keys]))
    d = flat(uploads(), clients=True) - flat(nudged(ADAPTER, 0))
    deviation = np.max(c.weights * np.sqrt((d**2).mean(1)) / gain, 1) / snr**0.5
    np.testing.assert_allclose(off.std(1), deviation, rtol=0.35)
    np.testing.assert_allclose((off / deviation[:, None]).std(), 1.0, rtol=0.02)
    assert abs((off / deviation[:, None]).mean()) < 0.02


# --- what does not go together


@pytest.mark.parametrize("wrap", [lambda m: scaffold(m, 8, 0.1), lambda m: feddyn(m, 8), fedadam, fedavgm])
@pytest.mark.parametrize("make", [fedex_lora, flora, ifca, lambda: pfedhn(8)])
def test_what_lives_in_factor_space_refuses_residuals_and_methods_without_an_adapter(wrap, make):
    with pytest.raises(ValueError, match=r"residual on the base|no global adapter"):
        jax.eval_shape(wrap(make()).init, KEY, ADAPTER)


@pytest.mark.parametrize("wrap", [lambda m: scaffold(m, 8, 0.1), lambda m: feddyn(m, 8)])
@pytest.mark.parametrize("make", [fed_sb, ditto])
def test_what_clients_keep_for_every_entry_refuses_methods_whose_clients_carry_something_else(wrap, make):
    method = wrap(make())
    with pytest.raises(ValueError, match="tree of another structure"):
        method.dispatch(BASE, method.init(KEY, ADAPTER), members(method))


@pytest.mark.parametrize("wrap", [clip, private, median, trimmed_mean, krum, norm_bound])
def test_what_acts_on_uploads_refuses_methods_that_learn_from_slopes(wrap):
    with pytest.raises(ValueError, match="also learns from meta-gradients"):
        wrap(pfedhn(8))


def test_numbers_out_of_range_are_refused():
    for make, message in (
        (lambda: proximal(fedit(), -1), "at least 0"),
        (lambda: scaffold(fedit(), 0, 0.1), "at least 1"),
        (lambda: feddyn(fedit(), 8, 0.0), "above 0"),
        (lambda: fedadam(fedit(), lr=0.0), "above 0"),
        (lambda: fedbc(fedit(), lr=-1.0), "at least 0"),
        (lambda: fedlc(fedit(), -1.0), "at least 0"),
        (lambda: clip(fedit(), 0.0), "above 0"),
        (lambda: dp(fedit(), EVERYBODY, 1, noise=-1.0), "at least 0"),
        (lambda: trimmed_mean(fedit(), 0.5), "below 0.5"),
        (lambda: krum(fedit(), kept=0), "at least 1"),
        (lambda: norm_bound(fedit(), 0.0), "above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_cohort_without_memory_is_refused():
    method = scaffold(fedit(), 8, 0.1)
    with pytest.raises(ValueError, match=r"rounds\.start"):
        method.dispatch(BASE, method.init(KEY, ADAPTER), cohort())


# --- on the command line


def test_a_spec_names_wrappers_from_the_inside_out():
    spec = "fedit+proximal:mu=0.5+scaffold+fedadam:lr=0.25"
    method = experiments.engine.methods.build(spec, population=8, local_lr=LOCAL_LR, participants=CLIENTS)
    by_hand = fedadam(scaffold(proximal(fedit(), 0.5), 8, LOCAL_LR), lr=0.25)
    assert_near(run(method, 1, SGD)[0], run(by_hand, 1, SGD)[0], 1e-6)
    assert experiments.engine.methods.about(spec).name == "FedIT + FedProx (mu=0.5) + SCAFFOLD + FedAdam (lr=0.25)"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fedit+proximl", "unknown wrapper 'proximl': did you mean proximal"),
        ("fedit+proximal:m=1", "'m=1' is no option of proximal; it has mu="),
        ("fedit+clip:bound=much", "bound must be float"),
        ("proximal+fedit", "'proximal' is a wrapper: put it around a method, as in fedit+proximal"),
        ("FedProx", "is a wrapper"),
        ("FedIT", "did you mean fedit"),
        ("fedit+", "a wrapper has no name"),
        ("fedit+proximal:mu", "mu needs a value, as in mu=0.01"),
    ],
)
def test_unknown_wrappers_and_options_are_refused(spec, message):
    with pytest.raises(ValueError, match="^.*" + message.replace("+", r"\+")):
        experiments.engine.methods.check(spec)


@pytest.mark.long
def test_the_table_shows_every_wrapper_with_its_options():
    table = list_methods.table(Config())
    for name, about in wrappers().items():
        row = next(line for line in table.splitlines() if line.startswith(f"{name} "))
        assert about.arxiv in row
    assert "lr=0.01, b1=0.9, b2=0.99, tau=0.001" in table
