"""The table of all methods, and one tiny problem with stacked and single non-square kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.linalg import norm

from fedlora_jax import lora, rounds, training
from fedlora_jax.clients import Population, Sampling
from fedlora_jax.method import Cohort, Dispatch, Method, as_carried, average_client
from fedlora_jax.methods.adf_lora import adf_lora
from fedlora_jax.methods.centralized import centralized
from fedlora_jax.methods.ditto import ditto
from fedlora_jax.methods.fdlora import fdlora
from fedlora_jax.methods.fed_hello import fed_hello
from fedlora_jax.methods.fed_sb import fed_sb
from fedlora_jax.methods.fed_talora import fed_talora
from fedlora_jax.methods.fedalt import fedalt
from fedlora_jax.methods.feddpa import feddpa
from fedlora_jax.methods.fedex_lora import fedex_lora
from fedlora_jax.methods.fedglomo import fedglomo
from fedlora_jax.methods.fedhl import fedhl
from fedlora_jax.methods.fedimpro import fedimpro
from fedlora_jax.methods.fedit import fedit
from fedlora_jax.methods.fedper import fedper
from fedlora_jax.methods.fedpgp import fedpgp
from fedlora_jax.methods.fedproto import fedproto
from fedlora_jax.methods.fedra import fedra
from fedlora_jax.methods.fedrep import fedrep
from fedlora_jax.methods.fedsa_lora import fedsa_lora
from fedlora_jax.methods.fedsvd import fedsvd
from fedlora_jax.methods.fedvlm import fedvlm
from fedlora_jax.methods.ffa_lora import ffa_lora
from fedlora_jax.methods.finetune import finetune
from fedlora_jax.methods.flexlora import flexlora
from fedlora_jax.methods.flora import flora
from fedlora_jax.methods.florist import florist
from fedlora_jax.methods.frozen import frozen
from fedlora_jax.methods.fslora import fslora
from fedlora_jax.methods.gossip import gossip
from fedlora_jax.methods.hetlora import hetlora
from fedlora_jax.methods.hilora import hilora
from fedlora_jax.methods.hyperlora import hyperlora
from fedlora_jax.methods.ifca import ifca
from fedlora_jax.methods.local_only import local_only
from fedlora_jax.methods.lora_a2 import lora_a2
from fedlora_jax.methods.lora_fair import lora_fair
from fedlora_jax.methods.mime import mime
from fedlora_jax.methods.per_fedavg import per_fedavg
from fedlora_jax.methods.pf2lora import pf2lora
from fedlora_jax.methods.pfedhn import pfedhn
from fedlora_jax.methods.pfedme import pfedme
from fedlora_jax.methods.rac_lora import rac_lora
from fedlora_jax.methods.ravan import ravan
from fedlora_jax.methods.rolora import rolora
from fedlora_jax.methods.sdflora import sdflora
from fedlora_jax.methods.spectral import spectral
from fedlora_jax.signatures import Signature
from fedlora_jax.task import Seen, Shown
from fedlora_jax.wrappers.dp_sgd import dp_sgd
from fedlora_jax.wrappers.fairness import afl
from fedlora_jax.wrappers.fedbc import fedbc
from fedlora_jax.wrappers.feddecorr import feddecorr
from fedlora_jax.wrappers.feddyn import feddyn
from fedlora_jax.wrappers.fedga import fedga
from fedlora_jax.wrappers.fedlc import fedlc
from fedlora_jax.wrappers.fedlesam import fedlesam
from fedlora_jax.wrappers.fednova import fednova
from fedlora_jax.wrappers.fedopt import fedadam, fedyogi
from fedlora_jax.wrappers.fedopt import server as server_optimizer
from fedlora_jax.wrappers.moon import moon
from fedlora_jax.wrappers.over_the_air import over_the_air
from fedlora_jax.wrappers.privacy import clip, dp
from fedlora_jax.wrappers.proximal import proximal
from fedlora_jax.wrappers.robust import geometric_median, krum, median, norm_bound, trimmed_mean, trust
from fedlora_jax.wrappers.scaffold import scaffold
from fedlora_jax.wrappers.signature_adapter import signature_adapter
from fedlora_jax.wrappers.signature_bias import signature_bias

CLIENTS, STEPS, BATCH, RANK, SCALE, CLASSES = 4, 2, 3, 2, 0.7, 3
EVERYBODY = Sampling(CLIENTS, CLIENTS)
SIGNATURE = Signature(np.zeros(4), np.zeros(CLASSES), np.zeros(1))  # one client's: its shapes

METHODS: dict[str, Callable[[], Method]] = {
    "fedit": fedit,
    "ffa_lora": ffa_lora,
    "flora": flora,
    "flexlora": flexlora,
    "flexlora_balanced": lambda: flexlora(split="balanced", gauge=True),
    "fedex_lora": fedex_lora,
    "lora_fair": lora_fair,
    "lora_fair_ridge": lambda: lora_fair(solver="ridge"),
    "lora_fair_columns": lambda: lora_fair(solver="column_cosine", steps=30, squared=False, on="both"),
    "hyperlora": lambda: hyperlora(CLIENTS, SIGNATURE, warmup=0),
    "hyperlora_exact": lambda: hyperlora(
        CLIENTS, SIGNATURE, "exact", "bases", "full", warmup=0, query=BATCH, kappa=0.5, memory=0.5, factors="steady"
    ),
    "fedhl": fedhl,
    "rolora": rolora,
    "hetlora": hetlora,
    "fedsa_lora": fedsa_lora,
    "fedvlm": fedvlm,
    "fed_sb": fed_sb,
    "fedra": fedra,
    "fed_hello": fed_hello,
    "fslora": fslora,
    "sdflora": lambda: sdflora(local_rank=2),
    "rac_lora": rac_lora,
    "fed_talora": fed_talora,
    "fedsvd": fedsvd,
    "florist": florist,
    "spectral": spectral,
    "ravan": ravan,
    "lora_a2": lora_a2,
}

EXACT = ["ffa_lora", "flora", "fedex_lora", "rolora", "fed_sb", "rac_lora", "fed_talora", "fedsvd", "ravan", "lora_a2"]
# Baselines and personalised methods. Clients' ids in ``cohort`` stay below 100.
CLASSICS: dict[str, Callable[[], Method]] = {
    "local_only": local_only,
    "frozen": frozen,
    "centralized": centralized,
    "finetune": lambda: finetune(0.5),
    "ditto": ditto,
    "fedper": fedper,
    "fedrep": fedrep,
    "fedpgp": fedpgp,
    "fedproto": lambda: fedproto(query=BATCH),
    "pfedme": lambda: pfedme(lam=5.0, steps=2, query=BATCH),
    "per_fedavg": per_fedavg,
    "pfedhn": lambda: pfedhn(100, size=4, width=8),
    "ifca": lambda: ifca(query=BATCH),
    "fedglomo": fedglomo,
    "mime": lambda: mime(query=BATCH),
    "fedimpro": lambda: fedimpro(draws=5, query=BATCH),
    "pf2lora": lambda: pf2lora(local_rank=2, al=0.1),
    "feddpa": feddpa,
    "fdlora": lambda: fdlora(query=BATCH),
    "fedalt": fedalt,
    "gossip": lambda: gossip(100),
    "adf_lora": lambda: adf_lora(100),
    "hilora": lambda: hilora(100, 10),
    "hilora_cluster": lambda: hilora(100, 10, root=0.1),  # the second round is of the next stage
}

LOCAL_LR = 0.02
WRAPPED: dict[str, Callable[[], Method]] = {
    "proximal": lambda: proximal(fedit(), 0.5),
    "scaffold": lambda: scaffold(fedit(), 8, LOCAL_LR),
    "feddyn": lambda: feddyn(fedit(), 8, 0.1),
    "server": lambda: server_optimizer(fedit(), optax.adam(0.01)),
    "fedadam": lambda: fedadam(fedit()),
    "fedlc": lambda: fedlc(fedit(), 0.1),
    "fedbc": lambda: fedbc(fedit(), lr=0.1, lam=0.2),
    "signature_adapter": lambda: signature_adapter(fedit(), SIGNATURE, CLIENTS, rank=2, warmup=0),
    "signature_bias": lambda: signature_bias(fedit(), SIGNATURE, warmup=0),
    "clip": lambda: clip(fedit(), 0.05),
    "dp": lambda: dp(fedit(), EVERYBODY, 4, bound=0.05, noise=0.0),
    "dp_sgd": lambda: dp_sgd(fedit(), 1, 4, bound=0.5, noise=0.0),
    "median": lambda: median(fedit()),
    "trimmed_mean": lambda: trimmed_mean(fedit(), 0.25),
    "krum": lambda: krum(fedit(), kept=2),
    "geometric_median": lambda: geometric_median(fedit(), on="products"),
    "trust": lambda: trust(fedit()),
    "norm_bound": lambda: norm_bound(fedit(), 1.0),
    "fednova": lambda: fednova(fedit()),
    "fedga": lambda: fedga(fedit()),
    "feddecorr": lambda: feddecorr(fedit()),
    "fedlesam": lambda: fedlesam(fedit(), 0.1),
    "moon": lambda: moon(fedit(), 0.5),
    "over_the_air": lambda: over_the_air(fedit(), 1e10),
    "afl": lambda: afl(fedit(), 100, 0.5),
}
generated = lambda inner: signature_adapter(inner, SIGNATURE, CLIENTS, rank=2, warmup=0)
told = lambda inner: signature_bias(generated(inner), SIGNATURE, warmup=0)
STACKS: dict[str, Callable[[], Method]] = {
    "corrected": lambda: fedadam(scaffold(proximal(fedit()), 8, LOCAL_LR)),
    "defended": lambda: clip(median(flexlora("balanced", gauge=True)), 0.05),
    "dynamic": lambda: fedlc(clip(fedadam(feddyn(told(fedga(feddecorr(ffa_lora()))), 8, 0.1)), 0.05), 0.1),
    "weighed": lambda: clip(
        proximal(fedbc(fednova(fedyogi(fedlesam(flexlora("balanced", gauge=True), 0.1))), lr=0.1, lam=0.2)), 0.05
    ),
    "private": lambda: clip(
        dp(
            dp_sgd(proximal(fedadam(flexlora("balanced", gauge=True))), 1, 4, bound=0.5, noise=0.0),
            EVERYBODY,
            4,
            noise=0.0,
            quantile=0.5,
            on="products",
        ),
        9.0,
    ),
    "outliers": lambda: over_the_air(
        norm_bound(krum(geometric_median(trimmed_mean(fedyogi(moon(fedit(), 0.5)), 0.25), on="products"), kept=2)), 1e6
    ),
    "personal": lambda: clip(trust(afl(proximal(ditto()), 100, 0.5)), 0.05),
}
METHODS |= CLASSICS
WRAPPED |= STACKS
EVERY = METHODS | WRAPPED


def float64():
    """A context in which arrays are float64."""
    return jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64()


@contextmanager
def users_programs():
    """Programs are compiled as a user has them: that numbers are the same to the byte is said of no others."""
    compile = jax.stages.Lowered.compile
    options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    options |= {"xla_cpu_use_fusion_emitters": True} if version("jaxlib").startswith("0.10.") else {}
    slowly = lambda self: compile(self, compiler_options=options)
    with mock.patch.object(jax.stages.Lowered, "compile", slowly):
        yield


HOOKS = ("penalty", "model", "objective", "combine", "mask_schedule")  # all of a method that local steps depend on


def quick_options() -> dict[str, Any]:
    """For tiny problems compilation is all the time there is: compile quickly, run slowly."""
    options = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
    options["xla_cpu_use_fusion_emitters"] = False
    try:
        jax.jit(lambda x: x, compiler_options=options)(0)
    except jax.errors.JaxRuntimeError:  # newer versions have but one emitter
        options.popitem()
    return options


jit = functools.partial(jax.jit, compiler_options=quick_options())

PLATFORMS = ("cpu", "cuda", "tpu")  # whatever tests run on, programs are lowered for all of them

# What a method is before its server has learned anything: then it may promise more.
UNLEARNED = METHODS | {
    "hyperlora": lambda: hyperlora(CLIENTS, SIGNATURE, warmup=10**6),
    "hyperlora_exact": lambda: hyperlora(CLIENTS, SIGNATURE, "exact", "bases", "full", warmup=10**6, query=BATCH),
}

# A large epsilon: Adam as smooth as SGD, so that rounding errors stay rounding errors.
OPTIMIZER = optax.adamw(0.02, eps=0.01, eps_root=1e-4, weight_decay=0.1)


class Problem(NamedTuple):
    base: lora.Params
    adapter: lora.Adapter


def problem(seed: int = 0, rank: int = RANK) -> Problem:
    """Two stacked layers 6 -> 4 and back through one 4 -> 6, a head trained in full, a bias nobody trains."""
    draw = np.random.default_rng(seed).normal
    shapes = {"blocks/kernel": (2, 6, 4), "blocks/bias": (2, 4), "mix/kernel": (4, 6), "head/kernel": (6, CLASSES)}
    shapes["head/bias"] = (1, CLASSES)
    base = {k: jnp.asarray(draw(size=s) / s[-2] ** 0.5) for k, s in shapes.items()}
    base = lora.unflatten(base | {"head/bias": base["head/bias"][0]})
    adapter = lora.new(jax.random.key(seed), base, rank, targets=["blocks/kernel", "mix"], full="head", scale=SCALE)
    return Problem(base, adapter)


def logits(base: lora.Params, adapter: lora.Adapter, x: jax.Array) -> jax.Array:
    head = lora.variables(base, adapter)["params"]["head"]
    return features(base, adapter, x) @ head["kernel"] + head["bias"]


def features(base: lora.Params, adapter: lora.Adapter, x: jax.Array) -> jax.Array:
    """What the head reads, ``[n, 6]``."""
    variables = lora.variables(base, adapter)

    def linear(name: str, x: jax.Array, layer: Any = ...) -> jax.Array:
        update = variables["lora"][name]["kernel"]
        w, a, b = variables["params"][name]["kernel"][layer], update.a[layer], update.b[layer]
        mixer = variables["lora"][name].get("mixer")
        inside = x @ a if mixer is None else (x @ a) * lora.by_input(x, mixer[layer], a.shape[-1])
        return x @ w + update.scale * (inside @ b)

    gate = variables["lora"]["blocks"].get("gate", (1, 1))  # 0: as if the layer were not there
    for layer in range(2):
        h = jnp.tanh(linear("blocks", x, layer) + variables["params"]["blocks"]["bias"][layer])
        x = x + gate[layer] * linear("mix", h)
    return x


def loss_fn(base: lora.Params, adapter: lora.Adapter, batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
    """Cross-entropy on noisy inputs; the noise shows which keys arrive."""
    x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
    return optax.softmax_cross_entropy_with_integer_labels(logits(base, adapter, x), batch["y"]).mean()


def seen(base: lora.Params, adapter: lora.Adapter, batch: dict[str, jax.Array], key: jax.Array) -> Seen:
    """What ``loss_fn`` looks at."""
    x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
    return Seen(features(base, adapter, x), logits(base, adapter, x), batch["y"], jnp.ones(len(x)))


SHOWN = Shown(loss_fn, seen)


def array(x: Any) -> np.ndarray:
    """In NumPy and of the type that JAX would give it. What tests do with single arrays then compiles nothing."""
    return np.asarray(x, jax.dtypes.canonicalize_dtype(np.asarray(x).dtype))


def host(tree: Any) -> Any:
    """The tree's arrays in NumPy; random keys, and what is being traced, stay as they are."""
    return jax.tree.map(lambda x: x if isinstance(x, jax.core.Tracer) else jax.device_get(x), tree)


