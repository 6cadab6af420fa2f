# %% [markdown]
# # Many clients, on a GPU or not
#
# The device holds one cohort, however many clients there are. What each keeps between rounds (here Ditto's personal
# model) stays on the host, and the rows of those who take part are brought to the device and written back.
#
# Nothing below names a device: on a GPU or TPU the same lines run there, all clients of a round side by side. On a CPU
# `chunk` has them follow one another in small groups, which is faster there and takes less memory; results agree.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedlora_jax as fl
from fedlora_jax import lora, rounds

CLIENTS, PARTICIPANTS, EACH, INPUTS, WIDTH, CLASSES = 5_000, 32, 12, 16, 32, 5
rng = np.random.default_rng(0)
x = rng.normal(size=(60_000, INPUTS)).astype(np.float32)
y = np.argmax(x @ rng.normal(size=(INPUTS, CLASSES)), 1)
base = {
    "hidden": {"kernel": jax.random.normal(jax.random.key(0), (INPUTS, WIDTH)) / INPUTS**0.5},
    "head": {"kernel": jnp.zeros((WIDTH, CLASSES))},
}
rows = np.arange(CLIENTS * EACH).reshape(CLIENTS, EACH)
facts = rows, np.full(CLIENTS, EACH), np.full(CLIENTS, 4)  # NumPy arrays: they stay on the host
clients = fl.Population(*facts)  # type: ignore


def loss_fn(base, adapter, batch, key):
    params = lora.merge(base, adapter)
    logits = jnp.tanh(batch[0] @ params["hidden"]["kernel"]) @ params["head"]["kernel"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


# %% [markdown]
# One program serves every cohort: it is compiled once.

# %%
method = fl.ditto()
adapter = lora.new(jax.random.key(1), base, rank=4, targets="hidden/kernel", full="^head/", scale=1.0)
chunk = 8 if jax.default_backend() == "cpu" else None
round_fn = fl.make_round(method, loss_fn, optax.sgd(0.2), chunk=chunk)
cohort_step = jax.jit(rounds.make_cohort_step(round_fn, steps=3, batch=6, smallest=EACH), donate_argnums=(4, 5))
step = rounds.make_host_step(cohort_step, participants=PARTICIPANTS)

run = rounds.start_on_host(method, jax.random.key(2), adapter, clients=CLIENTS)
kept = sum(leaf.nbytes for leaf in jax.tree.leaves(run.memory))
print(f"{CLIENTS} clients keep {kept / 2**20:.1f} MiB on the host, {kept / CLIENTS / 2**10:.1f} KiB each")

# %%
data, losses, took_part = (jnp.asarray(x), jnp.asarray(y)), [], set()
for _ in range(20):
    run, info = step(base, data, clients, run, jax.random.key(3))
    losses.append(float(info.loss.mean()))
    took_part |= set(np.asarray(info.ids).tolist())
print(f"20 rounds of {PARTICIPANTS}: loss {losses[0]:.2f} -> {losses[-1]:.2f}; {len(took_part)} clients took part")
assert losses[-1] < losses[0]

# %% [markdown]
# Only the rows of those who took part have changed.

# %%
fresh = rounds.start_on_host(method, jax.random.key(2), adapter, clients=1).memory
moved = np.zeros(CLIENTS, bool)
for own, start in zip(jax.tree.leaves(run.memory), jax.tree.leaves(fresh), strict=True):
    moved |= (own != start).reshape(CLIENTS, -1).any(1)
assert set(np.flatnonzero(moved).tolist()) == took_part
print("the models of all others are as they began")

# %% [markdown]
# On the command line: `--clients 10000 --clients-per-round 64 --eval-clients 200`, with `--kept staged` where it does
# not happen by itself, `--devices 8` for several GPUs (docs/scale.md).
