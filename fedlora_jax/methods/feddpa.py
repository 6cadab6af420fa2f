"""FedDPA: *Dual-Personalizing Adapter for Federated Foundation Models*, Yang et al., NeurIPS 2024, arXiv 2403.19211.

    client c's model:  W + (1 - mix) (global update) + mix (local update)        global = FedIT's

The global adapter is trained as FedIT trains it, and it alone travels. The local one is trained inside of the mixture,
in which the global one holds still. This is FedDPA-T, in which both are trained in every round; ours: side by side on
the same batches by one optimizer, as Ditto's, not one after the other. ``mix`` is one number for all: the paper weighs
each test instance by how near its features are to a client's training data, which a method that sees losses alone
cannot. Heads are mixed as updates are, and a client that never took part is served the global adapter.
"""

from __future__ import annotations

import jax

from fedlora_jax import personal
from fedlora_jax.checks import refuse_outside
from fedlora_jax.method import About, MetaGradient, Method
from fedlora_jax.methods.fedit import fedit

ABOUT = About("FedDPA-T", "Yang et al. NeurIPS 2024", "2403.19211", "a, b, head (twice)", "a, b, head", "n/a")


def feddpa(mix: float = 0.5) -> Method:
    """FedDPA-T.

    Args:
      mix: share of the local adapter in a client's model, from 0 (FedIT's) to 1 (its own alone).

    Raises:
      ValueError: another share.
    """
    refuse_outside("[0, 1]", mix=mix)

    def model(carried, context):
        return personal.mixture(carried["shared"], carried["personal"], mix)

    def objective(task, carried, context):
        loss = task(model(carried | {"shared": jax.lax.stop_gradient(carried["shared"])}, context))
        return task(carried["shared"]) + loss, loss

    inner = personal.side_by_side(fedit())
    passes = MetaGradient(inner.meta_gradient.train, lambda steps: 2 * steps)
    return inner._replace(model=model, objective=objective, meta_gradient=passes)
