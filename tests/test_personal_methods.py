"""Personalised methods and baselines: each computes the equation it is named for, and is FedIT where it should be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ADAPTER,
    BASE,
    BATCH,
    CLIENTS,
    KEY,
    METHODS,
    OPTIMIZER,
    SHOWN,
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
    seen,
    take,
)
from personal_helpers import SGD, body, head, personal, run, task

from fedlora_jax import lora, rounds, training
from fedlora_jax.method import average_client
from fedlora_jax.methods.ditto import ditto
from fedlora_jax.methods.fedimpro import Carried, fedimpro, of_classes
from fedlora_jax.methods.fedit import FedITState, fedit
from fedlora_jax.methods.fedper import fedper
from fedlora_jax.methods.fedpgp import fedpgp
from fedlora_jax.methods.fedproto import fedproto
from fedlora_jax.methods.fedrep import fedrep
from fedlora_jax.methods.finetune import finetune
from fedlora_jax.methods.frozen import frozen
from fedlora_jax.methods.ifca import ifca
from fedlora_jax.methods.local_only import local_only
from fedlora_jax.methods.per_fedavg import per_fedavg
from fedlora_jax.methods.pfedhn import pfedhn
from fedlora_jax.methods.pfedme import pfedme
from fedlora_jax.personal import squared_distance
from fedlora_jax.task import of_batch
from fedlora_jax.wrappers.proximal import proximal


@pytest.fixture(scope="module")
def reported():
    return run(fedit())[2].aggregation


@pytest.mark.parametrize("make", [ditto, lambda: proximal(ditto(), 0.0), finetune])
def test_the_report_of_a_round_is_on_what_was_sent(make, reported):
    """FedIT beside a model that does not travel: what averaging gets wrong is FedIT's."""
    info = run(make())[2]
    assert reported.bias_share > 1e-3
    assert_near(info.aggregation, reported, 1e-4)


# --- local-only, fine-tuning, Ditto


def test_frozen_is_the_start_whatever_clients_do():
    state, c, info = run(frozen(), 2)
    assert_near(state.adapter, ADAPTER)
    assert not any(np.any(x) for x in info.aggregation), "nothing is aggregated, and nothing is wrong with it"
    for i in range(len(c.ids)):
        assert_near(take(personal(frozen(), state, c), i), ADAPTER)


def test_local_only_clients_train_alone_from_where_they_were():
    state, c, _ = run(local_only(), 2)
    local = training.make_local(fedit(), loss_fn, OPTIMIZER)
    for i in range(CLIENTS):
        adapter = ADAPTER
        for t in range(2):
            one = cohort(t)
            mask = take(fedit().dispatch(BASE, FedITState(ADAPTER), one).mask, i)
            own = jax.random.fold_in(jax.random.fold_in(KEY, t), one.ids[i])
            adapter, _ = jit(local)(BASE, adapter, mask, (), take(one.batches, i), own)
        assert_near(take(personal(local_only(), state, c), i), adapter)
    assert_near(state.adapter, ADAPTER, 0)


@pytest.mark.long
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
        local = training.make_local(fedit(), loss_fn, OPTIMIZER, watch=lambda base, adapter: adapter)
        for i in range(CLIENTS):
            own = jax.random.fold_in(jax.random.fold_in(KEY, 1), one.ids[i])
            _, trace = jit(local)(BASE, take(last.adapter, i), take(last.mask, i), (), take(one.batches, i), own)
            assert_near(take(personal(finetune(share), state, c), i), take(trace.seen, steps - 1))
    assert finetune(0.0).dispatch(BASE, FedITState(ADAPTER), cohort()).adapter.keys() == ADAPTER.keys()


@pytest.mark.long
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
    with pytest.raises(ValueError, match="need something that is trained in full"):
        method.init(KEY, body(ADAPTER))


