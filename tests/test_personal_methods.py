"""Personalised methods and baselines: each computes the equation it is named for, and is FedIT where it should be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    ADAPTER,
    BASE,
    BATCH,
    CLIENTS,
    KEY,
    METHODS,
    OPTIMIZER,
    STEPS,
    assert_near,
    cohort,
    copies,
    examples,
    jit,
    loss_fn,
    members,
    normalised,
    nudged,
    population,
    remembered,
    replaced,
    take,
)

from fedlora_jax import lora, rounds
from fedlora_jax.method import average_client, models
from fedlora_jax.methods.centralized import centralized, pooled
from fedlora_jax.methods.ditto import ditto
from fedlora_jax.methods.fedit import FedITState, fedit
from fedlora_jax.methods.fedper import fedper
from fedlora_jax.methods.fedproto import fedproto
from fedlora_jax.methods.fedrep import fedrep
from fedlora_jax.methods.finetune import finetune
from fedlora_jax.methods.ifca import IFCAState, ifca
from fedlora_jax.methods.local_only import local_only
from fedlora_jax.methods.per_fedavg import per_fedavg
from fedlora_jax.methods.pfedhn import pfedhn
from fedlora_jax.methods.pfedme import pfedme
from fedlora_jax.personal import squared_distance
from fedlora_jax.wrappers.proximal import proximal

SGD = optax.sgd(0.05)


@pytest.fixture(scope="module")
def reported():
    return run(fedit())[2].aggregation


@pytest.mark.parametrize("make", [ditto, lambda: proximal(ditto(), 0.0), finetune])
def test_the_report_of_a_round_is_on_what_was_sent(make, reported):
    """FedIT beside a model that does not travel: what averaging gets wrong is FedIT's."""
    info = run(make())[2]
    assert reported.bias_share > 1e-3
    assert_near(info.aggregation, reported, 1e-4)


def run(method, count=2, optimizer=OPTIMIZER, adapter=ADAPTER):
    """Some rounds of all clients from a fresh state: the state, the last cohort with its new memory, and info."""
    round_fn = jit(rounds.make_round(method, loss_fn, optimizer))
    state, memory = method.init(jax.random.key(1), adapter), members(method).memory
    for t in range(count):
        c = cohort(t)._replace(memory=memory)
        state, memory, info = round_fn(BASE, state, c, jax.random.fold_in(KEY, t))
    return state, c._replace(memory=memory), info


def personal(method, state, c):
    """The models ``[C, ...]`` that clients use."""
    return models(method, method.dispatch(BASE, state, c))


def head(adapter):
    return lora.split(adapter)[1]


def body(adapter):
    return lora.split(adapter)[0]


def task(model, batch, key):
    return loss_fn(BASE, model, batch, key)


def step_key(c, i, t):
    return jax.random.fold_in(jax.random.fold_in(KEY, c.ids[i]), t)


# --- local-only, fine-tuning, Ditto


def test_local_only_clients_train_alone_from_where_they_were():
    state, c, _ = run(local_only(), 2)
    local = rounds.make_local(fedit(), loss_fn, OPTIMIZER)
    for i in range(CLIENTS):
        adapter = ADAPTER
        for t in range(2):
            one = cohort(t)
            mask = take(fedit().dispatch(BASE, FedITState(ADAPTER), one).mask, i)
            own = jax.random.fold_in(jax.random.fold_in(KEY, t), one.ids[i])
            adapter, _ = jit(local)(BASE, adapter, mask, (), take(one.batches, i), own)
        assert_near(take(personal(local_only(), state, c), i), adapter)
    assert_near(state.adapter, ADAPTER, 0)


