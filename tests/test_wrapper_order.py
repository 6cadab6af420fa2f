"""Every ordered pair of wrappers is right, in all that it keeps and does to uploads, or refused, with what to do.

The pairs are played on FedIT with uploads that are written down, against NumPy in float64.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    BASE,
    BATCH,
    KEY,
    LOCAL_LR,
    RANK,
    SCALE,
    SIGNATURE,
    STEPS,
    assert_near,
    cohort,
    copies,
    is_float,
    normalised,
    nudged,
    replaced,
    take,
)
from wrapper_helpers import flat

from experiments.engine.methods import wrappers
from fedlora_jax import lora
from fedlora_jax.batches import Padded
from fedlora_jax.clients import Sampling
from fedlora_jax.methods.centralized import centralized
from fedlora_jax.methods.fedit import fedit
from fedlora_jax.methods.flora import flora
from fedlora_jax.methods.local_only import local_only
from fedlora_jax.task import Seen, Task
from fedlora_jax.wrappers import order
from fedlora_jax.wrappers.dp_sgd import dp_sgd
from fedlora_jax.wrappers.fairness import afl, qffl
from fedlora_jax.wrappers.fedbc import fedbc
from fedlora_jax.wrappers.feddecorr import feddecorr
from fedlora_jax.wrappers.feddyn import feddyn
from fedlora_jax.wrappers.fedga import fedga
from fedlora_jax.wrappers.fedlc import fedlc
from fedlora_jax.wrappers.fedlesam import fedlesam
from fedlora_jax.wrappers.fednova import fednova
from fedlora_jax.wrappers.fedopt import fedadagrad, fedadam, fedavgm, fedyogi
from fedlora_jax.wrappers.fedopt import server as server_optimizer
from fedlora_jax.wrappers.moon import moon
from fedlora_jax.wrappers.over_the_air import over_the_air
from fedlora_jax.wrappers.privacy import clip, dp
from fedlora_jax.wrappers.proximal import proximal
from fedlora_jax.wrappers.robust import geometric_median, krum, median, norm_bound, trimmed_mean, trust
from fedlora_jax.wrappers.scaffold import scaffold
from fedlora_jax.wrappers.signature_adapter import signature_adapter
from fedlora_jax.wrappers.signature_bias import signature_bias

CLIENTS, POPULATION, BROKEN = 6, 12, 2
TAKEN = np.array([1, 2, 2, 1, 2, 1])
# Of either kind of leaf one: every operation is a program for each.
ADAPTER = lora.new(KEY, BASE, RANK, targets=["blocks/kernel"], full="head/bias", scale=SCALE)
MADE = {
    "proximal": lambda m: proximal(m, 0.3),
    "fedlc": lambda m: fedlc(m, 0.1),
    "signature_bias": lambda m: signature_bias(m, SIGNATURE, warmup=0),
    "signature_adapter": lambda m: signature_adapter(m, SIGNATURE, CLIENTS, rank=2, warmup=0),
    "scaffold": lambda m: scaffold(m, POPULATION, LOCAL_LR),
    "feddyn": lambda m: feddyn(m, POPULATION, 0.3),
    "fedbc": lambda m: fedbc(m, lr=0.1, gam=0.5, lam=0.2),
    "fedadam": lambda m: fedadam(m, 0.1),
    "clip": lambda m: clip(m, 0.8),
    "dp": lambda m: dp(m, Sampling(CLIENTS, CLIENTS), 9, bound=0.8, noise=0.0),
    "median": median,
    "trimmed_mean": lambda m: trimmed_mean(m, 0.25),
    "krum": lambda m: krum(m, kept=3),
    "norm_bound": lambda m: norm_bound(m, 0.9),
    "fednova": fednova,
    "qffl": lambda m: qffl(m, LOCAL_LR, 2.0),
    "fedga": fedga,
    "fedlesam": fedlesam,
    "moon": moon,
    "over_the_air": lambda m: over_the_air(m, 1e12),  # too loud for its noise to be seen
}
NAMES = list(MADE)
LOSSES = {"feddecorr": feddecorr}  # adds to the local loss and keeps nothing, as FedLC does
GRADIENTS = {"dp_sgd": lambda m: dp_sgd(m, 1, 9, noise=0.0)}  # bounds those of a client and keeps nothing
WEIGHED = {"geometric_median": geometric_median, "trust": trust}  # clients count anew, as of Krum
FAIR = {"afl": lambda m: afl(m, POPULATION)}  # weighs by losses, as q-FFL does
SERVERS = {  # which are ``server`` with another transformation, as fedadam is
    "fedavgm": fedavgm,
    "fedadagrad": fedadagrad,
    "fedyogi": fedyogi,
    "server": lambda m: server_optimizer(m, optax.sgd(1.0)),
}
STATEFUL = ("signature_bias", "signature_adapter", "scaffold", "feddyn", "fedadam", "dp", "over_the_air")
REMEMBERING = ("scaffold", "feddyn", "fedbc", "moon", "fedlesam")
DEFENCES = ("clip", "median", "trimmed_mean", "krum", "norm_bound", "dp")
HANDS_ON = (
    *DEFENCES,
    "fedbc",
    "fednova",
    "qffl",
    "over_the_air",
)  # other uploads or weights than it was given


def built(*stack, method=None):
    method = method or fedit()
    for name in stack:
        method = (MADE | SERVERS | LOSSES | GRADIENTS | WEIGHED | FAIR)[name](method)
    return method


class Play:
    """Two rounds of uploads ``sent + updates`` through wrappers around FedIT."""

    def __init__(self, stack, size=1.0, weights=(1, 2, 3, 4, 1, 1)):
        """``size``: of what the broken client sends in place of an update, or 1: none is broken."""
        self.stack, self.method = stack, built(*stack)
        c = normalised(cohort(clients=CLIENTS, weights=weights, ranks=[2, 2, 2, 1, 2, 1]))
        # Half of the population; who is not there leaves the parts of the others as they are. Steps are not equal.
        present = np.broadcast_to(np.arange(STEPS)[:, None] < TAKEN[:, None, None], (CLIENTS, STEPS, BATCH))
        self.c = c._replace(shares=np.float32([1, 2, 3, 4, 1, 1]) / 24, batches=Padded(c.batches, present))
        self.memory = copies(self.method.init_client(ADAPTER), CLIENTS)
        self.state = self.method.init(KEY, ADAPTER)
        for t in range(2):
            moved = nudged(jax.tree.map(np.zeros_like, copies(ADAPTER, CLIENTS)), t, 0.3)
            self.step(moved if size == 1 else replaced(moved, BROKEN, size))

    def step(self, updates):
        self.before, c = (self.state, self.memory), self.c._replace(memory=self.memory)
        self.sent = self.method.dispatch(BASE, self.state, c)
        upload = lambda x, m, u: x + np.where(m > 0, u, 0).astype(u.dtype)
        self.received = jax.tree.map(upload, self.sent.adapter, self.sent.mask, updates)
        self.memory = jax.vmap(self.method.remember)(self.memory, self.sent.context, self.sent.adapter, self.received)
        self.state = self.method.aggregate(BASE, self.state, c, self.sent, self.received)

    def kept(self, clients=slice(None)):
        """The server's adapter and what every wrapper keeps, at the server and at clients, by name; no keys."""
        out, rows = {}, take(self.memory, clients)
        for tree, which in ((self.state, STATEFUL), (rows, REMEMBERING)):
            for name in named(self.stack, which):
                out[name, which is STATEFUL] = [x for x in jax.tree.leaves(tree.own) if is_float(x)]
                tree = tree.inner
            out["method", which is STATEFUL] = tree
        return out


