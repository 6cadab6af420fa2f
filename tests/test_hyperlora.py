"""HyperLoRA's parts are neutral at the start, blind to order and gauge, and learn along the exact gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    ADAPTER,
    BASE,
    CLIENTS,
    KEY,
    METHODS,
    OPTIMIZER,
    RANK,
    SCALE,
    SIGNATURE,
    array,
    assert_near,
    begin,
    built,
    cohort,
    compiled,
    copies,
    dense,
    dispatched,
    effective,
    host,
    is_float,
    jit,
    loss_fn,
    normalised,
    nudged,
    problem,
    replaced,
    take,
)
from numpy.linalg import norm

from fedlora_jax import lora, rounds
from fedlora_jax import signatures as sig
from fedlora_jax.hyper import corrector, generator, synthesizer
from fedlora_jax.hyper.synthesizer import Uploads
from fedlora_jax.lora import LoRA
from fedlora_jax.method import average_client
from fedlora_jax.methods import hyperlora as module
from fedlora_jax.methods.hyperlora import Theta, aggregated, hyperlora
from fedlora_jax.signatures import Signature

KERNELS = ["blocks/kernel", "mix/kernel"]
FORMS = ["mix", "bases"]
generate = jit(generator.generate, static_argnames="form")
synthesize = jit(aggregated)


learner = METHODS["hyperlora"]


def doubles(tree):
    """The tree in float64 where that is enabled."""
    return jax.tree.map(lambda x: array(np.asarray(x, float)) if is_float(x) else x, host(tree))


@functools.partial(jit, static_argnums=0)
def _init(form) -> Theta:
    keys = jax.random.split(jax.random.key(0), 3)
    return Theta(
        generator.init(keys[0], ADAPTER, SIGNATURE, form),
        synthesizer.init(keys[1], ADAPTER, SIGNATURE),
        corrector.init(keys[2], ADAPTER, SIGNATURE),
    )


def neutral(form="mix") -> Theta:
    return doubles(_init(form))


def learned(form="mix") -> Theta:
    """Parameters as if trained: nothing is zero."""
    theta = nudged(neutral(form), 3, 0.05)
    steps, gains = nudged(theta.synthesizer.steps, 4), nudged(theta.synthesizer.gains, 5)
    return theta._replace(synthesizer=theta.synthesizer._replace(steps=steps, gains=gains))


def center() -> Signature:
    return doubles(take(cohort(9).signatures, 0))


def uploads(seed=0, clients=CLIENTS) -> Uploads:
    """A round's uploads from clients around one adapter that is not zero anywhere."""
    c, previous = normalised(cohort(seed, clients)), nudged(doubles(ADAPTER), seed)
    received = nudged(copies(previous, clients), seed + 1)
    return Uploads(received, c.weights, c.signatures, previous)


def products(adapter) -> dict[str, np.ndarray]:
    return {name: product(lora.flatten(adapter)[name]) for name in KERNELS}


def product(x: LoRA) -> np.ndarray:
    return x.scale * dense(x)


def means(x: Uploads) -> dict[str, np.ndarray]:
    return {name: np.tensordot(np.float64(x.weights), m, 1) for name, m in products(x.received).items()}


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def truncated(m: np.ndarray, gain=lambda n: 1) -> np.ndarray:
    """The best product of rank 2, its singular values times ``gain`` of their shares."""
    u, s, vt = np.linalg.svd(m)
    s = s[..., None, :RANK]
    return (u[..., :RANK] * s * gain(s / s.sum(-1, keepdims=True))) @ vt[..., :RANK, :]


# --- neutral at the start


@pytest.mark.parametrize("form", FORMS)
def test_at_initialisation_every_client_starts_from_the_global_adapter(form):
    start = nudged(ADAPTER)
    rows = generate(neutral(form).generator, cohort().signatures, center(), start, form)
    for x, one in zip(jax.tree.leaves(rows), jax.tree.leaves(start), strict=True):
        np.testing.assert_array_equal(x, np.broadcast_to(one, x.shape))


def test_at_initialisation_the_aggregate_is_the_truncated_mean_product():
    x = uploads()
    assert_near(products(synthesize(neutral(), x)), {k: truncated(m) for k, m in means(x).items()})


