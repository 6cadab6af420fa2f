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
    RANK,
    SCALE,
    SIGNATURE,
    aggregation,
    assert_near,
    cohort,
    compiled,
    copies,
    effective,
    is_float,
    jit,
    loss_fn,
    normalised,
    nudged,
    problem,
    take,
)

from fedlora_jax import hyper, lora
from fedlora_jax import signatures as sig
from fedlora_jax.hyper import Theta
from fedlora_jax.lora import LoRA
from fedlora_jax.methods.hyperlora import Uploads, hyperlora

KERNELS = ["blocks/kernel", "mix/kernel"]
generate, synthesize = jit(hyper.generate), jit(hyper.synthesize)


learner = METHODS["hyperlora"]


def doubles(tree):
    """The tree in float64 where that is enabled."""
    return jax.tree.map(lambda x: x.astype(float) if is_float(x) else x, tree)


@functools.cache
def _init() -> Theta:
    return hyper.init(jax.random.key(0), ADAPTER, SIGNATURE)


def neutral() -> Theta:
    return doubles(_init())


def learned() -> Theta:
    """Parameters as if trained: nothing is zero."""
    theta = nudged(neutral(), 3, 0.05)
    return theta._replace(memory=nudged(theta.memory, 4), gains=nudged(theta.gains, 5))


def uploads(seed=0, clients=CLIENTS) -> Uploads:
    """A round's uploads from clients around one adapter that is not zero anywhere."""
    c, previous = normalised(cohort(seed, clients)), nudged(doubles(ADAPTER), seed)
    received = nudged(copies(previous, clients), seed + 1)
    return Uploads(received, c.weights, c.signatures, previous)


def products(adapter) -> dict[str, np.ndarray]:
    return {name: np.asarray(lora.delta(lora.flatten(adapter)[name]), np.float64) for name in KERNELS}


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


def test_at_initialisation_every_client_starts_from_the_global_adapter():
    start = nudged(ADAPTER)
    rows = generate(neutral(), cohort().signatures, start)
    for x, one in zip(jax.tree.leaves(rows), jax.tree.leaves(start), strict=True):
        np.testing.assert_array_equal(x, np.broadcast_to(one, x.shape))


def test_at_initialisation_the_aggregate_is_the_truncated_mean_product():
    x = uploads()
    assert_near(products(synthesize(neutral(), *x)), {k: truncated(m) for k, m in means(x).items()})


def test_while_it_warms_up_it_is_flexlora_with_balanced_factors():
    plain, warm = compiled("flexlora_balanced"), compiled("hyperlora")
    one, other = plain.start, warm.start._replace(round=jnp.asarray(-3))  # learning begins at round 0
    for t in range(3):
        c, key = cohort(t), jax.random.fold_in(KEY, t)
        one, _, info = plain.fast(BASE, one, c, key)
        other, _, same = warm.fast(BASE, other, c, key)
        assert_near(same.loss, info.loss)
        assert_near(effective(warm.method, BASE, other, c), effective(plain.method, BASE, one, c))
        assert_near(other.adapter, one.adapter, 1e-4)
        assert_near(other.theta, warm.start.theta, 0)
    after, _, _ = warm.fast(BASE, other, cohort(3), KEY)
    for part in ("generator", "synthesizer", "memory", "gains"):  # and then it learns
        assert (flat(getattr(after.theta, part)) != flat(getattr(other.theta, part))).any()


# --- S and C keep what they must


def without_memory_and_gain(theta: Theta) -> Theta:
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    return theta._replace(memory=zeros(theta.memory), gains=zeros(theta.gains))


@pytest.mark.parametrize("clients", [1, CLIENTS])
def test_one_client_and_identical_clients_keep_their_product(clients):
    """Whatever has been learned about weights and about the correction."""
    x = uploads(clients=clients)
    same = x._replace(received=jax.tree.map(lambda y: y.at[:].set(y[0]), x.received))
    new = synthesize(without_memory_and_gain(learned()), *same)
    assert_near(products(new), products(take(same.received, 0)))


def gate(theta: Theta, gamma: float, lam: float) -> Theta:
    """The corrector's outputs set by its last bias."""
    last = {"kernel": jnp.zeros((32, 2)), "bias": jnp.asarray([gamma, lam])}
    return theta._replace(corrector={"params": {**theta.corrector["params"], "Dense_1": last}})


def test_a_truncated_svd_leaves_nothing_to_correct(x64):
    x = uploads()
    theta = gate(neutral(), 2.0, 0.3)
    assert_near(products(synthesize(theta, *x)), {k: truncated(m) for k, m in means(x).items()}, 1e-10)


def test_an_open_corrector_undoes_the_gain(x64):
    x = uploads()
    theta = neutral()._replace(gains=nudged(neutral().gains, size=1.0))
    ideal = {k: truncated(m) for k, m in means(x).items()}
    bent, undone = (products(synthesize(gate(theta, gamma, -30.0), *x)) for gamma in (0.0, 30.0))
    assert np.linalg.norm(bent["mix/kernel"] - ideal["mix/kernel"]) > 1e-2
    assert_near(undone, ideal, 1e-7)


