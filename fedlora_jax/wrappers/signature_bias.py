"""A bias for each class, generated from a client's signature, beside the models of any method.

    client c computes with bias_c[y] + shift_c[y],   shift_c[y] = tanh(t) (log(s_c[y] + eps) - log(s[y] + eps))
    t <- t - Adam( sum_c p_c (d shift_c / d t)^T (bias_c sent - bias_c received) )

Ours: the part of HyperLoRA's generator (Gupta et al. 2026, arXiv 2606.06154; our design, ``fedlora_jax/hyper``) that
measurements say does the work, made a tier of its own as HiLoRA's tiers are (Peng et al., CVPR 2026, arXiv 2603.02785):
it stands frozen beside what a client trains, so what comes back is the inner method's alone and nothing of it piles up
in an average. It reaches clients that never took part before they take a step. ``s_c`` are a client's shares of the
classes, ``s`` those of the mean client, and ``t``, one number for all, is how much of the move from one to the other
(logit adjustment: Menon et al., ICLR 2021, arXiv 2007.07314) is made. It is learned from what clients did to their own
bias in a round (``displacement``: Reptile, Nichol et al. 2018, arXiv 1803.02999; pFedHN, Shamsian et al. 2021, arXiv
2103.04628), hence from uploads alone, and only in rounds in which there are any. At first ``t`` is zero, and the whole
is the inner method.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from fedlora_jax import lora, signatures
from fedlora_jax.checks import refuse_outside
from fedlora_jax.hyper import generator
from fedlora_jax.method import Method
from fedlora_jax.signatures import Signature
from fedlora_jax.wrappers.around import AboutWrapper, Wrapper, around
from fedlora_jax.wrappers.refusals import class_bias, tells_of_labels

ABOUT = {
    "signature_bias": AboutWrapper(
        "Signature bias",
        "ours, after Gupta et al. 2026",
        "2606.06154",
        "a class bias from what a client's data are",
        "its signature",
    )
}


class SignatureBiasState(NamedTuple):
    """t: how much. meta: its optimizer's state. center: mean signature of the cohorts so far. round: done."""

    t: Array
    meta: Any
    center: Signature
    round: Array


def signature_bias(inner: Method, signature: Signature, lr: float = 0.1, warmup: int = 3, start: float = 0.0) -> Method:
    """A generated class bias beside the models of ``inner``; with ``lr = 0`` and ``start = 0`` it is ``inner``.

    Args:
      inner: a method whose clients train the bias of their head.
      signature: one client's, only its shapes are read.
      lr: of t (AdamW, weight decay 1e-4; the gradient is cut to 1).
      warmup: rounds before t learns.
      start: ``tanh(t)`` before anything is learned; with ``lr = 0`` logit adjustment by a fixed part. In the first
        round no mean client is known yet, and shifts are a part of the log shares themselves.

    Raises:
      ValueError: lr or warmup below 0, start not between -1 and 1; signatures that say nothing of labels; (when a round
        is traced) a model without one bias of its classes that is trained in full.
    """
    refuse_outside("[0, inf)", lr=lr, warmup=warmup)
    refuse_outside("(-1, 1)", start=start)  # the limits of tanh
    classes = tells_of_labels("signature_bias", signature).labels.shape[-1]
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lr, weight_decay=1e-4))

    def init(key, state, adapter):
        class_bias("signature_bias", adapter, classes)
        t = jnp.arctanh(jnp.asarray(start, float))
        return SignatureBiasState(t, tx.init(t), signatures.nobody(signature), jnp.zeros((), jnp.int32))

    def client_context(own, cohort, sent):
        z = tells_of_labels("signature_bias", cohort.signatures)
        return generator.class_shifts(own.t, z, own.center)  # [C, classes]

    def client_model(model, shift):
        flat, name = lora.flatten(model), class_bias("signature_bias", model, classes)
        return lora.unflatten(flat | {name: flat[name] + shift})

    def finish(old, new, cohort, sent, received):
        # Whoever differentiates a round takes what t learns in it as given.
        own, cohort, sent, received = jax.lax.stop_gradient((old.own, cohort, sent, received))
        start, end = (inner.aggregated(x) if inner.aggregated else x for x in (sent.adapter, received))
        name = class_bias("signature_bias", jax.tree.map(lambda x: x[0], end), classes)
        displacement = lora.flatten(start)[name] - lora.flatten(end)[name]  # [C, classes]
        _, pull = jax.vjp(lambda t: generator.class_shifts(t, cohort.signatures, own.center), own.t)
        (gradient,) = pull(cohort.weights[:, None] * displacement)
        updates, meta = tx.update(gradient, own.meta, own.t)
        # A method may have rounds in which clients keep all to themselves.
        sends = inner.report(new).get("travels_up", 1.0)
        learns = (own.round >= warmup) & (jnp.asarray(sends) > 0)
        keep = lambda x, y: jax.tree.map(lambda x, y: jnp.where(learns, x, y), x, y)
        t = keep(optax.apply_updates(own.t, updates), own.t)
        center = signatures.mean_so_far(own.center, cohort.signatures, cohort.weights, own.round)
        return new, SignatureBiasState(t, keep(meta, own.meta), center, own.round + 1)

    def traffic(own, cohort):
        theirs = inner.traffic(own, cohort)
        return theirs._replace(up=(theirs.up, signature), down=(theirs.down, jnp.zeros(classes)))

    report = lambda own: {"prior": generator.part(own.t)}
    wrapper = Wrapper(
        "signature_bias",
        init=init,
        client_context=client_context,
        client_model=client_model,
        finish=finish,
        report=report,
    )
    method = around(inner, wrapper)
    return method._replace(traffic=traffic)
