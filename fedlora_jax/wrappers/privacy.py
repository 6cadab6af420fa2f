"""Client-level privacy: *Learning Differentially Private Recurrent Language Models*, McMahan et al., ICLR 2018, arXiv
1710.06963 (DP-FedAvg).

    clip    D_c <- D_c min(1, bound / |D_c|)        noise    D_c <- D_c + N(0, deviation^2)        D_c = w_c - w_g

over all that clients share. The paper's server adds its noise to the sum; here it is on every client's update, so that
whatever the inner method computes of uploads, linear or not, comes after it. ``n`` clients of equal weight with
``deviation = z bound / sqrt(n)`` give their mean the noise ``z bound / n`` of DP-FedAvg at noise multiplier z. That is
central privacy, towards those who see the aggregate; each upload alone is protected by its own ``deviation / bound``
only. Clipping comes first when it is outside: ``clip(noise(m))``, on the command line ``m+noise+clip``.
Which epsilon that makes is not computed here; and the metrics of a run are not private.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedlora_jax.method import Method, per_client, refuse_outside
from fedlora_jax.wrappers.around import (
    AboutWrapper,
    around,
    needs_plain_uploads,
    replaced,
    square_norms,
    updates,
)

_MCMAHAN = "McMahan et al. ICLR 2018", "1710.06963"
ABOUT = {
    "clip": AboutWrapper("Clipping", *_MCMAHAN, "client updates shortened to a bound"),
    "noise": AboutWrapper("Gaussian noise", *_MCMAHAN, "noise on client updates"),
}


def clip(inner: Method, bound: float = 1.0) -> Method:
    """``inner`` whose server shortens each client's update to the norm ``bound``, all arrays together.

    As robust aggregation it is the norm bound of Sun et al., 2019, arXiv 1911.07963.

    Raises:
      ValueError: a bound not above 0, or an inner method that learns from more than adapters.
    """
    refuse_outside("(0, inf)", bound=bound)
    needs_plain_uploads("clip", inner)

    def receive(own, cohort, sent, received):
        d = updates(sent, received)
        return cohort.weights, replaced(sent, received, shortened(d, jnp.full(len(cohort.ids), bound)))

    return around(inner, receive=receive)


def noise(inner: Method, deviation: float = 0.01) -> Method:
    """``inner`` whose server gets each client's update with Gaussian noise on every entry that may move.

    Raises:
      ValueError: a deviation below 0, or an inner method that learns from more than adapters.
    """
    refuse_outside("[0, inf)", deviation=deviation)
    needs_plain_uploads("noise", inner)

    def receive(key, cohort, sent, received):
        keys = jax.vmap(lambda id_: jax.random.fold_in(key, id_))(cohort.ids)

        def noisy(d, i):
            draw = lambda key: jax.random.normal(jax.random.fold_in(key, i), d.shape[1:], d.dtype)
            return d + deviation * jax.vmap(draw)(keys)

        leaves, tree = jax.tree.flatten(updates(sent, received))
        new = jax.tree.unflatten(tree, [noisy(d, i) for i, d in enumerate(leaves)])
        return cohort.weights, replaced(sent, received, new)

    return around(
        inner,
        init=lambda key, state, adapter: key,
        receive=receive,
        finish=lambda old, new, cohort, sent, received: (new, jax.random.split(old.own, 1)[0]),
    )


def shortened(d, bounds):
    """Updates ``[C, ...]`` of norm at most ``bounds [C]``."""
    squares = square_norms(d)
    longer = squares > bounds**2
    factor = jnp.where(longer, bounds / jnp.sqrt(jnp.where(longer, squares, 1.0)), 1.0)
    return jax.tree.map(lambda x: x * per_client(factor, x), d)