played = functools.cache(Play)  # of a pair, which a test of either order looks at


def named(stack, which):
    """The wrappers of a kind from the outermost, as their parts of a state or memory are nested."""
    return [name for name in reversed(stack) if name in which]


# --- what is right


def controls_match(play):
    """The server's control is the mean of its clients' by their parts of the population."""
    for name in set(play.stack) & {"scaffold", "feddyn"}:
        server, own = (flat(play.kept()[name, there], clients=not there) for there in (True, False))
        assert_near(server, np.float64(play.c.shares) @ own, 1e-4)
        assert np.abs(server).max() > 1e-3


def a_broken_client_is_bounded(play):
    broken = Play(play.stack, 1e6)  # which remembers what it has trained, as MOON has it
    whose = [i for i in range(CLIENTS) if i != BROKEN] if "moon" in play.stack else slice(None)
    assert max(np.abs(x).max() for x in jax.tree.leaves(broken.kept(whose))) < 1e3


def the_outer_acts_first(play):
    """All that is inside is as of the inner wrapper alone, given the uploads and weights that the outer hands on."""
    inner, outer = play.stack
    method, c = built(inner), play.c
    (state, memory), new, after = play.before, play.state, play.memory
    lam = None
    if outer in ("dp", "over_the_air"):
        state, new = state.inner, new.inner
    if outer == "fedbc":
        memory, lam, after = memory.inner, memory.own, after.inner
    sent = method.dispatch(BASE, state, c._replace(memory=memory))
    weights, uploads = handed_on(outer, play, lam)
    c = c._replace(weights=np.float32(weights), memory=memory)
    assert_near(as_numbers(method.aggregate(BASE, state, c, sent, uploads)), as_numbers(new), 1e-4, floor=1e-3)
    if outer in ("clip", "fedbc"):  # what a client knows of its own upload
        rows = jax.vmap(method.remember)(memory, sent.context, sent.adapter, uploads)
        assert_near(rows, after, 1e-4, floor=1e-3)


