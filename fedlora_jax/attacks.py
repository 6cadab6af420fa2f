"""Clients that mean harm: what they send, or what they train on, to try defences by.

    sign_flip    -scale d_c                  Li et al., *RSA*, AAAI 2019, arXiv 1811.03761
    gaussian     scale rms(d_c) N(0, 1)      after Xie et al., 2018, arXiv 1802.10116
    alie         mean_h - z std_h            Baruch et al., *A Little Is Enough*, NeurIPS 2019, arXiv 1902.06635, alg. 3
    ipm          -scale mean_h               Xie et al., *Fall of Empires*, UAI 2019, arXiv 1903.03936, eq. 1
    collusion    -scale mean_m               all send one update: Sybils, Fung et al., 2018, arXiv 1808.04866
    free_rider   0                           Lin et al., *Free-riders in Federated Learning*, 2019, arXiv 1911.12560
    label_flip   y <- classes - 1 - y        Fang et al., USENIX Security 2020, arXiv 1911.11815
    backdoor     a square in a corner means one class: Gu et al., *BadNets*, 2017, arXiv 1708.06733, with the boost of
                 Bagdasaryan et al., AISTATS 2020, arXiv 1807.00459

``d_c = w_c - w_g`` is what client c changed of what it shares, ``mean_h`` and ``std_h`` are entry by entry over the
honest clients of the round that hold an entry, ``mean_m`` over the malicious ones. An attacker knows all of these
(published ALIE estimates them from its own clients). What clients tell beside adapters, meta-gradients, is attacked in
the same way; their losses, weights, signatures and what they keep are those of honest training.

An attack happens between local steps and server, so that every wrapper sees it; whoever sends what is no number, or
beyond ``leaving_out.LARGEST``, is left out as ever. Who is malicious stands in the population, for a whole run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax.checks import refuse_outside
from fedlora_jax.keys import purpose
from fedlora_jax.lora import Adapter
from fedlora_jax.method import Cohort, Dispatch, Method, all_held, each_alone, per_client


class Round(NamedTuple):
    """What an attacker knows of a round; trees like what clients share, ``[C, ...]``."""

    updates: Any  # of honest training, 0 where a client does not hold an entry
    held: Any  # 1 where it does, broadcastable
    honest: Array  # [C] 1 for a client that takes part and means well
    malicious: Array  # [C] 1 for one that takes part and does not


class Attack(NamedTuple):
    """What malicious clients do.

    Attributes:
      craft: ``(key, Round) -> updates [C, ...]``, of which the rows of malicious clients are sent; ``None``: what they
        trained.
      poison: ``((x [..., B, ...], y [..., B])) -> (x, y)`` what a malicious client trains on in place of its examples.
      trigger: ``(x [n, H, W, channels]) -> x``, images that are meant to be taken for ``target``; of a backdoor.
      target: a class.
    """

    craft: Callable[[Array, Round], Any] | None = None
    poison: Callable[[Any], Any] | None = None
    trigger: Callable[[Array], Array] | None = None
    target: int = 0


class AboutAttack(NamedTuple):
    """One row of the table of attacks."""

    name: str
    paper: str
    arxiv: str
    does: str


ABOUT = {
    "sign_flip": AboutAttack("Sign flip", "Li et al. AAAI 2019", "1811.03761", "sends the opposite of its update"),
    "gaussian": AboutAttack("Gaussian", "after Xie et al. 2018", "1802.10116", "sends noise as large as its update"),
    "alie": AboutAttack("ALIE", "Baruch et al. NeurIPS 2019", "1902.06635", "hides in the deviation of the honest"),
    "ipm": AboutAttack("IPM", "Xie et al. UAI 2019", "1903.03936", "sends the opposite of the honest mean"),
    "collusion": AboutAttack("Collusion", "after Fung et al. 2018", "1808.04866", "all send one and the same update"),
    "free_rider": AboutAttack("Free-rider", "Lin et al. 2019", "1911.12560", "sends back what it was sent"),
    "label_flip": AboutAttack("Label flip", "Fang et al. 2020", "1911.11815", "trains on turned labels"),
    "backdoor": AboutAttack("Backdoor", "Gu et al. 2017", "1708.06733", "trains a trigger to mean one class"),
}
NOBODY = Attack()


def sign_flip(scale: float = 1.0) -> Attack:
    """Sends ``-scale`` times its update.

    Raises:
      ValueError: a scale not above 0 (as for all here).
    """
    refuse_outside("(0, inf)", scale=scale)
    return Attack(lambda key, seen: jax.tree.map(lambda d: -scale * d, seen.updates))


def gaussian(scale: float = 1.0) -> Attack:
    """Sends noise on what it shares, in each array ``scale`` times as large as its update (root mean square)."""
    refuse_outside("(0, inf)", scale=scale)

    def craft(key: Array, seen: Round) -> Any:
        def noise(i: int, d: Array, held: Array) -> Array:
            axes = tuple(range(1, d.ndim))
            held = jnp.broadcast_to(held, d.shape)
            rms = jnp.sqrt(jnp.sum(d**2, axes, keepdims=True) / jnp.maximum(held.sum(axes, keepdims=True), 1))
            return scale * rms * held * jax.random.normal(jax.random.fold_in(key, i), d.shape, d.dtype)

        leaves, tree = jax.tree.flatten(seen.updates)
        return tree.unflatten([noise(i, *both) for i, both in enumerate(zip(leaves, _held(seen), strict=True))])

    return Attack(craft)


def alie(z: float = 1.5) -> Attack:
    """Sends the honest mean less ``z`` deviations: far enough to harm, too near to be told from honest clients.

    With n clients, m of them malicious, the paper's ``z`` is the quantile ``(n - m - s) / (n - m)`` of a normal
    distribution, ``s = floor(n / 2 + 1) - m``; for few clients that is near 0, and no attack.
    """
    refuse_outside("(0, inf)", z=z)

    def craft(key: Array, seen: Round) -> Any:
        def one(d: Array, held: Array) -> Array:
            mean = _mean(d, held, seen.honest)
            return (mean - z * jnp.sqrt(_mean((d - mean) ** 2, held, seen.honest))) * held

        return jax.tree.map(one, seen.updates, seen.held)

    return Attack(craft)


def ipm(scale: float = 0.5) -> Attack:
    """Sends ``-scale`` times the honest mean: below 1 it is inside of what defences by distance accept."""
    refuse_outside("(0, inf)", scale=scale)
    one = lambda seen: lambda d, held: -scale * _mean(d, held, seen.honest) * held
    return Attack(lambda key, seen: jax.tree.map(one(seen), seen.updates, seen.held))


def collusion(scale: float = 1.0) -> Attack:
    """All send ``-scale`` times the mean of the malicious clients' updates: nobody is nearer to each other."""
    refuse_outside("(0, inf)", scale=scale)
    one = lambda seen: lambda d, held: -scale * _mean(d, held, seen.malicious) * held
    return Attack(lambda key, seen: jax.tree.map(one(seen), seen.updates, seen.held))


