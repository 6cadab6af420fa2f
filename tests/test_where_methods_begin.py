"""Every method begins with the adapter that it is given, whatever its server makes of it: one that has learned, too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import METHODS, cohort, copies, jit, problem

from fedlora_jax import lora
from fedlora_jax.method import average_client, models


@pytest.mark.parametrize("name", METHODS)
def test_what_is_first_sent_is_the_adapter(name):
    base, adapter = problem()
    rng = np.random.default_rng(7)
    adapter = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), adapter)
    method = METHODS[name]()

    clients = cohort()
    clients = clients._replace(memory=copies(method.init_client(adapter), len(clients.ids)))

    def served(key, clients):
        state, made = method.init(key, adapter), []
        for who in (clients, average_client(clients)):
            sent = method.dispatch(base, state, who)
            made.append((sent.base, jax.tree.map(lambda x: x[0], models(method, sent))))
        return made

    expected = lora.merge(base, adapter)
    for sent, model in jit(served)(jax.random.key(1), clients):
        tolerance = 0.5 if name == "ifca" else 1e-4  # whose starts differ on purpose
        found = lora.merge(sent, mixed(model))
        for path, x in lora.flatten(found).items():
            np.testing.assert_allclose(x, lora.flatten(expected)[path], atol=tolerance, err_msg=path)


def mixed(model):
    """Without its mixers, which begin at zero: each of the updates side by side has the same share (``by_input``)."""
    flat = lora.flatten(model)
    for name in [name for name in flat if name.endswith("/mixer")]:
        mixer, kernel = flat.pop(name), name.removesuffix("mixer") + "kernel"
        assert not mixer.any()
        flat[kernel] = flat[kernel].replace(b=flat[kernel].b / mixer.shape[-1])
    return lora.unflatten(flat)


def test_a_part_of_its_rank_is_enough():
    """Of an adapter with columns that are fresh, as of fewer in some blocks, methods with cores keep what it has."""
    base, adapter = problem()
    rng = np.random.default_rng(7)
    adapter = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), adapter)
    adapter = lora.tree_map(lambda x: x.replace(b=x.b.at[..., 1, :].set(0)), adapter)
    for name in ("ravan", "fed_sb"):
        method = METHODS[name]()
        sent = method.dispatch(base, method.init(jax.random.key(1), adapter), average_client(cohort()))
        model = jax.tree.map(lambda x: x[0], models(method, sent))
        for path, x in lora.flatten(lora.merge(sent.base, model)).items():
            np.testing.assert_allclose(x, lora.flatten(lora.merge(base, adapter))[path], atol=1e-4, err_msg=path)