def as_numbers(state):
    return [x for x in jax.tree.leaves(state) if is_float(x)]


def the_order_does_not_matter(play):
    """All that is kept, the penalty, the loss and the model are those of the other order."""
    one, other = played(play.stack), played(play.stack[::-1])
    assert_near(other.kept(), one.kept(), 1e-4, floor=1e-3)
    seen = []
    for p in (one, other):
        w, context = nudged(ADAPTER, 3), jax.tree.map(lambda x: x[0], p.sent.context)
        task = lambda model: sum((i + 1) * np.square(x).sum() for i, x in enumerate(jax.tree.leaves(model)))
        hook, task = (
            p.method.objective,
            Task(task, lambda model: Seen(*(numbers(model) for _ in "zo"), LABELS, np.ones(2))),
        )
        loss = hook(task, w, context) if hook else [task(p.method.model(w, context))] * 2
        seen.append((p.method.penalty(w, context), *loss, p.method.model(w, context)))
    assert_near(seen[1], seen[0], 1e-4, floor=1e-4)


LABELS = np.arange(2)


def numbers(model):
    """Something ``[2, 5]`` of a model."""
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(model)])[:10].reshape(2, 5)


def a_past_is_what_was_trained(play):
    """Or what was sent, whatever stands outside."""
    tree = play.memory
    for name in named(play.stack, REMEMBERING):
        if name in ("moon", "fedlesam"):
            assert_near(tree.own.own, play.received if name == "moon" else play.sent.adapter, 0)
        tree = tree.inner


