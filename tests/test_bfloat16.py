"""What half the bits cost: a model's logits, and rounds on it; adapters and what methods carry stay float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from input_helpers import SMALL, change, refused

from experiments.cli import parse
from experiments.config import Config
from experiments.setup import problem
from experiments.setup.backbone import kept_as, load
from experiments.setup.digits import SIDE, digits
from fedlora_jax import lora
from models.backbone import NO_ADAPTER

HALF = ["--dtype", "bfloat16", "--base-dtype", "bfloat16"]


@pytest.mark.long
@pytest.mark.parametrize("family", ["vit", "mixer"])  # a CLIP's image tower is a ViT
def test_logits_move_by_a_hundredth_of_their_spread(family):
    """An activation or weight is off by at most 2^-9 of itself, one in five hundred; four blocks add these up."""
    images = digits()["x"][:200]

    def logits(dtype, base):
        model = load(Config(model=family, dtype=dtype), tuple("0123456789"), SIDE)
        params = kept_as(base, model.params, ("^head/",))
        assert {str(x.dtype) for name, x in lora.flatten(params).items() if not name.startswith("head")} == {base}
        return np.asarray(jax.jit(lambda x: model.apply(params, NO_ADAPTER, x)[0])(images))

    exact = logits("float32", "float32")
    for dtype, base in (("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")):
        found = logits(dtype, base)
        assert found.dtype == np.float32
        off = np.sqrt(np.mean((found - exact) ** 2)) / exact.std()
        assert 2**-10 < off < 0.015, "it is rounded, and no more than that"
        assert np.mean(found.argmax(-1) == exact.argmax(-1)) > 0.97


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change()(tmp_path / "data.npz")


def config(*options, rank="2"):
    return parse(["run", "--method", "fedit", *SMALL, "--data", "data.npz", "--rank", rank, *options])[1]


@pytest.mark.long
def test_only_what_is_frozen_has_fewer_bits(files):
    made = problem.build(config(*HALF, "--adapt-last", "2"))
    kinds = {name: str(x.dtype) for name, x in lora.flatten(made.base).items()}
    assert {kind for name, kind in kinds.items() if name.startswith("head/")} == {"float32"}
    assert {kind for name, kind in kinds.items() if not name.startswith("head/")} == {"bfloat16"}
    assert {x.dtype for x in jax.tree.leaves(made.adapters)} == {jnp.dtype("float32")}
    assert made.train[0].dtype == jnp.bfloat16  # tokens are stored as they are computed
    anew = problem.build(config(*HALF, "--adapt-last", "2", "--prefix", "anew"))
    losses = []
    for p in (made, anew):
        adapter, (x, y) = jax.tree.map(lambda x: x[0], p.adapters), p.train
        losses.append(jax.jit(p.loss_fn)(p.base, adapter, (x[:8], y[:8]), jax.random.key(0)))
    np.testing.assert_allclose(*losses, rtol=2e-3)


@pytest.mark.long
def test_by_default_nothing_of_it_is_in_the_program(files):
    made = problem.build(config())
    adapter, batch = jax.tree.map(lambda x: x[0], made.adapters), jax.tree.map(lambda x: x[:4], made.train)
    text = lambda p: str(jax.make_jaxpr(jax.grad(p.loss_fn, 1))(p.base, adapter, batch, jax.random.key(0)))
    assert "bf16" not in text(made)
    assert "bf16" in text(problem.build(config("--dtype", "bfloat16")))


@pytest.mark.long
def test_gradients_point_the_same_way(files):
    """Of a local step, with a head and factors that are not zero; they are float32."""
    found, draw = [], lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
    for options in ((), HALF):
        made = problem.build(config(*options))
        adapter = jax.tree.map(lambda x: draw(x[0]), made.adapters)
        batch = jax.tree.map(lambda x: x[:8], made.train)
        found.append(jax.jit(jax.grad(made.loss_fn, 1))(made.base, adapter, batch, jax.random.key(0)))
    for exact, half in zip(*map(jax.tree.leaves, found), strict=True):
        assert half.dtype == jnp.float32
        assert 0 < np.linalg.norm(half - exact) < 0.03 * np.linalg.norm(exact)


def test_what_a_server_adds_to_frozen_weights_is_not_rounded_to_theirs():
    """The residual of FedEx-LoRA, say."""
    base = {"kernel": jnp.full((3, 3), 1.5, jnp.bfloat16)}
    after = lora.add(base, {"kernel": jnp.full((3, 3), 1e-4, jnp.float32)})
    np.testing.assert_array_equal(after["kernel"], np.float32(1.5) + np.float32(1e-4))


def test_other_precisions_are_refused(files, capsys, monkeypatch):
    options = ["run", "--method", "fedit", *SMALL, "--data", "data.npz"]
    said = refused([*options, "--dtype", "float16"], capsys, monkeypatch)
    assert "--dtype must be one of float32, bfloat16; got float16" in said
