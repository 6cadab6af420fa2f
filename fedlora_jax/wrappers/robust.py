"""Robust aggregation: what the inner aggregation receives is replaced.

    median, trimmed_mean  *Byzantine-Robust Distributed Learning*, Yin et al., ICML 2018, arXiv 1803.01498
    krum                  *Machine Learning with Adversaries*, Blanchard et al., NeurIPS 2017, arXiv 1703.02757
    geometric_median      *Robust Aggregation for Federated Learning* (RFA), Pillutla et al., IEEE TSP 2022, arXiv
                          1912.13445
    trust                 after *FLTrust*, Cao et al., NDSS 2021, arXiv 2012.13995
    norm_bound            norm thresholding, *Can You Really Backdoor Federated Learning?*, Sun et al., 2019,
                          arXiv 1911.07963, at a multiple of the cohort's median norm (ours)

So that they work around any method: the coordinate-wise median and trimmed mean are taken of clients' *updates*, and
every client's upload becomes what it was sent plus that (a mean of identical uploads is the upload; where all were sent
the same it is the median of uploads themselves). Krum, the geometric median and trust say how much clients count. One
of weight zero takes no part; as published, the others count alike whatever they weigh, but for the geometric median's.

All look at factors, where nothing else is said. The median of factors is no median of their products: it is bounded by
theirs, entry by entry, and that is all. ``on=products`` has Krum, the geometric median and the norm bound look at the
products, so at what models compute with, whatever factors they were sent as (``geometry``).

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
from fedlora_jax.product import safe_sqrt
from fedlora_jax.wrappers.around import AboutWrapper, Wrapper, around
from fedlora_jax.wrappers.geometry import Entries, Products, parts, refuse_space, total, way
from fedlora_jax.wrappers.privacy import shortened
from fedlora_jax.wrappers.refusals import needs_plain_uploads
from fedlora_jax.wrappers.updates import changed, inner_products, present, square_norms, updates

_YIN = "Yin et al. ICML 2018", "1803.01498"
ABOUT = {
    "median": AboutWrapper("Median", *_YIN, "coordinate-wise median of updates"),
    "trimmed_mean": AboutWrapper("Trimmed mean", *_YIN, "coordinate-wise, without the extremes"),
    "krum": AboutWrapper("Krum", "Blanchard et al. NeurIPS 2017", "1703.02757", "the update nearest to others"),
    "geometric_median": AboutWrapper("RFA", "Pillutla et al. 2022", "1912.13445", "weights of the geometric median"),
    "trust": AboutWrapper(
        "Trust", "after Cao et al. NDSS 2021", "2012.13995", "updates weigh by their cosine to one", "who it is"
    ),
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


def krum(inner: Method, outliers: int = 1, kept: int = 1, on: str = "factors") -> Method:
    """``inner`` of the ``kept`` updates with the smallest sum of squared distances to their nearest others.

    Args:
      inner: a method whose clients all start from the same.
      outliers: how many clients may send anything; n clients count their n - outliers - 2 nearest others.
      kept: 1: Krum; more: Multi-Krum, with the clients' weights.
      on: in which space updates are compared, ``factors`` or ``products``.

    Raises:
      ValueError: a number out of range, or (when a round is traced) fewer than ``outliers + 3`` or ``kept`` clients.
    """
    refuse_outside("[0, inf)", outliers=outliers)
    refuse_outside("[1, inf)", kept=kept)
    needs_plain_uploads("krum", inner)
    refuse_space("krum", on, inner)

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
        scores = _krum_scores(parts(on, sent, received), there, outliers)
        rank = jnp.argsort(jnp.argsort(scores))
        chosen = jnp.where((rank < kept) & there, cohort.weights, 0.0)
        safe = jax.tree.map(lambda x, y: jnp.where(per_client(chosen > 0, x) > 0, y, x), sent.adapter, received)
        return chosen / jnp.maximum(chosen.sum(), 1e-12), safe  # 0 * inf is no zero: who is out sends nothing

    return around(inner, Wrapper("krum", receive=receive))


def geometric_median(inner: Method, steps: int = 32, floor: float = 1e-6, on: str = "factors") -> Method:
    """``inner`` of updates by the weights of which their mean is the geometric median (RFA, smoothed Weiszfeld).

        beta_c <- p_c / max(floor, |d_c - v|)        v <- sum_c beta_c d_c / sum_c beta_c        (algorithm 2)

    Only weights change, so that it is the inner method that takes the mean: of products where it averages products.

    Args:
      inner: a method whose clients all start from the same.
      steps: of Weiszfeld's algorithm, from the mean. Each takes from an outlier however far about the share b / g of
        what is left of it, of b such outliers and g others.
      floor: nu, the least distance, in units of the parameters.
      on: in which space distances are taken, ``factors`` or ``products``.

    Raises:
      ValueError: a number out of range, or a space that is none.
    """
    refuse_outside("[1, 1000]", steps=steps)
    refuse_outside("(0, inf)", floor=floor)
    needs_plain_uploads("geometric_median", inner)
    refuse_space("geometric_median", on, inner)

    def receive(own, cohort, sent, received):
        found = parts(on, sent, received)
        held = jnp.diagonal(total([x.common() for x in found]))
        whole = jnp.sqrt(held.max() / jnp.maximum(held, 1.0))  # as if everybody held all

        def step(_, weights):
            far = whole * safe_sqrt(total([x.from_mean(weights) for x in found]))
            new = cohort.weights / jnp.maximum(far, floor)
            return (new / new.sum()).astype(weights.dtype)  # a float32 norm is more where jax has 64 bits

        return jax.lax.fori_loop(0, steps, step, cohort.weights), received

    return around(inner, Wrapper("geometric_median", receive=receive))


def trust(inner: Method, root: int = -1) -> Method:
    """``inner`` of clients as far as they go where a reference goes, all as long as it (after FLTrust).

        weight_c = max(0, cos(d_c, r)) / sum of these        d_c <- |r| / |d_c| d_c        (eq. 2-4)

    The paper's reference ``r`` is what the server trains on clean data of its own, which here it has not; nor a loss.
    In its place is the update of a client that is trusted, whose data then are these root data (it counts too), or
    where there is none in the round the coordinate-wise median of all updates, which is right where most clients are.

    Args:
      inner: a method whose clients all start from the same.
      root: the number of the trusted client; -1: nobody is.

    Raises:
      ValueError: a number below -1.
    """
    refuse_outside("[-1, inf)", root=root)
    needs_plain_uploads("trust", inner)

    def receive(own, cohort, sent, received):
        d, there = updates(sent, received), cohort.weights > 0
        rooted = (cohort.ids == root) & there

        def reference(x, m):
            median = _mean_between(x, *_voters(m, there, lambda n: ((n - 1) // 2, n // 2)))
            return jnp.where(rooted.any(), (per_client(rooted, x) * x).sum(0), median) * m

        r = jax.tree.map(reference, d, sent.mask)  # [C, ...] as much of it as a client holds
        sizes, goal = (jnp.sqrt(square_norms(x)) for x in (d, r))
        cosine = inner_products(d, r) / jnp.maximum(sizes * goal, 1e-30)
        trusted = jnp.where(there, jnp.maximum(cosine, 0.0), 0.0)
        anybody = trusted.sum() > 0
        scale = jnp.where(trusted > 0, goal / jnp.maximum(sizes, 1e-30), 0.0)  # of none nothing is left
        weights = jnp.where(anybody, trusted / jnp.maximum(trusted.sum(), 1e-12), cohort.weights)
        d = jax.tree.map(lambda x: x * per_client(scale, x), d)
        return weights, changed(sent.mask, sent.adapter, received, d)

    return around(inner, Wrapper("trust", receive=receive))


def norm_bound(inner: Method, factor: float = 2.0, on: str = "factors") -> Method:
    """``inner`` of updates shortened to ``factor`` times the median of their norms.

    Args:
      inner: a method that aggregates adapters.
      factor: above 0, in medians of the cohort's norms.
      on: whose norms: of ``factors``, or of ``products``, then on the way that factors have gone.

    Raises:
      ValueError: a factor not above 0.
    """
    refuse_outside("(0, inf)", factor=factor)
    needs_plain_uploads("norm_bound", inner)
    refuse_space("norm_bound", on, inner)

    def bound(cohort, norms):
        n = present(cohort).sum().astype(int)
        return factor * _mean_between(norms, cohort.weights > 0, (n - 1) // 2, n // 2)

    def receive(own, cohort, sent, received):
        d = updates(sent, received)
        if on == "products":
            path = way(sent, received)
            far = path.within(bound(cohort, path.norms()))
            d = jax.tree.map(lambda x: x * per_client(far, x), d)
        else:
            norms = jnp.sqrt(jnp.maximum(square_norms(d), 1e-30))
            d = shortened(d, jnp.broadcast_to(bound(cohort, norms), norms.shape))
        return cohort.weights, changed(sent.mask, sent.adapter, received, d)

    return around(inner, Wrapper("norm_bound", receive=receive))


def _coordinatewise(name: str, inner: Method, middle) -> Method:
    needs_plain_uploads(name, inner)

    def receive(own, cohort, sent, received):
        def voted(x, m):
            return jnp.broadcast_to(_mean_between(x, *_voters(m, cohort.weights > 0, middle)), x.shape)

        d = jax.tree.map(voted, updates(sent, received), sent.mask)
        return cohort.weights, changed(sent.mask, sent.adapter, received, d)

    return around(inner, Wrapper(name, receive=receive))


def _voters(m: Array, there: Array, middle) -> tuple[Array, Array, Array]:
    """Who votes on each entry, and which places of their values count."""
    voters = (m > 0) & (per_client(there, m) > 0)
    return voters, *middle(voters.sum(0))


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


def _krum_scores(found: list[Entries | Products], there: Array, outliers: int) -> Array:
    """``[C]`` sums of squared distances to the nearest ``n - outliers - 2`` others; infinite for who is not there."""
    clients, n = there.shape[0], there.sum()
    far, both = total([x.apart() for x in found]), total([x.common() for x in found])
    far *= jnp.diagonal(both).max() / jnp.maximum(both, 1.0)
    pairs_of_two = there[:, None] & there[None] & ~jnp.eye(clients, dtype=bool) & (both > 0)
    far = jnp.sort(jnp.where(pairs_of_two & jnp.isfinite(far), far, jnp.inf), 1)
    nearest = jnp.arange(clients) < jnp.maximum(n - outliers - 2, 1)
    score = jnp.where(nearest, far, 0.0).sum(1)
    return jnp.where(there, jnp.minimum(score, 1e30), jnp.inf)  # who is there comes before who is not
