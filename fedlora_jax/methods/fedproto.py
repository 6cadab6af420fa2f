"""FedProto-style: after *FedProto: Federated Prototype Learning across Heterogeneous Clients*, Tan et al., AAAI 2022,
arXiv 2105.00243.

    minimise  f_c + lam sum_k |h_c,k - h_k|^2        h_k = sum_c q_ck h_c,k        q_ck = p_c n_ck / sum_c p_c n_ck

The paper's clients share no weights: they send the mean feature of each class, the server averages each class over the
clients that have it, and local features are drawn to those. Ours: the prototype of class k is the head's column k, for
a loss is all we see of a model; it is what travels, drawn in the same way, and averaged in the same way where the
server knows the shares ``n_ck`` of a client's classes (``Signature.labels``; else with p_c). The low-rank factors stay
with their client. A class that nobody has keeps its prototype.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedlora_jax import lora, personal
from fedlora_jax.checks import refuse_outside
from fedlora_jax.method import About, Method, Traffic, mean
from fedlora_jax.methods.fedit import FedITState, fedit
from fedlora_jax.personal import squared_distance
from fedlora_jax.signatures import Signature

ABOUT = About("FedProto-style", "after Tan et al. AAAI 2022", "2105.00243", "a, b, head", "head", "n/a")


def fedproto(lam: float = 1.0) -> Method:
    """FedProto with the head's columns for prototypes.

    Args:
      lam: how strongly a client's prototypes are drawn to the global ones.

    Raises:
      ValueError: lam below 0, or an adapter without a head.
    """
    refuse_outside("[0, inf)", lam=lam)
    inner = fedit()

    def init(key, adapter):
        personal.needs_head(adapter, "prototypes")
        return inner.init(key, adapter)

    def dispatch(base, state, cohort):
        sent = inner.dispatch(base, state, cohort)
        body, head = lora.split(sent.adapter)
        own = jax.tree.map(jnp.multiply, personal.own_or(cohort, body), lora.split(sent.mask)[0])
        return sent._replace(adapter=lora.join(own, head), context=head)

    def aggregate(base, state, cohort, sent, received):
        def prototypes(old, x):
            labels = cohort.signatures.labels if isinstance(cohort.signatures, Signature) else None
            if labels is None or labels.shape[-1] == 0 or labels.shape[-1] != x.shape[-1]:
                return mean(x, cohort.weights)
            held = cohort.weights[:, None] * labels**2  # [C, classes]
            total = held.sum(0)
            q = held / jnp.where(total > 0, total, 1.0)
            new = jnp.einsum("ck,c...k->...k", q.astype(x.dtype), x, precision="highest")
            return jnp.where(total > 0, new, old)

        body, old = lora.split(state.adapter)
        return FedITState(lora.join(body, jax.tree.map(prototypes, old, lora.split(received)[1])))

    def only_head(own, cohort):
        _, head = lora.split(own)
        return Traffic(up=head, down=head)

    return inner._replace(
        init=init,
        dispatch=dispatch,
        aggregate=aggregate,
        penalty=lambda adapter, h: lam * squared_distance(lora.split(adapter)[1], h),
        init_client=lambda adapter: personal.nothing_yet(lora.split(adapter)[0]),
        remember=lambda memory, context, sent, received: personal.keep(lora.split(received)[0]),
        upload_mask=lambda mask: lora.tree_map(lambda m: jax.tree.map(jnp.zeros_like, m), mask),
        traffic=only_head,
    )
