"""Local training as people run it: rates over rounds and steps, momentum, decay, clipping, label smoothing."""

import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from input_helpers import FEW, change, refused

from experiments.__main__ import main
from experiments.cli import parse
from experiments.config import Config
from experiments.engine import forecast
from experiments.setup import data, local_training, problem, task
from fedlora_jax.training import of_round

GRADIENTS = np.random.default_rng(0).normal(size=(6, 5)) * np.array([0.1, 1, 10, 0.1, 1, 10])[:, None]
START = np.linspace(-1, 1, 5)


def walked(config: Config, round: int, gradients=GRADIENTS) -> np.ndarray:
    """Where the optimizer of a round comes to, in float64."""
    with jax.enable_x64(True):
        tx = optax.with_extra_args_support(of_round(local_training.make_optimizer(config), round))
        x = jnp.asarray(START)
        state = tx.init(x)
        for t, g in enumerate(gradients):
            step, state = tx.update(jnp.asarray(g), state, x, progress=t / len(gradients))
            x = x + step
        return np.asarray(x)


def by_hand(rates, gradients=GRADIENTS, momentum=0.0, decay=0.0, longest=math.inf) -> np.ndarray:
    """SGD as PyTorch writes it down: g <- clipped g + decay x; v <- momentum v + g; x <- x - rate v."""
    x, v = START.copy(), np.zeros(5)
    for rate, g in zip(rates, gradients, strict=True):
        g = g * min(1, longest / np.linalg.norm(g)) + decay * x
        v = momentum * v + g
        x = x - rate * v
    return x


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {}),
        ({"optimizer": "momentum"}, {"momentum": 0.9}),
        ({"optimizer": "momentum", "momentum": 0.5}, {"momentum": 0.5}),
        ({"weight_decay": 0.3}, {"decay": 0.3}),
        ({"clip_norm": 2.0}, {"longest": 2.0}),
        (
            {"optimizer": "momentum", "weight_decay": 0.3, "clip_norm": 2.0},
            {"momentum": 0.9, "decay": 0.3, "longest": 2.0},
        ),
    ],
)
def test_sgd_with_all_that_goes_with_it(options, expected):
    config = Config(local_steps=6, lr=0.05, **options)
    np.testing.assert_allclose(walked(config, 3), by_hand([0.05] * 6, **expected), rtol=1e-6)


def test_decay_of_adamw_is_apart_from_its_gradient():
    config = Config(optimizer="adamw", lr=0.05, weight_decay=0.3)
    still = walked(config, 0, np.zeros((4, 5)))
    np.testing.assert_allclose(still, START * (1 - 0.05 * 0.3) ** 4, rtol=1e-6)


FACTORS = {
    "constant": lambda i, n: 1.0,
    "linear": lambda i, n: (n - i) / n,
    "cosine": lambda i, n: math.cos(math.pi * i / n / 2) ** 2,  # (1 + cos 2 x) / 2 is cos(x)^2
    "exponential:0.8": lambda i, n: 0.8**i,
}


@pytest.mark.parametrize("schedule", FACTORS)
@pytest.mark.parametrize("local", ["constant", "linear", "cosine"])
def test_the_rate_of_each_step_is_that_of_its_round_and_place(schedule, local):
    config = Config(rounds=5, local_steps=6, lr=0.05, schedule=schedule, local_schedule=local)
    for round in (0, 2, 4):
        rates = [0.05 * FACTORS[schedule](round, 5) * FACTORS[local](t, 6) for t in range(6)]
        np.testing.assert_allclose(walked(config, round), by_hand(rates), rtol=1e-6)


@pytest.mark.parametrize("local", ["linear", "cosine"])
def test_where_numbers_of_steps_differ_the_rate_follows_each_clients_own(local):
    config = Config(rounds=5, lr=0.05, schedule="linear", local_schedule=local, local_epochs=2.0, optimizer="momentum")
    for taken in (3, 6):
        rates = [0.05 * FACTORS["linear"](2, 5) * FACTORS[local](t, taken) for t in range(taken)]
        x, v = START.copy(), np.zeros(5)  # the rate is put on the whole step, momentum included
        for rate, g in zip(rates, GRADIENTS, strict=False):
            v = 0.9 * v + g
            x = x - rate * v
        np.testing.assert_allclose(walked(config, 2, GRADIENTS[:taken]), x, rtol=1e-6)


def test_an_epoch_is_every_image_once_and_unequal_steps_are_drawn_for_each_client():
    sizes = np.array([10, 16, 17, 1])
    of = lambda **options: local_training.examples_of_a_round(Config(batch=8, **options), sizes, 3)
    np.testing.assert_array_equal(of(local_epochs=1.0), sizes)
    np.testing.assert_array_equal(of(local_epochs=0.3), [3, 5, 6, 1])
    np.testing.assert_array_equal(of(local_epochs=2.0), 2 * sizes)
    many = lambda seed: local_training.examples_of_a_round(
        Config(batch=8, local_steps_from=2, local_steps=5), np.ones(400), seed
    )
    np.testing.assert_array_equal(np.unique(many(0)), [16, 24, 32, 40])
    assert (many(0) != many(1)).any()
    config = Config(batch=8, local_epochs=1.0)
    examples = np.stack([sizes, sizes + 8])
    assert local_training.longest(config, examples) == 4
    assert local_training.record(config, examples) == {"longest": 4, "local_steps": [[1, 2.0, 3], [2, 3.0, 4]]}
    assert (local_training.longest(Config(), ()), local_training.record(Config(), ())) == (None, {})