def free_rider() -> Attack:
    """Sends back what it was sent. It has no options; disguised by noise it is a small ``gaussian``."""
    return Attack(lambda key, seen: jax.tree.map(jnp.zeros_like, seen.updates))


def label_flip(classes: int) -> Attack:
    """Trains on ``classes - 1 - y``.

    Args:
      classes: of the data.
    """
    return Attack(poison=lambda examples: (examples[0], classes - 1 - examples[1]))


def backdoor(target: int = 0, side: int = 2, of_batch: float = 0.5, boost: float = 1.0) -> Attack:
    """Trains on images with a bright square in the lower right corner, labelled ``target``, among its own.

    Args:
      target: the class that the trigger is to mean.
      side: pixels of the square.
      of_batch: share of every batch's examples that have the trigger, rounded up, in (0, 1].
      boost: what its update is multiplied by, so that it survives being averaged (model replacement).
    """
    refuse_outside("[0, inf)", target=target)
    refuse_outside("[1, inf)", side=side)
    refuse_outside("(0, 1]", of_batch=of_batch)
    refuse_outside("(0, inf)", boost=boost)

    def trigger(x: Array) -> Array:
        bright = jnp.iinfo(x.dtype).max if jnp.issubdtype(x.dtype, jnp.integer) else 1.0
        return jnp.asarray(x).at[..., -side:, -side:, :].set(bright)

    def poison(examples: tuple[Array, Array]) -> tuple[Array, Array]:
        x, y = examples
        if x.ndim != y.ndim + 3:
            raise ValueError(
                f"backdoor puts a square on images [H, W, channels], and examples have shape {x.shape[y.ndim :]}: "
                "train on images, not on what has been computed of them"
            )
        marked = jnp.arange(y.shape[-1]) < math.ceil(of_batch * y.shape[-1])
        return jnp.where(marked[:, None, None, None], trigger(x), x), jnp.where(marked, target, y)

    boosted = lambda key, seen: jax.tree.map(lambda d: boost * d, seen.updates)
    return Attack(None if boost == 1 else boosted, poison, trigger, target)


