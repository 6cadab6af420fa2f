"""HyperLoRA learns along the exact gradient, from what its mode may know."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    ADAPTER,
    BASE,
    CLASSES,
    CLIENTS,
    KEY,
    METHODS,
    OPTIMIZER,
    SIGNATURE,
    assert_near,
    begin,
    built,
    cohort,
    copies,
    dispatched,
    host,
    jit,
    loss_fn,
    normalised,
    nudged,
    problem,
    take,
)
from hyperlora_helpers import center, doubles, everything, flat, learned, learner, synthesize, uploads
from numpy.linalg import norm

from fedlora_jax import lora, product, rounds
from fedlora_jax.hyper import generator
from fedlora_jax.lora import LoRA
from fedlora_jax.method import per_client
from fedlora_jax.methods import hyperlora as module
from fedlora_jax.methods.hyperlora import Theta, aggregated, hyperlora


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


def states(method, theta, last, factors):
    state = doubles(begin(method.init, jax.random.key(1)))
    return state._replace(theta=theta, last=last, adapter=synthesize(theta, last, factors), center=center())


def steps_alone() -> Theta:
    """What is learned by default, as if trained."""
    theta = learned()
    g, s = theta.generator._replace(network=(), bases={}), theta.synthesizer._replace(network=(), gains={})
    return Theta(g, s, theta.corrector._replace(gates=()))


by_default = functools.partial(hyperlora, CLIENTS, SIGNATURE)


@functools.cache
def learning_round(mode: str, make=everything):
    """One round in a mode; clients' learning rate is given, so that one program serves all."""
    method = make(mode=mode, warmup=0, query=3)
    return method, jit(lambda lr, *arguments: rounds.make_round(method, loss_fn, optax.sgd(lr))(*arguments))


def learn_once(mode: str, lr: float, c, base, theta, last, make=everything, factors="balanced"):
    """The meta-gradient of one round in a mode, through ``make_round``."""
    method, round_fn = learning_round(mode, make)
    state, _, _ = round_fn(lr, base, states(method, theta, last, factors), c, KEY)
    return meta_gradient(state.meta)


def phi(theta, last, signatures, form="mix", factors="balanced"):
    return generator.generate(theta.generator, signatures, center(), aggregated(theta, last, factors), form)


def cut(rows, ranks):
    """Clients of rank 1 hold the truncation of theirs: a decomposition to a rank that is not traced."""

    def one(x):
        t = product.truncate(x, 1)
        wide = LoRA(jnp.concatenate([t.a, 0 * t.a], -1), jnp.concatenate([t.b, 0 * t.b], -2), t.scale)
        return jax.tree.map(lambda x, y: jnp.where(per_client(jnp.asarray(ranks) < 2, x) > 0, y, x), x, wide)

    return lora.tree_map(one, rows)


@functools.partial(jit, static_argnums=(0, 5, 6))
def start_gradient(lr, base, theta, last, c, form="mix", factors="balanced"):
    def losses(adapters):
        """Each client's loss at its start, on the batch and with the key of its only step."""
        own = jax.vmap(lambda id_: jax.random.fold_in(jax.random.fold_in(KEY, id_), 0))(c.ids)
        return jax.vmap(loss_fn, (None, 0, 0, 0))(base, adapters, jax.tree.map(lambda x: x[:, 0], c.batches), own)

    starts = lambda theta: cut(phi(theta, last, c.signatures, form, factors), c.ranks)
    return jax.grad(lambda theta: lr * c.weights @ losses(starts(theta)))(theta)


@pytest.mark.long
def test_displacement_is_the_exact_gradient_for_one_step_of_sgd(x64):
    """d/dtheta of sum_c p_c L_c(start of c), in generator, synthesizer and corrector: from uploads alone."""
    lr, (base, theta, last, c) = 0.05, _problem64()
    c = c._replace(ranks=np.asarray([1, 2, 2, 1]))
    got = learn_once("displacement", lr, c, base, theta, last)
    exact = start_gradient(lr, base, theta, last, c)
    assert norm(flat(exact)) < 1  # else it would have been clipped
    for field in Theta._fields:
        x, y = flat(getattr(got, field)), flat(getattr(exact, field))
        assert norm(y) > 1e-8, field
        assert_near(x, y, 1e-6)


@pytest.mark.long
def test_displacement_is_the_exact_gradient_of_what_is_learned_by_default(x64):
    """``t`` and the server steps, through orthogonal factors."""
    lr, (base, _, last, c) = 0.05, _problem64()
    theta = steps_alone()
    got = learn_once("displacement", lr, c, base, theta, last, by_default, "orthogonal")
    exact = start_gradient(lr, base, theta, last, c, "none", "orthogonal")
    for x, y in ((got.generator, exact.generator), (got.synthesizer, exact.synthesizer)):
        assert 1e-8 < norm(flat(y)) < 1
        assert_near(flat(x), flat(y), 1e-6)


def unrolled(theta, lr, c, base, last):
    """sum_c p_c L_c(query after the local steps), written with a Python loop."""

    def one(start, batches, query, id_):
        own = jax.random.fold_in(KEY, id_)
        for t in range(jax.tree.leaves(batches)[0].shape[0]):
            grads = jax.grad(loss_fn, 1)(base, start, take(batches, t), jax.random.fold_in(own, t))
            start = jax.tree.map(lambda x, g: x - lr * g, start, grads)
        return loss_fn(base, start, query, jax.random.fold_in(own, jnp.iinfo(jnp.int32).max))

    return c.weights @ jax.vmap(one)(phi(theta, last, c.signatures), c.batches, c.queries, c.ids)