def test_the_gain_bends_singular_values_by_a_polynomial_of_their_shares(x64):
    x, gains = uploads(), nudged(neutral().gains, size=1.0)
    new = products(synthesize(neutral()._replace(gains=gains), *x))
    for name in KERNELS:
        c0, c1, c2 = np.moveaxis(0.25 * np.tanh(np.asarray(gains[name]))[..., None, None], -3, 0)
        assert_near(new[name], truncated(means(x)[name], lambda n: 1 + c0 + c1 * n + c2 * n**2), 1e-10)  # noqa: B023


def test_the_memory_keeps_a_share_of_the_previous_product(x64):
    x, memory = uploads(), nudged(neutral().memory, size=1.0)
    new = products(synthesize(neutral()._replace(memory=memory), *x))
    for name in KERNELS:
        beta = 0.5 * np.tanh(np.asarray(memory[name]))[..., None, None]
        kept = (1 - beta) * means(x)[name] + beta * products(x.previous)[name]
        assert_near(new[name], truncated(kept), 1e-10)


# --- blind to what must not matter


def test_features_are_what_they_are_called(x64):
    x = uploads()
    norm = lambda y: np.linalg.norm(y, axis=(-2, -1))
    cosine = lambda y, z: np.sum(y * z, (-2, -1)) / (norm(y) * norm(z))
    for name in KERNELS:
        received, previous = lora.flatten(x.received)[name], lora.flatten(x.previous)[name]
        feat = hyper.features(received, x.weights, previous)
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
    rows = copies(ADAPTER)
    for name in KERNELS:
        x = lora.flatten(rows)[name]
        assert jnp.isfinite(hyper.features(x, jnp.full(CLIENTS, 0.25), take(x, 0))).all()


def test_neither_order_nor_gauge_of_the_clients_changes_the_aggregate(x64):
    x, order = uploads(), jnp.asarray([2, 0, 3, 1])
    expected = products(synthesize(learned(), *x))
    turned = Uploads(take(x.received, order), x.weights[order], x.signatures[order], x.previous)
    assert_near(products(synthesize(learned(), *turned)), expected, 1e-6)

    rng = np.random.default_rng(0)

    def regauge(y: LoRA) -> LoRA:
        q = jnp.asarray(rng.normal(size=(*y.a.shape[:-2], RANK, RANK)) + 2 * np.eye(RANK))
        return LoRA(y.a @ q, jnp.linalg.inv(q) @ y.b, y.scale)

    other = x._replace(received=lora.tree_map(regauge, x.received))
    assert_near(products(synthesize(learned(), *other)), expected, 1e-6)


def test_a_client_of_weight_zero_changes_nothing_features_included():
    x, other = uploads()._replace(weights=jnp.asarray([0.2, 0.3, 0.5, 0.0])), uploads(5)
    swap = lambda y, z: y.at[3].set(z[3])
    changed = x._replace(
        received=jax.tree.map(swap, x.received, other.received), signatures=swap(x.signatures, other.signatures)
    )
    without = Uploads(take(x.received, slice(3)), x.weights[:3], x.signatures[:3], x.previous)
    expected = products(synthesize(learned(), *x))
    assert_near(products(synthesize(learned(), *changed)), expected, 1e-6)
    assert_near(products(synthesize(learned(), *without)), expected)


def test_clients_start_from_their_signatures_alone():
    """Equal signatures, equal starts; and who a client is, what it keeps and what it weighs play no part."""
    state = learner().init(jax.random.key(1), ADAPTER)._replace(theta=learned())
    c = cohort()
    rows = learner().dispatch(BASE, state, c).adapter
    nobody = c._replace(ids=jnp.full(CLIENTS, -1), weights=jnp.full(CLIENTS, jnp.nan), batches=())
    assert_near(learner().dispatch(BASE, state, nobody).adapter, rows, 0)
    constant = learner().dispatch(BASE, state, c._replace(signatures=jnp.ones((CLIENTS, SIGNATURE)))).adapter
    for x, y in zip(lora.low_rank_leaves(rows), lora.low_rank_leaves(constant), strict=True):
        np.testing.assert_allclose(y.b - y.b[:1], 0, atol=1e-6)
        assert jnp.abs(x.b - x.b[:1]).max() > 1e-3


def test_a_kernels_number_does_not_depend_on_how_a_dict_was_built():
    """JAX sorts dicts whenever it rebuilds a tree: eager and compiled calls must mean the same kernel."""
    start, z = nudged(ADAPTER), cohort().signatures
    backwards = lora.unflatten(dict(sorted(lora.flatten(start).items(), reverse=True)))
    rows, same = (hyper.generate(learned(), z, x) for x in (start, backwards))
    assert_near(lora.unflatten(dict(sorted(lora.flatten(same).items()))), jax.tree.map(jnp.copy, rows), 1e-6)


# --- learning by displacement


