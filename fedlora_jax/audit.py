"""What leaks, measured: lower bounds that a claim of privacy must not lie below. NumPy, but for ``inverted``.

    epsilon >= log((TPR - delta) / FPR)        of whoever tells two neighbouring runs apart by a threshold

A true and a false positive rate that are counted are known to a Clopper-Pearson interval, so that the bound holds at a
stated confidence: Jagielski et al., *Auditing Differentially Private Machine Learning*, NeurIPS 2020, arXiv 2006.07709.
What finds examples that a model was trained on is the likelihood ratio attack, Carlini et al., *Membership Inference
Attacks From First Principles*, S&P 2022, arXiv 2112.03570 (LiRA), and the threshold on their loss, Yeom et al., CSF
2018, arXiv 1709.01604. What a head that is trained in full says of a single example: Zhao et al., *iDLG*, 2020, arXiv
2001.02610 (its label), and Geiping et al., *Inverting Gradients*, NeurIPS 2020, arXiv 2003.14053 (its features); what
all that is trained says of it: the same, eq. 4. That an attack finds nothing proves nothing; that it finds more than a
claim allows does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fedlora_jax.checks import refuse_outside


def at_least(count: int, trials: int, confidence: float = 0.95) -> float:
    """The least probability with which ``count`` of ``trials`` succeed, one-sided (Clopper & Pearson 1934).

    Args:
      count: from 0 to ``trials``.
      trials: at least 1.
      confidence: that it is not less, from 0 to 1.

    Raises:
      ValueError: a number out of bounds.
    """
    refuse_outside("(0, 1)", confidence=confidence)
    refuse_outside("[1, inf)", trials=trials)
    refuse_outside(f"[0, {trials}]", count=count)
    if count == 0:
        return 0.0
    k = np.arange(count, trials + 1)
    choose = [math.lgamma(trials + 1) - math.lgamma(i + 1) - math.lgamma(trials - i + 1) for i in k]
    so_many = lambda p: np.exp(choose + k * math.log(p) + (trials - k) * math.log1p(-p)).sum()
    low, high = 0.0, 1.0
    for _ in range(50):
        p = (low + high) / 2
        low, high = (p, high) if so_many(p) < 1 - confidence else (low, p)
    return low


def epsilon_at_least(there: np.ndarray, absent: np.ndarray, delta: float = 0.0, confidence: float = 0.95) -> float:
    """A lower bound on the epsilon of what gave these scores; at most what is claimed, at that confidence, or it fails.

    Args:
      there: ``[n]`` scores of independent runs on one of two neighbouring populations (a canary takes part).
      absent: ``[m]`` on the other. Every second run of both chooses the threshold, the others are counted.
      delta: of the claim.
      confidence: of the bound.
    """
    threshold = _best_threshold(there[::2], absent[::2])
    there, absent, both = there[1::2], absent[1::2], (1 + confidence) / 2  # either may fail
    hits = at_least(int((there > threshold).sum()), len(there), both)
    alarms = 1 - at_least(int((absent <= threshold).sum()), len(absent), both)
    return math.log((hits - delta) / alarms) if hits - delta > alarms else 0.0


def _best_threshold(there: np.ndarray, absent: np.ndarray) -> float:
    """Where the ratio of rates is largest; false alarms count three more, as many as a bound makes of none."""
    thresholds = np.quantile(np.concatenate([there, absent]), np.linspace(0.02, 0.999, 100))
    ratio = lambda t: (there > t).mean() / (((absent > t).sum() + 3) / len(absent))
    return float(max(thresholds, key=ratio))


def area(members: np.ndarray, others: np.ndarray) -> float:
    """The probability that a member's score is above another's, ties by half: 0.5 of scores that say nothing."""
    ranks = np.searchsorted(np.sort(others), members, "left") + np.searchsorted(np.sort(others), members, "right")
    return float(ranks.mean() / (2 * len(others)))


def most_advantage(epsilon: float, delta: float = 0.0) -> float:
    """By how much a true positive rate can be above the false one (Humphries et al., CSF 2023, arXiv 2010.12112)."""
    return (math.expm1(epsilon) + 2 * delta) / (math.exp(epsilon) + 1)


def likelihood_ratios(losses: np.ndarray, members: np.ndarray) -> np.ndarray:
    """``[K, n]`` how much better an example's loss fits models that were trained on it than models that were not.

    Of each of K models the others are the shadow models. Logits ``log(p / (1 - p))`` of confidences ``p = exp(-loss)``
    are taken for Gaussian, with one variance, as published for few shadow models.

    Args:
      losses: ``[K, n]`` cross-entropy of every model on every example.
      members: ``[K, n]`` whether it was trained on it; of each example at least two models were and two were not.

    Raises:
      ValueError: some example has fewer.
    """
    members = np.asarray(members, bool)
    if min(members.sum(0).min(), (~members).sum(0).min()) < 2:
        raise ValueError(
            "each example needs two models that were trained on it and two that were not: draw more models"
        )
    x = -np.log(np.expm1(np.clip(np.float64(losses), 1e-12, 500)))
    # The mean over the other models of one kind; what is left over, of both kinds, has the variance.
    without = lambda who: (np.sum(who * x, 0) - who * x) / np.maximum(who.sum(0) - who, 1)
    inside, outside = without(members), without(~members)
    variance = np.var(np.where(members, x - inside, x - outside)) + 1e-12
    return ((x - outside) ** 2 - (x - inside) ** 2) / (2 * variance)


def of_one_example(kernel: np.ndarray, bias: np.ndarray) -> tuple[int, np.ndarray]:
    """The label and the features, up to their length, of the one example that moved a softmax's head by one step.

    Its gradient is ``h (p - y)^T`` and ``p - y``: only the label's bias goes up, and every column of the kernel is the
    features times what that of the bias is.

    Args:
      kernel: ``[d, classes]`` how the head's kernel has changed.
      bias: ``[classes]`` how its bias has.

    Returns:
      The label, and the features ``[d]`` of norm 1, those that fit all columns best; 0 where nothing moved.
    """
    features = np.asarray(kernel, np.float64) @ np.asarray(bias, np.float64)
    return int(np.argmax(bias)), features / max(float(np.linalg.norm(features)), 1e-300)


def inverted(
    update_of: Callable[[Array], Any],
    seen: Any,
    start: Array,
    steps: int = 500,
    rate: float = 0.02,
    smooth: float = 0.1,
    limits: tuple[float, float] = (0.0, 1.0),
) -> Array:
    """The input whose update points where one that was seen does: Geiping et al., eq. 4, by signs of the gradient.

        min_x 1 - cos(update_of(x), seen) + smooth * mean |differences of neighbours in x|

    Args:
      update_of: what a client would send of this input alone; it has a derivative.
      seen: what one sent, of the same structure.
      start: of the search, an image ``[H, W, ...]`` or anything else of two axes or more; without ``smooth`` of any.
      steps: of Adam, whose rate falls to 0.
      rate: of the first step, in units of the input.
      smooth: of the penalty, at least 0.
      limits: of the input's numbers.

    Raises:
      ValueError: ``smooth`` of a start without two axes.
    """
    if smooth and start.ndim < 2:
        raise ValueError(f"smooth compares neighbours in an image, and start has shape {start.shape}: give smooth=0")
    inner = lambda x, y: sum(jnp.vdot(u, v) for u, v in zip(*map(jax.tree.leaves, (x, y)), strict=True))

    def loss(x: Array) -> Array:
        own = update_of(x)
        like = inner(own, seen) / jnp.sqrt(jnp.maximum(inner(own, own) * inner(seen, seen), 1e-30))
        return (smooth * sum(jnp.abs(jnp.diff(x, axis=i)).mean() for i in (0, 1)) if smooth else 0.0) - like

    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry, _):
        x, state = carry
        move, state = optimizer.update(jnp.sign(jax.grad(loss)(x)), state)
        return (jnp.clip(x + move, *limits), state), None

    return jax.lax.scan(step, (start, optimizer.init(start)), None, length=steps)[0][0]
