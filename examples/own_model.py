"""Federate a model of your own: a plain function, arrays of your own, nothing but the library.

    python examples/own_model.py

Twenty clients, of which fifteen train; each mostly holds two of five classes. FlexLoRA aggregates what they learn;
around it a class bias suits the model that each is sent to what its signature says of its data. What is printed is
the accuracy of these models, before and after 15 rounds.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedlora_jax as fl

CLASSES, INPUTS, WIDTH, CLIENTS, TRAINING, EACH = 5, 8, 32, 20, 15, 60


# Data: x [n, INPUTS], y [n], and which rows are whose. Here synthetic, and skewed towards two classes of each client.
rng = np.random.default_rng(0)
x = rng.normal(size=(20_000, INPUTS)).astype(np.float32)
y = np.argmax(np.tanh(x @ rng.normal(size=(INPUTS, 16))) @ rng.normal(size=(16, CLASSES)), 1)
odds = lambda client: np.where((y - client) % CLASSES < 2, 9.0, 1.0)
rows = np.stack([rng.choice(len(y), EACH, replace=False, p=odds(i) / odds(i).sum()) for i in range(CLIENTS)])

# A model: frozen parameters, and any function of them.
draw = jax.random.normal(jax.random.key(0), (INPUTS, WIDTH))
base = {
    "hidden": {"kernel": draw / INPUTS**0.5, "bias": jnp.zeros(WIDTH)},
    "head": {"kernel": jnp.zeros((WIDTH, CLASSES)), "bias": jnp.zeros(CLASSES)},
}


def features(params, x):
    return jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])


def logits(params, x):
    return features(params, x) @ params["head"]["kernel"] + params["head"]["bias"]


# What the library needs to know: a loss, a score, and what is adapted.
def loss_fn(base, adapter, batch, key):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(logits(fl.lora.merge(base, adapter), x), y).mean()


def accuracy(base, adapter, examples):
    x, y = examples
    return (logits(fl.lora.merge(base, adapter), x).argmax(-1) == y).mean()


adapter = fl.lora.new(jax.random.key(1), base, rank=4, targets="hidden/kernel", full="^head/", scale=2.0)

train, test = jnp.asarray(rows[:, : EACH // 2]), jnp.asarray(rows[:, EACH // 2 :])
data, sizes = (jnp.asarray(x), jnp.asarray(y)), jnp.full(CLIENTS, EACH // 2)
told = fl.signatures.of_clients(
    features(base, data[0]), data[1], train, sizes, CLASSES, jax.random.key(2), training=TRAINING
)
everybody = fl.Population(train, sizes, ranks=jnp.full(CLIENTS, 4), signatures=told)
clients = everybody.members(jnp.arange(TRAINING))

method = fl.signature_bias(fl.proximal(fl.flexlora(), mu=0.01), jax.tree.map(lambda x: x[0, 0], told))
round_fn = fl.make_round(method, loss_fn, optax.sgd(0.3))
step = fl.make_step(round_fn, participants=TRAINING, steps=5, batch=10, smallest=EACH // 2, query=method.query)
evaluate = jax.jit(fl.make_evaluate(method, accuracy))


def scores(run):
    """Of clients that train, and of those that never do."""
    cohort = everybody.cohort(jnp.arange(CLIENTS), memory=())  # these methods keep nothing on clients
    own = evaluate(base, run.state, cohort, (data[0][test], data[1][test]), jax.random.key(3)).before
    return f"{own[:TRAINING].mean():.2f} and {own[TRAINING:].mean():.2f}"


run = fl.rounds.start(method, jax.random.key(4), adapter, clients=TRAINING)
print("before: clients that train and clients never seen have", scores(run))
run, info = jax.jit(fl.scan_rounds(step, 15), donate_argnums=3)(base, data, clients, run, jax.random.key(5))
print("after:  clients that train and clients never seen have", scores(run))
