"""FedRep: *Exploiting Shared Representations for Personalized Federated Learning*, Collins et al., ICML 2021, arXiv
2102.07078.

    E_h steps on head_c with (a, b) as sent, then E_b steps on (a_c, b_c) with that head
    (a, b) = sum_c p_c (a_c, b_c)

FedPer in two phases: the low-rank factors travel, the head stays with its client. E_h is given as a share of the local
steps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from fedlora_jax import lora, personal
from fedlora_jax.batches import steps_taken
from fedlora_jax.checks import is_concrete, refuse_outside
from fedlora_jax.method import About, Method
from fedlora_jax.methods.fedper import fedper

ABOUT = About("FedRep", "Collins et al. ICML 2021", "2102.07078", "head, then a, b", "a, b", "n/a")


def fedrep(share: float = 0.5) -> Method:
    """FedRep.

    Args:
      share: of the local steps, those on the head.

    Raises:
      ValueError: a share that leaves no step to one of the two phases, of all or (when a round is traced) of those that
        the cohort's batches make.
    """
    refuse_outside("(0, 1)", share=share)

    def mask_schedule(mask, progress):
        body, head = lora.split(mask)
        first = personal.within(progress, share)
        only = lambda part, on: jax.tree.map(lambda m: m * on, part)
        return lora.join(only(body, jnp.logical_not(first)), only(head, first))

    def with_both_phases(cohort):
        steps = steps_taken(cohort.batches, 1)
        if not is_concrete(share, steps):
            return cohort
        steps = int(np.min(steps))  # of the client that takes the fewest
        if personal.within((steps - 1) / steps, share):
            raise ValueError(
                f"a share of {share} of {steps} local steps for the head leaves none for the low-rank factors: "
                f"expected at most {steps - 1} of {steps}, lower the share or take more steps"
            )
        return cohort

    return fedper()._replace(mask_schedule=mask_schedule, pool=with_both_phases)
