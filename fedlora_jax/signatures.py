"""A client's signature: a short description of its data, seen through the frozen backbone.

The design is ours (HyperLoRA, arXiv 2606.06154, names a compact distribution signature and does not publish it):

    shape     [P std(mu_c) ; P std(log sigma_c)]      labels   sqrt(label histogram)      amount   log(1 + n_c) / 10

``mu_c`` and ``sigma_c`` are the mean and deviation of the client's features, ``P`` a fixed Gaussian projection, and
``std`` standardises over training clients with sums only, so that it could be computed under secure aggregation.
Where it is asked for, ``shape`` goes on with the means of the client's classes, which tell how it names what it sees:
``std(sum_{i of class y} Q (f_i - mu_c) / (1 + n_cy))`` for each class y, ``Q`` another projection.

A client computes ``moments`` once, of all its examples and, for training, of random halves of them (``views``): a
server that never sees the same signature twice cannot learn its clients by heart.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax.lora import mean
from fedlora_jax.product import safe_sqrt

SIZE = 64  # random directions in which each of the two feature moments is seen
AT_ONCE = 2**22  # numbers in the views of clients that are described together


class Signature(NamedTuple):
    """What the server knows of a client's data."""

    shape: Array  # [..., 2 * size (+ classes * prototypes)] where its features lie, how wide they spread (, and where
    #   those of each class lie)
    labels: Array  # [..., classes] square roots of the shares of its classes; classes = 0: it says nothing of labels
    amount: Array  # [..., 1]

    def flat(self) -> Array:
        """``[..., m]``, for a network to read."""
        return jnp.concatenate(self, -1)

    def shares(self) -> Array:
        """``[..., classes]`` the shares of its classes (noise makes their roots negative)."""
        return jnp.maximum(self.labels, 0) ** 2


def mean_client(signatures: Signature, weights: Array) -> Signature:
    """The signature ``[...]`` of the mean of clients ``[C, ...]``, whose weights sum to one: it has the mean of their
    shares of the classes, not of the roots."""
    own = Signature(*(mean(x, weights) for x in signatures))
    return own._replace(labels=safe_sqrt(mean(signatures.shares(), weights)))


def nobody(like: Signature) -> Signature:
    """Zeros in the shapes of ``like``, from which ``mean_so_far`` starts."""
    # From shapes alone: jax remembers the precision it once traced a NumPy constant in, and x64 may have changed.
    return jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), jnp.result_type(x)), like)


def mean_so_far(center: Signature, signatures: Signature, weights: Array, rounds: Array) -> Signature:
    """The mean over ``rounds`` cohorts and this one of each one's mean client; ``signatures [C, ...]``."""
    both = jax.tree.map(lambda *x: jnp.stack(x), center, mean_client(signatures, weights))
    return mean_client(both, jnp.stack([rounds, 1]) / (rounds + 1))


class Moments(NamedTuple):
    """What one client computes."""

    mean: Array  # [..., d]
    log_deviation: Array  # [..., d]
    histogram: Array  # [..., classes] shares
    size: Array  # [...]
    prototypes: Array  # [..., classes, k] means of its classes beyond its own mean, in k random directions; k may be 0


class Standard(NamedTuple):
    """Mean and deviation over training clients of what features say of them."""

    mean: Array  # [2, d] of the two moments
    deviation: Array
    class_mean: Array  # [classes, k] of the prototypes
    class_deviation: Array


def moments(features: Array, labels: Array, valid: Array, classes: int, prototypes: int = 0) -> Moments:
    """Moments of one client's features ``[n, d]`` and labels ``[n]`` over the examples where ``valid [n]``.

    Means of classes are seen in ``prototypes`` directions, and are nearer to zero the fewer examples they are of.
    """
    weight = valid.astype(features.dtype)[:, None] / jnp.maximum(valid.sum(), 1)
    mean = jnp.sum(weight * features, 0)
    deviation = jnp.sqrt(jnp.sum(weight * (features - mean) ** 2, 0) + 1e-6)
    of_class = valid[:, None] * jax.nn.one_hot(labels, classes)
    histogram = of_class.sum(0) / jnp.maximum(valid.sum(), 1)
    seen = (features - mean) @ _directions(1, features.shape[-1], prototypes)  # [n, k]
    centres = of_class.T @ seen / (1 + of_class.sum(0))[:, None]
    return Moments(mean, jnp.log(deviation), histogram, valid.sum(), centres)


def views(
    key: Array, features: Array, labels: Array, valid: Array, classes: int, parts: int, prototypes: int = 0
) -> Moments:
    """``moments`` of all valid examples, then of ``parts`` random halves of them, ``[1 + parts, ...]``.

    All views give the client's full size: how much it holds is no matter of the draw.
    """
    half = jax.random.uniform(key, (parts, valid.shape[0])) < 0.5
    half = half.at[:, 0].set(True)  # never nothing: the first example is always valid
    seen = jnp.concatenate([valid[None], half & valid])
    each = jax.vmap(lambda valid: moments(features, labels, valid, classes, prototypes))(seen)
    return each._replace(size=jnp.full(1 + parts, valid.sum()))