def test_while_it_warms_up_it_is_flexlora_with_balanced_factors():
    plain, method = compiled("flexlora_balanced"), hyperlora(CLIENTS, SIGNATURE, warmup=3)
    warm = jit(rounds.make_round(method, loss_fn, OPTIMIZER))
    one, start = plain.start, begin(method.init, jax.random.key(1))
    other = start
    for t in range(3):
        c, key = cohort(t), jax.random.fold_in(KEY, t)
        one, _, info = plain.fast(BASE, one, c, key)
        other, _, same = warm(BASE, other, c, key)
        assert_near(same.loss, info.loss)
        assert_near(effective(method, BASE, other, c), effective(plain.method, BASE, one, c))
        assert_near(other.adapter, one.adapter, 1e-4)
        assert_near(other.theta, start.theta, 0)
    after, _, _ = warm(BASE, other, cohort(3), KEY)
    for part in ("network", "prior"):  # and then it learns
        assert (flat(getattr(after.theta.generator, part)) != flat(getattr(other.theta.generator, part))).any()
    for part in ("network", "steps", "gains"):
        assert (flat(getattr(after.theta.synthesizer, part)) != flat(getattr(other.theta.synthesizer, part))).any()


def test_the_mean_client_starts_from_the_global_adapter_whatever_was_learned():
    """So the global model is the server's adapter, and what G gives one client does not pile up in the average."""
    m = compiled("hyperlora")
    state = m.state._replace(theta=learned(), center=average_client(cohort()).signatures)
    state = state._replace(center=take(state.center, 0))
    sent = dispatched(m.method, state, average_client(cohort()))
    assert_near(take(sent.adapter, 0), state.adapter, 1e-6)


# --- S and C keep what they must


def with_s(theta: Theta, **parts) -> Theta:
    return theta._replace(synthesizer=theta.synthesizer._replace(**parts))


@pytest.mark.parametrize("clients", [1, CLIENTS])
def test_one_client_and_identical_clients_keep_their_product(clients):
    """Whatever has been learned about weights and about the correction."""
    x = uploads(clients=clients)
    same = x._replace(received=copies(take(x.received, 0), clients))
    plain = neutral().synthesizer
    new = synthesize(with_s(learned(), steps=plain.steps, gains=plain.gains), same)
    assert_near(products(new), products(take(same.received, 0)))


def gate(theta: Theta, gamma: float, lam: float) -> Theta:
    """The corrector's outputs set by its last bias."""
    params = theta.corrector.gates["params"]
    last = {"kernel": jnp.zeros((32, 2)), "bias": jnp.asarray([gamma, lam])}
    gates = {"params": {**params, "mlp": {**params["mlp"], "Dense_1": last}}}
    return theta._replace(corrector=theta.corrector._replace(gates=gates))


def test_a_truncated_svd_leaves_nothing_to_correct(x64):
    x = uploads()
    theta = gate(neutral(), 2.0, 0.3)
    assert_near(products(synthesize(theta, x)), {k: truncated(m) for k, m in means(x).items()}, 1e-10)


def test_an_open_corrector_undoes_the_gain(x64):
    x = uploads()
    theta = with_s(neutral(), gains=nudged(neutral().synthesizer.gains, size=1.0))
    ideal = {k: truncated(m) for k, m in means(x).items()}
    bent, undone = (products(synthesize(gate(theta, gamma, -30.0), x)) for gamma in (0.0, 30.0))
    assert norm(bent["mix/kernel"] - ideal["mix/kernel"]) > 1e-2
    assert_near(undone, ideal, 1e-7)


def test_the_gain_bends_singular_values_by_a_polynomial_of_their_shares(x64):
    x, gains = uploads(), nudged(neutral().synthesizer.gains, size=1.0)
    new = products(synthesize(with_s(neutral(), gains=gains), x))
    for name in KERNELS:
        c0, c1, c2 = np.moveaxis(0.25 * np.tanh(np.asarray(gains[name]))[..., None, None], -3, 0)
        assert_near(new[name], truncated(means(x)[name], lambda n: 1 + c0 + c1 * n + c2 * n**2), 1e-10)  # noqa: B023


def test_the_server_step_goes_from_the_previous_product_towards_the_mean_and_beyond(x64):
    x, steps = uploads(), nudged(neutral().synthesizer.steps, size=1.0)
    new = synthesize(with_s(neutral(), steps=steps), x)
    for name in KERNELS:
        eta = 4 / (1 + 3 * np.exp(-np.asarray(steps[name])))[..., None, None]
        old = products(x.previous)[name]
        assert_near(products(new)[name], truncated(old + eta * (means(x)[name] - old)), 1e-10)
    eta, old = 4 / (1 + 3 * np.exp(-steps["head/kernel"])), np.asarray(x.previous["head"]["kernel"])
    mean = np.tensordot(np.asarray(x.weights), np.asarray(x.received["head"]["kernel"]), 1)
    assert_near(new["head"]["kernel"], old + eta * (mean - old), 1e-10)


