"""HyperLoRA's parts are neutral at the start and blind to order and gauge; what does not fit is refused."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ADAPTER,
    BASE,
    CLIENTS,
    KEY,
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
    dispatched,
    effective,
    host,
    jit,
    loss_fn,
    normalised,
    nudged,
    replaced,
    take,
)
from helpers import uploads as sent_back
from hyperlora_helpers import (
    FORMS,
    KERNELS,
    center,
    doubles,
    everything,
    flat,
    generate,
    learned,
    learner,
    means,
    neutral,
    product,
    products,
    synthesize,
    uploads,
)
from numpy.linalg import norm

from fedlora_jax import lora, rounds
from fedlora_jax import signatures as sig
from fedlora_jax.hyper import corrector, generator, synthesizer
from fedlora_jax.hyper.synthesizer import Factors, Uploads
from fedlora_jax.lora import LoRA
from fedlora_jax.method import average_client
from fedlora_jax.methods import hyperlora as module
from fedlora_jax.methods.hyperlora import Theta, hyperlora


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


@pytest.mark.long
def test_while_it_warms_up_it_is_flexlora_with_balanced_factors_and_then_it_learns():
    """Clients keep their updates, which nothing reads before a gate opens; the unseen one has none."""
    plain, method = compiled("flexlora_balanced"), everything(warmup=3, personal=1)
    warm = jit(rounds.make_round(method, loss_fn, OPTIMIZER))
    one, start = plain.start, begin(method.init, jax.random.key(1))
    other, memory = start, copies(method.init_client(ADAPTER))
    assert not flat(memory).any()
    for t in range(3):
        c, key = cohort(t)._replace(memory=memory), jax.random.fold_in(KEY, t)
        one, _, info = plain.fast(BASE, one, cohort(t), key)
        other, memory, same = warm(BASE, other, c, key)
        assert_near(same.loss, info.loss)
        assert_near(effective(method, BASE, other, c), effective(plain.method, BASE, one, c))
        assert_near(other.adapter, one.adapter, 1e-4)
        assert_near(other.theta, start.theta, 0)
    assert flat(memory).any()
    assert lora.flatten(take(memory, 0))["mix/kernel"].a.shape == (4, 1)
    after, _, _ = warm(BASE, other, cohort(3)._replace(memory=memory), KEY)
    assert norm(flat(after.theta.corrector.personal["params"]["mlp"]["Dense_1"])) > 0  # its gate started at zero
    for part in ("network", "prior"):
        assert (flat(getattr(after.theta.generator, part)) != flat(getattr(other.theta.generator, part))).any()
    for part in ("network", "steps", "gains"):
        assert (flat(getattr(after.theta.synthesizer, part)) != flat(getattr(other.theta.synthesizer, part))).any()


@pytest.mark.long
def test_the_mean_client_starts_from_the_global_adapter_whatever_was_learned():
    """So the global model is the server's adapter, and what G gives one client does not pile up in the average."""
    method = built(learner)
    state = begin(method.init, KEY)._replace(theta=learned(), adapter=nudged(ADAPTER))
    state = state._replace(center=take(average_client(cohort()).signatures, 0))
    sent = dispatched(method, state, average_client(cohort()))
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


@pytest.mark.long
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


def test_memory_makes_a_part_of_the_last_move_again(x64):
    """In product space: the factors of both ends are in gauges of their own."""
    x, before = uploads(), nudged(uploads().previous, 7)
    new = synthesize(neutral(), x._replace(push=synthesizer.push(0.7, x.previous, before)))
    for name in KERNELS:
        moved = products(x.previous)[name] - products(before)[name]
        assert_near(products(new)[name], truncated(means(x)[name] + 0.7 * moved), 1e-10)
    now, then, mean = (np.asarray(a["head"]["bias"]) for a in (x.previous, before, synthesize(neutral(), x)))
    assert_near(new["head"]["bias"], mean + 0.7 * (now - then), 1e-10)


@pytest.mark.long
def test_a_round_remembers_the_round_before():
    method = hyperlora(CLIENTS, SIGNATURE, memory=0.7)
    aggregate, states = jit(method.aggregate), [begin(method.init, jax.random.key(1))]
    for t in range(3):
        c = normalised(cohort(t))
        sent = dispatched(method, states[-1], c)
        states.append(aggregate(BASE, states[-1], c, sent, sent_back(sent, t)))
    for t, new in enumerate(states[1:]):
        old, older = states[t].adapter, states[max(t - 1, 0)].adapter
        push = lora.flatten(new.last.push)
        for name in KERNELS:
            assert_near(product(push[name]), 0.7 * (products(old)[name] - products(older)[name]), 1e-5)
        assert_near(push["head/bias"], 0.7 * (old["head"]["bias"] - older["head"]["bias"]), 1e-5)
    assert hyperlora(CLIENTS, SIGNATURE).init(KEY, ADAPTER).last.push == ()  # without memory there is none to carry


def test_other_factors_are_the_same_product_with_an_a_as_long_as_before(x64):
    x = uploads()
    theta = learned()._replace(corrector=neutral().corrector)  # whose ridge depends on factors
    balanced, new, even = (synthesize(theta, x, factors=factors) for factors in get_args(Factors))
    assert_near((products(new), products(even)), (products(balanced), products(balanced)), 1e-10)
    for name in KERNELS:
        length = lambda adapter, name=name: norm(lora.flatten(adapter)[name].a, axis=(-2, -1))
        assert_near(length(new), length(x.previous), 1e-10)
        assert (length(balanced) != length(x.previous)).all()
        a = np.asarray(lora.flatten(even)[name].a)  # whose columns are orthogonal and equally long
        assert_near(a.mT @ a, (length(x.previous) ** 2 / RANK)[..., None, None] * np.eye(RANK), 1e-10)


