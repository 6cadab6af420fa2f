"""Robust aggregation: what the inner aggregation receives is replaced.

    median, trimmed_mean  *Byzantine-Robust Distributed Learning*, Yin et al., ICML 2018, arXiv 1803.01498
    krum                  *Machine Learning with Adversaries*, Blanchard et al., NeurIPS 2017, arXiv 1703.02757
    norm_bound            norm thresholding, *Can You Really Backdoor Federated Learning?*, Sun et al., 2019,
                          arXiv 1911.07963, at a multiple of the cohort's median norm (ours)

So that they work around any method: the coordinate-wise median and trimmed mean are taken of clients' *updates*, and
every client's upload becomes what it was sent plus that (a mean of identical uploads is the upload; where all were sent
the same it is the median of uploads themselves). Krum gives all others the weight zero. All live in factor space. A
client of weight zero takes no part; as published, the others count alike whatever they weigh.

Ours, where clients hold different entries (ranks, depths, a choice of their own): on an entry only those vote who hold
it, so that what two clients alone hold has no majority, and one of them moves it. Krum compares two clients on what
both hold, as if that were all; it keeps whole clients, and for what none of those kept holds it is as if nobody had
been there. Norms are of all that a client holds, hence larger for larger ranks, and bounded alike. What becomes of
uploads then is up to the inner method: FedIT still takes columns that a client does not hold for zero.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax.checks import refuse_outside
from fedlora_jax.method import Method, per_client
from fedlora_jax.wrappers.around import AboutWrapper, Wrapper, around
from fedlora_jax.wrappers.privacy import shortened
from fedlora_jax.wrappers.refusals import needs_plain_uploads
from fedlora_jax.wrappers.updates import changed, present, square_norms, updates

_YIN = "Yin et al. ICML 2018", "1803.01498"
ABOUT = {
    "median": AboutWrapper("Median", *_YIN, "coordinate-wise median of updates"),
    "trimmed_mean": AboutWrapper("Trimmed mean", *_YIN, "coordinate-wise, without the extremes"),
    "krum": AboutWrapper("Krum", "Blanchard et al. NeurIPS 2017", "1703.02757", "the update nearest to others"),
    "norm_bound": AboutWrapper("Norm bound", "Sun et al. 2019", "1911.07963", "updates bounded by their median norm"),
}


def median(inner: Method) -> Method:
    """``inner`` of the coordinate-wise median update.

    Args:
      inner: a method that aggregates adapters.

    Raises:
      ValueError: an inner method that learns from more than adapters (as for all in this file).
    """
    return _coordinatewise("median", inner, lambda n: ((n - 1) // 2, n // 2))


def trimmed_mean(inner: Method, share: float = 0.1) -> Method:
    """``inner`` of the coordinate-wise mean without the ``share`` largest and the ``share`` smallest updates.

    Args:
      inner: a method that aggregates adapters.
      share: of the cohort that is left out at either end, from 0 (the mean) to below 0.5.

    Raises:
      ValueError: a share that leaves nothing.
    """
    refuse_outside("[0, 0.5)", share=share)

    def middle(n):
        lowest = jnp.floor(share * n + 1e-4).astype(int)  # 0.1 * 10 is 1, whatever float32 makes of it
        return lowest, n - 1 - lowest

    return _coordinatewise("trimmed_mean", inner, middle)


def krum(inner: Method, outliers: int = 1, kept: int = 1) -> Method:
    """``inner`` of the ``kept`` updates with the smallest sum of squared distances to their nearest others.

    Args:
      inner: a method whose clients all start from the same.
      outliers: how many clients may send anything; n clients count their n - outliers - 2 nearest others.
      kept: 1: Krum; more: Multi-Krum, with the clients' weights.

    Raises:
      ValueError: a number out of range, or (when a round is traced) fewer than ``outliers + 3`` or ``kept`` clients.
    """
    refuse_outside("[0, inf)", outliers=outliers)
    refuse_outside("[1, inf)", kept=kept)
    needs_plain_uploads("krum", inner)

    def receive(own, cohort, sent, received):
        clients = len(cohort.ids)
        if clients < outliers + 3:
            raise ValueError(
                f"krum with {outliers} outliers needs a cohort of at least {outliers + 3} clients, got {clients}: "
                "lower outliers or draw more clients per round"
            )
        if kept > clients:
            raise ValueError(f"krum keeps {kept} of a cohort of {clients} clients: lower kept, 1 is Krum as published")
        there = cohort.weights > 0
        scores = _krum_scores(updates(sent, received), sent.mask, there, outliers)
        rank = jnp.argsort(jnp.argsort(scores))
        chosen = jnp.where((rank < kept) & there, cohort.weights, 0.0)
        safe = jax.tree.map(lambda x, y: jnp.where(per_client(chosen > 0, x) > 0, y, x), sent.adapter, received)
        return chosen / jnp.maximum(chosen.sum(), 1e-12), safe  # 0 * inf is no zero: who is out sends nothing

    return around(inner, Wrapper("krum", receive=receive))


def norm_bound(inner: Method, factor: float = 2.0) -> Method:
    """``inner`` of updates shortened to ``factor`` times the median of their norms.

    Args:
      inner: a method that aggregates adapters.
      factor: above 0, in medians of the cohort's norms.

    Raises:
      ValueError: a factor not above 0.
    """
    refuse_outside("(0, inf)", factor=factor)
    needs_plain_uploads("norm_bound", inner)

    def receive(own, cohort, sent, received):
        d = updates(sent, received)
        norms, n = jnp.sqrt(jnp.maximum(square_norms(d), 1e-30)), present(cohort).sum().astype(int)
        bound = factor * _mean_between(norms, cohort.weights > 0, (n - 1) // 2, n // 2)
        d = shortened(d, jnp.broadcast_to(bound, norms.shape))
        return cohort.weights, changed(sent.mask, sent.adapter, received, d)

    return around(inner, Wrapper("norm_bound", receive=receive))


def _coordinatewise(name: str, inner: Method, middle) -> Method:
    needs_plain_uploads(name, inner)

    def receive(own, cohort, sent, received):
        def voted(x, m):
            voters = (m > 0) & (per_client(cohort.weights > 0, m) > 0)
            return jnp.broadcast_to(_mean_between(x, voters, *middle(voters.sum(0))), x.shape)

        d = jax.tree.map(voted, updates(sent, received), sent.mask)
        return cohort.weights, changed(sent.mask, sent.adapter, received, d)

    return around(inner, Wrapper(name, receive=receive))


def _mean_between(x: Array, voters: Array, low: Array, high: Array) -> Array:
    """``[...]`` the mean of the values from place ``low`` to ``high`` (both in) of ``x [C, ...]``, sorted over voters.

    Args:
      x: ``[C, ...]``.
      voters: ``[C, ...]``, broadcastable against it: whose values count. Without any the mean is 0.
      low, high: ``[...]`` without C.
    """
    x = jnp.where(voters, x, jnp.inf)  # last, as what is not a number: it is no one's middle
    x = jnp.sort(jnp.where(jnp.isnan(x), jnp.inf, x), 0)
    place = jnp.arange(x.shape[0]).reshape(-1, *(1,) * (x.ndim - 1))
    between = (place >= low) & (place <= high) & (place < voters.sum(0))
    return jnp.where(between, x, 0.0).sum(0) / jnp.maximum(high - low + 1, 1)


def _krum_scores(d, masks, there: Array, outliers: int) -> Array:
    """``[C]`` sums of squared distances to the nearest ``n - outliers - 2`` others; infinite for who is not there."""
    clients, n = there.shape[0], there.sum()
    pairs = list(zip(*map(jax.tree.leaves, (d, masks)), strict=True))
    far = sum((_square_distances(x, m) for x, m in pairs), jnp.zeros(()))
    both = sum((_held_by_both(x, m) for x, m in pairs), jnp.zeros(()))
    far *= jnp.diagonal(both).max() / jnp.maximum(both, 1.0)
    pairs_of_two = there[:, None] & there[None] & ~jnp.eye(clients, dtype=bool) & (both > 0)
    far = jnp.sort(jnp.where(pairs_of_two & jnp.isfinite(far), far, jnp.inf), 1)
    nearest = jnp.arange(clients) < jnp.maximum(n - outliers - 2, 1)
    score = jnp.where(nearest, far, 0.0).sum(1)
    return jnp.where(there, jnp.minimum(score, 1e30), jnp.inf)  # who is there comes before who is not


def _held_by_both(x: Array, m: Array) -> Array:
    """``[C, C]`` how many entries of one array ``x [C, ...]`` two clients both hold."""
    m = m.astype(x.dtype)
    return jnp.einsum("c...,d...->cd", m, m) * (x.size / m.size)


def _square_distances(x: Array, m: Array) -> Array:
    """``[C, C]`` between the rows of one array, over what both hold; as differences, which do not cancel."""
    one = lambda y, n: jax.vmap(lambda z, k: jnp.sum(n * k * (y - z) ** 2))(x, m)
    return jax.vmap(one)(x, m)
