"""Client-level differential privacy: *Learning Differentially Private Recurrent Language Models*, McMahan et al., ICLR
2018, arXiv 1710.06963 (DP-FedAvg), with the adaptive bound of *Differentially Private Learning with Adaptive Clipping*,
Andrew et al., NeurIPS 2021, arXiv 1905.03871.

    D_c <- D_c min(1, C / |D_c|)            D = (sum_c D_c + z_D C N(0, 1)) / n            every upload: w_g + D
    log C <- log C - eta (b - gamma)        b = 1/2 + (sum_c (1[|D_c| <= C] - 1/2) + s N(0, 1)) / n
    z_D = (z^-2 - (2 s)^-2)^(-1/2)          so that both together are one Gaussian of noise multiplier z

``n`` is how many clients are drawn on average. All count alike, whatever they weigh. Who never answers, or fails
(``leaving_out``), counts as drawn and as if it had sent nothing new: neither ``n`` nor the noise tells of it, a round
of nobody is noise alone, and what is told with fewer of those drawn is bounded by what is told with all of them. The
method inside sees the noised mean alone, as the upload of every client, those that are not there included: whatever it
makes of it, linear or not, is private to what ``accountant`` says. That is central privacy: the server that adds up is
trusted. What a method is told beside uploads (``About.tells``) is not covered, and noise is drawn in float32 (Mironov,
CCS 2012, on what its last bits tell).

Ours: ``s`` is n / 20 as published, or more where that would take over a tenth of z^-2. On ``products`` a client's
update is the change of its products, ``a_c b_c - a b``: clipping, the mean and its noise are of these ``[in, out]`` and
do not depend on how a product is split into factors. The factors of the mean are one step of alternating least squares
from a (b from a, then a from that b, as far as they may move), which depends on what the columns of a span alone.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedlora_jax import accountant, product
from fedlora_jax.accountant import Accountant
from fedlora_jax.checks import is_concrete, refuse_outside
from fedlora_jax.clients import Sampling
from fedlora_jax.decomposition import solve
from fedlora_jax.keys import purpose
from fedlora_jax.lora import Adapter, LoRA, tree_map
from fedlora_jax.method import Cohort, Dispatch, Method, all_held, all_of_it, per_client
from fedlora_jax.wrappers.around import AboutWrapper, Wrapper, around
from fedlora_jax.wrappers.refusals import needs_plain_uploads
from fedlora_jax.wrappers.updates import change, changed, present, square_norms, updates

_MCMAHAN = "McMahan et al. ICLR 2018", "1710.06963"
ABOUT = {
    "clip": AboutWrapper("Clipping", *_MCMAHAN, "client updates shortened to a bound"),
    "dp": AboutWrapper("DP", *_MCMAHAN, "the mean update bounded, noised and accounted for"),
}
MOST_OF_BOUND = 0.1  # of z^-2 that the adaptive bound takes
RIDGE = 1e-4  # of the mean eigenvalue, in least squares for factors

Space = Literal["factors", "products"]


def clip(inner: Method, bound: float = 1.0) -> Method:
    """``inner`` whose clients' updates are shortened to the norm ``bound`` each, all arrays together.

    As robust aggregation it is the norm bound of Sun et al., 2019, arXiv 1911.07963; without noise it hides nothing.

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


class Private(NamedTuple):
    """key: of the noise. round: [] rounds done. bound: [] C of the round to come."""

    key: Array
    round: Array
    bound: Array


