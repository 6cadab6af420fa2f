# %% [markdown]
# # Your own method in 20 lines
#
# A method is a few pure functions over one server state. What is not said is as in the method that it is made of.
#
# Ours averages the clients' products, not their factors, and keeps of the mean what fits into the rank (as FlexLoRA
# does, Bai et al. 2024, arXiv 2402.11505). Besides, the server moves only half of the way, which a wrapper could do as
# well.

# %%
import jax
import jax.numpy as jnp
import optax

import fedlora_jax as fl
from fedlora_jax import Method, lora, product
from fedlora_jax.methods.fedit import FedITState, fedit


def halfway(share: float = 0.5) -> Method:
    """The mean of products, a share of the way."""

    def aggregate(base, state, cohort, sent, received):
        def low_rank(old, stacked):  # LoRA without and with the axis of clients
            mean = product.total(stacked, cohort.weights)  # all factors side by side: nothing is formed
            moved = product.plus(times(1 - share, old), times(share, mean))
            return product.truncate(moved, old.a.shape[-1], like=old)

        full = lambda old, stacked: old + share * (lora.mean(stacked, cohort.weights) - old)
        return FedITState(lora.tree_map(low_rank, state.adapter, received, full=full))

    return fedit()._replace(aggregate=aggregate)


def times(factor, x):
    """A product, so many times."""
    return lora.LoRA(x.a, factor * x.b, x.scale)


# %% [markdown]
# A small problem: twelve clients, each with examples of mostly two of five classes.

# %%
INPUTS, WIDTH, CLASSES, CLIENTS, EACH = 8, 24, 5, 12, 40
key = jax.random.key(0)
base = {
    "hidden": {"kernel": jax.random.normal(key, (INPUTS, WIDTH)) / INPUTS**0.5},
    "head": {"kernel": jnp.zeros((WIDTH, CLASSES))},
}
x = jax.random.normal(jax.random.key(1), (4000, INPUTS))
y = jnp.argmax(jnp.tanh(x @ jax.random.normal(jax.random.key(2), (INPUTS, CLASSES))), 1)
odds = lambda i: jnp.where((y - i) % CLASSES < 2, 9.0, 1.0)
pick = lambda i: jax.random.choice(
    jax.random.fold_in(key, i), len(y), (EACH,), replace=False, p=odds(i) / odds(i).sum()
)
clients = fl.Population(jax.vmap(pick)(jnp.arange(CLIENTS)), jnp.full(CLIENTS, EACH), jnp.full(CLIENTS, 4))


def logits(base, adapter, x):
    params = lora.merge(base, adapter)
    return jnp.tanh(x @ params["hidden"]["kernel"]) @ params["head"]["kernel"]


def loss_fn(base, adapter, batch, key):
    return optax.softmax_cross_entropy_with_integer_labels(logits(base, adapter, batch[0]), batch[1]).mean()


# %% [markdown]
# It runs like any other, beside any other, with any wrapper around it; ten rounds are one program.

# %%
adapter = lora.new(jax.random.key(3), base, rank=4, targets="hidden/kernel", full="^head/", scale=1.0)
bias = {}
methods = {"fedit": fedit(), "halfway": halfway(), "halfway + FedProx": fl.proximal(halfway(), mu=0.01)}
for name, method in methods.items():
    round_fn = fl.make_round(method, loss_fn, optax.sgd(0.3))
    step = fl.make_step(round_fn, participants=6, steps=4, batch=10, smallest=EACH)
    run = fl.rounds.start(method, jax.random.key(4), adapter, clients=CLIENTS)
    run, info = jax.jit(fl.scan_rounds(step, 10), donate_argnums=3)(base, (x, y), clients, run, jax.random.key(5))
    right = (logits(base, run.state.adapter, x).argmax(-1) == y).mean()
    bias[name] = float(info.aggregation.bias_share.mean())
    print(f"{name:18} loss {float(info.loss[-1].mean()):.3f}, accuracy {float(right):.1%}, bias {bias[name]:.1%}")
assert bias["halfway"] > 0.4  # by intent: it goes half of the way

# %% [markdown]
# In a file of its own it is on the command line at once: `--methods my_method.py:halfway,fedit`, with options
# (`my_method.py:halfway:share=0.8`) and wrappers after it. `docs/methods.md` says what else a method can do: keep
# something on clients, add a term to their loss, learn on the server.