def test_fine_tuning_trains_fedit_and_serves_its_clients():
    """All steps: a client's model is what it sent; half of them: what it held in the middle; none: FedIT."""
    state, c, _ = run(finetune(1.0), 2)
    expected, _, _ = run(fedit(), 2)
    assert_near(state, expected)
    before, _, _ = run(fedit(), 1)
    last = fedit().dispatch(BASE, before, cohort(1))
    for share, steps in ((1.0, STEPS), (0.5, STEPS // 2)):
        state, c, _ = run(finetune(share), 2)
        one = cohort(1)
        local = rounds.make_local(fedit(), loss_fn, OPTIMIZER, watch=lambda base, adapter: adapter)
        for i in range(CLIENTS):
            own = jax.random.fold_in(jax.random.fold_in(KEY, 1), one.ids[i])
            _, trace = jit(local)(BASE, take(last.adapter, i), take(last.mask, i), (), take(one.batches, i), own)
            assert_near(take(personal(finetune(share), state, c), i), take(trace.seen, steps - 1))
    assert finetune(0.0).dispatch(BASE, FedITState(ADAPTER), cohort()).adapter.keys() == ADAPTER.keys()


def test_ditto_between_local_only_and_the_global_model():
    """lam = 0: every client alone; lam large: the global adapter as sent; the server is FedIT's all along."""
    alone, c, _ = run(local_only(), 2)
    state, d, _ = run(ditto(0.0), 2)
    assert_near(personal(ditto(0.0), state, d), personal(local_only(), alone, c))
    expected, _, _ = run(fedit(), 2)
    assert_near(state, expected)
    gap = {}
    for lam in (0.0, 20.0):  # times the learning rate of 0.05: one step of a strong pull lands on w
        state, d, _ = run(ditto(lam), 2, SGD)
        one, _, _ = run(fedit(), 1, SGD)
        gap[lam] = float(squared_distance(personal(ditto(lam), state, d), copies(one.adapter)))
    assert gap[20.0] < 0.5 * gap[0.0]


def test_dittos_objective_has_its_two_gradients():
    method, w, v, g = ditto(0.7), nudged(ADAPTER, 0), nudged(ADAPTER, 1), nudged(ADAPTER, 2)
    batch = take(cohort().batches, (0, 0))
    f = lambda x: task(x, batch, KEY)
    grads, slope = jit(jax.grad(lambda x: method.objective(f, x, g)[0])), jit(jax.grad(f))
    both = grads({"shared": w, "personal": v})
    assert_near(both["shared"], slope(w))
    assert_near(both["personal"], jax.tree.map(lambda d, v, g: d + 0.7 * (v - g), slope(v), v, g))


def test_a_client_that_never_took_part_is_served_the_global_adapter():
    state, c, _ = run(ditto(), 1)
    fresh = members(ditto())
    assert_near(personal(ditto(), state, fresh), copies(state.adapter), 0)
    assert_near(take(personal(ditto(), state, average_client(c)), 0), state.adapter, 0)
    with pytest.raises(ValueError, match=r"rounds\.start"):
        ditto().dispatch(BASE, state, cohort())


# --- heads


def test_fedper_shares_the_factors_and_keeps_the_heads():
    method = fedper()
    state, c = method.init(KEY, nudged(ADAPTER, 0)), normalised(members(method))
    sent = method.dispatch(BASE, state, c)
    received = nudged(sent.adapter, 1)
    new = method.aggregate(BASE, state, c, sent, received)
    means = jax.tree.map(lambda x: np.tensordot(np.float64(c.weights), np.float64(x), 1), body(received))
    assert_near(body(new.adapter), means, 1e-6)
    again = method.dispatch(BASE, new, remembered(method, c, sent, received))
    assert_near(head(again.adapter), head(received), 0)
    assert_near(body(again.adapter), copies(body(new.adapter)), 0)
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert count(method.traffic(ADAPTER, [ADAPTER]).up) == count(body(ADAPTER))
    with pytest.raises(ValueError, match="need a head"):
        method.init(KEY, body(ADAPTER))


def test_the_average_client_holds_the_mean_of_the_heads_of_those_who_took_part():
    method, c = fedper(), normalised(members(fedper()))
    state = method.init(KEY, ADAPTER)
    sent = method.dispatch(BASE, state, c)
    received = nudged(sent.adapter, 1)
    kept = remembered(method, c, sent, received)
    half = replaced(kept.memory, slice(2, None), c.memory)  # the last two never came
    mean = head(method.dispatch(BASE, state, average_client(c._replace(memory=half))).adapter)
    p = np.float64(c.weights[:2]) / np.float64(c.weights[:2]).sum()
    by_hand = jax.tree.map(lambda x: np.tensordot(p, np.float64(x[:2]), 1)[None], head(received))
    assert_near(mean, by_hand, 1e-5)


def test_fedrep_trains_the_head_first_and_then_the_factors():
    method, c = fedrep(0.5), members(fedrep())
    state = method.init(KEY, nudged(ADAPTER, 0))
    sent = method.dispatch(BASE, state, c)
    local = rounds.make_local(method, loss_fn, OPTIMIZER, watch=lambda base, adapter: adapter)
    end, trace = jit(local)(BASE, *(take(x, 0) for x in (sent.adapter, sent.mask, sent.context, c.batches)), KEY)
    middle = take(trace.seen, STEPS // 2 - 1)
    start = take(sent.adapter, 0)
    assert_near(body(middle), body(start), 0)
    assert_near(head(end), head(middle), 0)
    for x, y in ((head(middle), head(start)), (body(end), body(middle))):
        assert all((a != b).mean() > 0.9 for a, b in zip(*map(jax.tree.leaves, (x, y)), strict=True))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.7, 0.9])
@pytest.mark.parametrize("steps", [10, 20])
def test_a_share_of_the_local_steps_is_that_many_whatever_rounding_says(share, steps):
    mask, counted = {"kernel": jnp.ones(())}, 0
    for t in range(steps):
        moving = finetune(share).mask_schedule({"shared": mask, "personal": mask}, jnp.float32(t) / steps)
        counted += moving["personal"]["kernel"]
        assert fedrep(share).mask_schedule(mask, jnp.float32(t) / steps)["kernel"] == moving["personal"]["kernel"]
    assert counted == round(share * steps)


def test_fedrep_refuses_local_steps_that_are_all_for_the_head():
    for share, steps in (0.5, 1), (0.6, 2):
        method = fedrep(share)
        with pytest.raises(ValueError, match="leaves none for the low-rank factors"):
            rounds.make_round(method, loss_fn, SGD)(BASE, method.init(KEY, ADAPTER), members(method, steps=steps), KEY)


def test_fedproto_averages_each_class_over_the_clients_that_have_it():
    method, shares = fedproto(0.3), np.asarray([[0.5, 0.5, 0], [0.2, 0.8, 0], [1, 0, 0], [0, 1, 0]])
    c = normalised(members(method))
    c = c._replace(signatures=c.signatures._replace(labels=jnp.sqrt(jnp.asarray(shares, jnp.float32))))
    state = method.init(KEY, nudged(ADAPTER, 0))
    sent = method.dispatch(BASE, state, c)
    received = nudged(sent.adapter, 1)
    new = method.aggregate(BASE, state, c, sent, received)
    held = np.float64(c.weights)[:, None] * shares
    for k in range(2):
        q = held[:, k] / held[:, k].sum()
        assert_near(new.adapter["head"]["kernel"][:, k], q @ np.float64(received["head"]["kernel"])[..., k], 1e-5)
    np.testing.assert_array_equal(new.adapter["head"]["kernel"][:, 2], state.adapter["head"]["kernel"][:, 2])
    again = method.dispatch(BASE, new, remembered(method, c, sent, received))
    assert_near(body(again.adapter), body(received), 0)
    grads = jax.grad(method.penalty)(take(received, 0), take(sent.context, 0))
    assert_near(head(grads), jax.tree.map(lambda x, y: 0.6 * (x[0] - y), head(received), head(state.adapter)), 1e-5)
    assert not any(x.any() for x in jax.tree.leaves(body(grads)))


# --- objectives with inner steps


def test_pfedme_descends_the_moreau_envelope():
    lam, steps, lr = 3.0, 4, 0.1
    method, w = pfedme(lam, steps, lr, query=BATCH), nudged(ADAPTER, 0)
    c = members(method)
    f = lambda x: task(x, take(c.batches, (0, 0)), KEY)
    theta = w
    for _ in range(steps):
        slope = lambda t, g, w: t - lr * (g + lam * (t - w))
        theta = jax.tree.map(slope, theta, jax.grad(f)(theta), w)
    carried = {"shared": w, "personal": nudged(ADAPTER, 5)}
    grads, loss = jax.grad(lambda x: method.objective(f, x, ()), has_aux=True)(carried)
    assert_near(grads["shared"], jax.tree.map(lambda w, t: lam * (w - t), w, theta), 1e-4)
    assert not any(x.any() for x in jax.tree.leaves(grads["personal"]))
    np.testing.assert_allclose(loss, f(theta), rtol=1e-5)
    envelope = f(theta) + method.objective(f, carried, ())[0]
    assert envelope < f(w)


def test_pfedme_clients_use_theta_of_their_last_w_and_the_server_takes_part_of_a_step():
    state, c, _ = run(pfedme(5.0, 2, query=BATCH), 1, SGD)
    half, _, _ = run(pfedme(5.0, 2, beta=0.5, query=BATCH), 1, SGD)
    between = jax.tree.map(lambda x, y: (x + y) / 2, ADAPTER, state.adapter)
    assert_near(half.adapter, between, 1e-5)
    rows = personal(pfedme(5.0, 2, query=BATCH), state, c)
    last = jnp.iinfo(jnp.int32).max
    for i in range(CLIENTS):
        own = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(KEY, 0), c.ids[i]), last)
        before, after = (task(x, take(c.queries, i), own) for x in (ADAPTER, take(rows, i)))
        assert after < before


