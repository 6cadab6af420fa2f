"""What rounds of a noised sum of clients' updates cost in (epsilon, delta): Google's ``dp-accounting`` (extra
``privacy``).

A round adds up what the clients of a ``clients.Sampling`` send, each of norm 1 at most, with Gaussian noise of
deviation z, the noise multiplier. Rounds compose; what is told are upper bounds.

    sampling                    neighbours              pld                                rdp
    everybody                   a client more or less   exact: Balle & Wang 2018 [4]       Gaussian
    Poisson                     a client more or less   its distribution [3]               Mironov et al. 2019 [2]
    Poisson, cut off            a client more or less   its distribution [3]               -
    fixed size                  a client replaced       [3] at rate 1                      Wang et al. 2019 [1] at z / 2

A client replaced moves the sum by up to 2, hence z / 2. ``pld`` composes privacy loss distributions (Koskela et al.,
AISTATS 2020, arXiv 1906.03049; Doroshenko et al., PETS 2022, arXiv 2207.04380) and is tighter than ``rdp``, Renyi
divergences (Mironov, CSF 2017, arXiv 1702.07476). [1] AISTATS 2019, arXiv 1808.00087, theorem 27; [2] arXiv 1908.10530;
[3] arXiv 2508.15089, the event of dp-accounting for cohorts that are cut off at random; [4] ICML 2018, arXiv
1805.06530, theorem 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import Any, Literal

from fedlora_jax.checks import refuse_outside
from fedlora_jax.clients import Sampling

Accountant = Literal["pld", "rdp"]
INTERVAL = 1e-3  # of privacy losses; an upper bound at any, and at a tenth of it lower by 1e-5 of itself
CLOSE = 1e-3  # of the noise multiplier that ``noise_for`` finds: how much more it is than it need be, at most


def neighbours(sampling: Sampling) -> str:
    """Between which two populations what is told is nearly the same."""
    return "a client replaced" if sampling.rate == 1 and sampling.most < sampling.clients else "a client more or less"


@lru_cache(maxsize=64)
def epsilons(noise: float, sampling: Sampling, rounds: int, delta: float, by: Accountant = "pld") -> tuple[float, ...]:
    """Epsilon after 0, 1, ... ``rounds`` rounds.

    Args:
      noise: z, at least 0; 0 is not private (infinite).
      sampling: who takes part.
      rounds: how many.
      delta: above 0, below 1.
      by: which accountant.

    Raises:
      ValueError: a number out of bounds, a sampling that the accountant does not know, or no ``dp-accounting``.
    """
    refuse_outside("[0, inf)", noise=noise)
    refuse_outside("[1, inf)", rounds=rounds)
    refuse_outside("(0, 1)", delta=delta)
    if noise == 0:
        return (0.0, *(math.inf,) * rounds)
    return (0.0, *_BY[_known(by)](noise, sampling, rounds, delta))


@lru_cache(maxsize=64)
def noise_for(epsilon: float, sampling: Sampling, rounds: int, delta: float, by: Accountant = "pld") -> float:
    """The smallest noise multiplier, but for a thousandth, with which ``rounds`` rounds do not exceed ``epsilon``.

    Raises:
      ValueError: as ``epsilons``, or no multiplier below 10^4 is enough.
    """
    refuse_outside("(0, inf)", epsilon=epsilon)
    spent = lambda z: _BY[_known(by)](z, sampling, rounds, delta, last=True)[-1]
    low, high = 0.0, 1.0
    while spent(high) > epsilon:
        low, high = high, 2 * high
        if high > 1e4:
            raise ValueError(f"epsilon {epsilon:g} at delta {delta:g} needs more noise than 10^4 bounds: raise either")
    while high - low > CLOSE * high:
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle) <= epsilon else (middle, high)
    return high


def _known(by: str) -> str:
    if by not in _BY:
        raise ValueError(f"the accountant must be {' or '.join(_BY)}, got {by!r}")
    return by


def _pld(noise: float, sampling: Sampling, rounds: int, delta: float, last: bool = False) -> list[float]:
    pld = _library().pld.privacy_loss_distribution
    n, most, rate = sampling
    spent = lambda total: float(total.get_epsilon_for_delta(delta))
    if rate == 1 and most == n:  # Gaussians compose to one
        one_of = lambda count: _library().get_epsilon_gaussian(noise / math.sqrt(count), delta)
        return [one_of(count) for count in _counts(rounds, last)]
    one = pld.from_truncated_subsampled_gaussian_mechanism(n, rate, most, noise, value_discretization_interval=INTERVAL)
    if last:
        return [spent(one.self_compose(rounds))]
    return [spent(total) for total in accumulate([one] * rounds, lambda total, one: total.compose(one))]


def _rdp(noise: float, sampling: Sampling, rounds: int, delta: float, last: bool = False) -> list[float]:
    library = _library()
    rdp, gaussian, relation = library.rdp, library.GaussianDpEvent, library.NeighboringRelation
    n, most, rate = sampling
    event, between = gaussian(noise), relation.ADD_OR_REMOVE_ONE
    if rate < 1:
        if most < n:
            raise ValueError(
                f"rdp knows no Poisson sampling that is cut off at {most} of {n} clients: use pld, or {n} places"
            )
        event = library.PoissonSampledDpEvent(rate, event)
    elif most < n:
        event, between = library.SampledWithoutReplacementDpEvent(n, most, gaussian(noise / 2)), relation.REPLACE_ONE
    accountant = rdp.RdpAccountant(ORDERS, between)
    accountant.compose(event)
    one = accountant.rdp  # of every order; to compose anew for every count would compute them again
    return [float(rdp.compute_epsilon(ORDERS, count * one, delta)[0]) for count in _counts(rounds, last)]


def _counts(rounds: int, last: bool) -> range:
    return range(rounds if last else 1, rounds + 1)


_BY: dict[str, Callable[..., list[float]]] = {"pld": _pld, "rdp": _rdp}
ORDERS = (*range(2, 64), *range(64, 257, 16))  # of Renyi divergences


def _library() -> Any:
    try:
        import dp_accounting  # pyright: ignore[reportMissingImports]
        import dp_accounting.pld  # pyright: ignore[reportMissingImports]
        import dp_accounting.rdp  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError('epsilon is computed by dp-accounting: pip install "fedlora-jax[privacy]"') from None
    return dp_accounting
