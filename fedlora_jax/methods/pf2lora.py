"""PF2LoRA: *Personalized Federated Fine-tuning for Heterogeneous Data: An Automatic Rank Learning Approach via
Two-Level LoRA*, Hao et al., 2025, arXiv 2503.03920.

    client c:  W + s a b + s u_c v_c        min over a, b of sum_c p_c f_c(a, b, best u_c, v_c of f_c)

A common update and a smaller one of each client, learned on two levels: the client's answers to the common one. Common
factors and the head travel and are averaged, as FedIT's; u_c, v_c never do. Between rank r and r plus the local rank
each client's model has the rank that its data ask for. Known from the abstract: the two levels. Ours: the lower level
is one gradient step of length ``al``, whose derivative the upper one follows, and both move in every local step:

    upper: grad f_c(a, b, y - al grad_y f_c)  in a, b        lower: grad f_c  in y = (u_c, v_c)
"""

from __future__ import annotations

import jax

from fedlora_jax import personal
from fedlora_jax.checks import refuse_outside
from fedlora_jax.method import About, MetaGradient, Method
from fedlora_jax.methods.fedit import fedit

ABOUT = About("PF2LoRA", "Hao et al. 2025", "2503.03920", "a, b, u, v, head", "a, b, head", "no", "u, v")


def pf2lora(local_rank: int = 2, al: float = 0.01) -> Method:
    """PF2LoRA.

    Args:
      local_rank: of the clients' own part; 0: FedIT.
      al: length of the lower level's step; 0: both parts follow the loss together.

    Raises:
      ValueError: a number below 0, or (at init) a rank that does not fit a kernel.
    """
    refuse_outside("[0, inf)", local_rank=local_rank, al=al)
    inner = personal.beside(fedit(), local_rank)

    def objective(task, carried, context):
        held = jax.lax.stop_gradient
        f = lambda x, y: task(personal.together(personal.Pair(x, y)))
        x, y = carried
        loss, slope = jax.value_and_grad(f, 1)(x, held(y))
        upper = f(x, jax.tree.map(lambda y, g: y - al * g, held(y), slope))
        return upper + f(held(x), y), held(loss)

    passes = MetaGradient(inner.meta_gradient.train, lambda steps: 3 * steps)
    return inner._replace(objective=objective, meta_gradient=passes)