def dp(
    inner: Method,
    sampling: Sampling,
    rounds: int,
    bound: float = 1.0,
    noise: float = 1.0,
    epsilon: float = 0.0,
    delta: float = 1e-5,
    quantile: float = 0.0,
    eta: float = 0.2,
    on: Space = "factors",
    by: Accountant = "pld",
) -> Method:
    """``inner`` of the clipped and noised mean update, accounted for.

    It reports ``epsilon``, spent so far at ``delta``, the noise multiplier, and the bound as ``clipping``. After
    ``rounds`` rounds nothing that clients send is read any more, so that no run exceeds what it was planned for.

    Args:
      inner: a method that averages adapters.
      sampling: who takes part in a round.
      rounds: that are planned.
      bound: C, of the first round, above 0; in units of the parameters, or of their products.
      noise: z, the noise multiplier; 0: none, and no epsilon to report.
      epsilon: above 0: z is the smallest with which ``rounds`` rounds do not exceed it, and ``noise`` is left out.
      delta: above 0; less than 1 over the number of clients means something.
      quantile: gamma, from 0 to 1, of the norms that C follows; 0: C stays.
      eta: of C's steps.
      on: ``factors``, or ``products``.
      by: the accountant, ``pld`` or ``rdp``.

    Raises:
      ValueError: a number out of bounds, both ``noise`` and ``epsilon``, a method that learns from more than
        adapters or whose clients choose what they send, or what ``accountant`` raises.
    """
    refuse_outside("(0, inf)", bound=bound, eta=eta)
    refuse_outside("[0, inf)", noise=noise, epsilon=epsilon)
    refuse_outside("[0, 1)", quantile=quantile)
    if not is_concrete(noise, epsilon, delta):
        raise ValueError("what it spends is computed before a run: give noise, epsilon and delta as plain numbers")
    if epsilon and noise != 1.0:
        raise ValueError(f"epsilon {epsilon:g} decides the noise, and noise is {noise:g}: give one of them")
    refuse_what_noise_does_not_cover(inner, on)
    z = accountant.noise_for(epsilon, sampling, rounds, delta, by) if epsilon else noise
    spent = np.asarray(accountant.epsilons(z, sampling, rounds, delta, by), np.float32)
    of_bound, of_update = shared_noise(z, sampling.expected) if quantile else (0.0, z)
    plan = Plan(rounds, sampling.expected, of_update, of_bound, quantile, eta, on)
    first = lambda key: Private(purpose(key, "noise"), jnp.zeros((), jnp.int32), jnp.asarray(bound, jnp.float32))
    wrapper = Wrapper(
        "dp",
        init=lambda key, state, adapter: first(key),
        receive=partial(noised_mean, plan),
        always=True,
        finish=lambda old, new, cohort, sent, received: (new, next_round(plan, old.own, cohort, sent, received)),
        report=lambda own: (
            ({"epsilon": jnp.asarray(spent)[jnp.minimum(own.round, rounds)]} if z else {})
            | {
                "delta": jnp.float32(delta),
                "noise_multiplier": jnp.float32(z),
                "clipping": own.bound,
            }
        ),
    )
    return around(inner, wrapper)


class Plan(NamedTuple):
    """What does not change over the ``rounds`` of a run: ``n``, z_D, s, gamma, eta and the space."""

    rounds: int
    n: float
    of_update: float
    of_bound: float
    quantile: float
    eta: float
    on: Space


def refuse_what_noise_does_not_cover(inner: Method, on: Space) -> None:
    """Refuse methods that learn from more than a mean of uploads, or on products that are not everybody's."""
    needs_plain_uploads("dp", inner)
    if on not in ("factors", "products"):
        raise ValueError(f"on must be factors or products, got {on!r}")
    if inner.held is not all_held:
        raise ValueError(
            "clients of this method choose what they send, which no noise covers: wrap one whose clients all send the "
            "same arrays, such as fedit"
        )
    if on == "products" and inner.upload_mask is not all_of_it:
        raise ValueError(
            "products of this method are of factors of which clients keep some to themselves: use on=factors"
        )


def bounded(plan: Plan, own: Private, cohort: Cohort, sent: Dispatch, received: Adapter):
    """What clients changed ``[C, ...]``; ``[C]`` each: by what that is multiplied, is it there, does its norm fit."""
    there, d = present(cohort), updates(sent, received)
    if plan.on == "products":
        d = products_of(changed(sent.mask, sent.adapter, received, d), sent.adapter)
    squares = norms_on(plan.on, d)
    factor = there * jnp.minimum(1.0, own.bound / jnp.sqrt(jnp.maximum(squares, 1e-30)))
    return d, factor, there, squares <= own.bound**2


