"""What stays with a client stays there: FedSA-LoRA, FedVLM, SDFLoRA."""

import jax
import jax.numpy as jnp
import numpy as np
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
    mean_product,
    members,
    normalised,
    nudged,
    take,
    uploads,
)
from numpy.linalg import norm

from fedlora_jax import lora
from fedlora_jax.lora import LoRA
from fedlora_jax.method import average_client
from fedlora_jax.methods.fedit import FedITState, fedit
from fedlora_jax.methods.fedsa_lora import fedsa_lora, partial_share
from fedlora_jax.methods.fedvlm import fedvlm
from fedlora_jax.methods.flexlora import flexlora
from fedlora_jax.methods.hetlora import hetlora
from fedlora_jax.methods.sdflora import protected, sdflora
from fedlora_jax.personal import Pair, together

KERNELS = ["blocks/kernel", "mix/kernel"]


def second_round(method):
    """What clients sent in one round, and what they are sent in the next."""
    c, _, sent, received, new = aggregated(method)
    memory = jax.vmap(method.remember)(c.memory, sent.context, sent.adapter, received)
    return c, received, new, method.dispatch(BASE, new, c._replace(memory=memory)), memory


@pytest.mark.parametrize(("method", "shared", "own"), [(fedsa_lora(), "a", "b"), (fedvlm(), "b", "a")])
def test_one_factor_is_averaged_and_the_other_comes_back_to_its_client(method, shared, own):
    c, received, _, sent, memory = second_round(method)
    for name in KERNELS:
        x, y = lora.flatten(received)[name], lora.flatten(sent.adapter)[name]
        mean = np.tensordot(np.float64(c.weights), np.float64(getattr(x, shared)), 1)
        for i in range(CLIENTS):
            assert_near(getattr(y, shared)[i], mean)
            np.testing.assert_array_equal(getattr(y, own)[i], getattr(x, own)[i])
    assert set(memory) == set(KERNELS)  # the head is shared


def test_a_personal_head_comes_back_too():
    _, received, _, sent, _ = second_round(fedsa_lora(head="personal"))
    np.testing.assert_array_equal(sent.adapter["head"]["kernel"], received["head"]["kernel"])
    assert sum(x.size for x in jax.tree.leaves(fedsa_lora(head="personal").traffic(ADAPTER, []).up)) == 2 * (2 * 6 + 4)


def test_sharing_neither_factor_is_training_alone():
    method = partial_share("none", "personal")
    _, received, _, sent, _ = second_round(method)
    jax.tree.map(np.testing.assert_array_equal, sent.adapter, received)
    assert not jax.tree.leaves(method.traffic(ADAPTER, []).up)


def test_clients_that_agree_on_what_is_personal_make_fedsa_fedit():
    """The average client has the mean of the personal factors: then both servers hold the same."""
    method = fedsa_lora()
    c = normalised(members(method))
    state = FedITState(ADAPTER)
    sent = method.dispatch(BASE, state, c)
    received = uploads(sent)
    new = method.aggregate(BASE, state, c, sent, received)
    memory = jax.vmap(method.remember)(c.memory, sent.context, sent.adapter, received)
    average = method.dispatch(BASE, new, average_client(c._replace(memory=memory))).adapter
    assert_near(take(average, 0), fedit().aggregate(BASE, state, c, sent, received).adapter)


def test_sharing_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="share must be"):
        partial_share("c")
    with pytest.raises(ValueError, match="head must be"):
        fedsa_lora(head="frozen")


@pytest.mark.parametrize("method", [fedsa_lora(), sdflora(), hetlora()])
def test_a_cohort_without_memory_is_refused(method):
    with pytest.raises(ValueError, match=r"start from rounds\.start"):
        method.dispatch(BASE, method.init(KEY, ADAPTER), cohort())


# --- SDFLoRA


