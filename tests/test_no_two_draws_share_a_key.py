"""No two draws of a run share a key: watched is what is drawn, in the programs that draw it."""

import re
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ADAPTER, BASE, BATCH, CLASSES, CLIENTS, RANK, SIGNATURE, examples, jit, logits, loss_fn, population
from jax.extend import random as prng

from experiments.config import Config
from experiments.engine import evaluation
from experiments.setup import descriptions, problem
from fedlora_jax import attacks, clients, layers, lora, rounds
from fedlora_jax.clients import Sampling
from fedlora_jax.keys import purpose, stable_hash
from fedlora_jax.methods.fed_sb import fed_sb
from fedlora_jax.methods.fedra import fedra
from fedlora_jax.methods.flora import flora
from fedlora_jax.methods.fslora import fslora
from fedlora_jax.methods.hilora import hilora
from fedlora_jax.methods.hyperlora import hyperlora
from fedlora_jax.methods.ifca import ifca
from fedlora_jax.methods.pfedhn import pfedhn
from fedlora_jax.methods.rac_lora import rac_lora
from fedlora_jax.methods.sdflora import sdflora
from fedlora_jax.wrappers.dp_sgd import dp_sgd
from fedlora_jax.wrappers.privacy import dp

STEPS, SGD, PEOPLE, DATA = 2, optax.sgd(0.1), population(), examples(0, 28)
SEEN: list[tuple[int, int]] = []  # the keys whose bits have been drawn
_THREEFRY = prng.threefry_prng_impl
SCORES = clients._scores


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    monkeypatch.setattr(clients, "_scores", _watched_scores)


def _watched_bits(key, width, shape):
    jax.debug.callback(lambda key: SEEN.append(tuple(np.asarray(key).tolist())), key)
    return _THREEFRY.random_bits(key, width, shape)


_WATCHED = prng.define_prng_impl(
    key_shape=_THREEFRY.key_shape,
    seed=_THREEFRY.seed,
    split=_THREEFRY.split,
    random_bits=_watched_bits,
    fold_in=_THREEFRY.fold_in,
    name="watched threefry",
    tag="w",
)
SEED = jax.random.key(3, impl=_WATCHED)


def _watched_scores(key, numbers):
    """The order of a client's examples is drawn from its key number by number."""
    jax.debug.callback(lambda key: SEEN.append(tuple(np.asarray(key).tolist())), jax.random.key_data(key))
    return SCORES(key, numbers)


def drawn(f, *arguments):
    """What ``f`` gives, and how often each key was drawn from."""
    SEEN.clear()
    out = jax.block_until_ready(f(*arguments))
    jax.effects_barrier()
    return out, Counter(SEEN)


def of_preparation(signature: str) -> Counter:
    """Of adapters and signatures, as ``experiments`` draws them."""
    new = partial(lora.new, params=BASE, rank=RANK, targets="kernel$", full="bias")
    key, features = jax.random.fold_in(SEED, 1), jax.random.normal(jax.random.key(0), (28, 4))
    told = lambda: descriptions.of_clients(
        features, jnp.zeros(28, int), PEOPLE.rows, PEOPLE.sizes, key, 4, CLASSES, signature
    )
    return drawn(lambda: new(SEED))[1] + drawn(told)[1]


def of_rounds(method, count: int = 3):
    """A run after ``count`` rounds, the compiled step, and what its start and rounds drew."""
    run, seen = drawn(rounds.start, method, SEED, ADAPTER, 5)
    # A loss that draws, too; clients one after another, lest what they draw from one key is drawn once for all.
    round_fn = rounds.make_round(method, loss_fn, SGD, chunk=1)
    options = {"participants": 4, "steps": STEPS, "batch": BATCH, "smallest": 3, "query": method.query}
    step = jit(rounds.make_step(round_fn, **options))
    for _ in range(count):
        (run, _), more = drawn(step, BASE, DATA, PEOPLE, run, SEED)
        seen += more
    return run, step, seen


def dealt(run) -> set:
    """Keys of what is dealt for good, so that the same is drawn whenever it is looked at."""
    if not hasattr(run.state, "deal"):
        return set()
    return set(drawn(layers.budgets, (1.0, 0.75, 0.5), run.state.deal, jnp.arange(-1, 5), 2)[1])


def once(seen: Counter) -> bool:
    return len(seen) > 5 and max(seen.values()) == 1


