"""FedIT with local fine-tuning: *Federated Evaluation of On-device Personalization*, Wang et al., 2019, arXiv
1910.10252.

    w = sum_c p_c w_c        v_c = w after H local steps of client c

FedIT trains and travels as ever; each client uses what it has made of the last global adapter it was sent. H is given
as a share of the local steps. Ours: the two are trained side by side, which costs the shared steps twice, and by one
optimizer: one that clips by the global norm scales them together.
"""

from __future__ import annotations

import jax

from fedlora_jax import personal
from fedlora_jax.checks import refuse_outside
from fedlora_jax.method import About, MetaGradient, Method
from fedlora_jax.methods.fedit import fedit

ABOUT = About("FedIT fine-tuned", "Wang et al. 2019", "1910.10252", "a, b, head", "a, b, head", "no")


def finetune(share: float = 1.0) -> Method:
    """FedIT, then local steps for the client itself.

    Args:
      share: of a round's local steps that a client takes for itself, 0 to 1; 0: FedIT.

    Raises:
      ValueError: a share outside 0 to 1.
    """
    refuse_outside("[0, 1]", share=share)
    if share == 0:
        return fedit()

    def objective(task, carried, context):
        loss = task(carried["shared"])
        return loss + task(carried["personal"]), loss

    def mask_schedule(mask, progress):
        own = jax.tree.map(lambda m: m * personal.within(progress, share), mask["personal"])
        return mask | {"personal": own}

    def train(tune, judge, start):
        end, trace = tune(start | {"personal": start["shared"]})  # whatever it kept: fine-tuning starts from w
        return end, trace, ()

    return personal.side_by_side(fedit())._replace(
        objective=objective, mask_schedule=mask_schedule, meta_gradient=MetaGradient(train, lambda steps: 2 * steps)
    )