@pytest.mark.parametrize("order", ["exact", "first_order"])
def test_per_fedavg_has_the_gradient_of_the_loss_after_a_step(x64, order):
    al, w = 0.3, jax.tree.map(lambda x: x.astype(float), nudged(ADAPTER, 0))
    base = jax.tree.map(lambda x: x.astype(float), BASE)
    batch = take(cohort().batches, (0, 0))
    f = lambda x: loss_fn(base, x, batch, KEY)
    method = per_fedavg(al, order)
    grads, loss = jit(jax.grad(lambda x: method.objective(f, x, ()), has_aux=True))(w)
    np.testing.assert_allclose(loss, f(w))
    after = jax.tree.map(lambda x, g: x - al * g, w, jax.grad(f)(w))
    if order == "first_order":
        assert_near(grads, jax.grad(f)(after), 1e-10)
        return
    outcome = jit(lambda x: f(jax.tree.map(lambda x, g: x - al * g, x, jax.grad(f)(x))))
    way = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(3).normal(size=x.shape)), w)
    moved = lambda t: jax.tree.map(lambda x, d: x + t * d, w, way)
    numeric = (outcome(moved(1e-5)) - outcome(moved(-1e-5))) / 2e-5
    along = sum(float(jnp.vdot(x, d)) for x, d in zip(*map(jax.tree.leaves, (grads, way)), strict=True))
    np.testing.assert_allclose(along, numeric, rtol=1e-6)


