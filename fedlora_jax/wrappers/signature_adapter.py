"""A low-rank adapter generated from a client's signature, beside the models of any method.

    client c computes with  a_c b_c + u V[phi_c]  and  y_c + H[phi_c]      phi_c = z_c - z, beyond the mean client
    S <- (1 - eta) S + eta sum_c p_c phi_c phi_c^T
    V <- V + eta R sum_c p_c phi_c (x) u^T D_c         R = (S + lam tr(S) / N I)^-1
    H <- H + eta R sum_c p_c phi_c (x) d_c             D_c, d_c: how c's product, or what is trained in full, moved
    u <- orth(sum_c p_c D_c D_c^T u)                   beyond the mean move; u in the first rounds only

Ours: a generator for HyperLoRA (Gupta et al. 2026, arXiv 2606.06154, which does not publish its own), made a tier of
its own as ``signature_bias`` is: it stands frozen beside what a client trains, so what comes back is the inner
method's alone. It is linear in the signature, and learns how much of clients' local moves their signatures foretell:
one step of recursive least squares with forgetting a round, where a network would make one step of Adam. ``N``, the
clients that it remembers, makes a few of them believed less: what is found between signatures and moves of a dozen
clients is mostly chance. They are those that there are, or ``(2 - eta) / eta`` cohorts: so many, weighed alike, say as
much as all weighed by how long ago they came. It rests
where ``displacement`` rests (uploads that signatures tell nothing of). ``u`` are the leading left singular directions
of clients' moves beyond the mean one (block power iteration), fixed after ``warmup`` rounds; until then nothing is
generated. The mean client is served the inner model exactly, and a client that never took part its own at once.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fedlora_jax import lora, product, signatures
from fedlora_jax.checks import refuse_outside
from fedlora_jax.decomposition import solve
from fedlora_jax.lora import Adapter, LoRA
from fedlora_jax.method import Method
from fedlora_jax.product import matmul
from fedlora_jax.signatures import Signature
from fedlora_jax.wrappers.around import AboutWrapper, Wrapper, around

ABOUT = {
    "signature_adapter": AboutWrapper(
        "Signature adapter",
        "ours, after Gupta et al. 2026",
        "2606.06154",
        "an adapter from what a client's data are",
        "its signature",
    )
}


class SignatureAdapterState(NamedTuple):
    """For signatures of m numbers; dicts are by the name of the parameter."""

    basis: dict[str, Array]  # u [..., in, k] of each low-rank kernel
    maps: dict[str, Array]  # V [m, ..., k, out] of these, and H [m, ...] of what is trained in full
    second: Array  # S [m, m]
    center: Signature  # mean of the cohorts so far
    round: Array  # rounds done


class Tier(NamedTuple):
    """What is generated for one client: ``u`` and ``V[phi]``, ``H[phi]``."""

    basis: dict[str, Array]
    own: dict[str, Array]


def signature_adapter(
    inner: Method,
    signature: Signature,
    population: int,
    rank: int = 8,
    lr: float = 0.3,
    ridge: float = 3.0,
    warmup: int = 3,
    head: bool = True,
) -> Method:
    """A generated adapter beside the models of ``inner``; with ``lr = 0`` it is ``inner``.

    Args:
      inner: a method whose clients carry one adapter, and whose server one.
      signature: one client's, only its shapes are read.
      population: clients that may take part.
      rank: of what is generated for each kernel, at most its input; 0: nothing low-rank is.
      lr: eta, from 0 to 1.
      ridge: lam, above 0: how large what signatures do not foretell of one client's move is beside what they do.
      warmup: rounds before anything is generated.
      head: whether what is trained in full is generated, too.

    Raises:
      ValueError: a number outside of its interval; nothing would be generated; (when a round is traced) clients of the
        method carry something else than one adapter.
    """
    refuse_outside("[1, inf)", population=population)
    refuse_outside("[0, inf)", rank=rank, warmup=warmup)
    refuse_outside("[0, 1]", lr=lr)
    refuse_outside("(0, inf)", ridge=ridge)
    if not (rank or head):
        raise ValueError("signature_adapter with rank=0 and head=False generates nothing: leave it out, or one of them")
    m = sum(x.shape[-1] for x in signature)

    def init(key, state, adapter):
        basis, maps = {}, {}
        for i, (name, x) in enumerate(sorted(lora.flatten(adapter).items())):
            if lora.is_lora(x) and rank:
                basis[name] = _first_basis(jax.random.fold_in(key, i), x, rank)
                maps[name] = jnp.zeros((m, *basis[name].shape[:-2], basis[name].shape[-1], x.b.shape[-1]))
            elif head and not lora.is_lora(x):
                maps[name] = jnp.zeros((m, *x.shape))
        center = signatures.nobody(signature)
        return SignatureAdapterState(basis, maps, jnp.zeros((m, m)), center, jnp.zeros((), jnp.int32))

    def client_context(own, cohort, sent):
        _one_adapter(own, sent.adapter)
        phi = _beyond_the_mean(own, cohort.signatures)
        each = lambda x: jnp.broadcast_to(x, (len(phi), *x.shape))
        return Tier(jax.tree.map(each, own.basis), {name: jnp.tensordot(phi, x, 1) for name, x in own.maps.items()})

    def finish(old, new, cohort, sent, received):
        # Whoever differentiates a round takes what is learned in it as given.
        own, cohort, sent, received = jax.lax.stop_gradient((old.own, cohort, sent, received))
        remembered = jnp.minimum(population, len(cohort.weights) * (2 - lr) / jnp.maximum(lr, 1e-6))
        share = ridge / remembered  # of tr(S)
        return new, _learned(own, cohort, lora.flatten(sent.adapter), lora.flatten(received), lr, share, warmup)

    def traffic(own, cohort):
        theirs = inner.traffic(own, cohort)
        flat = lora.flatten(own)
        tier = [
            _factors_of(x, rank) if lora.is_lora(x) else x for x in flat.values() if (rank if lora.is_lora(x) else head)
        ]
        return theirs._replace(up=(theirs.up, signature), down=(theirs.down, tier))

    wrapper = Wrapper(
        "signature_adapter",
        init=init,
        client_context=client_context,
        client_model=_beside,
        finish=finish,
        report=lambda own: {"generated": _size(own)},
    )
    return around(inner, wrapper)._replace(traffic=traffic)


def _first_basis(key: Array, x: LoRA, rank: int) -> Array:
    """Orthonormal ``[..., in, k]``, that of ``a`` first: at first, moves are within it."""
    k = min(rank, x.a.shape[-2])
    more = jax.random.normal(key, (*x.a.shape[:-1], k), x.a.dtype)
    return _orthonormal(jnp.concatenate([x.a, more], -1)[..., :k])


def _factors_of(x: LoRA, rank: int) -> tuple[Array, Array]:
    """Zeros in the shapes of ``u`` and ``V[phi]`` of a kernel."""
    k = min(rank, x.a.shape[-2])
    return jnp.zeros((*x.a.shape[:-1], k)), jnp.zeros((*x.b.shape[:-2], k, x.b.shape[-1]))


def _orthonormal(x: Array) -> Array:
    """A basis of the columns of ``x [..., in, k]``, matrix by matrix: batched QR can hang on CPU."""
    k = x.shape[-1]
    identity = jnp.broadcast_to(jnp.eye(k, dtype=x.dtype), (*x.shape[:-2], k, k))
    return product.truncate(LoRA(x, identity, 1.0), k, split="left").a


def _beyond_the_mean(own: SignatureAdapterState, z: Signature) -> Array:
    return z.flat() - own.center.flat()  # [C, m]


def _beside(model: Adapter, tier: Tier) -> Adapter:
    flat = lora.flatten(model)
    for name, x in tier.own.items():
        bare = flat[name]
        beside = lambda u, x=x, bare=bare: product.plus(bare, LoRA(u / bare.scale, x, bare.scale))
        flat[name] = beside(tier.basis[name]) if name in tier.basis else bare + x
    return lora.unflatten(flat)


def _learned(own, cohort, sent, received, lr, share, warmup) -> SignatureAdapterState:
    p, phi = cohort.weights, _beyond_the_mean(own, cohort.signatures)
    beyond = lambda x: x - jnp.tensordot(p, x, 1)  # what is alike for all is the inner method's
    phi = beyond(phi)
    second = (1 - lr) * own.second + lr * jnp.einsum("c,ci,cj->ij", p, phi, phi, precision="highest")
    shift = (share * jnp.trace(second) + 1e-12) * jnp.eye(len(second), dtype=second.dtype)
    gain = solve(second + shift, (p[:, None] * phi).T)  # [m, C]
    basis, maps, begun = {}, {}, own.round >= warmup
    for name, x in own.maps.items():
        if name in own.basis:
            u, moved = own.basis[name], jax.vmap(product.difference)(received[name], sent[name])
            seen = beyond(moved.scale * matmul(matmul(u.mT, moved.a), moved.b))  # u^T D [C, ..., k, out]
            basis[name] = jax.lax.cond(begun, lambda u, *_: u, _turned, u, p, moved, seen)
        else:
            seen = beyond(received[name] - sent[name])
        step = lr * jnp.tensordot(gain, seen, 1, precision="highest")
        maps[name] = jnp.where(begun, x + step, x)
    center = signatures.mean_so_far(own.center, cohort.signatures, p, own.round)
    return SignatureAdapterState(basis, maps, second, center, own.round + 1)


def _turned(u: Array, p: Array, moved: LoRA, seen: Array) -> Array:
    """One step of block power iteration, ``orth(sum_c p_c D_c (u^T D_c)^T)``; what ``u`` spans where nothing moved."""
    d = jnp.einsum("c,c...ir,c...rk->...ik", p, moved.a, matmul(moved.b, seen.mT), precision="highest")
    d = d / (product.safe_sqrt(jnp.sum(d**2, (-2, -1), keepdims=True)) + 1e-20)
    return _orthonormal(d + 1e-4 * u)


def _size(own: SignatureAdapterState) -> Array:
    """How large what is generated is: the root of its mean square over clients of the signatures that were seen."""
    squares = [jnp.einsum("ij,i...,j...->", own.second, x, x) for x in own.maps.values()]
    return product.safe_sqrt(jnp.stack(squares).sum())


def _one_adapter(own: SignatureAdapterState, rows: Adapter) -> None:
    missing = [name for name in own.maps if name not in lora.flatten(rows)]
    if missing:
        raise ValueError(
            f"signature_adapter stands beside the server's adapter, and clients of this method carry none called "
            f"{missing[0]}: wrap a method whose clients carry one adapter, such as fedit"
        )