def test_layers_that_are_named_stay_with_clients_and_all_others_travel():
    """Low-rank or not: one kernel and one array of the head stay, the rest is averaged."""
    method = fedper("mix|head.bias")
    stays = lambda tree: {k: x for k, x in lora.flatten(tree).items() if "mix" in k or k == "head/bias"}
    rest = lambda tree: {k: x for k, x in lora.flatten(tree).items() if k not in stays(tree)}
    state, c = method.init(KEY, nudged(ADAPTER, 0)), normalised(members(method))
    assert len(stays(ADAPTER)) == 2
    sent = method.dispatch(BASE, state, c)
    received = nudged(sent.adapter, 1)
    new = method.aggregate(BASE, state, c, sent, received)
    means = jax.tree.map(lambda x: np.tensordot(np.float64(c.weights), np.float64(x), 1), rest(received))
    assert_near(rest(new.adapter), means, 1e-6)
    again = method.dispatch(BASE, new, remembered(method, c, sent, received))
    assert_near(stays(again.adapter), stays(received), 0)
    assert_near(rest(again.adapter), copies(rest(new.adapter)), 0)
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert count(method.traffic(ADAPTER, [ADAPTER]).up) == count(rest(ADAPTER))
    held = method.upload_mask(lora.rank_mask(ADAPTER, np.full(2, 2)))
    assert not any(np.any(x) for x in jax.tree.leaves(stays(held)))
    assert all(np.all(x) for x in jax.tree.leaves(rest(held)))
    with pytest.raises(ValueError, match="stays=nothing finds nothing of what is trained, which is "):
        fedper("nothing").init(KEY, ADAPTER)


def test_fedpgp_shares_what_is_trained_in_full_and_leaves_low_rank_terms_with_clients():
    method, c = fedpgp(), normalised(members(fedpgp()))
    state = method.init(KEY, ADAPTER)
    sent = method.dispatch(BASE, state, c)
    received = nudged(sent.adapter, 1)
    new = method.aggregate(BASE, state, c, sent, received)
    means = jax.tree.map(lambda x: np.tensordot(np.float64(c.weights), np.float64(x), 1), head(received))
    assert_near(head(new.adapter), means, 1e-6)
    met = remembered(method, c, sent, received)
    again = method.dispatch(BASE, new, met)
    assert_near(body(again.adapter), body(received), 0)
    assert_near(head(again.adapter), copies(head(new.adapter)), 0)
    newcomer = method.dispatch(BASE, new, members(method)).adapter
    assert all(not np.any(x.b) for x in lora.low_rank_leaves(newcomer)), "the shared part alone"
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert count(method.traffic(ADAPTER, [ADAPTER]).up) == count(head(ADAPTER))
    with pytest.raises(ValueError, match="shares what is trained in full, and the adapter has nothing"):
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
    local = training.make_local(method, loss_fn, OPTIMIZER, watch=lambda base, adapter: adapter)
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


@pytest.mark.long
def test_fedproto_averages_mean_features_of_each_class_over_the_clients_that_have_it():
    """Two rounds: what clients send are class means of their queries after local steps, in float64."""
    method = fedproto(0.3, query=BATCH)
    c, state = normalised(members(method)), method.init(KEY, nudged(ADAPTER, 0))
    round_fn = jit(rounds.make_round(method, SHOWN, OPTIMIZER))
    new, memory, _ = round_fn(BASE, state, c, KEY)
    sums, held = np.zeros((3, 6)), np.zeros(3)
    for i, p in enumerate(np.float64(c.weights)):
        key = jax.random.fold_in(jax.random.fold_in(KEY, c.ids[i]), np.iinfo(np.int32).max)
        told = seen(BASE, take(memory.own, i), take(c.queries, i), key)
        for feature, label in zip(np.float64(told.features), c.queries["y"][i], strict=True):
            sums[label] += p * feature
            held[label] += p
    assert_near(new.prototypes.mean, sums / np.maximum(held, 1e-9)[:, None], 1e-4)
    later = c._replace(weights=np.zeros(CLIENTS), memory=memory)
    sent = method.dispatch(BASE, new, later)
    assert_near(sent.adapter.own, memory.own, 0)
    assert_near(method.aggregate(BASE, new, later, sent, sent.adapter).prototypes, new.prototypes, 0)
    batch, w, known = take(c.batches, (0, 0)), nudged(ADAPTER, 1), take(sent.context, 0)
    minimised, loss = method.objective(of_batch(SHOWN, BASE, batch, KEY), take(sent.adapter, 0)._replace(own=w), known)
    told, far = seen(BASE, w, batch, KEY), 0.0
    for k in set(batch["y"].tolist()) & set(np.flatnonzero(known.held).tolist()):
        mine = np.float64(told.features)[batch["y"] == k].mean(0)
        far += np.mean((mine - np.float64(known.mean[k])) ** 2)
    np.testing.assert_allclose(minimised, loss + 0.3 * far, rtol=1e-5)
    with pytest.raises(ValueError, match="one head reads"):
        method.init(KEY, lora.split(ADAPTER)[0])


