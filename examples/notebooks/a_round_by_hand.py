# %% [markdown]
# # A round by hand
#
# What `make_round` does, written out: dispatch, local steps, aggregation. At the end both give the same numbers.
#
# The model is a plain function of frozen parameters. Four clients hold eight examples each.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedlora_jax as fl
from fedlora_jax import lora

INPUTS, WIDTH, CLASSES, CLIENTS, STEPS = 6, 16, 3, 4, 3
base = {
    "hidden": {"kernel": jax.random.normal(jax.random.key(0), (INPUTS, WIDTH)) / INPUTS**0.5},
    "head": {"kernel": jax.random.normal(jax.random.key(6), (WIDTH, CLASSES)) / WIDTH**0.5},
}
x = jax.random.normal(jax.random.key(1), (CLIENTS, STEPS, 8, INPUTS))  # each client's batches, one for each step
y = jax.random.randint(jax.random.key(2), (CLIENTS, STEPS, 8), 0, CLASSES)


def loss_fn(base, adapter, batch, key):
    params = lora.merge(base, adapter)
    logits = jnp.tanh(batch[0] @ params["hidden"]["kernel"]) @ params["head"]["kernel"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


# %% [markdown]
# An adapter is a tree at the paths of the parameters: a low-rank pair for the hidden kernel, a plain difference for the
# head. A pair adds `scale * a @ b`; as `b` begins at zero, nothing is added yet.

# %%
adapter = lora.new(jax.random.key(3), base, rank=2, targets="hidden/kernel", full="^head/", scale=1.5)
pair = adapter["hidden"]["kernel"]
print("a", pair.a.shape, "b", pair.b.shape, "adds", float(jnp.abs(lora.delta(pair)).max()))

# %% [markdown]
# **Dispatch.** A cohort is the clients of one round, stacked. FedIT sends the same adapter to each: every array has a
# leading axis of clients.

# %%
method = fl.fedit()
state = method.init(jax.random.key(4), adapter)
clients = fl.Population(rows=jnp.zeros((CLIENTS, 16), int), sizes=jnp.full(CLIENTS, 16), ranks=jnp.full(CLIENTS, 2))
cohort = clients.cohort(jnp.arange(CLIENTS), memory=(), batches=(x, y))
sent = method.dispatch(base, state, cohort)
print("sent: a", sent.adapter["hidden"]["kernel"].a.shape)


# %% [markdown]
# **Local steps.** Each client takes the gradient with respect to its adapter alone, on its own batches.


# %%
def local(adapter, batches):
    for t in range(STEPS):
        batch = jax.tree.map(lambda z, t=t: z[t], batches)
        gradient = jax.grad(lambda own, batch=batch: loss_fn(sent.base, own, batch, None))(adapter)
        adapter = jax.tree.map(lambda p, g: p - 0.5 * g, adapter, gradient)
    return adapter


received = jax.jit(jax.vmap(local))(sent.adapter, (x, y))

# %% [markdown]
# **Aggregation.** FedIT averages the factors. The mean of the clients' products is something else; that is the bias
# which half of the methods here are about.

# %%
new = method.aggregate(base, state, cohort._replace(weights=jnp.full(CLIENTS, 1 / CLIENTS)), sent, received)
pairs = received["hidden"]["kernel"]
wanted = jnp.einsum("cir,cro->io", pairs.a, pairs.b) / CLIENTS
got = new.adapter["hidden"]["kernel"].a @ new.adapter["hidden"]["kernel"].b
print(f"the server misses {float(jnp.linalg.norm(wanted - got) / jnp.linalg.norm(wanted)):.1%} of the mean update")

# %% [markdown]
# **The same, written once for all methods.** `make_round` returns a function that is not jitted: the caller jits it,
# scans it over rounds, differentiates it.

# %%
round_fn = jax.jit(fl.make_round(method, loss_fn, optax.sgd(0.5)))
after, memory, info = round_fn(base, state, cohort, jax.random.key(5))
for one, two in zip(jax.tree.leaves(new.adapter), jax.tree.leaves(after.adapter), strict=True):
    np.testing.assert_allclose(one, two, atol=1e-6)
share = float(info.aggregation.bias_share)
assert abs(share - float(jnp.linalg.norm(wanted - got) / jnp.linalg.norm(wanted))) < 1e-4
print(f"make_round: the same adapter, and it reports a bias of {share:.1%}")
