"""Over-the-air aggregation: uploads add up in the channel, and arrive with its noise. Ours, after the model of Hamidi
et al., *Over-the-Air Fair Federated Learning via Multi-Objective Optimization*, 2025, arXiv 2501.03392 (OTA-FFL).

    client c transmits  eta p_c d_c / |h_c|        |h_c| ~ Rayleigh, power E |.|^2 of an entry at most 1
    the server has      sum_c p_c d_c + n / eta        n ~ N(0, 1 / snr),  eta = min_c |h_c| / (p_c rms(d_c))

Channels are inverted, so that the sum is without bias, and the weakest of them (or who counts and moves most) decides
how loud all may be. The noise is one vector for all. Which weights OTA-FFL gives clients for fairness (a modified
Chebyshev approach) is not public in what we could read; ``qffl`` and ``afl`` are such weights, inside or outside of it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedlora_jax.checks import refuse_outside
from fedlora_jax.keys import purpose
from fedlora_jax.method import Method
from fedlora_jax.wrappers.around import AboutWrapper, Wrapper, around
from fedlora_jax.wrappers.refusals import needs_plain_uploads
from fedlora_jax.wrappers.updates import changed, square_norms, updates

ABOUT = {
    "over_the_air": AboutWrapper("Over the air", "after Hamidi et al. 2025", "2501.03392", "channel noise on the mean")
}


def over_the_air(inner: Method, snr: float = 100.0) -> Method:
    """``inner`` of updates that are added up by a fading channel.

    Args:
      inner: a method that aggregates adapters; what it makes of a common shift of all updates is noise on its mean.
      snr: power that a client may use for an entry over that of the noise, where its channel is 1; above 0.

    Raises:
      ValueError: a ratio not above 0, or an inner method that learns from more than adapters.
    """
    refuse_outside("(0, inf)", snr=snr)
    needs_plain_uploads("over_the_air", inner)

    def receive(key, cohort, sent, received):
        d = updates(sent, received)
        fading, noise = jax.random.split(key)
        gain = jnp.sqrt(jax.random.exponential(fading, cohort.weights.shape))  # |h| of a complex Gaussian of power 1
        entries = sum(x[0].size for x in jax.tree.leaves(d))
        loud = cohort.weights * jnp.sqrt(square_norms(d) / entries)
        deviation = jnp.max(jnp.where(cohort.weights > 0, loud / jnp.maximum(gain, 1e-6), 0.0)) / snr**0.5
        leaves, tree = jax.tree.flatten(d)
        drawn = [jax.random.normal(jax.random.fold_in(noise, i), x.shape[1:], x.dtype) for i, x in enumerate(leaves)]
        heard = jax.tree.map(lambda x, n: x + deviation.astype(x.dtype) * n, d, tree.unflatten(drawn))
        return cohort.weights, changed(sent.mask, sent.adapter, received, heard)

    wrapper = Wrapper(
        "over_the_air",
        init=lambda key, state, adapter: purpose(key, "over the air"),
        receive=receive,
        finish=lambda old, new, cohort, sent, received: (new, jax.random.split(old.own, 1)[0]),
    )
    return around(inner, wrapper)
