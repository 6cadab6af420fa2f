"""G: from a client's signature to the adapter it starts from.

    mix      a_c = a (I + m_a)              b_c = (I + m_b) b + sum_j k_j v_j         m = tanh(.) / (2 r)
    bases    a_c = a + sum_j k'_j u_j       b_c = b + sum_j k_j v_j
    none     a_c = a                        b_c = b
    head     bias_c[y] = bias[y] + tanh(t) log(s_c[y] + EPSILON)                      for each class y, of share s_c[y]

``head`` comes with each of the other forms. The numbers ``m`` and ``k`` are what one network, shared by all kernels,
makes of the signature ``z_c`` and of a code for the kernel and the layer. The head's bias needs no network: a
classifier moves to other shares of its classes by the difference of their logarithms (logit adjustment: Menon et al.,
ICLR 2021, arXiv 2007.07314), and ``t`` is how much of it helps a model whose own evidence is still weak: nothing at ``t
= 0``, never more than all of it. Of everything the value at the mean signature is subtracted: the mean client starts
from the global adapter exactly, and what G adds for one client and takes from another does not pile up in their
average.

The last layer of the network and ``t`` start at zero, hence at first everybody starts from the global adapter. The
bases ``u, v`` start small and random: were they zero, too, both factors of ``k v`` would have a zero gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax.hyper.networks import Conditioned, Place, per_layer, places
from fedlora_jax.keys import purpose
from fedlora_jax.lora import Adapter, LoRA, flatten, unflatten
from fedlora_jax.product import matmul
from fedlora_jax.signatures import Signature

Form = Literal["none", "mix", "bases"]
BASES = 4
EPSILON = 0.01  # added to shares: far below it a class counts as absent, and its logarithm stays finite


class Generator(NamedTuple):
    """The parameters of G."""

    network: Any  # z -> m and k of every low-rank kernel; () in the form none
    bases: dict[str, dict[str, Array]]  # by kernel: v [..., J, r, out]; u [..., J, in, r] in the form bases
    prior: Any  # t; () where signatures say nothing of labels, or no bias is trained


def init(key: Array, adapter: Adapter, like: Signature, form: Form, scale: float = 0.02) -> Generator:
    """A generator that sends the global adapter unchanged.

    Args:
      key: typed PRNG key.
      adapter: gives names and shapes.
      like: one client's signature; only its shapes are read.
      form: see the module.
      scale: deviation of the bases.

    Raises:
      ValueError: an unknown form, or kernels of several ranks.
    """
    if form not in get_args(Form):
        raise ValueError(f"form must be {', '.join(get_args(Form)[:-1])} or {get_args(Form)[-1]}, got {form!r}")
    at, flat = places(adapter), flatten(adapter)
    prior = jnp.zeros(()) if _biases(flat, like) else ()
    if form == "none":
        return Generator((), {}, prior)
    rank = flat[at[0].name].a.shape[-1]
    if any(flat[place.name].a.shape[-1] != rank for place in at):
        raise ValueError(f"form={form} needs one rank for all kernels; give clients smaller ranks by mask instead")
    key_network, key_bases = jax.random.split(key)
    z = jnp.zeros((*at[0].layers, like.flat().shape[-1]))
    bases = {p.name: _bases(jax.random.fold_in(key_bases, p.number), flat[p.name], form, scale) for p in at}
    return Generator(_network(form, rank).init(key_network, z, at[0]), bases, prior)


def generate(g: Generator, signatures: Signature, center: Signature, adapter: Adapter, form: Form) -> Adapter:
    """Each client's start ``[C, ...]``.

    Args:
      g: parameters.
      signatures: ``[C, ...]``.
      center: the mean client's signature, without the client axis.
      adapter: the global one.
      form: as in ``init``.
    """
    flat = flatten(adapter)
    clients = signatures.amount.shape[0]
    rows = {name: jax.tree.map(lambda x: jnp.broadcast_to(x, (clients, *x.shape)), x) for name, x in flat.items()}
    for name in _biases(flat, signatures):
        rows[name] = rows[name] + class_shifts(g.prior, signatures, center)
    both = _with(signatures, center)
    for place in places(adapter) if form != "none" else ():
        rows[place.name] = _low_rank(g, both.flat(), flat[place.name], place, form)
    return unflatten(rows)


def class_shifts(t: Array, signatures: Signature, center: Signature) -> Array:
    """``[C, classes]`` what a bias gets: ``tanh(t)`` of the log share of its class, beyond the mean client's."""
    prior = lambda z: jnp.log(z.shares() + EPSILON)
    return part(t) * (prior(signatures) - prior(center))


def part(t: Array | tuple[()]) -> Array:
    """How much of the move to a client's shares is made, above -1 and below 1; none without a ``t``."""
    return jnp.zeros(()) if isinstance(t, tuple) else jnp.tanh(t)


def _with(signatures: Signature, center: Signature) -> Signature:
    """The mean client after all others, ``[C + 1, ...]``."""
    return jax.tree.map(lambda z, mean: jnp.concatenate([z, mean[None]]), signatures, center)


def _low_rank(g: Generator, z: Array, x: LoRA, place: Place, form: Form) -> LoRA:
    r, bases = x.a.shape[-1], g.bases[place.name]
    network = lambda z: _network(form, r).apply(g.network, z, place)
    out = _beyond_the_mean(network, per_layer(z, place.layers))
    combined = lambda k, v: jnp.einsum("c...j,...jxy->c...xy", k, v)
    if form == "bases":
        return LoRA(x.a + combined(out[..., BASES:], bases["u"]), x.b + combined(out[..., :BASES], bases["v"]), x.scale)
    k, m_a, m_b = jnp.split(out, [BASES, BASES + r * r], -1)
    square = lambda y: 0.5 / r * jnp.tanh(y).reshape(*y.shape[:-1], r, r)
    a, b = x.a + matmul(x.a, square(m_a)), x.b + matmul(square(m_b), x.b)
    return LoRA(a, b + combined(k, bases["v"]), x.scale)


def _beyond_the_mean(network: Callable, x: Array) -> Array:
    """The outputs for all rows but the last, minus the output for the last."""
    out = jnp.asarray(network(x))
    return out[:-1] - out[-1:]


def _network(form: Form, rank: int) -> Conditioned:
    return Conditioned(outputs=BASES + (2 * rank**2 if form == "mix" else BASES), width=128, blocks=2)


def _biases(flat: dict[str, Any], signature: Signature) -> list[str]:
    """The parameters trained in full that hold one number per class."""
    classes = signature.labels.shape[-1]
    return [name for name, x in sorted(flat.items()) if not isinstance(x, LoRA) and classes and x.shape == (classes,)]


def _bases(key: Array, x: LoRA, form: Form, scale: float) -> dict[str, Array]:
    *layers, n_in, rank = x.a.shape
    draw = lambda key, *shape: scale * jax.random.normal(key, (*layers, BASES, *shape))
    bases = {"v": draw(jax.random.fold_in(key, 0), rank, x.b.shape[-1])}
    return bases | {"u": draw(purpose(key, "u"), n_in, rank)} if form == "bases" else bases
