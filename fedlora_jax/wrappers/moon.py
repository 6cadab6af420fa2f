"""MOON: *Model-Contrastive Federated Learning*, Li et al., CVPR 2021, arXiv 2103.16257, eq. 3 and 4.

    minimise  f(w) + mu mean -log(e^(z z_g / t) / (e^(z z_g / t) + e^(z z_p / t)))        z z': their cosine

z are an image's features by the model in training, z_g by the global one as sent, z_p by the one that the client sent
last: features stay near the mean's and leave the client's own past. Three forward passes of a batch. Ours: features are
what the head reads, without a projection of their own behind them; a client that never took part has no past, and no
gradient of this term. The reported loss is with it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import personal
from fedlora_jax.checks import refuse_outside
from fedlora_jax.lora import Adapter
from fedlora_jax.method import Method, as_carried
from fedlora_jax.wrappers import order
from fedlora_jax.wrappers.around import AboutWrapper, Wrapper, around

ABOUT = {"moon": AboutWrapper("MOON", "Li et al. CVPR 2021", "2103.16257", "features near the global model's")}


class Context(NamedTuple):
    """start: [C, ...] w as sent. past: [C, ...] what each client sent last."""

    start: Adapter
    past: Adapter


def moon(inner: Method, mu: float = 1.0, temperature: float = 0.5) -> Method:
    """MOON around ``inner``; ``mu = 0`` is ``inner``.

    Args:
      inner: a method whose clients compute with the one adapter that they carry; no other wrapper inside.
      mu: weight of the contrastive term, at least 0.
      temperature: t.

    Raises:
      ValueError: a number out of range, another inner method, or (when a round is traced) a loss that does not show
        features (``fedlora_jax.task.Shown``).
    """
    refuse_outside("[0, inf)", mu=mu)
    refuse_outside("(0, inf)", temperature=temperature)
    order.check("moon", inner.stack, inner.uploads)
    if inner.model is not as_carried or inner.objective is not None:
        raise ValueError(
            "moon compares models that clients carry and send, and clients of this method carry something else: wrap "
            "a method whose clients train one adapter, such as fedit"
        )

    def client_context(own, cohort, sent):
        return Context(sent.adapter, personal.own_or(cohort, sent.adapter))

    def training_loss(task, model, context):
        z, near, far = (task.seen(w) for w in (model, *context))
        held = jax.lax.stop_gradient
        pull, push = cosine(z.features, held(near.features)), cosine(z.features, held(far.features))
        return task(model) + mu * z.mean(jax.nn.softplus((push - pull) / temperature))

    wrapper = Wrapper(
        "moon",
        init_client=personal.nothing_yet,
        client_context=client_context,
        training_loss=training_loss,
        remember=lambda own, context, sent, received: personal.keep(received),
    )
    return around(inner, wrapper)


def cosine(x: Array, y: Array) -> Array:
    """``[B]`` of rows ``[B, width]``; 0 where one of them is zero."""
    size = jnp.sqrt(jnp.maximum(jnp.sum(x**2, -1) * jnp.sum(y**2, -1), 1e-24))
    return jnp.sum(x * y, -1) / size
