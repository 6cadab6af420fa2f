"""FedPGP: *Harmonizing Generalization and Personalization in Federated Prompt Learning*, Cui et al., ICML 2024, arXiv
2405.09771.

    p_c = p_g + u_c v_c        p_g = sum_c p_c p_g,c        u_c v_c stays with client c

What is trained in full travels and is averaged, the low-rank factors stay: FedPer the other way round. Of a CLIP these
are vectors before the words of prompts and a low-rank term that is added to them; the contrastive term that the paper
adds to the loss is the task's (``experiments``: ``--contrast``), as it looks at texts. Ours: the term begins at zero
(``b = 0``), and a client that never took part has ``p_g`` alone.
"""

from __future__ import annotations

from fedlora_jax import lora, personal
from fedlora_jax.method import About, Method
from fedlora_jax.methods.fedit import fedit

ABOUT = About("FedPGP", "Cui et al. ICML 2024", "2405.09771", "a, b, head", "head", "n/a", "a, b")


def fedpgp() -> Method:
    """FedPGP. It has no options: what is trained in full (``full`` of ``lora.new``) is what travels."""
    inner = fedit()

    def init(key, adapter):
        if not lora.flatten(lora.split(adapter)[1]):
            raise ValueError(
                "FedPGP shares what is trained in full, and the adapter has nothing: name it, as in full=('^head/',) "
                "of lora.new (--full ^head/context)"
            )
        return inner.init(key, adapter)

    return personal.keeping(inner, lambda adapter: lora.split(adapter)[::-1])._replace(init=init)
