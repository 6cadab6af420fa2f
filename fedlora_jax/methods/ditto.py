"""Ditto: *Ditto: Fair and Robust Federated Learning Through Personalization*, Li et al., ICML 2021, arXiv 2012.04221.

    w = sum_c p_c w_c  (FedIT)        v_c <- argmin  f_c(v) + lam / 2 |v - w|^2

Clients train the global adapter and one of their own side by side and use their own; w in the penalty is the adapter
as sent. The global adapter travels, v_c never does. Twice the local work. Both are trained by one optimizer: one that
clips by the global norm scales them together, and the global adapter is then no longer exactly FedIT's.
"""

from __future__ import annotations

from fedlora_jax import personal
from fedlora_jax.checks import refuse_outside
from fedlora_jax.method import About, MetaGradient, Method
from fedlora_jax.methods.fedit import fedit
from fedlora_jax.personal import squared_distance

ABOUT = About("Ditto", "Li et al. ICML 2021", "2012.04221", "a, b, head (twice)", "a, b, head", "n/a")


def ditto(lam: float = 0.1) -> Method:
    """Ditto.

    Args:
      lam: how strongly a client's adapter is drawn to the global one; 0: every client alone.

    Raises:
      ValueError: lam below 0.
    """
    refuse_outside("[0, inf)", lam=lam)

    def objective(task, carried, w):
        v = carried["personal"]
        loss = task(v)
        return task(carried["shared"]) + loss + lam / 2 * squared_distance(v, w), loss

    inner = personal.side_by_side(fedit())
    return inner._replace(
        objective=objective, meta_gradient=MetaGradient(inner.meta_gradient.train, lambda steps: 2 * steps)
    )