@pytest.mark.long
def test_exact_is_the_gradient_of_the_unrolled_objective(x64):
    """In all three parts; of an objective scaled so that clipping shows as a common factor only."""
    lr, (base, theta, last, c) = 0.3, _problem64()
    c = normalised(cohort(1, steps=3))
    got = learn_once("exact", lr, c, base, theta, last)
    exact = jit(jax.grad(unrolled))(theta, lr, c, base, last)
    clip = min(1.0, 1 / norm(flat(exact)))
    for field in Theta._fields:
        assert_near(flat(getattr(got, field)), clip * flat(getattr(exact, field)), 1e-6)


@pytest.mark.long
def test_the_generator_has_a_gradient_from_the_first_round_on():
    """Though b and the coefficients of its bases start at zero; with bases of zero, too, it would never use them."""
    fresh, one_round = begin(built(learner).init, KEY), jit(rounds.make_round(built(learner), loss_fn, OPTIMIZER))
    zero = fresh.theta.generator._replace(bases=jax.tree.map(jnp.zeros_like, fresh.theta.generator.bases))
    stuck = fresh._replace(theta=fresh.theta._replace(generator=zero))
    for start, learns in ((fresh, True), (stuck, False)):
        new, _, _ = one_round(BASE, start, cohort(), KEY)
        gradient = meta_gradient(new.meta).generator
        last = np.asarray(gradient.network["params"]["mlp"]["Dense_5"]["kernel"])[:, : generator.BASES]
        assert (np.abs(last).max(0) > 1e-7).all() == learns
        assert np.isfinite(flat(gradient)).all()


@pytest.mark.long
def test_only_displacement_needs_no_client_data():
    """Everything that a client did not send is replaced by NaN after its upload: nothing changes."""
    state = begin(built(learner).init, jax.random.key(1))
    state, c = state._replace(theta=learned(), last=uploads(2), round=jnp.asarray(10**6)), normalised(cohort())
    method, exact = built(learner), built(METHODS["hyperlora_exact"])
    assert method.query == 0 < exact.query
    with pytest.raises(ValueError, match="has none"):
        rounds.make_round(exact, loss_fn, optax.sgd(0.1))(BASE, None, c._replace(queries=()), KEY)
    sent = host(dispatched(method, state, c))
    received = uploads(3).received
    slopes = jax.tree.map(lambda x, y: x - y, sent.adapter, received)
    nan = functools.partial(jax.tree.map, lambda x: x * np.float32(np.nan))
    gone = c._replace(batches=nan(c.batches), queries=nan(c.queries))
    server = jit(lambda c: method.aggregate(BASE, method.learn(state, c, slopes), c, sent, received))
    new = server(c)
    assert (flat(new.theta) != flat(state.theta)).any()
    assert_near(server(gone), new, 0)


@pytest.mark.long
def test_a_frozen_theta_serves_and_stays():
    theta = learned()
    method = everything(mode="frozen", theta=module.named(theta))
    state = begin(method.init, KEY)
    new, _, _ = jit(rounds.make_round(method, loss_fn, optax.sgd(0.1)))(BASE, state, cohort(), KEY)
    assert_near(new.theta, theta, 0)
    one, two, *_ = np.asarray(dispatched(method, new, cohort()).adapter["head"]["bias"])
    assert norm(one - two) > 0


@pytest.mark.long
def test_the_report_is_zero_for_flexlora_and_says_what_was_learned():
    fresh, report = begin(built(learner).init, KEY), jit(built(learner).report)
    for name, value in report(fresh._replace(last=uploads())).items():
        np.testing.assert_allclose(value, 1.0 if name == "server_step" else 0.0, atol=1e-6, err_msg=name)
    said = report(fresh._replace(theta=learned(), last=uploads(), adapter=uploads().previous, center=center()))
    assert min(said.values()) > 1e-4
    counts = module.parameters(learned())
    assert counts == {part: flat(getattr(learned(), part)).size for part in Theta._fields}


@pytest.mark.long
def test_while_its_gates_are_closed_the_personal_part_changes_nothing():
    """Neither products nor factors, whatever clients keep: rounds with and without it are the same bits."""
    start, c = nudged(begin(built(learner).init, KEY).adapter, 3), normalised(cohort())
    sent = {}
    for personal in (0, 2):
        method = everything(factors="steady", personal=personal)
        state = begin(method.init, KEY)
        theta = learned()._replace(corrector=state.theta.corrector)
        state = state._replace(theta=theta, adapter=start, center=center(), last=uploads())
        own = nudged(copies(method.init_client(ADAPTER)), 4)
        sent[personal] = dispatched(method, state, c._replace(memory=own)).adapter
    assert_near(sent[2], sent[0], 0)


def test_kappa_is_refused_where_nothing_is_learned_and_its_gradient_is_counted():
    with pytest.raises(ValueError, match="mode=frozen it learns nothing; got 1"):
        hyperlora(CLIENTS, SIGNATURE, "frozen", kappa=1.0)
    up = lambda *options: flat(everything(mode=options[0], kappa=options[1]).traffic(ADAPTER, []).up).size
    own, told = flat(ADAPTER).size, 4 + CLASSES + 1
    assert flat(hyperlora(CLIENTS, SIGNATURE).traffic(ADAPTER, []).up).size == own + CLASSES + 1  # its classes alone
    assert up("displacement", 0.0) == up("frozen", 0.0) == own + told
    assert up("displacement", 0.5) == up("exact", 0.0) == up("first_order", 0.5) == 2 * own + told
