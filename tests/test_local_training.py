"""Local training as people run it: rates over rounds and steps, momentum, decay, clipping, label smoothing."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from input_helpers import SMALL, refused

from experiments.config import Config
from experiments.setup import local_training, task
from fedlora_jax.training import of_round

GRADIENTS = np.random.default_rng(0).normal(size=(6, 5)) * np.array([0.1, 1, 10, 0.1, 1, 10])[:, None]
START = np.linspace(-1, 1, 5)


def walked(config: Config, round: int, gradients=GRADIENTS) -> np.ndarray:
    """Where the optimizer of a round comes to, in float64."""
    with jax.enable_x64(True):
        tx = of_round(local_training.make_optimizer(config), round)
        x = jnp.asarray(START)
        state = tx.init(x)
        for g in gradients:
            step, state = tx.update(jnp.asarray(g), state, x)
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
            loss, _ = task.objectives(task.TASKS[name], Model(), smoothing=smoothing)  # type: ignore[arg-type]
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
    ],
)
def test_options_that_mean_nothing_are_refused(options, said, capsys, monkeypatch):
    assert said in refused(["compare", *SMALL, *options.split()], capsys, monkeypatch)


def test_defaults_are_plain_sgd():
    assert local_training.is_plain_sgd(Config())
    for change in ({"optimizer": "adam"}, {"schedule": "linear"}, {"weight_decay": 0.1}, {"clip_norm": 1.0}):
        assert not local_training.is_plain_sgd(dataclasses.replace(Config(), **change))
