"""Client-level privacy: *Learning Differentially Private Recurrent Language Models*, McMahan et al., ICLR 2018, arXiv
1710.06963 (DP-FedAvg).

    clip    D_c <- D_c min(1, bound / |D_c|)        noise    D_c <- D_c + N(0, deviation^2)        D_c = w_c - w_g

over all that clients share. The paper's server adds its noise to the sum; here it is on every client's update, so that
whatever the inner method computes of uploads, linear or not, comes after it. With weights p_c, and if these tell
nothing, the mean of a cohort is noised at the multiplier

    z = deviation sqrt(sum p_c^2) / (bound max p_c)        n clients of equal weight:   z = deviation sqrt(n) / bound

so that ``deviation = z bound / sqrt(n)`` is DP-FedAvg at noise multiplier z where all clients count alike, and less
than that where they do not: use equal weights (``Population.weights``, on the command line ``--weights-of-clients
uniform``). That is central privacy, towards those who see the aggregate; each upload alone is protected by its own
``deviation / bound`` only. Clipping comes first when it is outside: ``clip(noise(m))``, on the command line
``m+noise+clip``. A client that keeps a part of what a wrapper inside keeps (SCAFFOLD's controls, say) makes it of its
clipped and noised update, as the server does.
Which epsilon that makes is not computed here; and the metrics of a run are not private.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedlora_jax.checks import refuse_outside
from fedlora_jax.keys import purpose
from fedlora_jax.method import Method, per_client
from fedlora_jax.wrappers.around import AboutWrapper, Wrapper, around
from fedlora_jax.wrappers.refusals import needs_plain_uploads
from fedlora_jax.wrappers.updates import change, changed, square_norms

_MCMAHAN = "McMahan et al. ICLR 2018", "1710.06963"
ABOUT = {
    "clip": AboutWrapper("Clipping", *_MCMAHAN, "client updates shortened to a bound"),
    "noise": AboutWrapper("Gaussian noise", *_MCMAHAN, "noise on client updates"),
}


def clip(inner: Method, bound: float = 1.0) -> Method:
    """``inner`` whose clients' updates are shortened to the norm ``bound`` each, all arrays together.

    As robust aggregation it is the norm bound of Sun et al., 2019, arXiv 1911.07963.

    Args:
      inner: a method that aggregates adapters.
      bound: the largest norm of one client's update, above 0, in units of the parameters.

    Raises:
      ValueError: a bound not above 0, or an inner method that learns from more than adapters.
    """
    refuse_outside("(0, inf)", bound=bound)
    needs_plain_uploads("clip", inner)

    def upload(own, mask, sent, received):
        d = jax.tree.map(lambda x: x[None], change(mask, sent, received))
        short = jax.tree.map(lambda x: x[0], shortened(d, jnp.full(1, bound)))
        return changed(mask, sent, received, short)

    return around(inner, Wrapper("clip", upload=upload))


def noise(inner: Method, deviation: float = 0.01) -> Method:
    """``inner`` whose server gets each client's update with Gaussian noise on every entry that it may move.

    Args:
      inner: a method that aggregates adapters.
      deviation: of the noise on every entry of one client's update, in units of the parameters, at least 0.

    Raises:
      ValueError: a deviation below 0, or an inner method that learns from more than adapters.
    """
    refuse_outside("[0, inf)", deviation=deviation)
    needs_plain_uploads("noise", inner)

    def upload(key, mask, sent, received):
        def noisy(d, i):
            return d + deviation * jax.random.normal(jax.random.fold_in(key, i), d.shape, d.dtype)

        leaves, tree = jax.tree.flatten(change(mask, sent, received))
        new = jax.tree.unflatten(tree, [noisy(d, i) for i, d in enumerate(leaves)])
        return changed(mask, sent, received, new)

    wrapper = Wrapper(
        "noise",
        init=lambda key, state, adapter: purpose(key, "noise"),
        client_context=lambda key, cohort, sent: jax.vmap(lambda id_: jax.random.fold_in(key, id_))(cohort.ids),
        upload=upload,
        finish=lambda old, new, cohort, sent, received: (new, jax.random.split(old.own, 1)[0]),
    )
    return around(inner, wrapper)


def shortened(d, bounds):
    """Updates ``[C, ...]`` of norm at most ``bounds [C]``."""
    squares = square_norms(d)
    longer = squares > bounds**2
    factor = jnp.where(longer, bounds / jnp.sqrt(jnp.where(longer, squares, 1.0)), 1.0)
    return jax.tree.map(lambda x: x * per_client(factor, x), d)
