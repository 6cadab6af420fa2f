"""What accelerators are given, read in the text of programs: no GPU or TPU has to be at hand.

Every method's round is lowered for all three in ``test_every_method.py``; here whole blocks of rounds of real models.
"""

import functools
import re
from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from helpers import PLATFORMS, quick_options
from input_helpers import SMALL, change

from experiments.cli import parse
from experiments.engine import methods, programs
from experiments.engine.facts import facts_of
from experiments.setup import problem
from experiments.setup.memory import bytes_of
from fedlora_jax import lora

CLIENTS, BATCH, RANK, SIDE, PATCH = 5, 7, 2, 16, 4  # no two products of these make an array of another kind
OPTIONS = f"--clients {CLIENTS} --batch {BATCH} --rank {RANK} --chunk {CLIENTS} --eval-every 2 --targets all".split()
HALF = ("--dtype", "bfloat16", "--base-dtype", "bfloat16")
COMPILED = re.compile(r"\b(?:f32|bf16)\[([\d,]+)\]")
TYPE = re.compile(r"tensor<((?:\d+x)*)(\w+)>")
PRODUCT = re.compile(r"dot_general .*: \((.*), (.*)\) -> (.*?)(?: loc.*)?$", re.MULTILINE)


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    """A block of two rounds of Ditto, whose clients keep a model, all clients at once; lowered once for all platforms,
    which is refused where it would ask the host for anything."""
    file = tmp_path_factory.mktemp("data") / "data.npz"
    change()(file)

    @functools.cache
    def lower(family, *options):
        typed = ["run", "--method", "ditto", *SMALL, *OPTIONS, "--data", str(file), "--model", family, *options]
        config = parse(typed)[1]
        p = problem.build(config)
        made = programs.make(config, p, methods.build("ditto", **facts_of(config, p.signature, p.smallest)))
        run = jax.eval_shape(made.start, p.adapters, p.keys)
        traced = made.train.trace(p.base, p.train, p.clients, run, p.keys)
        text = traced.lower(lowering_platforms=PLATFORMS).as_text()
        frozen = [x.shape for name, x in lora.flatten(p.base).items() if "head" not in name and x.ndim > 1]
        return SimpleNamespace(text=text, traced=traced, run=run, frozen=frozen)

    return lower


def shapes(text):
    """Of all arrays in it, however they lie; before it is compiled and after."""
    found = [dims.split("x")[:-1] for dims, _ in TYPE.findall(text)] + [x.split(",") for x in COMPILED.findall(text)]
    return {tuple(sorted(map(int, dims))) for dims in found}


def copied(frozen, found):
    """Which frozen arrays, or one block's part of them, are there once for each client."""
    own = lambda shape: tuple(sorted((CLIENTS, *shape)))
    kernels = [x for shape in frozen for x in (shape, shape[1:]) if len(x) > 1]
    return [x for x in kernels if own(x) in found]


MODELS = [("vit",), ("mixer", *HALF)]
every_model = pytest.mark.parametrize("model", MODELS, ids=" ".join)


@pytest.mark.long
@every_model
def test_what_a_run_carries_is_written_where_it_was(model, lowered):
    """Every array of it: the server's state, and what clients keep."""
    own = lowered(*model)
    arguments = re.search(r"@main\((.*?)\) ->", own.text, re.DOTALL)[1]
    given = Counter(re.findall(r"tensor<(\S+)> {tf.aliasing_output", arguments))
    text = lambda x: "x".join([*map(str, x.shape), {"float32": "f32", "int32": "i32"}[str(x.dtype)]])
    assert given == Counter(map(text, jax.tree.leaves(own.run)))


@pytest.mark.long
@every_model
def test_frozen_weights_are_there_once_for_all_clients(model, lowered):
    own = lowered(*model)
    assert len(own.frozen) > 5
    assert not copied(own.frozen, shapes(own.text))


@pytest.mark.long
def test_frozen_weights_are_there_once_in_what_is_compiled(lowered):
    """And what a run carries takes no memory a second time."""
    own = lowered("vit")
    compiled = own.traced.lower().compile(compiler_options=quick_options())
    assert not copied(own.frozen, shapes(compiled.as_text()))
    memory = compiled.memory_analysis()
    if memory is not None:
        assert memory.alias_size_in_bytes == bytes_of(own.run)


def test_a_copy_for_each_client_would_be_seen():
    """What the two tests above look for, where a server's part of a kernel is merged into it client by client."""
    merged = jax.vmap(lambda w, x, a: x @ (w + a), (None, 0, 0))
    text = jax.jit(merged).lower(*(jnp.ones(s) for s in ((6, 4), (CLIENTS, 2, 6), (CLIENTS, 6, 4)))).as_text()
    assert copied([(3, 6, 4)], shapes(text)) == [(6, 4)]


@every_model
def test_products_over_tokens_are_as_wide_as_the_options_say(model, lowered):
    """With half the bits all of them read half the bits, forward and backward, and give them, on a CPU the sums."""
    own = lowered(*model)
    tokens = (SIDE // PATCH) ** 2 + (model[0] == "vit")
    found = [[TYPE.search(part).groups() for part in product] for product in PRODUCT.findall(own.text)]
    dims = lambda part: {int(n) for n in part[0].split("x")[:-1]}
    over = lambda part: {BATCH, tokens} <= dims(part) or BATCH * tokens in dims(part)
    wide = [p for p in found if any(map(over, p)) and not any(1 in dims(part) for part in p)]
    assert len(wide) > 30
    kind = "bf16" if model[1:] else "f32"
    assert {part[1] for product in wide for part in product[:2]} == {kind}
    assert {product[2][1] for product in wide} <= {kind, "f32"}
