"""FedSVD: *Adaptive Orthogonalization for Private Federated Learning with LoRA*, Lee et al., NeurIPS 2025, arXiv
2505.12805.

    b = sum_c p_c b_c,  a as sent        (a, b) <- (U, S V^T)  of  a b

FFA-LoRA whose frozen factor follows: after every round the product, which is exact and of rank r, is taken apart anew
with orthonormal ``a``, so that b's gradients are bounded and noise on b is not amplified. Only b and the head are
trained and sent; both factors come back. Directions that are still empty keep the ``a`` they had: ours.
"""

from __future__ import annotations

from fedlora_jax import lora, product
from fedlora_jax.method import About, Method, Traffic
from fedlora_jax.methods.ffa_lora import ffa_lora

ABOUT = About("FedSVD", "Lee et al. NeurIPS 2025", "2505.12805", "b, head", "b, head up; a, b, head down", "yes")


def fedsvd() -> Method:
    """FedSVD. It has no options."""
    inner = ffa_lora()

    def aggregate(base, state, cohort, sent, received):
        new = inner.aggregate(base, state, cohort, sent, received)
        anew = lambda x: product.continued(product.truncate(x, x.a.shape[-1], split="left"), x)
        return new._replace(adapter=lora.tree_map(anew, new.adapter))

    return inner._replace(
        aggregate=aggregate, traffic=lambda own, cohort: Traffic(up=inner.traffic(own, cohort).up, down=own)
    )