def test_per_fedavg_without_an_inner_step_is_fedit():
    state, _, info = run(per_fedavg(0.0), 2)
    expected, _, report = run(fedit(), 2)
    assert_near(state, expected)
    assert_near(info.loss, report.loss)


# --- hypernetwork, clusters, pooled data


def test_pfedhn_learns_by_the_pullback_of_displacements():
    method, lr = pfedhn(20, lr=0.3, size=3, width=5), 0.3
    state, c = method.init(jax.random.key(1), ADAPTER), normalised(members(method))
    state = state._replace(phi=nudged(state.phi, 2, 0.05))
    new, _, _ = jit(rounds.make_round(method, loss_fn, SGD))(BASE, state, c, KEY)
    sent = method.dispatch(BASE, state, c)
    local = rounds.make_local(method, loss_fn, SGD)
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(c.ids)
    received, _ = jit(jax.vmap(lambda *row: local(BASE, *row)))(sent.adapter, sent.mask, sent.context, c.batches, keys)

    def weighted(phi):
        x = method.dispatch(BASE, state._replace(phi=phi), c).adapter
        inner = lambda x, s, y: jnp.einsum("c,c...->", c.weights, x * (s - y))
        return sum(jax.tree.leaves(jax.tree.map(inner, x, sent.adapter, received)))

    grads = jit(jax.grad(weighted))(state.phi)
    assert sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)) < 50**2  # nothing is clipped
    assert_near(new.phi, jax.tree.map(lambda t, g: t - lr * g, state.phi, grads), 1e-4)
    away = np.setdiff1d(np.arange(20), c.ids)
    np.testing.assert_array_equal(new.phi.embeddings[away], state.phi.embeddings[away])