@pytest.mark.parametrize("factors", get_args(Factors))
def test_directions_in_which_a_mean_is_zero_go_on_with_the_a_of_before(factors, x64):
    """As after a first round of clients of rank 1: their mean has one direction, the others can still be trained."""
    x, theta = uploads(), neutral()
    theta = theta._replace(synthesizer=theta.synthesizer._replace(network=(), gains={}))
    nothing = lora.tree_map(lambda p: LoRA(p.a, 0 * p.b, p.scale), x.previous)
    first = lambda p, q: LoRA(jnp.broadcast_to(q.a, p.a.shape), jnp.asarray(p.b).at[..., 1:, :].set(0), p.scale)
    x = x._replace(previous=nothing, received=lora.tree_map(first, x.received, nothing))
    new = synthesize(theta._replace(corrector=theta.corrector._replace(gates=(), personal=())), x, factors=factors)
    for name in KERNELS:
        old, a = (np.asarray(lora.flatten(tree)[name].a) for tree in (nothing, new))
        onto = old @ np.linalg.pinv(old)
        assert_near(onto @ a, a, 1e-9)
        assert (np.linalg.matrix_rank(a) == RANK).all()


def test_steps_alone_are_what_remains_where_networks_say_nothing(x64):
    """And what G says of the head's bias, what remains without its low-rank part."""
    x, everything = uploads(), with_s(neutral(), steps=nudged(neutral().synthesizer.steps, size=1.0))
    alone = Theta(
        everything.generator._replace(network=(), bases={}, prior=jnp.asarray(0.7)),
        everything.synthesizer._replace(network=(), gains={}),
        everything.corrector._replace(gates=(), personal=()),
    )
    assert_near(products(synthesize(alone, x)), products(synthesize(everything, x)), 1e-12)
    full = everything.generator._replace(prior=jnp.asarray(0.7))
    z, adapter = doubles(cohort().signatures), nudged(doubles(ADAPTER))
    assert_near(generate(alone.generator, z, center(), adapter, "none"), generate(full, z, center(), adapter, "mix"))


def test_what_is_learned_in_rounds_makes_no_step_shorter_than_to_the_mean():
    """Where uploads ask for shorter ones, as where clients go to and fro, they end where they began."""
    method = hyperlora(CLIENTS, SIGNATURE, warmup=0, lr_step=0.5)
    state = begin(method.init, KEY)._replace(adapter=nudged(ADAPTER), last=uploads(), round=jnp.asarray(9))
    c, learn = normalised(cohort()), jit(method.learn)
    moved = jax.tree.map(lambda x, y: x.mean(0) - y, uploads().received, uploads().previous)
    for way, low, high in ((1, 0.0, 0.0), (-1, 0.01, 1.0)):  # a step that was too long, and one too short
        new = learn(state, c, copies(jax.tree.map(lambda x, way=way: way * x, moved)))
        steps = flat(new.theta.synthesizer.steps)
        assert low <= steps.min()
        assert steps.max() <= high


# --- what is a client's own


def test_the_personal_part_adds_a_clients_last_update_as_far_as_its_gate_is_open(x64):
    x = uploads()
    sent = copies(x.previous)
    own = jit(jax.vmap(lambda s, r: corrector.own_update(s, r, 2)))(sent, x.received)
    for name in KERNELS:
        change = products(x.received)[name] - products(sent)[name]
        assert_near(product(lora.flatten(own)[name]), truncated(change), 1e-8)
    personalise = jit(corrector.personalise)
    neutral = doubles(jit(corrector.init)(KEY, ADAPTER, SIGNATURE))
    closed = personalise(neutral, x.signatures, sent, own)
    assert_near(products(closed), products(sent), 1e-10)
    opened = products(personalise(nudged(neutral, 3, 0.3), x.signatures, sent, own))
    for name in KERNELS:
        added, base = opened[name] - products(sent)[name], products(sent)[name]
        one = [truncated(base + g * product(lora.flatten(own)[name])) for g in (-1.0, 1.0)]
        assert norm(added) > 1e-3
        assert norm(opened[name]) <= max(map(norm, one)) * (1 + 1e-9)


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


@pytest.mark.long
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


@pytest.mark.long
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


def test_it_refuses_what_does_not_fit():
    mixed = lora.unflatten({**lora.flatten(ADAPTER), "mix/kernel": LoRA(jnp.zeros((4, 1)), jnp.zeros((1, 6)), SCALE)})
    with pytest.raises(ValueError, match="one rank for all kernels"):
        generator.init(KEY, mixed, SIGNATURE, "mix")
    with pytest.raises(ValueError, match="needs a Signature"):
        hyperlora(CLIENTS, ())  # type: ignore[arg-type]
    for wrong in (
        {"mode": "guess"},
        {"form": "full"},
        {"kappa": -1.0},
        {"personal": -1},
        {"memory": 1.0},
        {"factors": "any"},
        {"server": "none"},
    ):
        with pytest.raises(ValueError, match=r"must be|guess"):
            hyperlora(CLIENTS, SIGNATURE, **wrong).init(KEY, ADAPTER)
    longer = SIGNATURE._replace(shape=np.zeros(9))
    with pytest.raises(ValueError, match="learned for another signature"):
        hyperlora(CLIENTS, longer, theta=module.named(learned())).init(KEY, ADAPTER)
    method = built(learner)
    told = cohort()._replace(signatures=sig.label_free(cohort().signatures))
    with pytest.raises(ValueError, match=r"\[4, 0, 1\] numbers .* made for \[4, 3, 1\]"):
        method.dispatch(BASE, method.init(KEY, ADAPTER), told)