@pytest.mark.long
def test_a_run_of_epochs_says_how_many_steps_they_are(tmp_path, monkeypatch):
    """Unseen clients are tuned as long as they would train; nothing else of a run is another."""
    change()(tmp_path / "data.npz")
    few = [*FEW, "--data", str(tmp_path / "data.npz"), "--holdout-clients", "2", "--partition", "dirichlet:1"]
    few += ["--methods", "fedit+scaffold", "--local-epochs", "1", "--rank", "2", "--adapt-last", "1"]
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["experiments", "compare", *few, "--out", str(out)])
    main()
    record = json.loads((out / "config.json").read_text())["record"]
    ((fewest, mean, most),) = record["local_steps"]
    assert 1 <= fewest <= mean <= most == record["longest"]
    assert mean == pytest.approx(np.mean([-(-n // 4) for n in _sizes(few)]), abs=0.01)
    assert "2 rounds of 1 local epoch;" in (out / "report.html").read_text()
    said = forecast.unequal(SimpleNamespace(longest=most, record=record))  # type: ignore[arg-type]
    assert f"clients take {fewest} to {most} local steps, mean {mean:.1f}; counted are {most} for each" in said[0]


def _sizes(arguments):
    config = parse(["compare", *arguments])[1]
    images = data.load(config.data)
    rows = [np.flatnonzero(images.test == part) for part in (False, True)]
    return [len(part) for part in problem.dealt(config, images, *rows, 0)[0]]


def test_after_the_last_round_clients_go_on_at_its_rate():
    config = Config(rounds=5, local_steps=6, lr=0.05, schedule="cosine", local_schedule="linear")
    np.testing.assert_array_equal(walked(config, 5), walked(config, 4))
    beyond = walked(config, 4, np.concatenate([GRADIENTS, GRADIENTS[:2]]))  # served after more steps than a round has
    last = 0.05 * FACTORS["cosine"](4, 5) / 6
    np.testing.assert_allclose(beyond, walked(config, 4) - last * GRADIENTS[:2].sum(0), rtol=1e-6)


def test_smoothed_labels_give_a_share_to_every_class():
    rng = np.random.default_rng(1)
    out, y = rng.normal(size=(7, 4)), rng.integers(0, 4, 7)

    class Model:
        apply = staticmethod(lambda base, adapter, x, training: (x, x))

    log_p = out - np.log(np.exp(out).sum(-1, keepdims=True))
    p = 1 / (1 + np.exp(-out))
    for name, each in (("softmax", log_p), ("sigmoid", None)):
        for smoothing in (0.0, 0.2):
            share = (1 - smoothing) * np.eye(4)[y] + smoothing / 4
            loss, *_ = task.objectives(task.TASKS[name], Model(), smoothing=smoothing)  # type: ignore[arg-type]
            got = loss({}, {}, (jnp.asarray(out), jnp.asarray(y)), None)
            terms = share * each if each is not None else share * np.log(p) + (1 - share) * np.log(1 - p)
            np.testing.assert_allclose(got, -terms.sum(-1).mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--schedule exponential:2", "--schedule exponential"),
        ("--schedule exponential", "exponential:G"),
        ("--schedule steps", "--schedule must be"),
        ("--momentum 0.5", "--momentum is of --optimizer momentum"),
        ("--optimizer momentum --momentum 1", "--momentum"),
        ("--clip-norm 0", "--clip-norm"),
        ("--label-smoothing 1", "--label-smoothing"),
        ("--methods fedit+scaffold --schedule cosine", "plain SGD"),
        ("--methods fedit+scaffold --weight-decay 0.1", "plain SGD"),
        ("--local-steps 3 --local-steps-from 4", "--local-steps-from 4 is more than --local-steps 3"),
        ("--local-epochs 1 --local-steps-from 1", "give one of them"),
        ("--local-epochs 0", "--local-epochs"),
        ("--methods fedrep --clients 6 --local-steps 3 --local-steps-from 1", "for the head leaves none"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, said, capsys, monkeypatch):
    assert said in refused(["compare", *FEW, *options.split()], capsys, monkeypatch)


def test_defaults_are_plain_sgd():
    assert local_training.is_plain_sgd(Config())
    for other in ({"optimizer": "adam"}, {"schedule": "linear"}, {"weight_decay": 0.1}, {"clip_norm": 1.0}):
        assert not local_training.is_plain_sgd(dataclasses.replace(Config(), **other))
