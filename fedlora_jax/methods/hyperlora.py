"""HyperLoRA: *Amortizing Federated Adaptation: Hypernetwork Driven LoRA for Personalized Foundation Models*, Gupta,
Shanker and Sethi, 2026, arXiv 2606.06154.

    start      x_c = G(z_c; a, b)                         from the client's signature z_c and the global adapter
    aggregate  (a, b) = C(S({a_c, b_c, p_c, z_c}))         in product space, with a residual correction

The paper's architecture and objective are not public; ``hyper.py`` holds our design. Here all parts learn online by
*displacement*, from what a real server has: with x_c the start and y_c what client c sent back, the direction
p_c (x_c - y_c) is pulled back through G and through the aggregation of the *previous* round's uploads (the rule of
Reptile and pFedHN). No client data, no extra upload but the signature.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedlora_jax import hyper, lora
from fedlora_jax.hyper import Theta
from fedlora_jax.lora import Adapter
from fedlora_jax.method import About, Dispatch, Method, Traffic

ABOUT = About(
    "HyperLoRA", "Gupta et al. 2026 (our design)", "2606.06154", "a, b, head", "a, b, head; signature up", "to rank r"
)


class Uploads(NamedTuple):
    """What the server got in a round and what it needs to aggregate it once more."""

    received: Adapter  # [C, ...]
    weights: jax.Array  # [C], summing to one
    signatures: jax.Array  # [C, m]
    previous: Adapter  # the global adapter then in force


class HyperLoRAState(NamedTuple):
    """adapter: the global one, C(S(last)). theta: parameters of G, S, C. meta: their optimizer's state."""

    adapter: Adapter
    theta: Theta
    meta: Any
    last: Uploads
    round: jax.Array


def hyperlora(
    participants: int, signature_size: int, lr: float = 3e-4, lr_server: float = 3e-4, warmup: int = 3
) -> Method:
    """HyperLoRA, trained online by displacement.

    Args:
      participants: clients per round; the state keeps one round of uploads.
      signature_size: length m of the signatures.
      lr: of the generator (AdamW, weight decay 1e-4).
      lr_server: of the synthesizer and the corrector (Adam).
      warmup: rounds before anything is learned, in which the method is FlexLoRA with balanced, aligned factors.
    """
    if signature_size < 1:
        raise ValueError("hyperlora needs signatures: got signature_size 0; see fedlora_jax.signatures")
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition(
            {"generator": optax.adamw(lr, weight_decay=1e-4), "server": optax.adam(lr_server)},
            Theta("generator", "generator", "server", "server", "server", "server"),  # type: ignore[arg-type]
        ),
    )

    def init(key, adapter):
        theta = hyper.init(key, adapter, signature_size)
        stack = lambda x: jnp.broadcast_to(x, (participants, *x.shape)) * 1
        weights = jnp.ones(participants) / participants  # not jnp.full: its weak type would compile round two anew
        last = Uploads(jax.tree.map(stack, adapter), weights, jnp.zeros((participants, signature_size)), adapter)
        return HyperLoRAState(adapter, theta, tx.init(theta), last, jnp.zeros((), jnp.int32))

    def dispatch(base, state, cohort):
        mask = lora.rank_mask(state.adapter, cohort.ranks)
        rows = hyper.generate(state.theta, cohort.signatures, state.adapter)
        rows = jax.tree.map(jnp.multiply, rows, mask)
        return Dispatch(base, rows, mask, anchor=rows)

    def aggregate(base, state, cohort, sent, received):
        # Whoever differentiates a round takes what theta learned in it as given.
        updates, meta = learn(*jax.lax.stop_gradient((state, cohort, sent.adapter, received)))
        theta: Any = optax.apply_updates(state.theta, updates)
        uploads = Uploads(received, cohort.weights, cohort.signatures, state.adapter)
        return HyperLoRAState(hyper.synthesize(theta, *uploads), theta, meta, uploads, state.round + 1)

    def learn(state, cohort, started, received):
        """One step against the displacement: what to add to theta (nothing during warm-up)."""

        def starts(theta):
            return hyper.generate(theta, cohort.signatures, hyper.synthesize(theta, *state.last))

        p = cohort.weights
        pull = lambda x, y: jnp.einsum("c,c...->c...", p, x - y)
        _, vjp = jax.vjp(starts, state.theta)
        (grads,) = vjp(jax.tree.map(pull, started, received))
        updates, meta = tx.update(grads, state.meta, state.theta)
        learning = state.round >= warmup
        keep = lambda new, old: jax.tree.map(lambda x, y: jnp.where(learning, x, y), new, old)
        return keep(updates, jax.tree.map(jnp.zeros_like, updates)), keep(meta, state.meta)

    def traffic(own, cohort):
        return Traffic(up=(own, jnp.zeros(signature_size)), down=own)

    return Method(init, dispatch, aggregate, traffic=traffic)