def cohort(seed: int = 0, clients: int = CLIENTS, steps: int = STEPS, weights=None, ranks=None, rank=RANK) -> Cohort:
    rng = np.random.default_rng(seed)
    return Cohort(
        ids=array(np.arange(10, 10 + clients)),
        weights=array(weights := rng.uniform(1, 3, clients) if weights is None else np.asarray(weights, float)),
        ranks=array([rank] * clients if ranks is None else ranks),
        signatures=signatures(rng, clients),
        batches=labelled(rng, clients, steps, BATCH),
        queries=labelled(rng, clients, BATCH),
        shares=array(weights / weights.sum() / 2),  # as many again take no part
        losses=array(np.random.default_rng(seed + 100).uniform(0.5, 2, (clients, steps))),
    )


def labelled(rng: np.random.Generator, *lead: int) -> dict[str, np.ndarray]:
    return {"x": array(rng.normal(size=(*lead, 6))), "y": array(rng.integers(0, CLASSES, lead))}


def signatures(rng: np.random.Generator, *lead: int) -> Signature:
    return jax.tree.map(lambda x: array(rng.normal(size=(*lead, *x.shape))), SIGNATURE)


def examples(seed: int = 0, count: int = 40) -> dict[str, np.ndarray]:
    return labelled(np.random.default_rng(seed), count)