# --- what is a client's own


def test_the_personal_part_adds_a_clients_last_update_as_far_as_its_gate_is_open(x64):
    x = uploads()
    sent = copies(x.previous)
    own = jit(jax.vmap(lambda s, r: corrector.own_update(s, r, 2)))(sent, x.received)
    for name in KERNELS:
        change = products(x.received)[name] - products(sent)[name]
        assert_near(product(lora.flatten(own)[name]), truncated(change), 1e-8)
    personalise = jit(corrector.personalise)
    closed = personalise(neutral().corrector, x.signatures, sent, own)
    assert_near(products(closed), products(sent), 1e-10)
    theta = nudged(neutral().corrector, 3, 0.3)
    opened = products(personalise(theta, x.signatures, sent, own))
    for name in KERNELS:
        added, base = opened[name] - products(sent)[name], products(sent)[name]
        one = [truncated(base + g * product(lora.flatten(own)[name])) for g in (-1.0, 1.0)]
        assert norm(added) > 1e-3
        assert norm(opened[name]) <= max(map(norm, one)) * (1 + 1e-9)


def test_a_client_keeps_its_update_and_the_unseen_one_has_none():
    method = hyperlora(CLIENTS, SIGNATURE, warmup=0, personal=1)
    step = jit(rounds.make_round(method, loss_fn, optax.sgd(0.1)))
    state, row = begin(method.init, KEY), method.init_client(ADAPTER)
    assert not flat(row).any()
    c = cohort(1)._replace(memory=copies(row))
    for t in range(2):
        state, memory, _ = step(BASE, state, c, jax.random.fold_in(KEY, t))
        c = c._replace(memory=memory)
    assert flat(c.memory).any()
    first = lora.flatten(take(c.memory, 0))["mix/kernel"]
    assert first.a.shape == (4, 1)
    assert norm(flat(state.theta.corrector.personal["params"]["mlp"]["Dense_1"])) > 0  # its gate started at zero


# --- blind to what must not matter


def test_features_are_what_they_are_called(x64):
    x = uploads()
    norm = lambda y: np.linalg.norm(y, axis=(-2, -1))
    cosine = lambda y, z: np.sum(y * z, (-2, -1)) / (norm(y) * norm(z))
    for name in KERNELS:
        received, previous = lora.flatten(x.received)[name], lora.flatten(x.previous)[name]
        feat = jit(synthesizer.features)(received, x.weights, previous)
        m, old, each = means(x)[name], products(x.previous)[name], products(x.received)[name]
        log_norm = np.log(norm(each) + 1e-8)
        s2 = np.linalg.svd(each, compute_uv=False) ** 2
        expected = [
            log_norm - np.tensordot(x.weights, log_norm, 1),
            cosine(each, m),
            cosine(each, old),
            np.log(s2.sum(-1) ** 2 / (s2**2).sum(-1)),
        ]
        np.testing.assert_allclose(feat, np.stack(expected, -1), atol=1e-7)


def test_features_of_an_untrained_adapter_are_finite():
    rows, features = copies(ADAPTER), jit(synthesizer.features)
    for name in KERNELS:
        x = lora.flatten(rows)[name]
        assert np.isfinite(features(x, array([0.25] * CLIENTS), take(x, 0))).all()


def test_neither_order_nor_gauge_of_the_clients_changes_the_aggregate(x64):
    x, order = uploads(), np.asarray([2, 0, 3, 1])
    expected = products(synthesize(learned(), x))
    turned = Uploads(take(x.received, order), x.weights[order], take(x.signatures, order), x.previous)
    assert_near(products(synthesize(learned(), turned)), expected, 1e-6)

    rng = np.random.default_rng(0)

    def regauge(y: LoRA) -> LoRA:
        q = rng.normal(size=(*y.a.shape[:-2], RANK, RANK)) + 2 * np.eye(RANK)
        return LoRA(y.a @ q, np.linalg.inv(q) @ y.b, y.scale)

    other = x._replace(received=lora.tree_map(regauge, x.received))
    assert_near(products(synthesize(learned(), other)), expected, 1e-6)