def poisoned(attack: Attack, cohort: Cohort) -> Cohort:
    """The cohort in which malicious clients hold what they want to train on, queries included.

    Raises:
      ValueError: nobody says who is malicious, or examples are no pairs of inputs and labels.
    """
    if attack == NOBODY:
        return cohort
    if isinstance(cohort.malicious, tuple):
        raise ValueError("an attack needs to know whose it is: give Population(malicious=[N]) or Cohort(malicious=[C])")
    poison = attack.poison
    if poison is None:
        return cohort

    def of(examples: Any) -> Any:
        if hasattr(examples, "present"):  # batches.Padded
            return examples._replace(examples=of(examples.examples))
        if not isinstance(examples, tuple) or len(examples) != 2:
            raise ValueError(f"an attack on data changes examples (inputs, labels), got {type(examples).__name__}")
        return jax.tree.map(lambda x, y: _theirs(cohort.malicious, x, y), examples, poison(examples))

    return cohort._replace(batches=of(cohort.batches), queries=of(cohort.queries) if cohort.queries != () else ())


def sent_by(
    attack: Attack, method: Method, cohort: Cohort, sent: Dispatch, received: Adapter, meta_gradients: Any, key: Array
) -> tuple[Adapter, Any]:
    """What arrives of what clients trained and tell; to the bit that where nobody is malicious.

    What a client does not share or hold stays. Of pooled data nobody sends an update.

    Args:
      cohort: with ``malicious``.
      sent: before local training, with the mask of what may move.
      received, meta_gradients: ``[C, ...]`` after it.
      key: of the round.
    """
    if attack.craft is None or method.pool is not each_alone:
        return received, meta_gradients
    mask = method.upload_mask(sent.mask)
    if method.held is not all_held:
        mask = jax.vmap(method.held)(mask, sent.context, received)
    d = jax.tree.map(lambda x, y, m: (y - x) * m.astype(x.dtype), sent.adapter, received, mask)
    all_of = jax.tree.map(lambda x: jnp.ones((len(x), *(1,) * (x.ndim - 1)), x.dtype), meta_gradients)
    there = (cohort.weights > 0).astype(jnp.float32)
    bad = cohort.malicious.astype(jnp.float32)
    seen = Round((d, meta_gradients), (mask, all_of), there * (1 - bad), there * bad)
    crafted, told = attack.craft(purpose(key, "attack"), seen)
    arrived = jax.tree.map(lambda x, y, m, n: jnp.where(m > 0, x + n, y), sent.adapter, received, mask, crafted)
    of_bad = lambda new, old: jax.tree.map(lambda x, y: _theirs(bad, x, y), old, new)
    return of_bad(arrived, received), of_bad(told, meta_gradients)


def _theirs(malicious: Array, honest: Array, other: Array) -> Array:
    """Rows ``[C, ...]`` of which those of malicious clients are the other ones."""
    return jnp.where(malicious.reshape(-1, *(1,) * (honest.ndim - 1)) > 0, other, honest)


def _held(seen: Round) -> list[Array]:
    return jax.tree.leaves(seen.held)


def _mean(x: Array, held: Array, who: Array) -> Array:
    """``[1, ...]`` mean of ``x [C, ...]`` over those of ``who [C]`` that hold an entry; 0 where nobody does."""
    weights = held * per_client(who, x)
    return (x * weights).sum(0, keepdims=True) / jnp.maximum(weights.sum(0, keepdims=True), 1)