def population(sizes=(5, 9, 3, 7, 4), seed: int = 0, ranks=None) -> Population:
    """Clients that hold consecutive rows of ``examples``, padded with row 0."""
    sizes, ends = np.asarray(sizes), np.cumsum(sizes)
    rows = np.zeros((len(sizes), sizes.max()), int)
    for row, size, end in zip(rows, sizes, ends, strict=True):
        row[:size] = np.arange(end - size, end)
    told = signatures(np.random.default_rng(seed), len(sizes), 1)
    ranks = [RANK] * len(sizes) if ranks is None else ranks
    return Population(*(array(x) for x in (rows, sizes, ranks)), told)


def copies(tree: Any, clients: int = CLIENTS) -> Any:
    """The tree stacked with itself: every client holds the same."""
    return jax.tree.map(lambda x: np.stack([x] * clients), host(tree))


def take(rows: Any, index: Any) -> Any:
    """The same rows of every array of a tree with a leading client axis."""
    return jax.tree.map(lambda x: x[index], host(rows))


def replaced(tree: Any, rows: Any, others: Any) -> Any:
    """The tree with some rows of every array from another tree like it, or all of one number."""

    def one(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        x = x.copy()
        x[rows] = y[rows]
        return x

    tree = host(tree)
    others = jax.tree.map(lambda x: np.full_like(x, others), tree) if np.isscalar(others) else host(others)
    return jax.tree.map(one, tree, others)


def members(method: Method, *arguments: Any, **options: Any) -> Cohort:
    """A ``cohort`` whose clients never took part before and hold the memory that the method gives them."""
    c = cohort(*arguments, **options)
    return c._replace(memory=copies(method.init_client(ADAPTER), len(c.ids)))


def remembered(method: Method, c: Cohort, sent: Any, received: Any) -> Cohort:
    """The cohort after local steps."""
    return c._replace(memory=_remember(method.remember, c.memory, sent.context, sent.adapter, received))


@functools.partial(jit, static_argnums=0)
def _remember(remember: Callable, *rows: Any) -> Any:
    return jax.vmap(remember)(*rows)


def normalised(c: Cohort) -> Cohort:
    return c._replace(weights=c.weights / c.weights.sum())


def nudged(tree: Any, seed: int = 1, size: float = 0.3) -> Any:
    """The tree with noise on its float arrays."""
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    noisy = [x + (size * rng.normal(size=x.shape)).astype(x.dtype) if is_float(x) else x for x in host(leaves)]
    return treedef.unflatten(noisy)


def is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def effective(method: Method, base: lora.Params, state: Any, c: Cohort) -> dict[str, np.ndarray]:
    """The weights of the server's model: what an average client would compute with, by name."""
    base, model = average((method.dispatch, method.model), base, state, c._replace(batches=(), queries=()))
    return weights_of(base, take(model, 0))


@functools.partial(jit, static_argnums=0)
def average(hooks: tuple, base: lora.Params, state: Any, c: Cohort) -> tuple[lora.Params, lora.Adapter]:
    dispatch, model = hooks
    sent = dispatch(base, state, average_client(c))
    return sent.base, jax.vmap(model)(sent.adapter, sent.context)


def dispatched(method: Method, state: Any, c: Cohort) -> Dispatch:
    """What the method sends, compiled once for each method."""
    return _dispatch(method.dispatch, BASE, state, c)


@functools.partial(jit, static_argnums=0)
def _dispatch(dispatch: Callable, *arguments: Any) -> Dispatch:
    return dispatch(*arguments)


def models_of(method: Method, sent: Any) -> lora.Adapter:
    """The adapters ``[C, ...]`` that clients compute with."""
    return sent.adapter if method.model is as_carried else _models(method.model, sent.adapter, sent.context)


@functools.partial(jit, static_argnums=0)
def _models(model: Callable, adapters: Any, contexts: Any) -> lora.Adapter:
    return jax.vmap(model)(adapters, contexts)


def weights_of(base: lora.Params, adapter: lora.Adapter) -> dict[str, np.ndarray]:
    """``base`` with the whole adapter folded in, by name."""
    weights, differences = host(lora.flatten(base)), lora.flatten(adapter)
    for name in weights.keys() & differences.keys():
        x = differences[name]
        weights[name] = weights[name] + (x.scale * dense(x) if lora.is_lora(x) else np.asarray(x))
    return weights


def mean_weights(base: lora.Params, adapters: lora.Adapter, weights: jax.Array) -> dict[str, np.ndarray]:
    """The mean of the clients' merged weights: what an exact server holds."""
    rows = [weights_of(base, take(adapters, c)) for c in range(len(weights))]
    return {k: sum(np.float64(w) * row[k] for w, row in zip(weights, rows, strict=True)) for k in rows[0]}


def assert_near(x: Any, y: Any, rel: float = 1e-5, floor: float = 1e-25) -> None:
    """Two trees agree: every pair of arrays differs by at most ``rel`` of the second's norm (or of ``floor``)."""

    def near(u: Any, v: Any) -> None:
        if jnp.issubdtype(jnp.asarray(v).dtype, jax.dtypes.prng_key):
            u, v = jax.random.key_data(u), jax.random.key_data(v)
        u, v = np.asarray(u, np.float64), np.asarray(v, np.float64)
        assert u.shape == v.shape
        error, size = norm(u - v), max(norm(v), floor)
        assert error <= rel * size, f"off by {error:.3g}, {error / size:.3g} of the expected norm"

    jax.tree.map(near, x, y)


@functools.partial(jit, static_argnums=0)
def _train(hooks: tuple, sent: Any, c: Cohort, key: jax.Array, extra: float) -> tuple[lora.Adapter, jax.Array]:
    like = fedit()._replace(**dict(zip(HOOKS, hooks, strict=True)))
    penalty = lambda adapter, context: like.penalty(adapter, context) + extra
    local = training.make_local(like._replace(penalty=penalty), SHOWN, OPTIMIZER)

    def one(id_, *row):
        adapter, trace = local(sent.base, *row, jax.random.fold_in(key, id_))
        return adapter, trace.loss

    return jax.vmap(one)(c.ids, sent.adapter, sent.mask, sent.context, c.batches)


def train(method: Method, sent: Any, c: Cohort, key: jax.Array, extra: float = 0.0) -> tuple[lora.Adapter, jax.Array]:
    """Every client's local steps: adapters and losses ``[C, T]``. Compiled once for all methods that train alike.

    The penalty is larger by the constant ``extra``.
    """
    c = c._replace(memory=(), signatures=(), queries=())
    return host(_train(hooks(method), sent, c, key, extra))


def hooks(method: Method) -> tuple:
    return tuple(getattr(method, hook) for hook in HOOKS)


KEY = jax.random.key(7)
BASE, ADAPTER = problem()


@functools.cache
def built(make: Callable[[], Method]) -> Method:
    """One method of each kind: what is compiled of it serves all tests."""
    return make()


@functools.partial(jit, static_argnums=0)
def begin(init: Callable, key: jax.Array) -> Any:
    """A method's first state."""
    return jax.tree.map(jnp.copy, init(key, ADAPTER))


class Compiled:
    """One method, its round as it is and compiled once, and states: the first, and after one round, when b is no
    longer 0."""

    def __init__(self, name: str) -> None:
        self.method, self.traces = built(EVERY[name]), []

        def counted(*args):
            self.traces.append(1)
            return loss_fn(*args)

        self.round_fn = rounds.make_round(self.method, Shown(counted, seen), OPTIMIZER)
        self.fast = jit(self.round_fn)
        self.start = begin(self.method.init, jax.random.key(1))
        self.cohort = functools.partial(members, self.method)

    @functools.cached_property
    def state(self) -> Any:  # tests that only trace the round need none
        return self.fast(BASE, self.start, self.cohort(), KEY)[0]


compiled = functools.cache(Compiled)


@functools.cache
def aggregation(name: str) -> tuple[Method, Any, Callable]:
    """A method that has learned nothing, its first state, and its aggregation compiled."""
    method = built((UNLEARNED | WRAPPED)[name])
    return method, begin(method.init, jax.random.key(1)), jit(method.aggregate)


def server(method: Method) -> Any:
    """A state in the middle of a run: nothing in the adapter is zero."""
    state = begin(method.init, jax.random.key(1))
    return state._replace(adapter=nudged(state.adapter, 0))


def uploads(sent: Any, seed: int = 1, size: float = 0.3) -> lora.Adapter:
    """What clients send back: their starts, moved at random where the mask allows it."""
    moved = nudged(sent.adapter, seed, size)
    return jax.tree.map(lambda x, y, m: np.where(m > 0, y, x), *map(host, (sent.adapter, moved, sent.mask)))


def aggregated(method: Method, c: Cohort | None = None, size: float = 0.3, aggregate: Callable | None = None):
    """One aggregation in the middle of a run: ``(cohort, state, sent, received, new state)``."""
    c = normalised(cohort() if c is None else c)
    c = c._replace(memory=copies(method.init_client(ADAPTER), len(c.ids)))
    state = server(method)
    sent = dispatched(method, state, c)
    received = uploads(sent, size=size)
    return c, state, sent, received, (aggregate or jit(method.aggregate))(BASE, state, c, sent, received)


def dense(x: lora.LoRA) -> np.ndarray:
    return np.asarray(x.a, np.float64) @ np.asarray(x.b, np.float64)


def mean_product(x: lora.LoRA, p: Any) -> np.ndarray:
    return np.tensordot(np.float64(p), dense(x), 1)


def forget() -> None:
    """Drop all compiled programs, and what counted how often they were traced."""
    compiled.cache_clear()
    aggregation.cache_clear()
    built.cache_clear()
    jax.clear_caches()