def test_a_client_of_weight_zero_changes_nothing_features_included():
    x, other = uploads()._replace(weights=array([0.2, 0.3, 0.5, 0.0])), uploads(5)
    received, told = replaced((x.received, x.signatures), 3, (other.received, other.signatures))
    changed = x._replace(received=received, signatures=told)
    without = Uploads(take(x.received, slice(3)), x.weights[:3], take(x.signatures, slice(3)), x.previous)
    expected = products(synthesize(learned(), x))
    assert_near(products(synthesize(learned(), changed)), expected, 1e-6)
    assert_near(products(synthesize(learned(), without)), expected)


def test_clients_start_from_their_signatures_alone():
    """Equal signatures, equal starts; and who a client is, what it keeps and what it weighs play no part."""
    state, c = begin(built(learner).init, jax.random.key(1))._replace(theta=learned()), cohort()
    start = lambda **other: host(dispatched(built(learner), state, c._replace(**other)).adapter)
    rows = start()
    other = cohort(5)._replace(ids=c.ids - 11, weights=c.weights * np.float32(np.nan), signatures=c.signatures)
    assert_near(start(**other._asdict()), rows, 0)
    constant = start(signatures=jax.tree.map(np.ones_like, c.signatures))
    for x, y in zip(lora.low_rank_leaves(rows), lora.low_rank_leaves(constant), strict=True):
        np.testing.assert_allclose(y.b - y.b[:1], 0, atol=1e-6)
        assert np.abs(x.b - x.b[:1]).max() > 1e-3


