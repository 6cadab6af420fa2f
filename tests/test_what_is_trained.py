"""Everything that a round trains is read by the loss, and what local steps moved is told."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ADAPTER, BASE, CLASSES, KEY, SCALE, cohort, jit, logits, loss_fn, take

from fedlora_jax import lora, rounds
from fedlora_jax.methods.fedit import fedit
from fedlora_jax.methods.fedra import fedra


class Stock(nn.Module):
    """A model of layers that know nothing of LoRA."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES, name="head")(nn.relu(nn.Dense(5, name="first")(x)))


PARAMS = Stock().init(KEY, jnp.zeros((1, 6)))["params"]
STOCK = lora.new(KEY, PARAMS, 2, targets="first/", full="head", scale=SCALE)


def stock_loss(variables):
    """With ``apply`` jitted, as users have it: what is not read is seen inside as well."""

    def loss(base, adapter, batch, key):
        out = jax.jit(Stock().apply)(variables(base, adapter), batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(out, batch["y"]).mean()

    return loss


def one_round(method, loss, base=BASE, adapter=ADAPTER, steps=3):
    c = cohort(steps=steps)
    return jit(rounds.make_round(method, loss, optax.sgd(0.1)))(base, method.init(KEY, adapter), c, KEY)


def test_an_adapter_that_the_loss_does_not_read_is_refused_before_anything_compiles(compilations):
    compilations.clear()
    with pytest.raises(ValueError, match=r"does not read first/kernel of the adapter.*lora.merge\(base, adapter\)"):
        one_round(fedit(), stock_loss(lora.variables), PARAMS, STOCK)
    assert not compilations


def test_such_a_model_trains_merged():
    state, _, _ = one_round(fedit(), stock_loss(lambda b, a: {"params": lora.merge(b, a)}), PARAMS, STOCK)
    assert jnp.abs(state.adapter["first"]["kernel"].b).max() > 0


@pytest.mark.parametrize("half", ["a", "b", "head"])
def test_each_factor_and_each_difference_must_be_read(half):
    """Not a whole leaf is forgotten, but one array of it."""

    def drop(adapter):
        if half == "head":
            return adapter | {"head": jax.tree.map(jnp.zeros_like, adapter["head"])}
        mix = adapter["mix"]["kernel"]
        return adapter | {"mix": {"kernel": mix.replace(**{half: jnp.zeros_like(getattr(mix, half))})}}

    with pytest.raises(ValueError, match="does not read head/bias, head/kernel" if half == "head" else "mix/kernel"):
        one_round(fedit(), lambda base, adapter, *rest: loss_fn(base, drop(adapter), *rest))


def test_a_switch_that_the_model_does_not_know_is_refused():
    without = lambda adapter: adapter | {"blocks": {"kernel": adapter["blocks"]["kernel"]}}

    def loss(base, adapter, batch, key):
        return jnp.mean(logits(base, without(adapter), batch["x"]) ** 2)

    with pytest.raises(ValueError, match=r"switches parts of the model by blocks/gate"):
        one_round(fedra(), loss)


def test_a_first_step_under_a_new_head_moves_the_head_and_is_told():
    """A head of zeros gives the adapter no gradient in the first step: only the head moves."""
    base = lora.unflatten(lora.flatten(BASE) | {"head/kernel": jnp.zeros((6, CLASSES))})
    c = cohort(steps=1, clients=1)
    round_fn = jit(rounds.make_round(fedit(), loss_fn, optax.sgd(0.1)))
    state, _, info = round_fn(base, fedit().init(KEY, ADAPTER), c, KEY)
    assert info.aggregation.update == 0  # of the adapter, in product space
    change = jax.tree.map(lambda x, y: np.sum((np.float64(x) - np.float64(y)) ** 2), state.adapter, ADAPTER)
    np.testing.assert_allclose(info.moved, [sum(jax.tree.leaves(change)) ** 0.5], rtol=1e-6)
    assert info.moved[0] > 0


@pytest.mark.long
def test_every_client_tells_how_far_it_moved_of_what_it_trains():
    """Of FedIT at one client at a time, the new state is what the client sent."""
    whole = one_round(fedit(), loss_fn)[2]
    c, round_fn = cohort(steps=3), jit(rounds.make_round(fedit(), loss_fn, optax.sgd(0.1)))
    for i in range(2):
        state, _, info = round_fn(BASE, fedit().init(KEY, ADAPTER), take(c, slice(i, i + 1)), KEY)
        change = jax.tree.map(lambda x, y: np.sum((np.float64(x) - np.float64(y)) ** 2), state.adapter, ADAPTER)
        np.testing.assert_allclose(info.moved[0], sum(jax.tree.leaves(change)) ** 0.5, rtol=1e-5)
        np.testing.assert_allclose(whole.moved[i], info.moved[0], rtol=1e-5)
    still = jit(rounds.make_round(fedit(), loss_fn, optax.sgd(0.0)))(BASE, fedit().init(KEY, ADAPTER), c, KEY)[2]
    assert not still.moved.any()