def meta_gradient(meta) -> Theta:
    """The gradient of the first learning step, read off the first moments of Adam."""
    moments = {jax.tree_util.keystr(path): mu for path, mu in optax.tree_utils.tree_get_all_with_path(meta, "mu")}
    part = lambda name: next(mu for path, mu in moments.items() if name in path)
    fields = [part("generator" if i < 2 else "server")[i] for i in range(6)]
    return Theta(*jax.tree.map(lambda mu: mu / 0.1, fields))


def test_displacement_is_the_exact_gradient_for_one_step_of_sgd(x64):
    """d/dtheta of sum_c p_c L_c(start of c), in generator, synthesizer and corrector: from uploads alone."""
    lr, method = 0.05, learner()
    base, adapter = problem()
    theta, last, c = learned(), uploads(2), normalised(cohort(1, steps=1))
    state = doubles(method.init(jax.random.key(1), adapter))
    state = state._replace(theta=theta, last=last, adapter=synthesize(theta, *last))

    def losses(adapters):
        """Each client's loss at its start."""
        return jax.vmap(loss_fn, (None, 0, 0, None))(base, adapters, take(c.batches, (slice(None), 0)), KEY)

    sent = method.dispatch(base, state, c)
    slopes = jax.grad(lambda x: losses(x).sum())(sent.adapter)
    received = jax.tree.map(lambda x, g: x - lr * g, sent.adapter, slopes)
    new = jit(method.aggregate)(base, state, c, sent, received)

    starts = lambda theta: hyper.generate(theta, c.signatures, hyper.synthesize(theta, *last))
    exact = jit(jax.grad(lambda theta: lr * c.weights @ losses(starts(theta))))(theta)
    assert np.linalg.norm(flat(exact)) < 1  # else it would have been clipped
    for field, x, y in zip(Theta._fields, meta_gradient(new.meta), exact, strict=True):
        assert np.linalg.norm(flat(y)) > 1e-8, field
        assert_near(flat(x), flat(y), 1e-6)


def test_the_generator_has_a_gradient_from_the_first_round_on():
    """Though b and the coefficients of its bases start at zero; with bases of zero, too, it would never use them."""
    m = compiled("hyperlora")
    theta = m.start.theta
    stuck = m.start._replace(theta=theta._replace(bases=jax.tree.map(jnp.zeros_like, theta.bases)))
    for start, learns in ((m.start, True), (stuck, False)):
        new, _, _ = m.fast(BASE, start, cohort(), KEY)
        gradient = meta_gradient(new.meta)
        coefficients = gradient.generator["params"]["Dense_5"]["bias"][2 * RANK**2 : -1]
        assert (jnp.abs(coefficients) > 1e-6).all() == learns
        assert np.isfinite(flat(gradient)).all()


def test_aggregation_reads_no_client_data():
    method, state, aggregate = aggregation("hyperlora")
    state, c = state._replace(theta=learned(), last=uploads(2), round=jnp.asarray(10**6)), normalised(cohort())
    sent = method.dispatch(BASE, state, c)
    gone = c._replace(batches=jax.tree.map(lambda x: x * jnp.nan, c.batches))
    new = aggregate(BASE, state, c, sent, uploads(3).received)
    assert (flat(new.theta) != flat(state.theta)).any()
    assert_near(aggregate(BASE, state, gone, sent, uploads(3).received), new, 0)


# --- refusals, signatures


def test_it_refuses_kernels_of_several_ranks_and_clients_without_signatures():
    mixed = lora.unflatten({**lora.flatten(ADAPTER), "mix/kernel": LoRA(jnp.zeros((4, 1)), jnp.zeros((1, 6)), SCALE)})
    with pytest.raises(ValueError, match="one rank for all kernels"):
        hyper.init(KEY, mixed, SIGNATURE)
    with pytest.raises(ValueError, match="needs signatures"):
        hyperlora(CLIENTS, 0)


def test_signatures_describe_valid_examples_only():
    rng = np.random.default_rng(0)
    features, labels, valid = rng.normal(size=(3, 8, 6)), rng.integers(0, 4, (3, 8)), np.arange(8) < [[5], [8], [3]]
    moments = jax.vmap(sig.moments, (0, 0, 0, None))(*map(jnp.asarray, (features, labels, valid)), 4)
    for c in range(3):
        own = features[c][valid[c]]
        np.testing.assert_allclose(moments.mean[c], own.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.exp(moments.log_deviation[c]), own.std(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(moments.histogram[c], np.bincount(labels[c][valid[c]], minlength=4) / valid[c].sum())
    z = sig.signatures(moments, sig.standard(moments), size=7)
    assert z.shape == (3, 2 * 7 + 4 + 1)
    np.testing.assert_allclose(z[:, 14:18] ** 2, moments.histogram, atol=1e-6)
    np.testing.assert_allclose(z[:, -1], np.log1p(valid.sum(1)) / 10, rtol=1e-5)
    np.testing.assert_allclose(z[:, :14].mean(0), 0, atol=1e-5)  # standardised over these clients
    one = sig.signatures(take(moments, slice(1)), sig.standard(moments), size=7)
    assert_near(one, z[:1])  # a client's does not depend on who else is described