def test_a_kernels_number_does_not_depend_on_how_a_dict_was_built():
    """JAX sorts dicts whenever it rebuilds a tree: eager and compiled calls must mean the same kernel."""
    start, z = nudged(ADAPTER), cohort().signatures
    backwards = lora.unflatten(dict(sorted(lora.flatten(start).items(), reverse=True)))
    theta, mean = learned().generator, center()
    given = lambda x: jit(lambda: generator.generate(theta, z, mean, x, "mix"))()  # an argument would be sorted
    assert_near(given(backwards), given(start), 1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_the_generators_forms_are_their_equations(form, x64):
    """One client, in NumPy, from the outputs of the network."""
    g, z, x = learned(form).generator, doubles(cohort().signatures), nudged(doubles(ADAPTER))
    rows = host(generate(g, z, center(), x, form))
    both = jax.tree.map(lambda y, mean: np.concatenate([y, mean[None]]), z, center()).flat()
    for place in generator.places(x):
        tiled = generator.per_layer(both, place.layers)
        out = np.asarray(generator._network(form, RANK).apply(g.network, tiled, place))
        out, old, new = out[1] - out[-1], lora.flatten(x)[place.name], lora.flatten(rows)[place.name]
        bases, j = g.bases[place.name], generator.BASES
        novel = np.einsum("...j,...jxy->...xy", out[..., :j], bases["v"])
        if form == "mix":
            m_a, m_b = (
                np.tanh(y).reshape(*y.shape[:-1], RANK, RANK) / (2 * RANK) for y in np.split(out[..., j:], 2, -1)
            )
            a, b = old.a @ (np.eye(RANK) + m_a), (np.eye(RANK) + m_b) @ old.b + novel
        else:
            a, b = old.a + np.einsum("...j,...jxy->...xy", out[..., j:], bases["u"]), old.b + novel
        assert_near(new.a[1], a, 1e-10)
        assert_near(new.b[1], b, 1e-10)


def test_the_heads_bias_is_generated_class_by_class(x64):
    """``tanh(t)`` of the move from the mean's log shares to the client's; who says nothing of labels gets none."""
    g, z, x = learned().generator, doubles(cohort().signatures), nudged(doubles(ADAPTER))
    bias = host(generate(g, z, center(), x, "mix")["head"]["bias"]) - x["head"]["bias"]
    prior = lambda z: np.log(np.maximum(np.asarray(z.labels), 0) ** 2 + generator.EPSILON)
    assert norm(bias) > 1e-2
    assert_near(bias, np.tanh(np.asarray(g.prior)) * (prior(z) - prior(center())), 1e-10)
    quiet = generator.init(KEY, x, sig.label_free(SIGNATURE), "mix")
    assert quiet.prior == ()
    rows = generate(quiet, sig.label_free(z), sig.label_free(center()), x, "mix")
    assert_near(rows["head"]["bias"], copies(x["head"]["bias"]), 0)


# --- learning


def meta_gradient(meta) -> Theta:
    """The gradient of the first learning step, read off the first moments of Adam."""
    moments = {jax.tree_util.keystr(path): mu for path, mu in optax.tree_utils.tree_get_all_with_path(meta, "mu")}
    at = lambda name: host(next(mu for path, mu in moments.items() if name in path))
    part = lambda name: jax.tree.map(lambda mu: mu / 0.1, at(name))
    low, prior, networks, numbers = map(part, ("generator", "prior", "networks", "numbers"))
    s, c = networks.synthesizer, networks.corrector
    return Theta(low.generator._replace(prior=prior.generator.prior), s._replace(steps=numbers.synthesizer.steps), c)


def _problem64():
    return problem().base, learned(), uploads(2), normalised(cohort(1, steps=1))


def states(method, theta, last):
    state = doubles(begin(method.init, jax.random.key(1)))
    return state._replace(theta=theta, last=last, adapter=synthesize(theta, last), center=center())


def learn_once(mode: str, lr: float, c, base, theta, last):
    """The meta-gradient of one round in a mode, through ``make_round``."""
    method = hyperlora(CLIENTS, SIGNATURE, mode, warmup=0, query=3)
    round_fn = rounds.make_round(method, loss_fn, optax.sgd(lr))
    state, _, _ = jit(round_fn)(base, states(method, theta, last), c, KEY)
    return meta_gradient(state.meta)


def phi(theta, last, signatures):
    return generator.generate(theta.generator, signatures, center(), aggregated(theta, last), "mix")


def test_displacement_is_the_exact_gradient_for_one_step_of_sgd(x64):
    """d/dtheta of sum_c p_c L_c(start of c), in generator, synthesizer and corrector: from uploads alone."""
    lr, (base, theta, last, c) = 0.05, _problem64()
    got = learn_once("displacement", lr, c, base, theta, last)

    def losses(adapters):
        """Each client's loss at its start, on the batch and with the key of its only step."""
        own = jax.vmap(lambda id_: jax.random.fold_in(jax.random.fold_in(KEY, id_), 0))(c.ids)
        return jax.vmap(loss_fn, (None, 0, 0, 0))(base, adapters, take(c.batches, (slice(None), 0)), own)

    exact = jit(jax.grad(lambda theta: lr * c.weights @ losses(phi(theta, last, c.signatures))))(theta)
    assert norm(flat(exact)) < 1  # else it would have been clipped
    for field in Theta._fields:
        x, y = flat(getattr(got, field)), flat(getattr(exact, field))
        assert norm(y) > 1e-8, field
        assert_near(x, y, 1e-6)


def unrolled(theta, lr, c, base, last):
    """sum_c p_c L_c(query after the local steps), written with a Python loop."""

    def one(start, batches, query, id_):
        own = jax.random.fold_in(KEY, id_)
        for t in range(jax.tree.leaves(batches)[0].shape[0]):
            grads = jax.grad(loss_fn, 1)(base, start, take(batches, t), jax.random.fold_in(own, t))
            start = jax.tree.map(lambda x, g: x - lr * g, start, grads)
        return loss_fn(base, start, query, jax.random.fold_in(own, jnp.iinfo(jnp.int32).max))

    return c.weights @ jax.vmap(one)(phi(theta, last, c.signatures), c.batches, c.queries, c.ids)


def test_exact_is_the_gradient_of_the_unrolled_objective(x64):
    """In all three parts; of an objective scaled so that clipping shows as a common factor only."""
    lr, (base, theta, last, c) = 0.3, _problem64()
    c = normalised(cohort(1, steps=3))
    got = learn_once("exact", lr, c, base, theta, last)
    exact = jit(jax.grad(unrolled), static_argnums=1)(theta, lr, c, base, last)
    clip = min(1.0, 1 / norm(flat(exact)))
    for field in Theta._fields:
        assert_near(flat(getattr(got, field)), clip * flat(getattr(exact, field)), 1e-6)


def test_the_unrolled_objective_agrees_with_finite_differences(x64):
    lr, (base, theta, last, _) = 0.3, _problem64()
    c = normalised(cohort(1, steps=2))
    objective = jit(unrolled, static_argnums=1)
    grads = jit(jax.grad(unrolled), static_argnums=1)(theta, lr, c, base, last)
    rng = np.random.default_rng(0)
    for field in Theta._fields:
        part = getattr(theta, field)
        way = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), part)
        moved = lambda h: theta._replace(**{field: jax.tree.map(lambda x, d: x + h * d, part, way)})  # noqa: B023
        slope = (objective(moved(1e-6), lr, c, base, last) - objective(moved(-1e-6), lr, c, base, last)) / 2e-6
        np.testing.assert_allclose(flat(getattr(grads, field)) @ flat(way), slope, rtol=1e-5, atol=1e-9)