def test_pfedhn_sends_strangers_the_adapter_of_the_mean_embedding():
    method = pfedhn(20, size=3, width=5)
    state = method.init(jax.random.key(1), ADAPTER)
    assert_near(method.dispatch(BASE, state, cohort()).adapter, copies(ADAPTER), 0)  # at first everybody's is fresh
    phi = nudged(state.phi, 2)
    state = state._replace(phi=phi)
    strangers = method.dispatch(BASE, state, cohort()._replace(ids=jnp.asarray([-1, 20, 99, 3]))).adapter
    middle = phi._replace(embeddings=jnp.broadcast_to(phi.embeddings.mean(0), phi.embeddings.shape))
    mean = method.dispatch(BASE, state._replace(phi=middle), cohort()).adapter
    for i in range(3):
        assert_near(take(strangers, i), take(mean, 0), 1e-5)
    assert any((x[3] != x[0]).any() for x in jax.tree.leaves(strangers))


def test_ifca_with_one_model_is_fedit():
    state, c, info = run(ifca(1), 2)
    expected, _, report = run(fedit(), 2)
    assert_near(take(state.models, 0), expected.adapter)
    assert_near(info.loss, report.loss)
    assert_near(personal(ifca(1), state, c), copies(expected.adapter))


def test_ifca_clients_choose_what_fits_and_clusters_are_means_of_who_chose():
    """A whole round with three models against its steps by hand."""
    method, good = ifca(3, query=BATCH), [nudged(ADAPTER, 0), nudged(ADAPTER, 1)]
    third = nudged(ADAPTER, 2)
    start = jax.tree.map(lambda *xs: jnp.stack(xs), *good, third)
    state, c = IFCAState(start, jnp.ones(3) / 3), normalised(members(method))
    new, chosen, info = jit(rounds.make_round(method, loss_fn, SGD))(BASE, state, c, KEY)
    last, local, ends, choices = jnp.iinfo(jnp.int32).max, rounds.make_local(fedit(), loss_fn, SGD), [], []
    for i in range(CLIENTS):
        own = jax.random.fold_in(KEY, c.ids[i])
        losses = [task(x, take(c.queries, i), jax.random.fold_in(own, last)) for x in (*good, third)]
        choices.append(int(np.argmin(losses)))
        mask = take(fedit().dispatch(BASE, FedITState(ADAPTER), c).mask, i)
        ends.append(jit(local)(BASE, take(start, choices[i]), mask, (), take(c.batches, i), own)[0])
    assert len(set(choices)) > 1
    np.testing.assert_array_equal(chosen, np.eye(3)[choices])
    for j in range(3):
        mine = [i for i in range(CLIENTS) if choices[i] == j]
        p = np.float64(c.weights)[mine]
        means = lambda *xs, p=p: np.tensordot(p / p.sum(), np.float64(np.stack(xs)), 1)
        expected = jax.tree.map(means, *(ends[i] for i in mine)) if mine else take(start, j)
        assert_near(take(new.models, j), expected)
    served = personal(method, new, c._replace(memory=chosen))
    assert_near(take(served, 0), take(new.models, choices[0]))
    share = max(np.bincount(choices, np.float64(c.weights), 3))
    np.testing.assert_allclose(info.learned["largest_cluster"], share, rtol=1e-5)


def test_a_cluster_that_nobody_chose_keeps_its_model():
    method, c = ifca(3), normalised(members(ifca(3), weights=[1, 2, 3, 0]))
    state = IFCAState(nudged(copies(ADAPTER, 3), 1), jnp.ones(3) / 3)
    sent = method.dispatch(BASE, state, c)
    received = nudged(sent.adapter, 2)._replace(chosen=jnp.eye(3)[jnp.asarray([0, 0, 0, 2])])  # the last has no weight
    new = method.aggregate(BASE, state, c, sent, received)
    for j in (1, 2):
        assert_near(take(new.models, j), take(state.models, j), 0)
    means = jax.tree.map(lambda x: np.tensordot(np.float64(c.weights), np.float64(x[:, 0]), 1), received.models)
    assert_near(take(new.models, 0), means, 1e-5)