def noised_mean(plan: Plan, own: Private, cohort: Cohort, sent: Dispatch, received: Adapter):
    """Equal weights ``[C]``, and what each client was sent with the noised mean of all updates on what is shared."""
    d, factor, _, _ = bounded(plan, own, cohort, sent, received)
    live = (own.round < plan.rounds) / plan.n  # planned rounds alone read what clients send
    leaves, tree = jax.tree.flatten(summed(plan.on, d, factor))
    key_of = lambda i: jax.random.fold_in(purpose(own.key, "updates"), i)
    drawn = [jax.random.normal(key_of(i), x.shape, x.dtype) for i, x in enumerate(leaves)]
    noisy = [live * (x + plan.of_update * own.bound * e) for x, e in zip(leaves, drawn, strict=True)]
    mean = jax.tree.unflatten(tree, noisy)
    if plan.on == "products":
        mean = in_factors(mean, *(jax.tree.map(lambda x: x[0], tree) for tree in (sent.adapter, sent.mask)))
    same = jax.tree.map(lambda x, d: jnp.broadcast_to(d, x.shape), sent.adapter, mean)
    # The rest stays as it was sent: what clients keep for themselves goes no further than this.
    return jnp.full(len(cohort.ids), 1 / len(cohort.ids)), changed(sent.mask, sent.adapter, sent.adapter, same)


def next_round(plan: Plan, own: Private, cohort: Cohort, sent: Dispatch, received: Adapter) -> Private:
    """The state of the round to come, its bound nearer to the quantile."""
    key = jax.random.split(own.key, 1)[0]
    if not plan.quantile:
        return Private(key, own.round + 1, own.bound)
    _, _, there, fits = bounded(plan, own, cohort, sent, received)
    votes = jnp.sum(there * (fits - 0.5)) + plan.of_bound * jax.random.normal(purpose(own.key, "bound"))
    step = jnp.exp(-plan.eta * (0.5 + votes / plan.n - plan.quantile))
    return Private(key, own.round + 1, own.bound * jnp.where(own.round < plan.rounds, step, 1.0))


def shared_noise(z: float, n: float) -> tuple[float, float]:
    """Deviations ``(s, z_D)`` of the noise on the votes about the bound, and on updates, in bounds; one Gaussian of z.

    Args:
      z: noise multiplier of both together.
      n: clients that take part on average.
    """
    if z == 0:
        return 0.0, 0.0
    share = min(MOST_OF_BOUND, (10 * z / n) ** 2)  # (2 s)^-2 / z^-2 with s = n / 20
    return z / (2 * share**0.5), z / (1 - share) ** 0.5


def shortened(d, bounds):
    """Updates ``[C, ...]`` of norm at most ``bounds [C]``."""
    squares = square_norms(d)
    longer = squares > bounds**2
    factor = jnp.where(longer, bounds / jnp.sqrt(jnp.where(longer, squares, 1.0)), 1.0)
    return jax.tree.map(lambda x: x * per_client(factor, x), d)


def products_of(new: Adapter, old: Adapter) -> Adapter:
    """What changed of products, kept factored, and of the rest; ``[C, ...]``."""
    return tree_map(product.difference, new, old, full=jnp.subtract)


def norms_on(on: Space, d: Adapter) -> Array:
    """``[C]`` squared norms of updates, or of products, over all arrays together."""
    if on == "factors":
        return square_norms(d)
    sizes = tree_map(lambda x: product.norm(x), d, full=lambda x: x)
    return square_norms(sizes)


def summed(on: Space, d: Adapter, weights: Array) -> Adapter:
    """``sum_c weights_c D_c``; of products as matrices ``[..., in, out]``, the scale in them."""
    total = lambda x: jnp.sum(x * per_client(weights, x), 0)
    if on == "factors":
        return jax.tree.map(total, d)

    def whole(x: LoRA) -> Array:
        wide = product.total(x, weights)
        return x.scale * (wide.a @ wide.b)

    return tree_map(whole, d, full=total)


def in_factors(mean: Adapter, start: Adapter, mask: Adapter) -> Adapter:
    """How the factors of ``start`` change so that their product changes about as ``mean``, as far as they may move."""

    def one(x: LoRA, moved: Array, m: LoRA) -> LoRA:
        target = moved / x.scale
        db = m.b * _solved(x.a, target)
        b = x.b + db
        left = target - x.a @ db
        return LoRA(m.a * _solved(b.mT, left.mT).mT, db, x.scale)

    return tree_map(one, start, mean, mask, full=lambda x, d, m: d)


def _solved(a: Array, y: Array) -> Array:
    """Least squares ``x`` of ``a x = y``, each ``[..., n, r]`` and ``[..., n, k]``; a little towards 0."""
    gram = a.mT @ a
    size = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None] / gram.shape[-1]
    return solve(gram + (RIDGE * size + 1e-12) * jnp.eye(gram.shape[-1]), a.mT @ y)
