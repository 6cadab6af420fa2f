"""Clients of several depths and budgets: FedRA, Fed-HeLLo, FSLoRA. What is left out is left out exactly."""

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
    SCALE,
    aggregated,
    assert_near,
    cohort,
    dense,
    jit,
    members,
    normalised,
    nudged,
    take,
    uploads,
)

from fedlora_jax import layers, lora
from fedlora_jax.lora import LoRA
from fedlora_jax.method import average_client, models
from fedlora_jax.methods import fed_hello as hello
from fedlora_jax.methods.fed_hello import fed_hello
from fedlora_jax.methods.fedit import FedITState, fedit
from fedlora_jax.methods.fedra import fedra, gated
from fedlora_jax.methods.fslora import fslora, sketch
from models.vit import ViT

UNIFORM = [1, 1, 1, 1]


@pytest.fixture(scope="module")
def tiny():
    """A ViT of four blocks, its parameters, an adapter in which nothing is zero, and images."""
    model = ViT(classes=3, patch=4, width=8, depth=4, heads=2, mlp_width=12)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8, 8, 3)), jnp.float32)
    params = jit(model.init)(jax.random.key(0), images)["params"]
    adapter = lora.new(
        jax.random.key(1), params, 2, targets=["attn/query/kernel", "mlp/fc1/kernel"], full="head", scale=SCALE
    )
    return model, nudged(params, 3, 0.1), nudged(adapter, 2), images


def shallower(tree, blocks):
    """The tree with those blocks of the stack only."""
    return tree | {"blocks": jax.tree.map(lambda x: x[np.asarray(blocks)], tree["blocks"])}


@functools.partial(jit, static_argnums=0)
def derivatives(net, base, adapter, images):
    """Of a loss in both, and the logits."""

    def loss(base, adapter):
        logits, _ = net.apply(lora.variables(base, adapter), images)
        return jnp.sum(jnp.sin(logits)), logits

    return jax.grad(loss, (0, 1), has_aux=True)(base, adapter)


@pytest.mark.long
@pytest.mark.parametrize("unroll", [False, True])
def test_a_gate_of_zero_is_a_truly_shallower_network(tiny, unroll):
    model, base, adapter, images = tiny
    blocks = [0, 2]
    gate = jnp.zeros(4).at[np.asarray(blocks)].set(1.0)
    short = model.clone(depth=len(blocks))
    grads, logits = derivatives(model.clone(unroll=unroll), base, gated(adapter, gate), images)
    expected_grads, expected = derivatives(short, shallower(base, blocks), shallower(adapter, blocks), images)
    assert_near(logits, expected, 1e-6)
    of_base, of_adapter = grads
    of_adapter["blocks"].pop("gate")
    assert_near(shallower(of_base, blocks), expected_grads[0], 1e-4, floor=0.1)  # some are zero but for rounding
    assert_near(shallower(of_adapter, blocks), expected_grads[1], 1e-4, floor=0.1)  # some are zero but for rounding
    skipped = np.flatnonzero(np.asarray(gate) == 0)
    assert not any(x[skipped].any() for x in jax.tree.leaves((of_base["blocks"], of_adapter["blocks"])))


@pytest.mark.long
def test_a_model_without_a_gate_has_no_gate_in_it(tiny):
    model, base, adapter, images = tiny
    forward = lambda adapter: model.apply(lora.variables(base, adapter), images)[0]
    count = lambda adapter: str(jax.make_jaxpr(forward)(adapter)).count(" sub ")
    assert count(gated(adapter, jnp.ones(4))) == count(adapter) + 1
    assert_near(forward(gated(adapter, jnp.ones(4))), forward(adapter), 1e-5)


# --- draws


def test_every_share_is_dealt_equally_often_and_nobody_in_particular_has_all():
    shares, ids = layers.shares("1.0, 0.75,0.5"), jnp.asarray([*range(18), -1])
    count = np.asarray(layers.budgets(shares, KEY, ids, 12))
    assert (
        np.sort(count[:18].reshape(6, 3), 1) == [6, 9, 12]
    ).all()  # of unseen clients as well, whatever their number
    assert count[-1] == 12
    some = np.asarray([17, 4, 4, -1])
    np.testing.assert_array_equal(layers.budgets(shares, KEY, jnp.asarray(some), 12), count[some])
    assert layers.budgets((0.01,), KEY, jnp.asarray([0]), 12) == 1


