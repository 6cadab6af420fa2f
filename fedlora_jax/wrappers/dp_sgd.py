"""Example-level differential privacy on clients: *Deep Learning with Differential Privacy*, Abadi et al., CCS 2016,
arXiv 1607.00133, alg. 1 (DP-SGD), of adapters.

    g_i <- grad f_i(w)        g <- (sum_i g_i min(1, C / |g_i|) + z C N(0, 1)) / B        in every local step

``f_i`` is what the method minimises, of a batch of one example; ``B`` how many are in the batch, which follows from how
many examples the client has, and that is no secret here. The gradient is of all that may move, over all arrays
together; penalties (FedProx, SCAFFOLD) look at no example and are added to it. Whatever is made of such gradients is
private too: optimizers, what is sent, what a client keeps, and the server needs no trust.

What it costs. Clients go through their examples epoch by epoch (``clients.sample_batches``), so that an example is in
one batch of each epoch. Two data sets are neighbours where one example of a client counts in one and not in the other,
at the same place. Whatever the order, which does not depend on the examples, epochs are then Gaussian mechanisms of
multiplier z, one after another, and T of them are one of z / sqrt(T): exact for a given order, an upper bound for a
random one (Chua et al., *How Private are DP-SGD Implementations?*, ICML 2024, arXiv 2403.17673, on what shuffling may
add; the smaller epsilon of Poisson sampling is not claimed). Where an epoch begins within the batch in which another
ends an example can be in a batch twice; ``uses`` counts that as four. Each client's account is of the rounds in which
it took part, against whoever sees all that it sends: no drawing of clients hides it.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedlora_jax import accountant
from fedlora_jax.checks import is_concrete, refuse_outside
from fedlora_jax.clients import Sampling
from fedlora_jax.lora import Adapter
from fedlora_jax.method import Method, all_held, each_alone, no_learning, no_meta_gradient, per_client
from fedlora_jax.wrappers.around import AboutWrapper, Wrapper, around

ABOUT = {
    "dp_sgd": AboutWrapper("DP-SGD", "Abadi et al. CCS 2016", "1607.00133", "gradients of examples bounded and noised")
}
ALWAYS = Sampling(1, 1)  # an example that is in every sum


def dp_sgd(
    inner: Method,
    uses: int,
    rounds: int,
    bound: float = 1.0,
    noise: float = 1.0,
    epsilon: float = 0.0,
    delta: float = 1e-5,
) -> Method:
    """``inner`` whose clients take local steps with clipped and noised gradients of their examples.

    It reports the noise multiplier, delta and the bound; ``spent`` says what a client has spent.

    Args:
      inner: a method whose clients look at their examples in local steps alone.
      uses: of an example in one round, at most (``uses``, of the client with the fewest examples).
      rounds: that are planned, in which a client may take part every time.
      bound: C, above 0, of the gradient of one example.
      noise: z, the noise multiplier; 0: none, and no epsilon.
      epsilon: above 0: z is the smallest with which no client exceeds it in ``rounds`` rounds, and ``noise`` is left
        out.
      delta: above 0; less than 1 over the number of a client's examples means something.

    Raises:
      ValueError: a number out of bounds, both ``noise`` and ``epsilon``, a method whose clients look at examples
        outside of local steps or share them, or what ``accountant`` raises.
    """
    refuse_outside("[1, inf)", uses=uses, rounds=rounds)
    refuse_outside("(0, inf)", bound=bound)
    refuse_outside("(0, 1)", delta=delta)
    refuse_outside("[0, inf)", noise=noise, epsilon=epsilon)
    if not is_concrete(noise, epsilon, delta):
        raise ValueError("what it spends is computed before a run: give noise, epsilon and delta as plain numbers")
    if epsilon and noise != 1.0:
        raise ValueError(f"epsilon {epsilon:g} decides the noise, and noise is {noise:g}: give one of them")
    refuse_other_looks(inner)
    z = noise_for(epsilon, uses * rounds, delta) if epsilon else noise
    if z:
        spent(z, uses * rounds, delta)  # is there an accountant?
    told = {"example_noise": z, "example_delta": delta, "example_clipping": bound}
    report = lambda own: {name: jnp.asarray(x, jnp.float32) for name, x in told.items()}
    return around(inner, Wrapper("dp_sgd", report=report))._replace(combine=partial(private_sum, bound, z))


def refuse_other_looks(inner: Method) -> None:
    """Refuse a method whose clients look at examples outside of their local steps, where no noise covers it."""
    if inner.query or inner.learn is not no_learning or inner.meta_gradient.train is not no_meta_gradient.train:
        raise ValueError(
            "clients of this method also look at examples outside of their local steps, which no noise of dp_sgd "
            "covers: wrap one whose clients only train, such as fedit"
        )
    if inner.held is not all_held:
        raise ValueError(
            "clients of this method choose what they send by their examples, which no noise of dp_sgd covers: wrap one "
            "whose clients all send the same arrays, such as fedit"
        )
    if inner.pool is not each_alone:
        raise ValueError("examples of several clients train together in this method: wrap one of clients apart")


def private_sum(bound: float | Array, z: float, gradients: Adapter, present: Array, key: Array) -> Adapter:
    """The clipped gradients ``[B, ...]`` of the examples that are there, added up, noised, over their number.

    One that is not finite counts as 0, so that no example moves the sum by more than the bound.
    """
    squares = sum(jnp.sum(jnp.square(x), range(1, x.ndim)) for x in jax.tree.leaves(gradients))
    fine = present & jnp.isfinite(squares)
    factor = fine * jnp.minimum(1.0, bound / jnp.sqrt(jnp.where(fine & (squares > 0), squares, 1.0)))
    total = lambda x: jnp.sum(jnp.where(per_client(fine, x) > 0, x * per_client(factor, x), 0), 0)
    leaves, tree = jax.tree.flatten(jax.tree.map(total, gradients))
    if z:
        drawn = [jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype) for i, x in enumerate(leaves)]
        leaves = [x + z * bound * e for x, e in zip(leaves, drawn, strict=True)]
    return jax.tree.unflatten(tree, [x / jnp.maximum(present.sum(), 1).astype(x.dtype) for x in leaves])


def uses(size: Any, examples: Any, batch: int) -> Any:
    """As how many uses of an example that is in one sum a round of a client counts, at most.

    Epochs begun, times how many of them one batch may meet: an example that is in a batch m times moves its sum m times
    as far, which costs as much as m^2 uses. 1 where no example is drawn again. It does not grow with the size.

    Args:
      size: how many examples the client has; an integer, or an array of them.
      examples: how many it goes through in a round, ``T B`` in T steps; as ``size``.
      batch: B.
    """
    epochs = -(-examples // size)
    return epochs * np.minimum(epochs, (batch + size - 2) // size + 1)


def spent(noise: float, count: int, delta: float) -> float:
    """Epsilon of a client after ``count`` uses in all; infinite without noise.

    Raises:
      ValueError: as ``accountant.epsilons``.
    """
    return accountant.epsilons(noise / math.sqrt(count), ALWAYS, 1, delta)[-1] if count else 0.0


def noise_for(epsilon: float, count: int, delta: float) -> float:
    """The smallest noise multiplier, but for a thousandth, with which ``count`` uses do not exceed ``epsilon``.

    It is a number of float32, in which noise is drawn.
    """
    one = accountant.noise_for(epsilon, ALWAYS, 1, delta)
    return float(np.nextafter(np.float32(one * math.sqrt(count)), np.float32(np.inf)))