def standard(clients: Moments) -> Standard:
    """Statistics over training clients ``[N, ...]``; reuse them unchanged for clients never seen.

    From ``sum x`` and ``sum (x - mean)^2``: two secure sums.
    """

    def both(x: Array) -> tuple[Array, Array]:  # [N, ...]
        mean = x.sum(0) / x.shape[0]
        return mean, jnp.sqrt(jnp.sum((x - mean) ** 2, 0) / x.shape[0]) + 1e-6

    pair = jnp.stack([clients.mean, clients.log_deviation], 1)  # [N, 2, d]
    return Standard(*both(pair), *both(clients.prototypes))


def signatures(clients: Moments, stats: Standard, size: int = SIZE) -> Signature:
    """Signatures of clients' moments ``[..., d]``; ``size`` random directions for each of the two moments."""
    pair = jnp.stack([clients.mean, clients.log_deviation], -2)  # [..., 2, d]
    scaled = (pair - stats.mean) / stats.deviation
    shape = (scaled @ _directions(0, pair.shape[-1], size)).reshape(*pair.shape[:-2], -1)
    if clients.prototypes.size:
        centres = (clients.prototypes - stats.class_mean) / stats.class_deviation
        shape = jnp.concatenate([shape, centres.reshape(*pair.shape[:-2], -1)], -1)
    return Signature(shape, jnp.sqrt(clients.histogram), jnp.log1p(clients.size.astype(shape.dtype))[..., None] / 10)


def of_clients(
    features: Array,
    labels: Array,
    rows: Array,
    sizes: Array,
    classes: int,
    key: Array,
    *,
    training: int | None = None,
    parts: int = 16,
    prototypes: int = 0,
) -> Signature:
    """Signatures of all clients in all views, ``[N, 1 + parts, ...]``, for ``Population(signatures=...)``.

    A method that asks for the shapes of one client's is given ``jax.tree.map(lambda x: x[0, 0], signatures)``.

    Args:
      features: ``[n, d]`` of all examples, as the frozen model sees them: the input of its head, say.
      labels: ``[n]`` integers from 0.
      rows, sizes: ``[N, n_max]`` and ``[N]``, which examples are whose, as in ``Population``; clients that never train
        come last.
      classes: how many there are; 0: signatures say nothing of labels.
      key: of the views.
      training: features are standardised over the first so many clients; ``None``: over all.
      parts: random halves of its data that describe each client in training (``clients.sample_views``).
      prototypes: random directions in which the mean of each class is told as well.

    Raises:
      ValueError: features and labels, or rows and sizes, are not of the same examples or clients.
    """
    if len(features) != len(labels) or len(rows) != len(sizes):
        raise ValueError(
            f"expected a label for each example and a size for each client, got features of {len(features)} examples, "
            f"{len(labels)} labels, rows of {len(rows)} clients and {len(sizes)} sizes"
        )
    return _of_clients(features, labels, rows, sizes, key, classes, training, parts, prototypes)


@partial(jax.jit, static_argnums=(5, 6, 7, 8))  # one program instead of fifty small ones, one for each operation
def _of_clients(features, labels, rows, sizes, key, classes, training, parts, prototypes) -> Signature:
    def one(of_client: tuple[Array, Array, Array]) -> Moments:
        key, r, size = of_client
        own = views(key, features[r], labels[r], jnp.arange(r.shape[0]) < size, classes, parts, prototypes)
        return own if prototypes else own._replace(prototypes=())  # lax.map cannot put arrays of nothing together

    keys, width = jax.random.split(key, rows.shape[0]), (1 + parts) * rows.shape[1] * features.shape[1]
    step = max(1, AT_ONCE // width)  # every view of a client's features is an array of its own
    each = jax.lax.map(one, (keys, rows, sizes), batch_size=step)
    each = each if prototypes else each._replace(prototypes=jnp.zeros((*each.size.shape, classes, 0)))
    return signatures(each, standard(jax.tree.map(lambda x: x[:training, 0], each)))


def label_free(signature: Signature) -> Signature:
    """The signature of a client that keeps its labels to itself."""
    return signature._replace(labels=signature.labels[..., :0])


def noisy(key: Array, signature: Signature, deviation: float, bound: float = 3.0) -> Signature:
    """Every entry clipped to ``[-bound, bound]``, plus Gaussian noise of the given deviation."""
    keys = jax.random.split(key, len(signature))
    blur = lambda key, x: jnp.clip(x, -bound, bound) + deviation * jax.random.normal(key, x.shape, x.dtype)
    return Signature(*map(blur, keys, signature))


def _directions(number: int, width: int, count: int) -> Array:
    """``[width, count]``, a fixed Gaussian projection."""
    return jax.random.normal(jax.random.key(number), (width, count)) / jnp.sqrt(width)