METHODS = {  # that draw anything; all draw batches
    "dp around noise on gradients around the noise of SDFLoRA": lambda: dp(
        dp_sgd(sdflora(2, clip=1.0, noise=0.5), 1, 4), Sampling(5, 4), 4, noise=0.0, quantile=0.5
    ),
    "ifca": lambda: ifca(query=BATCH),
    "fslora": fslora,
    "fedra": fedra,  # deals depths, as FedHello does
    "hilora": lambda: hilora(5, 3, root=0.34),  # clusters are formed in the second round
    "pfedhn": lambda: pfedhn(5, size=4, width=8),
    "flora": flora,
    "rac_lora": rac_lora,
    "fed_sb": fed_sb,
}


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_a_run_draws_from_every_key_once(name):
    run, _, seen = of_rounds(METHODS[name]())
    assert once(Counter({key: times for key, times in seen.items() if key not in dealt(run)}) + of_preparation("full"))
    assert not dealt(run) & of_preparation("full").keys()


@pytest.mark.long
def test_parts_that_learn_begin_with_draws_of_their_own():
    """Of HyperLoRA, whose rounds draw what those of IFCA do."""
    seen = drawn(rounds.start, hyperlora(CLIENTS, SIGNATURE, form="bases"), SEED, ADAPTER, 5)[1]
    assert once(seen + of_preparation("full"))


@pytest.mark.parametrize("kind", ["noisy", "random"])
def test_what_is_told_instead_of_signatures_is_drawn_apart(kind):
    assert once(of_preparation(kind))


@pytest.mark.long
def test_evaluation_draws_nothing_that_rounds_draw():
    """Local steps after which a model is scored have batches of their own, and so have the trials of newcomers."""
    method = METHODS["hilora"]()
    run, step, seen = of_rounds(method, count=2)
    config = Config(clients=5, holdout_clients=2, local_steps=STEPS, batch=BATCH, rounds=9)
    right = lambda base, model, xy: (logits(base, model, xy[0]).argmax(-1) == xy[1]).astype(float)
    loss = lambda base, adapter, xy, key: loss_fn(base, adapter, {"x": xy[0], "y": xy[1]}, key)
    what_is_told = {"smallest": 3, "longest": None, "adapters": ADAPTER, "images": SimpleNamespace(known=None)}
    task = SimpleNamespace(correct_fn=right, loss_fn=loss, attack=attacks.NOBODY, **what_is_told)
    wider = population((5, 9, 3, 7, 4, 6, 5))
    everybody = problem.Clients(wider, jnp.zeros((7, 2), int), jnp.ones(7, int))
    scores = jit(evaluation.make_scores(config, task, method, SGD, 1))  # type: ignore[arg-type]
    train, test = (tuple(examples(seed, count).values()) for seed, count in ((0, 39), (1, 4)))
    arrays = problem.Arrays(BASE, train, test)
    _, own = drawn(scores, arrays, problem.Seed(everybody, ADAPTER, SEED), run, True)
    _, following = drawn(step, BASE, DATA, PEOPLE, run, SEED)
    assert once(own)
    assert not own.keys() & (seen + following).keys()


def test_a_purpose_is_no_number_and_no_other_purpose():
    """Over all names in the sources, for the numbers that clients, rounds, steps and leaves have."""
    root = Path(__file__).parents[1]
    sources = [p.read_text() for folder in ("fedlora_jax", "experiments") for p in (root / folder).rglob("*.py")]
    names = {name for text in sources for name in re.findall(r'purpose\([^"\n]*"([^"]+)"\)|key\("([^"]+)"\)', text)}
    names = {one or other for one, other in names}
    assert len(names) > 10
    assert len({stable_hash(name) for name in names}) == len(names)
    data = lambda keys: {tuple(x) for x in np.asarray(jax.random.key_data(keys)).tolist()}
    key = jax.random.key(0)
    named = data(jnp.stack([purpose(key, name) for name in sorted(names)]))
    assert len(named) == len(names)
    numbers = jnp.concatenate([jnp.arange(20_000), jnp.array([-1, 2**31 - 1])])
    hashes = jnp.array([stable_hash(name) for name in names])  # as lora.new folds in the names of kernels
    assert not named & data(jax.vmap(partial(jax.random.fold_in, key))(jnp.concatenate([numbers, hashes])))
    assert not named & data(jax.random.split(key, 20_000))
