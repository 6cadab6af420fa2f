"""What the outputs of a model mean: the loss that is minimised, and when a prediction counts as right.

A new task is one entry of ``TASKS``, and its name in ``groups.problem.TASKS`` (a test holds them together).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from experiments.setup.augment import augmentation
from fedlora_jax import dropout, lora
from fedlora_jax.batches import Padded
from fedlora_jax.keys import purpose
from fedlora_jax.lora import Adapter, LoRA, Params
from fedlora_jax.task import Seen, Shown
from models.backbone import Backbone, Stem

AT_ONCE = 256  # images that are scored at once
CLOSE = 0.5  # temperature of ``apart``
STEM = "stem"  # the name under which a base holds the blocks that come before the adapted ones


class Task(NamedTuple):
    """For logits ``[n, classes]`` and labels ``[n]``."""

    loss: Callable[[Array, Array], Array]  # -> [n]; of shares of classes [n, classes] as well
    right: Callable[[Array, Array], Array]  # -> [n] 1 where a prediction is right, 0 where it is not
    meaning: str


def one_vs_rest(logits: Array, y: Array) -> Array:
    """Binary cross-entropy of every class, summed: each output says yes or no on its own."""
    return optax.sigmoid_binary_cross_entropy(logits, shares(logits, y)).sum(-1)


def shares(logits: Array, y: Array) -> Array:
    """Labels ``[n]``, or shares of classes ``[n, classes]``, as shares."""
    return jax.nn.one_hot(y, logits.shape[-1]) if y.ndim < logits.ndim else y


def cross_entropy(logits: Array, y: Array) -> Array:
    """Of labels ``[n]``, or of shares of classes ``[n, classes]``."""
    of = optax.softmax_cross_entropy_with_integer_labels if y.ndim < logits.ndim else optax.softmax_cross_entropy
    return of(logits, y)


def pairs(logits: Array, y: Array) -> Array:
    """Every image of a batch against the texts of all, and every text against the images, ``[n]``.

        -1/2 sum_j t_ij (log softmax_j s_ij + log softmax_j s_ji)        s_ij: of image i with the text of image j

    Texts of one class are one: ``t_ij`` is 1 over how many images are of the class of i, of these. With each image of
    another class it is CLIP's loss (Radford et al., ICML 2021, arXiv 2103.00020, figure 3), else that of Yang et al.,
    *Unified Contrastive Learning in Image-Text-Label Space*, CVPR 2022, arXiv 2204.03610, eq. 3-4. Ours: of shares of
    classes (mixed images, say) a text is the mean of theirs; images that only fill up a batch are compared with, too.
    """
    own = shares(logits, y)
    scores, same = logits @ own.T, own @ own.T
    targets = same / same.sum(-1, keepdims=True)
    return (cross_entropy(scores, targets) + cross_entropy(scores.T, targets)) / 2


def most_likely(logits: Array, y: Array) -> Array:
    return (logits.argmax(-1) == y).astype(jnp.float32)


def among(logits: Array, y: Array, known: int) -> Array:
    """Logits of the classes on the side of each label alone, of those below ``known`` or of the others."""
    same = (jnp.arange(logits.shape[-1]) < known) == (y < known)[:, None]
    return jnp.where(same, logits, -jnp.inf)


TASKS = {
    "softmax": Task(cross_entropy, most_likely, "cross-entropy of one distribution over classes"),
    # Wightman et al., ResNet strikes back, 2021, arXiv 2110.00476: the loss DeiT III is trained with.
    "sigmoid": Task(one_vs_rest, most_likely, "binary cross-entropy of each class on its own, summed"),
    "pairs": Task(pairs, most_likely, "contrastive: images of a batch against the texts of its classes, both ways"),
}


def apart(texts: Callable[[Params, Adapter], Array], base: Params, adapter: Adapter, known: int | None = None) -> Array:
    """The contrastive term of FedPGP: texts of shared vectors stay near those that they began as, away from one's own.

        mean over classes of -log(e^(z_0 z_g / t) / (e^(z_0 z_g / t) + e^(z_g z_i / t)))

    with ``z_0`` of the model as it came, ``z_g`` of what is trained in full alone, ``z_i`` of all of the adapter, t 0.5
    (Cui et al., ICML 2024, arXiv 2405.09771, eq. 8, and the public code). Ours: ``z_0`` is of what vectors begin as, of
    words where ``--context`` gives some, as the paper has it; there it is of words that it writes by hand.
    """
    shared = lora.tree_map(lambda x: LoRA(x.a, jnp.zeros_like(x.b), x.scale), adapter)
    began, common, own = (texts(base, x)[:known] for x in ({}, shared, adapter))
    near, far = (began * common).sum(-1), (common * own).sum(-1)
    return jax.nn.softplus((far - near) / CLOSE).mean()


class Objectives(NamedTuple):
    """Functions of a model and examples."""

    loss_fn: Callable  # (base, adapter, batch, key) -> mean loss of a batch
    correct_fn: Callable  # (base, adapter, (x, y)) -> 1 where the prediction is right, [n]
    judge_fn: Callable  # the loss without what varies it in training alone: dropout
    counted_fn: Callable  # the loss with blocks unrolled: of a loop XLA counts the arithmetic of one turn


def objectives(
    task: Task,
    backbone: Backbone,
    stem: Stem | None = None,
    smoothing: float = 0.0,
    augment: Sequence[str] = (),
    drop: float = 0.0,
    unroll: bool = True,
    known: int | None = None,
    contrast: float = 0.0,
) -> Objectives:
    """What clients minimise and are scored by.

    Images are uint8, or tokens of a stem.

    Args:
      task: what is minimised and counted.
      backbone: the model that is trained.
      stem: what comes before it and is computed anew each time; its parameters are ``base[STEM]``.
      smoothing: share of each label that goes to all classes alike, in the loss (Szegedy et al., 2016, arXiv
        1512.00567, section 7).
      augment: how images are varied before they are trained on (``augment.WAYS``).
      drop: share of the inputs of low-rank updates that are dropped, in the loss (``fedlora_jax.dropout``).
      unroll: whether the loss unrolls blocks, see ``models.backbone.Apply``.
      known: how many classes, the first, are trained on and predicted among themselves; the others are novel, which
        alone are predicted for an image of one. ``None``: there are no novel ones.
      contrast: how much ``apart`` counts in the loss.

    Raises:
      ValueError: a contrast, of a model that reads no text while it is trained.
    """
    if contrast and backbone.texts is None:
        raise ValueError(f"--contrast compares texts, and {backbone.name} computes none in a step: use --head text")
    vary = augmentation(augment)

    @partial(jax.jit, static_argnames="training")
    def outputs(base: Params, adapter: Adapter, x: Array, training: bool = False) -> tuple[Array, Array]:
        if stem is not None:
            base, before = {name: x for name, x in base.items() if name != STEM}, base[STEM]
            x = stem.apply(before, x)
        return backbone.apply(base, adapter, x, training=training)

    def seen(unroll: bool, drop: float, base, adapter, batch, key) -> Seen:
        x, y = examples = batch.examples if isinstance(batch, Padded) else batch
        if augment:
            classes = jax.eval_shape(lambda: outputs(base, adapter, x)[0][:, :known]).shape[-1]
            x, y = vary(purpose(key, "augmentation"), examples, classes)
        model = dropout.switched_on(adapter, purpose(key, "dropout of adapters"), drop) if drop else adapter
        out, features = outputs(base, model, x, unroll)
        present = batch.present if isinstance(batch, Padded) else jnp.ones(len(out))
        return Seen(features, out[:, :known], y, present)

    def loss(unroll: bool, drop: float, base, adapter, batch, key):
        _, out, y, _ = seen(unroll, drop, base, adapter, batch, key)
        losses = task.loss(out, optax.smooth_labels(shares(out, y), smoothing) if smoothing else y)
        mean = batch.mean(losses) if isinstance(batch, Padded) else losses.mean()
        return mean + contrast * apart(backbone.texts, base, adapter, known) if contrast and backbone.texts else mean

    def correct_fn(base, adapter, examples):
        def one(xy: tuple[Array, Array]) -> Array:
            x, y = (part[None] for part in xy)
            out, _ = outputs(base, adapter, x)
            return task.right(out if known is None else among(out, y, known), y)[0]

        return jax.lax.map(one, examples, batch_size=AT_ONCE)  # bounds memory whatever the number of examples

    loss_fn = Shown(partial(loss, unroll, drop), partial(seen, unroll, drop))
    counted_fn = partial(loss, True, drop)
    return Objectives(
        loss_fn,
        correct_fn,
        Shown(partial(loss, unroll, 0.0), partial(seen, unroll, 0.0)) if drop else loss_fn,
        counted_fn,
    )