def handed_on(name, play, lam):
    """``(weights [C], received)`` of the last round behind one wrapper, by its equations."""
    mask = jax.tree.map(lambda x, m: np.broadcast_to(m, x.shape), play.sent.adapter, play.sent.mask)
    x, y, held = (flat(tree, clients=True) for tree in (play.sent.adapter, play.received, mask))
    d, p = (y - x) * held, np.float64(play.c.weights)
    norms = np.linalg.norm(d, axis=1)
    votes = np.where(held > 0, d, np.nan)
    if name == "clip":
        d = d * np.minimum(1, 0.8 / norms)[:, None]
    elif name == "norm_bound":
        d = d * np.minimum(1, 0.9 * np.median(norms) / norms)[:, None]
    elif name == "median":
        d = np.nanmedian(votes, 0) + 0 * d
    elif name == "trimmed_mean":
        d = (
            np.asarray(
                [np.sort(v[~np.isnan(v)])[(cut := int(sum(~np.isnan(v)) / 4)) : -cut or None].mean() for v in votes.T]
            )
            + 0 * d
        )
    elif name == "krum":
        d, p = chosen_by_krum(d, held, p, 3)
    elif name == "fedbc":
        new = np.maximum(np.float64(lam) + 0.1 * (norms**2 - 0.5), 0)
        p = new / new.sum()
    elif name == "fednova":
        d = (p @ TAKEN) * d / TAKEN[:, None]
    elif name == "qffl":
        loss = np.float64(play.c.losses)[:, 0]
        fair, bent = p * loss**2, p * 2 * loss * norms**2 / LOCAL_LR
        p, d = fair / fair.sum(), d * fair.sum() / (fair.sum() + bent.sum())
    elif name == "dp":
        d = (d * np.minimum(1, 0.8 / norms)[:, None]).mean(0) + 0 * d
        p = np.full(CLIENTS, 1 / CLIENTS)
    return p, unflattened(np.where(held > 0, x + d, y), play.received)


def chosen_by_krum(d, held, p, kept):
    """With one outlier. Distances are means over what both hold, times what the largest holds."""
    both = held @ held.T
    far = np.asarray([[np.sum(held[i] * held[j] * (d[i] - d[j]) ** 2) for j in range(CLIENTS)] for i in range(CLIENTS)])
    scores = np.sort(far * both.max() / both, 1)[:, 1 : 1 + CLIENTS - 3].sum(1)
    out = np.argsort(scores)[kept:]
    d, p = d.copy(), p.copy()
    d[out], p[out] = 0, 0
    return d, p / p.sum()


def unflattened(rows, tree):
    leaves, structure = jax.tree.flatten(tree)
    parts = np.split(np.float32(rows), np.cumsum([x[0].size for x in leaves])[:-1], axis=1)
    return structure.unflatten([part.reshape(x.shape) for part, x in zip(parts, leaves, strict=True)])


def goes(*stack):
    try:
        built(*stack)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(("inner", "outer"), [(inner, outer) for inner in MADE for outer in MADE])
def test_every_ordered_pair_is_right_or_refused(inner, outer):
    if not goes(inner, outer):
        with pytest.raises(ValueError, match=r"(leave|put|take) ") as refused:
            built(inner, outer)
        assert {inner, outer} <= set(re.findall(r"\w+", str(refused.value)))
        for better in re.findall(r"(?<=: )(?:\+\w+)+$", str(refused.value)):
            built(*better[1:].split("+"))
        return
    checks, pair = [], {inner, outer}
    if pair & {"scaffold", "feddyn"}:
        checks.append(controls_match)
    if pair & set(DEFENCES):
        checks.append(a_broken_client_is_bounded)
    if inner in ("moon", "fedlesam") and outer not in HANDS_ON:
        checks.append(a_past_is_what_was_trained)
    if outer in HANDS_ON:
        checks.append(the_outer_acts_first)
    either = goes(outer, inner) and not pair <= set(HANDS_ON)
    if either and NAMES.index(inner) <= NAMES.index(outer):  # it is the same of the other order
        checks.append(the_order_does_not_matter)
    assert checks or either
    play = played((inner, outer)) if checks else None
    for check in checks:
        check(play)