@pytest.mark.long
def test_first_order_tends_to_exact_as_local_steps_shrink(x64):
    base, theta, last, _ = _problem64()
    c, apart = normalised(cohort(1, steps=3)), []
    for lr in (0.1, 0.01):
        exact, first = (flat(learn_once(m, lr, c, base, theta, last)) for m in ("exact", "first_order"))
        apart.append(norm(first - exact) / norm(exact))
    assert 0 < apart[1] < 0.2 * apart[0]


def test_the_generator_has_a_gradient_from_the_first_round_on():
    """Though b and the coefficients of its bases start at zero; with bases of zero, too, it would never use them."""
    m = compiled("hyperlora")
    theta = m.start.theta
    zero = theta.generator._replace(bases=jax.tree.map(jnp.zeros_like, theta.generator.bases))
    stuck = m.start._replace(theta=theta._replace(generator=zero))
    for start, learns in ((m.start, True), (stuck, False)):
        new, _, _ = m.fast(BASE, start, cohort(), KEY)
        gradient = meta_gradient(new.meta).generator
        last = np.asarray(gradient.network["params"]["mlp"]["Dense_5"]["kernel"])[:, : generator.BASES]
        assert (np.abs(last).max(0) > 1e-7).all() == learns
        assert np.isfinite(flat(gradient)).all()


@pytest.mark.parametrize("mode", ["displacement", "exact"])
def test_only_displacement_needs_no_client_data(mode):
    """Everything that a client did not send is replaced by NaN after its upload: nothing changes."""
    state = begin(built(learner).init, jax.random.key(1))
    state, c = state._replace(theta=learned(), last=uploads(2), round=jnp.asarray(10**6)), normalised(cohort())
    method = built(METHODS["hyperlora" if mode == "displacement" else "hyperlora_exact"])
    assert (method.query == 0) == (mode == "displacement")
    if mode == "exact":
        with pytest.raises(ValueError, match="has none"):
            rounds.make_round(method, loss_fn, optax.sgd(0.1))(BASE, None, c._replace(queries=()), KEY)
        return
    sent = host(dispatched(method, state, c))
    received = uploads(3).received
    slopes = jax.tree.map(lambda x, y: x - y, sent.adapter, received)
    nan = functools.partial(jax.tree.map, lambda x: x * np.float32(np.nan))
    gone = c._replace(batches=nan(c.batches), queries=nan(c.queries))
    server = jit(lambda c: method.aggregate(BASE, method.learn(state, c, slopes), c, sent, received))
    new = server(c)
    assert (flat(new.theta) != flat(state.theta)).any()
    assert_near(server(gone), new, 0)


def test_a_frozen_theta_serves_and_stays():
    theta = learned()
    method = hyperlora(CLIENTS, SIGNATURE, "frozen", theta=module.named(theta))
    state = begin(method.init, KEY)
    new, _, _ = jit(rounds.make_round(method, loss_fn, optax.sgd(0.1)))(BASE, state, cohort(), KEY)
    assert_near(new.theta, theta, 0)
    one, two, *_ = np.asarray(dispatched(method, new, cohort()).adapter["head"]["bias"])
    assert norm(one - two) > 0


def test_the_report_is_zero_for_flexlora_and_says_what_was_learned():
    fresh, state = compiled("hyperlora").start, compiled("hyperlora").state
    report = jit(built(learner).report)
    for name, value in report(fresh._replace(last=uploads())).items():
        np.testing.assert_allclose(value, 1.0 if name == "server_step" else 0.0, atol=1e-6, err_msg=name)
    said = report(state._replace(theta=learned(), last=uploads(), adapter=uploads().previous, center=center()))
    assert min(said.values()) > 1e-4
    counts = module.parameters(learned())
    assert counts == {part: flat(getattr(learned(), part)).size for part in Theta._fields}


# --- refusals, signatures