def test_centralized_is_one_machine_that_reads_all_batches():
    method, c = centralized(), cohort()
    state, _, info = jit(rounds.make_round(method, loss_fn, OPTIMIZER))(BASE, method.init(KEY, ADAPTER), c, KEY)
    one = pooled(c)
    assert one.batches["x"].shape == (1, CLIENTS * STEPS, BATCH, 6)
    rows = lambda x: sorted(map(tuple, np.asarray(x, float).reshape(-1, 6).tolist()))
    assert rows(one.batches["x"]) == rows(c.batches["x"])  # every example once
    same = [tuple(x) for x in np.asarray(c.batches["x"][0], float).reshape(-1, 6).tolist()]
    first = [tuple(x) for x in np.asarray(one.batches["x"][0, 0], float).tolist()]
    assert sum(x in same for x in first) <= 1  # a batch mixes clients
    mask = take(fedit().dispatch(BASE, FedITState(ADAPTER), c).mask, 0)
    local = rounds.make_local(fedit(), loss_fn, OPTIMIZER)
    own = jax.random.fold_in(KEY, c.ids[0])
    end, trace = jit(local)(BASE, ADAPTER, mask, (), take(one.batches, 0), own)
    assert_near(state.adapter, end)
    assert_near(info.loss, trace.loss.mean()[None])
    np.testing.assert_array_equal(info.ids, c.ids)
    assert info.aggregation.bias_share < 1e-5


def test_centralized_with_one_client_is_fedit():
    c = cohort(clients=1)
    state, expected = (
        jit(rounds.make_round(m, loss_fn, OPTIMIZER))(BASE, m.init(KEY, ADAPTER), c, KEY)[0]
        for m in (centralized(), fedit())
    )
    assert_near(state, expected)


# --- in a run


def test_what_clients_keep_goes_by_client_through_a_run_with_few_participants():
    data, clients, method = examples(), population((5, 9, 3, 7, 4)), ditto()
    round_fn = rounds.make_round(method, loss_fn, OPTIMIZER)
    step = jit(rounds.make_step(round_fn, participants=2, steps=STEPS, batch=BATCH, smallest=3))
    run_, came = rounds.start(method, KEY, ADAPTER, 5), set()
    for _ in range(3):
        run_, info = step(BASE, data, clients, run_, KEY)
        came |= set(info.ids.tolist())
    np.testing.assert_array_equal(run_.memory.met, [float(i in came) for i in range(5)])


def test_numbers_out_of_range_are_refused():
    for make, message in (
        (lambda: ditto(-1.0), "at least 0"),
        (lambda: finetune(1.5), "at most 1"),
        (lambda: fedrep(1.0), "below 1"),
        (lambda: fedproto(-1.0), "at least 0"),
        (lambda: pfedme(lam=0.0), "above 0"),
        (lambda: pfedme(lam=15.0, lr=0.2), "diverges"),
        (lambda: per_fedavg(-1.0), "at least 0"),
        (lambda: per_fedavg(order="second"), "first_order"),
        (lambda: ifca(0), "at least 1"),
        (lambda: ifca(2, query=0), "at least 1"),
        (lambda: pfedhn(0), "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_what_stays_with_a_client_is_out_of_reach_of_wrappers():
    """A proximal term pulls on what is sent alone: the private factor of FedSA-LoRA, the local part of SDFLoRA not."""
    own_b = lambda carried: [x.b for x in lora.low_rank_leaves(carried)]
    for name, private in (("fedsa_lora", own_b), ("sdflora", lambda carried: carried.local)):
        method = proximal(METHODS[name](), 1.0)
        c = normalised(cohort())._replace(memory=copies(method.init_client(ADAPTER)))
        sent = method.dispatch(BASE, method.init(KEY, ADAPTER), c)
        row, context = take((sent.adapter, sent.context), 0)
        pull = jax.grad(method.penalty)(nudged(row), context)
        assert any(np.abs(x).max() > 0 for x in jax.tree.leaves(pull))
        assert not any(np.abs(x).max() > 0 for x in jax.tree.leaves(private(pull)))