@pytest.mark.parametrize("outer", ["scaffold", "feddyn", "fedbc"])
@pytest.mark.parametrize("inner", DEFENCES)
def test_a_defence_inside_of_controls_would_leave_them_open(inner, outer, monkeypatch):
    """Why these orders are refused."""
    monkeypatch.setattr(order, "check", lambda *arguments: None)
    broken = Play((inner, outer), 1e6)
    assert max(np.abs(x).max() for x in jax.tree.leaves(broken.kept()[outer, outer != "fedbc"])) > 1e4


def test_server_optimizers_are_one_to_the_table():
    for name in SERVERS:
        for other in MADE:
            assert goes(name, other) == goes("fedadam", other)
            assert goes(other, name) == goes(other, "fedadam")
        assert not goes(name, "fedadam")


def test_afl_is_one_to_the_table_as_q_ffl():
    for other in MADE.keys() - {"qffl"}:
        assert goes("afl", other) == goes("qffl", other)
        assert goes(other, "afl") == goes(other, "qffl")
    assert not goes("afl", "qffl")


def test_what_weighs_clients_anew_is_one_to_the_table_as_krum():
    """But that the geometric median leaves nobody out, so that a server's steps may stand outside of it."""
    for other in MADE.keys() - {"krum"}:
        assert goes("trust", other) == goes("krum", other)
        assert goes("geometric_median", other) == (goes("krum", other) or other == "fedadam")
        for name in WEIGHED:
            assert goes(other, name) == goes(other, "krum")


def test_feddecorr_is_one_to_the_table_as_fedlc_but_for_what_takes_the_place_of_a_loss():
    for other in MADE.keys() - {"fedlc", "fedga"}:
        assert goes("feddecorr", other) == goes("fedlc", other)
        assert goes(other, "feddecorr") == goes(other, "fedlc")
    assert goes("feddecorr", "fedga")
    assert not goes("fedga", "feddecorr")


def test_dp_sgd_is_one_to_the_table_as_fedlc_but_for_losses_that_weigh_clients_or_are_of_several_examples():
    assert not any(goes(*pair) for name in ("qffl", "afl", "fedbc", "fedga", "feddecorr", "fedlc")
                   for pair in ((name, "dp_sgd"), ("dp_sgd", name)))  # fmt: skip
    for other in MADE.keys() - {"qffl", "fedbc", "fedga", "fedlc"}:
        assert goes("dp_sgd", other) == goes("fedlc", other)
        assert goes(other, "dp_sgd") == goes(other, "fedlc")


def test_the_table_knows_every_wrapper():
    assert set(wrappers()) | {"server"} == order.KNOWN == set(MADE | SERVERS | LOSSES | GRADIENTS | WEIGHED | FAIR)


def test_a_pair_is_seen_through_what_stands_between():
    with pytest.raises(ValueError, match=r"scaffold around clip \(\+clip\+scaffold\)"):
        built("clip", "proximal", "fedlc", "scaffold")


# --- methods whose clients send nothing, or of which nothing is averaged


@pytest.mark.parametrize("make", [local_only, centralized])
@pytest.mark.parametrize("name", sorted(set(MADE) - {"fedlc", "fedga"}))
def test_what_works_by_uploads_refuses_methods_without_any(name, make):
    with pytest.raises(ValueError, match="send no adapters"):
        MADE[name](make())


@pytest.mark.parametrize("make", [local_only, centralized])
def test_what_works_without_uploads_goes_around_methods_without_any(make):
    assert fedga(feddecorr(fedlc(make()))).stack == ("fedlc", "feddecorr", "fedga")


@pytest.mark.parametrize("wrap", [median, trimmed_mean])
def test_entrywise_defences_refuse_a_stack_of_products(wrap):
    with pytest.raises(ValueError, match="stacks every client's own product"):
        wrap(flora())
    assert clip(krum(norm_bound(flora()))).stack == ("norm_bound", "krum", "clip")
