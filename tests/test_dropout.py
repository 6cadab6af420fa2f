"""LoRA dropout and alpha mean what they mean in PEFT, and are nowhere in a program that does not ask for them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ADAPTER, BASE, BATCH, jit, loss_fn, members
from input_helpers import SMALL, change, refused

from experiments.cli import parse
from experiments.config import Config
from experiments.engine import programs
from experiments.setup import problem
from experiments.setup.backbone import load
from experiments.setup.problem import new_adapter
from fedlora_jax import Dense, dropout, fedit, ifca, lora, make_round

RATE, KEY = 0.3, jax.random.key(5)
X = np.random.default_rng(0).normal(size=(7, 40)).astype(np.float32)


def test_inputs_of_the_low_rank_path_alone_are_dropped_and_scaled_up():
    """Against NumPy, with the mask read off where the input is all ones."""
    layer = Dense(3)
    base = {**layer.init(jax.random.key(0), X)["params"], "bias": jnp.arange(3.0)}
    adapter = lora.new(jax.random.key(1), base, rank=2, targets="kernel", scale=0.7)
    adapter = {"kernel": adapter["kernel"].replace(b=jax.random.normal(jax.random.key(2), (2, 3)))}
    on = dropout.switched_on(adapter, KEY, RATE)
    found = layer.apply(lora.variables(base, on), X)
    mask = np.asarray(on["dropout"](jnp.ones_like(X)))
    assert set(np.unique(mask)) == {0.0, np.float32(1 / (1 - RATE))}
    assert np.mean(mask == 0) == pytest.approx(RATE, abs=0.1)
    w, a, b = (np.float64(x) for x in (base["kernel"], adapter["kernel"].a, adapter["kernel"].b))
    np.testing.assert_allclose(found, X @ w + 0.7 * ((X * mask) @ a) @ b + np.arange(3), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(layer.apply(lora.variables(base, dropout.switched_on(adapter, KEY, 0.0)), X),
                                  layer.apply(lora.variables(base, adapter), X))  # fmt: skip


def test_every_kernel_and_layer_draws_from_a_key_of_its_own():
    model = load(Config(), tuple("0123456789"), 16)
    adapter = new_adapter(Config(targets=("all",)), model, jax.random.key(0))
    switches = [x for x in lora.flatten(dropout.switched_on(adapter, KEY, RATE)).values() if not lora.is_lora(x)]
    keys = [np.asarray(jax.random.key_data(x.key)).reshape(-1, 2) for x in switches if isinstance(x, dropout.Dropout)]
    assert len(keys) == 6
    assert len(np.unique(np.concatenate(keys), axis=0)) == 6 * 4


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change()(tmp_path / "data.npz")


@pytest.mark.long
def test_it_is_in_local_steps_alone_and_only_where_asked_for(files):
    options = ["run", "--method", "fedit", *SMALL, "--data", "data.npz", "--rank", "2"]
    plain, dropped = (problem.build(parse([*options, *more])[1]) for more in ((), ("--dropout", "0.5")))
    draw = lambda x: 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
    adapter, batch = jax.tree.map(lambda x: draw(x[0]), plain.adapters), jax.tree.map(lambda x: x[:4], plain.train)
    text = lambda f, *rest: str(jax.make_jaxpr(f)(plain.base, adapter, batch, *rest))
    assert "random_bits" not in text(plain.loss_fn, KEY)
    assert "random_bits" in text(dropped.loss_fn, KEY)
    assert "random_bits" not in text(dropped.correct_fn)
    assert "random_bits" not in text(dropped.judge_fn, KEY)
    assert dropped.judge_fn(plain.base, adapter, batch, KEY) == plain.loss_fn(plain.base, adapter, batch, KEY)
    assert plain.judge_fn is plain.loss_fn
    loss = jax.jit(lambda key: dropped.loss_fn(plain.base, adapter, batch, key))
    losses = [float(loss(key)) for key in (KEY, KEY, jax.random.key(6))]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.long
def test_models_are_judged_without_it(files, monkeypatch):
    """By the commands; and by the library, where whoever judges by the negative loss chooses the other model."""
    asked = []
    monkeypatch.setattr(programs.rounds, "make_round", lambda *given, **more: asked.append(more["judge_fn"]))
    options = ["run", "--method", "fedit", *SMALL, "--data", "data.npz", "--rank", "2", "--dropout", "0.5"]
    config = parse(options)[1]
    made = problem.build(config)
    programs.make_block(config, made, fedit(), optax.sgd(0.1), None)
    assert asked == [made.judge_fn]
    monkeypatch.undo()
    method = ifca(query=BATCH)
    state, c = method.init(KEY, ADAPTER), members(method)
    other = lambda *given: -loss_fn(*given)
    rounds_of = [make_round(method, loss_fn, optax.sgd(0.1), judge_fn=judge) for judge in (None, loss_fn, other)]
    chosen = [np.asarray(jit(round_fn)(BASE, state, c, KEY)[1]) for round_fn in rounds_of]
    np.testing.assert_array_equal(chosen[0], chosen[1])
    np.testing.assert_array_equal(chosen[0], 1 - chosen[2])


def test_a_model_that_folds_its_adapter_in_is_refused(files, capsys, monkeypatch, pytestconfig):
    own = f"{pytestconfig.rootpath}/examples/own_backbones.py:plain"
    options = ["run", "--method", "fedit", *SMALL, "--data", "data.npz", "--model", own, "--dropout", "0.1"]
    said = refused([*options, "--out", "out"], capsys, monkeypatch)
    assert "a plain function has no layer that drops inputs of its adapter: leave --dropout out" in said


def test_alpha_is_divided_by_the_rank(capsys, monkeypatch):
    model = load(Config(), tuple("0123456789"), 16)
    scales = lambda config: {x.scale for x in lora.low_rank_leaves(new_adapter(config, model, jax.random.key(0)))}
    assert scales(Config(alpha=12.0, rank=(8,))) == {1.5}
    assert scales(Config(alpha=12.0, rank=(2, 16))) == {0.75}, "one for all clients, of the largest"
    assert scales(Config()) == {2.0}
    said = refused(["run", "--method", "fedit", "--alpha", "16", "--scale", "3"], capsys, monkeypatch)
    assert "--alpha and --scale say the same in two ways: give one of them" in said