def test_without_a_local_part_sdflora_is_flexlora():
    method, inner = sdflora(local_rank=0), flexlora()
    c = normalised(members(method, ranks=[1, 2, 1, 2]))
    start = nudged(ADAPTER, 0)
    state = method.init(KEY, ADAPTER)._replace(adapter=start)
    sent, plain = method.dispatch(BASE, state, c), inner.dispatch(BASE, FedITState(start), c)
    assert_near(sent.adapter.shared, plain.adapter, 0)
    received = uploads(plain)
    new = method.aggregate(BASE, state, c, sent, Pair(received, sent.adapter.local))
    assert_near(new.adapter, inner.aggregate(BASE, FedITState(start), c, plain, received).adapter, 0)
    assert_near(together(take(sent.adapter, 1), ()), take(plain.adapter, 1), 0)


def test_the_local_part_adds_to_the_model_and_moves_nobody_else():
    method = sdflora(local_rank=1)
    c = normalised(members(method))
    state = method.init(KEY, ADAPTER)._replace(adapter=nudged(ADAPTER, 0))
    sent = method.dispatch(BASE, state, c)
    received = uploads(sent)
    for name in KERNELS:
        pair = take(received, 2)
        shared, local = (lora.flatten(x)[name] for x in pair)
        assert_near(dense(lora.flatten(together(pair, ()))[name]), dense(shared) + dense(local))
    other = received._replace(local=nudged(received.local, 5))
    aggregate = jit(method.aggregate)
    assert_near(*(aggregate(BASE, state, c, sent, x).adapter for x in (received, other)), 0)
    memory = jax.vmap(method.remember)(c.memory, sent.context, sent.adapter, received)
    later = method.dispatch(BASE, state, c._replace(memory=memory)).adapter.local
    jax.tree.map(np.testing.assert_array_equal, later, received.local)
    nobody = take(method.dispatch(BASE, state, average_client(c._replace(memory=memory))).adapter, 0)
    for name in KERNELS:
        assert not lora.flatten(nobody.local)[name].b.any()


@pytest.mark.long
def test_clipping_bounds_the_change_and_noise_has_the_stated_deviation():
    x = {"kernel": LoRA(jnp.ones((40, 20)), jnp.ones((20, 30)), SCALE), "head": jnp.zeros((50, 3))}
    mask = jax.tree.map(jnp.ones_like, x)
    moved = nudged(x, 1, 1.0)
    change = lambda y: jax.tree.map(jnp.subtract, y, x)
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    clipped = protected(KEY, x, moved, mask, 2.0, 0.0)
    assert_near(norm(flat(change(clipped))), 2.0)
    assert_near(flat(change(clipped)) / 2.0, flat(change(moved)) / norm(flat(change(moved))), 1e-4)
    assert_near(protected(KEY, x, moved, mask, 1e6, 0.0), moved, 1e-6)
    noise = flat(protected(KEY, x, moved, mask, 2.0, 0.25)) - flat(clipped)
    np.testing.assert_allclose([noise.mean(), noise.std()], [0.0, 0.5], atol=0.05)
    frozen = jax.tree.map(jnp.zeros_like, mask)
    assert_near(protected(KEY, x, x, frozen, 2.0, 0.25), x, 0)


def test_noise_reaches_the_server_through_the_upload_alone():
    method = sdflora(local_rank=1, clip=1e6, noise=1e-6)
    c = normalised(members(method))
    state = method.init(KEY, ADAPTER)._replace(adapter=nudged(ADAPTER, 0))
    sent = method.dispatch(BASE, state, c)
    received = uploads(sent)
    new = jit(method.aggregate)(BASE, state, c, sent, received)
    again = jit(method.aggregate)(BASE, state._replace(key=jax.random.key(3)), c, sent, received)
    for name in KERNELS:
        m = mean_product(lora.flatten(received.shared)[name], c.weights)
        x, y = (dense(lora.flatten(s.adapter)[name]) for s in (new, again))
        assert norm(x - y) > 0.1 * norm(m)


def test_sdflora_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="set both"):
        sdflora(noise=1.0)
    with pytest.raises(ValueError, match="at least 0"):
        sdflora(local_rank=-1)
    with pytest.raises(ValueError, match="does not fit a kernel"):
        sdflora(local_rank=5).init(KEY, ADAPTER)
