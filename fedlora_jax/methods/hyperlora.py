"""HyperLoRA: *Amortizing Federated Adaptation: Hypernetwork Driven LoRA for Personalized Foundation Models*, Gupta,
Shanker and Sethi, 2026, arXiv 2606.06154.

    start      x_c = G(z_c; a, b)                         from the client's signature z_c and the global adapter
    aggregate  (a, b) = C(S({a_c, b_c, p_c, z_c}))        in product space, with a residual correction

The paper's architecture and objective are not public; ``fedlora_jax/hyper`` holds our design. With all of the server
written as one map ``Phi(theta, uploads of the last round, z) -> {x_c}``, its parts learn by one rule, whatever is
known of how the starts should have been different (a *meta-gradient* g_c, ``fedlora_jax/meta.py``):

    theta <- theta - Adam( (d Phi / d theta)^T {p_c g_c} )

so aggregation is judged by the next round, which starts from it. A client of a smaller rank starts from the best
approximation of x_c of that rank. ``displacement`` asks nothing of a client but its
upload, ``first_order`` a gradient on examples kept apart, ``exact`` the derivative through its local steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from fedlora_jax import lora, meta, method, product, signatures
from fedlora_jax.checks import is_concrete, refuse_outside
from fedlora_jax.hyper import corrector, generator, synthesizer
from fedlora_jax.hyper.corrector import Corrector
from fedlora_jax.hyper.generator import Form, Generator
from fedlora_jax.hyper.networks import per_layer, places
from fedlora_jax.hyper.synthesizer import Factors, Server, Synthesizer, Uploads
from fedlora_jax.lora import Adapter
from fedlora_jax.method import About, Cohort, Dispatch, Method, Traffic
from fedlora_jax.signatures import Signature

ABOUT = About(
    "HyperLoRA",
    "Gupta et al. 2026 (our design)",
    "2606.06154",
    "a, b, head",
    "a, b, head; signature up",
    "to rank r",
    tells="its signature, a meta-gradient",
)

Mode = Literal["displacement", "first_order", "exact", "frozen"]


class Theta(NamedTuple):
    """Everything that is meta-learned."""

    generator: Generator
    synthesizer: Synthesizer
    corrector: Corrector


class HyperLoRAState(NamedTuple):
    """adapter: the global one, C(S(last)). theta: parameters of G, S, C. meta: their optimizer's state.

    last: the latest round's uploads. center: mean signature of the cohorts so far. round: rounds done.
    """

    adapter: Adapter
    theta: Theta
    meta: Any
    last: Uploads
    center: Signature
    round: Array


class Settings(NamedTuple):
    """The arguments of ``hyperlora``, as its functions need them. tx: the optimizer of theta."""

    participants: int
    signature: Signature
    form: Form
    server: Server
    tx: optax.GradientTransformation
    memory: float
    factors: Factors
    warmup: int
    personal: int
    theta: Mapping[str, Array] | None


def hyperlora(
    participants: int,
    signature: Signature,
    mode: Mode = "displacement",
    form: Form = "none",
    server: Server = "steps",
    lr: float = 1e-4,
    lr_prior: float = 0.1,
    lr_server: float = 3e-4,
    lr_step: float = 0.1,
    memory: float = 0.0,
    factors: Factors = "orthogonal",
    warmup: int = 3,
    query: int = 16,
    kappa: float = 0.0,
    personal: int = 0,
    theta: Mapping[str, Array] | None = None,
) -> Method:
    """HyperLoRA.

    Args:
      participants: clients per round; the state keeps one round of uploads.
      signature: one client's, only its shapes are read.
      mode: which meta-gradient theta learns from; ``frozen``: theta stays as it is.
      form: of G's low-rank part, see ``fedlora_jax/hyper/generator.py``; none: it speaks for the head's bias alone.
      server: what S and C learn. ``steps``: a server step of each layer; ``full``: client weights, a bend of singular
        values and a correction as well, by networks.
      lr, lr_prior: of G's network, where there is one, and of its ``t`` (AdamW, weight decay 1e-4).
      lr_server, lr_step: of all else in S and C, where there is any, and of S's server steps (Adam).
      memory: part of the last move of the global adapter that S makes again, from 0 to below 1; 0: none is kept.
      factors: of the global adapter's products, see ``fedlora_jax/hyper/synthesizer.py``.
      warmup: rounds before anything is learned; the method is FlexLoRA in such factors there.
      query: examples a client keeps apart in a round, where the mode needs them.
      kappa: weight of the loss at the start itself, before local steps, in what theta learns from; needs examples kept
        apart, and its gradient travels.
      personal: rank of the update that a client keeps for itself and that C may add to its next start; 0: none.
      theta: parameters learned elsewhere, as ``named`` gives them.

    Raises:
      ValueError: an unknown mode, server or factors, a rank or weight below 0, a memory of 1 or more, a kappa where
        nothing is learned, or (when a round is traced) signatures of another size than theta was learned for.
    """
    _check(mode, kappa, personal, memory, factors, server, signature)
    refuse_outside("[0, inf)", lr=lr, lr_prior=lr_prior, lr_server=lr_server, lr_step=lr_step, warmup=warmup)
    refuse_outside("[1, inf)", query=query)
    tx = _optimizer(lr, lr_prior, lr_server, lr_step)
    s = Settings(participants, signature, form, server, tx, memory, factors, warmup, personal, theta)
    meta_gradient = {**meta.META_GRADIENTS, "frozen": method.no_meta_gradient}[mode]
    asks = bool(kappa) or mode in ("exact", "first_order")  # clients for a gradient on examples kept apart

    by_networks = form != "none" or server == "full" or personal
    told = signature if by_networks else signature._replace(shape=signature.shape[:0])  # what is read of it

    def traffic(own, cohort):
        return Traffic(up=(own, own if asks else (), told), down=own)

    full = Method(
        partial(_init, s),
        partial(_dispatch, s),
        partial(_aggregate, s),
        traffic=traffic,
        meta_gradient=meta.also_at_the_start(meta_gradient, kappa) if kappa else meta_gradient,
        learn=method.no_learning if mode == "frozen" else partial(_learn, s),
        query=query if asks else 0,
        report=partial(_report, s),
    )
    if not personal:
        return full
    return full._replace(
        init_client=lambda adapter: corrector.nothing_personal(adapter, personal),
        remember=lambda memory, context, sent, received: corrector.own_update(sent, received, personal),
    )


def _init(s: Settings, key, adapter):
    lora.needs_low_rank(adapter, "generated starts")
    keys = jax.random.split(key, 3)
    fresh = Theta(
        generator.init(keys[0], adapter, s.signature, s.form),
        synthesizer.init(keys[1], adapter, s.signature, s.server),
        corrector.init(keys[2], adapter, s.signature, shared=s.server == "full", own=s.personal > 0),
    )
    own = fresh if s.theta is None else _restored(s.theta, fresh)
    stack = lambda x: jnp.broadcast_to(x, (s.participants, *x.shape)) * 1
    nobody = signatures.nobody(s.signature)
    weights = jnp.ones(s.participants) / s.participants  # not jnp.full: its weak type would compile round two anew
    last = Uploads(
        jax.tree.map(stack, adapter), weights, jax.tree.map(stack, nobody), adapter, _push(s, adapter, adapter)
    )
    return HyperLoRAState(adapter, own, s.tx.init(own), last, nobody, jnp.zeros((), jnp.int32))


def _push(s: Settings, now: Adapter, before: Adapter) -> Any:
    return () if is_concrete(s.memory) and s.memory == 0 else synthesizer.push(s.memory, now, before)


def _starts(s: Settings, theta: Theta, state: HyperLoRAState, adapter: Adapter, cohort: Cohort) -> Adapter:
    """G, and the personal part of C; of a smaller rank the best approximation."""
    rows = generator.generate(theta.generator, cohort.signatures, state.center, adapter, s.form)
    if s.personal and jax.tree.leaves(cohort.memory):
        rows = corrector.personalise(theta.corrector, cohort.signatures, rows, cohort.memory, _split(s.factors))
    smaller = cohort.ranks < lora.max_rank(adapter)

    def truncated_row(x, m):
        t = jax.vmap(partial(product.within, split=_split(s.factors)))(x, cohort.ranks)
        t = synthesizer.steady(t, jax.tree.map(jnp.multiply, x, m)) if s.factors != "balanced" else t
        return jax.tree.map(lambda x, y: jnp.where(method.per_client(smaller, x) > 0, y, x), x, t)

    mask = lora.rank_mask(adapter, cohort.ranks)
    truncated = lambda rows: lora.tree_map(truncated_row, rows, mask)
    return jax.lax.cond(smaller.any(), truncated, lambda rows: rows, rows)


def _split(factors: Factors) -> product.Split:
    return "left" if factors == "orthogonal" else "balanced"


def _dispatch(s: Settings, base, state, cohort):
    _check_signatures(cohort.signatures, state.center)
    mask = lora.rank_mask(state.adapter, cohort.ranks)
    rows = jax.tree.map(jnp.multiply, _starts(s, state.theta, state, state.adapter, cohort), mask)
    return Dispatch(base, rows, mask, context=rows)


def _learn(s: Settings, state, cohort, meta_gradients):
    """One step of theta against the meta-gradients (none during warm-up)."""
    # Whoever differentiates a round takes what theta learns in it as given.
    frozen, cohort, meta_gradients = jax.lax.stop_gradient((state, cohort, meta_gradients))
    phi = lambda theta: _starts(s, theta, frozen, aggregated(theta, frozen.last, s.factors), cohort)
    _, pull = jax.vjp(phi, frozen.theta)
    (grads,) = pull(jax.tree.map(lambda g: jnp.einsum("c,c...->c...", cohort.weights, g), meta_gradients))
    updates, moments = s.tx.update(grads, frozen.meta, frozen.theta)
    keep = lambda new, old: jax.tree.map(lambda x, y: jnp.where(state.round >= s.warmup, x, y), new, old)
    theta: Any = optax.apply_updates(state.theta, keep(updates, jax.tree.map(jnp.zeros_like, updates)))
    theta = theta._replace(synthesizer=synthesizer.no_shorter(theta.synthesizer, frozen.theta.synthesizer))
    return state._replace(theta=theta, meta=keep(moments, frozen.meta))


def _aggregate(s: Settings, base, state, cohort, sent, received):
    moved = _push(s, state.adapter, state.last.previous)
    last = Uploads(received, cohort.weights, cohort.signatures, state.adapter, moved)
    center = signatures.mean_so_far(state.center, cohort.signatures, cohort.weights, state.round)
    adapter = aggregated(state.theta, last, s.factors)
    return HyperLoRAState(adapter, state.theta, state.meta, last, center, state.round + 1)


def _report(s: Settings, state):
    g, steps = state.theta.generator, state.theta.synthesizer.steps
    eta = [synthesizer.server_step(steps[place.name]).mean() for place in places(state.adapter)]
    said = {"prior": generator.part(g.prior), "server_step": jnp.stack(eta).mean()}
    if s.form != "none":
        rows = generator.generate(g, state.last.signatures, state.center, state.adapter, s.form)
        said["personal_start"] = _spread(rows, state.adapter)
    return said | (_gates(state.theta, state.last) if s.server == "full" else {})


def aggregated(theta: Theta, uploads: Uploads, factors: Factors) -> Adapter:
    """The new global adapter: S, then C."""
    low_rank, full = synthesizer.synthesize(theta.synthesizer, uploads, factors)
    return lora.unflatten({**full, **corrector.correct(theta.corrector, uploads, low_rank)})


def parameters(theta: Theta) -> dict[str, int]:
    """Numbers in each part."""
    return {part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in theta._asdict().items()}


def _gates(theta: Theta, last: Uploads) -> dict[str, Array]:
    """How far the networks of S and C are from saying nothing, mean over kernels and layers of absolute values."""
    z, old, new = last.signatures.flat(), lora.flatten(last.previous), lora.flatten(last.received)
    rows = []
    for place in places(last.previous):
        feat = synthesizer.features(new[place.name], last.weights, old[place.name])
        features = jnp.concatenate([per_layer(z, place.layers), feat], -1)
        w = synthesizer.client_weights(theta.synthesizer, last.weights, features, place)
        p = last.weights.reshape(-1, *(1,) * len(place.layers))
        gamma, _ = corrector.gates(theta.corrector, feat, last.weights, place)
        g = jnp.tanh(theta.synthesizer.gains[place.name]) / 4
        rows.append([jnp.abs(w - p).sum(0).mean(), jnp.abs(g).sum(-1).mean(), jnp.abs(gamma).mean()])
    means = [jnp.stack(column).mean() for column in zip(*rows, strict=True)]
    return dict(zip(("reweighting", "gain", "correction"), means, strict=True))


def _spread(rows: Adapter, adapter: Adapter) -> Array:
    """How far the starts of a cohort are from the global adapter, |x_c - x| / |x| over all products together."""
    squares = []
    for x, rows_ in zip(lora.low_rank_leaves(adapter), lora.low_rank_leaves(rows), strict=True):
        distance = jax.vmap(lambda row, x=x: product.norm(product.difference(row, x)))(rows_)
        squares.append([jnp.sum(distance**2) / distance.shape[0], jnp.sum(product.norm(x) ** 2)])
    distance, size = (jnp.stack(column).sum() for column in zip(*squares, strict=True))
    return product.safe_sqrt(distance / jnp.maximum(size, 1e-30))


def _optimizer(lr: float, lr_prior: float, lr_server: float, lr_step: float) -> optax.GradientTransformation:
    rates: dict[Any, optax.GradientTransformation] = {
        "generator": optax.adamw(lr, weight_decay=1e-4),
        "prior": optax.adamw(lr_prior, weight_decay=1e-4),
        "networks": optax.adam(lr_server),
        "numbers": optax.adam(lr_step),
    }
    labels: Any = Theta(
        Generator("generator", "generator", "prior"),  # type: ignore[arg-type]
        Synthesizer("networks", "numbers", "networks"),  # type: ignore[arg-type]
        Corrector("networks", "networks"),
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.partition(rates, labels))


def _check(
    mode: str, kappa: float, personal: int, memory: float, factors: str, server: str, signature: Signature
) -> None:
    if mode not in (*meta.META_GRADIENTS, "frozen"):
        raise ValueError(f"mode must be {', '.join(meta.META_GRADIENTS)} or frozen, got {mode!r}")
    refuse_outside("[0, inf)", kappa=kappa, personal=personal)
    refuse_outside("[0, 1)", memory=memory)
    if kappa and mode == "frozen":
        raise ValueError(f"kappa weighs what theta learns from, and with mode=frozen it learns nothing; got {kappa}")
    if factors not in get_args(Factors):
        raise ValueError(f"factors must be {' or '.join(get_args(Factors))}, got {factors!r}")
    if server not in get_args(Server):
        raise ValueError(f"server must be {' or '.join(get_args(Server))}, got {server!r}")
    if not isinstance(signature, Signature):
        raise ValueError(f"hyperlora needs a Signature, got {type(signature).__name__}; see fedlora_jax.signatures")


def _check_signatures(signatures: Signature, expected: Signature) -> None:
    got, want = ([x.shape[-1] for x in z] for z in (signatures, expected))
    if got != want:
        raise ValueError(
            f"signatures have {got} numbers (shape, labels, amount), the generator was made for {want}: "
            "describe clients as it was trained, or train another"
        )


def named(theta: Theta) -> dict[str, Array]:
    """The arrays of theta by name, to be saved and given to ``hyperlora(theta=...)``."""
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(theta)}


def _restored(arrays: Mapping[str, Array], like: Theta) -> Theta:
    want = {name: x.shape for name, x in named(like).items()}
    mine = lambda name: name in want or not name.startswith(".corrector.personal")  # older ones have it without use
    arrays = {name: x for name, x in arrays.items() if mine(name)}
    got = {name: np.shape(x) for name, x in arrays.items()}
    wrong = [f"{k}: got {got.get(k)}, expected {want.get(k)}" for k in want | got if got.get(k) != want.get(k)]
    if wrong:
        raise ValueError(
            f"theta was learned for another signature, adapter or form ({len(wrong)} arrays differ): "
            f"{'; '.join(wrong[:3])}"
        )
    leaves = [jnp.asarray(arrays[name]) for name in want]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