@pytest.mark.long
@pytest.mark.parametrize("make", [fedra, fed_hello])
def test_depth_says_nothing_of_what_is_dealt_by_id(make):
    """Over seeds, against what independence of depth and ``id mod 6`` (a domain, say) lets one expect."""
    modulus = 6
    shares, ids, seeds = layers.shares("1.0,0.5,0.25"), jnp.arange(12), 400
    deals = jit(jax.vmap(lambda key: make().init(key, ADAPTER).deal))(jax.random.split(KEY, seeds))
    count = np.asarray(jit(jax.vmap(lambda deal: layers.budgets(shares, deal, ids, 4)))(deals))  # [seeds, 12]
    group = np.broadcast_to(np.arange(12) % modulus, count.shape)
    table = np.asarray([[np.sum((group == g) & (count == n)) for n in (1, 2, 4)] for g in range(modulus)])
    expected = seeds * 12 / modulus / 3
    assert np.abs(table - expected).max() < 5 * np.sqrt(expected)
    assert len({tuple(row) for row in count}) > seeds / 2  # and seeds differ
    state = make().init(KEY, ADAPTER)
    sent = make().dispatch(BASE, state, cohort())
    received = uploads(sent)
    after = make().aggregate(BASE, state, normalised(cohort()), sent, received)
    np.testing.assert_array_equal(*map(jax.random.key_data, (after.deal, state.deal)))  # for good


def test_draws_have_the_budget_and_follow_the_odds():
    odds, ids = np.asarray([3.0, 1.0, 1.0, 1.0]), jnp.arange(4000)
    draw = lambda count: np.asarray(layers.draw(KEY, ids, jnp.full(4000, count), jnp.log(jnp.asarray(odds))))
    one, two = draw(1), draw(2)
    assert (one.sum(1) == 1).all()
    assert (two.sum(1) == 2).all()
    np.testing.assert_allclose(one.mean(0), odds / 6, atol=0.03)
    np.testing.assert_allclose(
        two.mean(0)[0], 1 / 2 + 3 * (1 / 6) * (3 / 5), atol=0.03
    )  # first, or second after another
    again = layers.draw(KEY, jnp.asarray([17, 5]), jnp.asarray([1, 1]), jnp.log(jnp.asarray(odds)))
    np.testing.assert_array_equal(again, one[[17, 5]])


@pytest.mark.parametrize("text", ["", "0", "1.5", "half", "1,,"])
def test_depths_that_are_no_shares_are_refused(text):
    for make in (fedra, fed_hello):
        with pytest.raises(ValueError, match="depths are shares"):
            make(depths=text)


def test_an_adapter_without_a_stack_is_refused():
    without = {"head": ADAPTER["head"], "mix": ADAPTER["mix"]}
    for make in (fedra, fed_hello):
        with pytest.raises(ValueError, match="adapt a kernel of the stack"):
            make().init(KEY, without)
    with pytest.raises(ValueError, match="odds must be"):
        fed_hello(odds="some")
    with pytest.raises(ValueError, match="regroup must be"):
        fed_hello(regroup=0)


# --- aggregation


@pytest.mark.parametrize("method", [fedra(depths="1.0"), fed_hello(depths="1.0"), fed_hello("fisher", "1.0")])
def test_at_full_depth_it_is_fedit_with_uniform_weights(method):
    *_, received, new = aggregated(method, cohort())
    c = normalised(cohort(weights=UNIFORM))
    plain = fedit().aggregate(BASE, FedITState(ADAPTER), c, None, received)  # type: ignore[arg-type]
    assert_near(new.adapter, plain.adapter, 1e-6)


@pytest.mark.parametrize("method", [fedra(depths="0.5"), fed_hello(depths="0.5")])
def test_a_layer_is_the_mean_over_its_holders_and_stays_where_there_are_none(method):
    """Two layers, one each: over some rounds every layer is held by all, by some and by none of two clients."""
    c = normalised(members(method, clients=2, weights=[1, 5]))
    state, holders = method.init(KEY, ADAPTER)._replace(adapter=nudged(ADAPTER, 0)), set()
    aggregate = jit(method.aggregate)
    for t in range(8):
        sent = method.dispatch(BASE, state, c)
        received = uploads(sent, t)
        new = aggregate(BASE, state, c, sent, received)
        held = np.asarray(sent.mask["blocks"]["kernel"].a)[..., 0, 0] > 0  # [C, layers]
        for layer in range(2):
            who = np.flatnonzero(held[:, layer])
            holders.add(len(who))
            x, old = (tree["blocks"]["kernel"] for tree in (received, state.adapter))
            got = jax.tree.map(lambda y, layer=layer: y[layer], new.adapter["blocks"]["kernel"])
            if len(who):
                assert_near(
                    got, jax.tree.map(lambda y, who=who, layer=layer: np.asarray(y)[who, layer].mean(0), x), 1e-6
                )
            else:
                jax.tree.map(np.testing.assert_array_equal, got, jax.tree.map(lambda y, layer=layer: y[layer], old))
        head = np.float64(received["head"]["kernel"]).mean(0)
        assert_near(new.adapter["head"]["kernel"], head, 1e-6)
        state = new
    assert holders == {0, 1, 2}


def test_fedra_clients_compute_with_the_blocks_they_hold_and_the_server_with_all():
    method = fedra(depths="0.5,1.0")
    state, c = method.init(KEY, ADAPTER), members(method)
    sent = method.dispatch(BASE, state, c)
    gates = np.asarray(models(method, sent)["blocks"]["gate"])
    np.testing.assert_array_equal(gates.sum(1), layers.budgets((0.5, 1.0), state.deal, c.ids, 2))
    assert set(gates.sum(1)) == {1, 2}
    np.testing.assert_array_equal(gates, np.asarray(sent.mask["blocks"]["kernel"].b)[:, :, 0, 0])
    whole = models(method, method.dispatch(BASE, state, average_client(c)))
    assert (whole["blocks"]["gate"] == 1).all()