def test_it_refuses_what_does_not_fit():
    mixed = lora.unflatten({**lora.flatten(ADAPTER), "mix/kernel": LoRA(jnp.zeros((4, 1)), jnp.zeros((1, 6)), SCALE)})
    with pytest.raises(ValueError, match="one rank for all kernels"):
        generator.init(KEY, mixed, SIGNATURE, "mix")
    with pytest.raises(ValueError, match="needs a Signature"):
        hyperlora(CLIENTS, ())  # type: ignore[arg-type]
    for wrong in ({"mode": "guess"}, {"form": "full"}, {"kappa": -1.0}, {"personal": -1}):
        with pytest.raises(ValueError, match=r"must be|guess"):
            hyperlora(CLIENTS, SIGNATURE, **wrong).init(KEY, ADAPTER)
    longer = SIGNATURE._replace(shape=np.zeros(9))
    with pytest.raises(ValueError, match="learned for another signature"):
        hyperlora(CLIENTS, longer, theta=module.named(learned())).init(KEY, ADAPTER)
    method = hyperlora(CLIENTS, SIGNATURE)
    told = cohort()._replace(signatures=sig.label_free(cohort().signatures))
    with pytest.raises(ValueError, match=r"\[4, 0, 1\] numbers .* made for \[4, 3, 1\]"):
        method.dispatch(BASE, method.init(KEY, ADAPTER), told)


def test_signatures_describe_valid_examples_only():
    rng = np.random.default_rng(0)
    features, labels, valid = rng.normal(size=(3, 8, 6)), rng.integers(0, 4, (3, 8)), np.arange(8) < [[5], [8], [3]]
    moments = jax.vmap(sig.moments, (0, 0, 0, None))(*map(jnp.asarray, (features, labels, valid)), 4)
    for c in range(3):
        own = features[c][valid[c]]
        np.testing.assert_allclose(moments.mean[c], own.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.exp(moments.log_deviation[c]), own.std(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(moments.histogram[c], np.bincount(labels[c][valid[c]], minlength=4) / valid[c].sum())
    stats = sig.standard(moments)
    for i, x in enumerate((moments.mean, moments.log_deviation)):
        np.testing.assert_allclose(stats.mean[i], np.mean(x, 0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats.deviation[i], np.std(x, 0), rtol=1e-4, atol=1e-5)
    z = sig.signatures(moments, stats, size=7)
    assert [x.shape for x in z] == [(3, 2 * 7), (3, 4), (3, 1)]
    np.testing.assert_allclose(z.labels**2, moments.histogram, atol=1e-6)
    np.testing.assert_allclose(z.amount[:, 0], np.log1p(valid.sum(1)) / 10, rtol=1e-5)
    np.testing.assert_allclose(z.shape.mean(0), 0, atol=1e-5)  # standardised over these clients
    one = sig.signatures(take(moments, slice(1)), stats, size=7)
    assert_near(one, take(z, slice(1)))  # a client's does not depend on who else is described


def test_views_are_the_whole_and_random_halves_of_it():
    rng = np.random.default_rng(0)
    features, labels = jnp.asarray(rng.normal(size=(40, 6))), jnp.asarray(rng.integers(0, 4, 40))
    valid = jnp.arange(40) < 30
    seen = sig.views(KEY, features, labels, valid, 4, 5)
    assert_near(take(seen, 0), sig.moments(features, labels, valid, 4))
    assert (seen.size == 30).all()
    assert norm(np.ptp(seen.histogram[1:], axis=0)) > 0.05  # they differ
    np.testing.assert_allclose(seen.histogram.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(seen.histogram[1:].mean(0), seen.histogram[0], atol=0.15)
    alone = sig.views(KEY, features, labels, jnp.arange(40) < 1, 4, 5)
    assert np.isfinite(flat(alone)).all()
    np.testing.assert_allclose(alone.mean, np.broadcast_to(features[0], (6, 6)), rtol=1e-5)  # never of nothing


def test_noise_is_clipped_gaussian():
    z = Signature(jnp.full((2000, 3), 50.0), jnp.zeros((2000, 2)), jnp.ones((2000, 1)))
    told = sig.noisy(KEY, z, 0.5, bound=2.0)
    np.testing.assert_allclose([x.mean() for x in told], [2.0, 0.0, 1.0], atol=0.05)
    np.testing.assert_allclose([x.std() for x in told], 0.5, atol=0.03)
    assert sig.label_free(z).flat().shape == (2000, 4)
