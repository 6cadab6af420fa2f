# %% [markdown]
# # Learning through rounds
#
# A round is a differentiable function. Here the clients' learning rate is learned by
# gradient through two whole rounds of FedIT: dispatch, local steps and aggregation, in one program.

# %%
import jax
import jax.numpy as jnp
import optax

import fedlora_jax as fl
from fedlora_jax import lora, meta
from fedlora_jax.clients import sample_rounds

INPUTS, WIDTH, CLASSES, CLIENTS, EACH = 6, 16, 4, 8, 40
base = {
    "hidden": {"kernel": jax.random.normal(jax.random.key(0), (INPUTS, WIDTH)) / INPUTS**0.5},
    "head": {"kernel": jnp.zeros((WIDTH, CLASSES))},
}
x = jax.random.normal(jax.random.key(1), (CLIENTS * EACH, INPUTS))
y = jnp.argmax(x @ jax.random.normal(jax.random.key(2), (INPUTS, CLASSES)), 1)
clients = fl.Population(jnp.arange(len(y)).reshape(CLIENTS, EACH), jnp.full(CLIENTS, EACH), jnp.full(CLIENTS, 4))
adapter = lora.new(jax.random.key(3), base, rank=4, targets="hidden/kernel", full="^head/", scale=1.0)
method = fl.fedit()


def loss_fn(base, adapter, batch, key):
    params = lora.merge(base, adapter)
    logits = jnp.tanh(batch[0] @ params["hidden"]["kernel"]) @ params["head"]["kernel"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


# %% [markdown]
# Two rounds of all clients, and for each client examples that it does not train on: what the outcome is judged by.

# %%
ids = jnp.tile(jnp.arange(CLIENTS), (2, 1))


def drawn(key):
    batches, queries = sample_rounds(key, (x, y), clients, ids, 3, 8, EACH, query=10)
    return jax.vmap(lambda i, b: clients.cohort(i, (), b))(ids, batches), queries


def outcome(log_rate, key):
    """The loss on those examples, of the models after two rounds."""
    cohorts, queries = drawn(key)
    after = meta.outcome(method, loss_fn, optax.sgd(jnp.exp(log_rate)))
    start = method.init(jax.random.key(4), adapter)
    return after(base, start, cohorts, queries, key)[0]


# %% [markdown]
# The gradient agrees with what one finds by trying rates on either side.

# %%
key, rate = jax.random.key(5), jnp.log(0.05)
both = jax.jit(jax.value_and_grad(outcome))
loss, slope = both(rate, key)
numeric = (both(rate + 0.01, key)[0] - both(rate - 0.01, key)[0]) / 0.02
print(f"derivative {float(slope):.4f}, by differences {float(numeric):.4f}")
assert abs(slope - numeric) < 0.02 * abs(slope) + 1e-4

# %% [markdown]
# A rate that is far too small is found to be so in a few steps.

# %%
tx, first = optax.adam(0.3), float(loss)
moments = tx.init(rate)
for i in range(8):
    loss, slope = both(rate, jax.random.fold_in(key, i))
    update, moments = tx.update(slope, moments)
    rate = jnp.add(rate, update)
print(f"learning rate 0.05 -> {float(jnp.exp(rate)):.2f}, loss after two rounds {first:.3f} -> {float(loss):.3f}")
assert float(loss) < first

# %% [markdown]
# Methods that learn *while* they run, as HyperLoRA does, say what they need to hear of clients (`meta.displacement`,
# `meta.first_order` or `meta.exact`) and get it in `Method.learn`, in the same program.