@pytest.mark.long
def test_fed_hello_follows_the_published_shape_and_regroups_by_change():
    assert_near(np.exp(hello.bottleneck(12)), [3, 3, 3, 2, 2, 1, 1, 1, 2, 3, 3, 3], 1e-6)
    assert_near(np.exp(hello.bottleneck(4)), [3, 2, 1, 3], 1e-6)
    assert_near(np.exp(hello.groups(jnp.asarray([0.1, 5.0, 0.3, 2.0, 0.2, 9.0]))), [1, 3, 2, 2, 1, 3], 1e-6)
    assert not hello.groups(jnp.zeros(6)).any()

    method = fed_hello("fisher", depths="1.0", regroup=2)
    c = normalised(members(method))
    state = method.init(KEY, ADAPTER)
    sent = method.dispatch(BASE, state, c)
    moved = lora.tree_map(
        lambda x: x if x.a.ndim < 4 else LoRA(x.a.at[:, 1].add(1.0), x.b.at[:, 0].add(0.1), x.scale), sent.adapter
    )
    new = method.aggregate(BASE, state, c, sent, moved)
    a, b = ADAPTER["blocks"]["kernel"].a[0].size, ADAPTER["blocks"]["kernel"].b[0].size
    assert_near(new.scores, [0.01 * b / (a + b), a / (a + b)])
    assert new.log_odds[1] > new.log_odds[0]
    still = method.aggregate(BASE, new, c, sent, sent.adapter)
    assert_near(still.log_odds, new.log_odds, 0)  # round 1 of 2


# --- FSLoRA


def test_a_sketch_is_the_product_on_average_and_has_one_set_of_indices():
    rng = np.random.default_rng(0)
    x = LoRA(jnp.asarray(rng.normal(size=(2, 7, 4))), jnp.asarray(rng.normal(size=(2, 4, 5))), SCALE)
    c = cohort(clients=1)._replace(ranks=jnp.asarray([3]))
    keys = jax.random.split(KEY, 6000)
    drawn = np.asarray(jit(jax.vmap(lambda key: sketch(key, x, c)[0]))(keys))  # [draws, layers, r]
    assert (np.sort(drawn, -1) == np.float32([0, 4 / 3, 4 / 3, 4 / 3])).all()
    average = np.mean([dense(LoRA(x.a * d[..., None, :], x.b, 1.0)) for d in drawn], 0)
    assert_near(average, dense(x), 0.03)
    assert (drawn[:, 0] != drawn[:, 1]).any()


@pytest.mark.long
def test_fslora_trains_the_columns_it_drew_and_nothing_else():
    method = fslora()
    c = normalised(members(method, ranks=[1, 2, 1, 2]))
    state = method.init(KEY, ADAPTER)._replace(adapter=nudged(ADAPTER, 0))
    sent = method.dispatch(BASE, state, c)
    for name, d in sent.context.items():
        mask, model = (lora.flatten(tree)[name] for tree in (sent.mask, models(method, sent)))
        held = np.asarray(d) > 0
        np.testing.assert_array_equal(np.asarray(mask.a)[..., 0, :] > 0, held)
        np.testing.assert_array_equal(np.asarray(mask.b)[..., 0] > 0, held)
        x = lora.flatten(state.adapter)[name]
        for i in range(CLIENTS):
            assert_near(dense(take(model, i)), dense(LoRA(x.a * np.asarray(d)[i][..., None, :], x.b, 1.0)), 1e-6)
    whole = models(method, method.dispatch(BASE, state, average_client(c)._replace(ranks=jnp.asarray([2]))))
    assert_near(take(whole, 0), state.adapter, 0)


def test_fslora_at_full_rank_and_a_plain_server_is_fedit():
    *_, received, new = aggregated(fslora())
    plain = fedit().aggregate(BASE, FedITState(ADAPTER), normalised(cohort()), None, received)  # type: ignore[arg-type]
    assert_near(new.adapter, plain.adapter, 1e-5)


@pytest.mark.long
def test_fslora_takes_one_step_of_its_servers_optimizer():
    method = fslora("adamw", 0.01)
    c, state, sent, received, new = aggregated(method, cohort(ranks=[1, 2, 1, 2]))
    change = jax.tree.map(lambda x, y: np.tensordot(np.float32(c.weights), y - x, 1), sent.adapter, received)
    adamw = optax.adamw(0.01)
    downhill = jax.tree.map(lambda x: -jnp.asarray(x), change)
    updates, _ = adamw.update(downhill, adamw.init(state.adapter), state.adapter)
    assert_near(new.adapter, optax.apply_updates(state.adapter, updates), 1e-5)
    for wrong in ({"server": "lion"}, {"server_lr": 0.0}):
        with pytest.raises(ValueError, match="server"):
            fslora(**wrong)