@pytest.mark.long
def test_fedimpro_trains_the_head_on_features_of_all_clients():
    """Moments are those of NumPy over all clients' examples apart; what is drawn has them; W and b see it."""
    method = fedimpro(draws=4000, query=BATCH)
    c, state = normalised(members(method)), method.init(KEY, nudged(ADAPTER, 0))
    sent = take(method.dispatch(BASE, state, c), 0)
    batch, w = take(c.batches, (0, 0)), nudged(ADAPTER, 1)
    task = of_batch(SHOWN, BASE, batch, KEY)
    assert_near(method.objective(task, sent.adapter._replace(own=w), sent.context), (task(w), task(w)), 0)  # none yet
    ends = [nudged(ADAPTER, i) for i in range(CLIENTS)]
    looks = [seen(BASE, w, take(c.queries, i), KEY) for i, w in enumerate(ends)]
    told, labels, measured = [np.float64(x.features) for x in looks], c.queries["y"], [of_classes(x) for x in looks]
    stacked = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    new = method.aggregate(BASE, state, c, method.dispatch(BASE, state, c), Carried(stacked(ends), stacked(measured)))
    assert_near(
        new.adapter, jax.tree.map(lambda *x: sum(p * y for p, y in zip(c.weights, x, strict=True)), *ends), 1e-5
    )
    of = [np.concatenate([x[y == k] for x, y in zip(told, labels, strict=True)]) for k in range(3)]
    p = [np.concatenate([q * np.ones(sum(y == k)) for q, y in zip(c.weights, labels, strict=True)]) for k in range(3)]
    has = [k for k in range(3) if len(of[k])]
    mean = np.stack([np.average(of[k], 0, p[k]) for k in has])
    deviation = np.sqrt(np.stack([np.average((of[k] - m) ** 2, 0, p[k]) for k, m in zip(has, mean, strict=True)]))
    assert_near(new.features.mean[np.array(has)], mean, 1e-4)
    context = take(method.dispatch(BASE, new, c), 0).context
    h, y = np.float64(context.h), np.asarray(context.y)
    assert set(y.tolist()) <= set(has)
    for i, k in enumerate(has):
        n = sum(y == k)
        np.testing.assert_allclose(n / 4000, sum(p[k]) / sum(map(sum, p)), atol=0.04)
        assert (abs(h[y == k].mean(0) - mean[i]) <= 5 * deviation[i] / n**0.5 + 1e-3).all()
        np.testing.assert_allclose(h[y == k].std(0), deviation[i], rtol=0.2, atol=1e-3)
    head = jax.tree.map(lambda x, d: np.float64(x) + np.float64(d), BASE["head"], w["head"])
    z = h @ head["kernel"] + head["bias"]
    upper = np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(4000), y])
    minimised, loss = method.objective(task, sent.adapter._replace(own=w), context)
    np.testing.assert_allclose(minimised, loss + upper, rtol=1e-4)
    with pytest.raises(ValueError, match="one linear head"):
        method.init(KEY, lora.split(ADAPTER)[0])


# --- in a run


@pytest.mark.long
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


@pytest.mark.long
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
