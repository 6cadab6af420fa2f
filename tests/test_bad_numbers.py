"""Numbers that are none, or that no device holds, are refused by name: nan, infinity, beyond float32 or int32."""

import importlib
import inspect
import re

import jax
import numpy as np
import pytest
from helpers import EVERYBODY, SIGNATURE

from experiments.engine import methods
from experiments.engine.trial import Failed, check_moved
from fedlora_jax.checks import in_words, refuse_outside
from fedlora_jax.diagnostics import Aggregation
from fedlora_jax.methods.fedit import fedit
from fedlora_jax.rounds import Info

NO_NUMBERS = (float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 1e-300, np.float64(1e39), 2**31, -(10**12))


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "words"),
    [
        ("[0, 1)", (0, 0.0, 0.5, np.float32(0.999)), (-0.1, 1, 1.0, -1), "at least 0 and below 1"),
        ("(0, 1]", (1, 1.0, 1e-30), (0, 0.0, -0.0, 1.001), "above 0 and at most 1"),
        ("[1, inf)", (1, 2**31 - 1, 3.4e38), (0, 0.99), "at least 1"),
        ("(-inf, inf)", (0, -3.4e38, 1.2e-38), (), "a finite number"),
    ],
)
def test_an_interval_holds_its_numbers_and_no_others(interval, inside, outside, words):
    assert in_words(interval) == words
    for value in inside:
        refuse_outside(interval, lam=value)
    for value in (*outside, *NO_NUMBERS):
        with pytest.raises(ValueError, match=f"^lam must be {words}, got "):
            refuse_outside(interval, mu=inside[0], lam=value)


def test_traced_numbers_pass():
    jax.jit(lambda x: refuse_outside("(0, 1)", x=x))(7.0)


PARTS = {name: getattr(importlib.import_module(f"fedlora_jax.methods.{name}"), name) for name in methods.names()}
PARTS |= {name: methods._wrapper(name)[1] for name in methods.wrappers()}
OPTIONS = [(name, key) for name, make in PARTS.items() for key, p in methods.settable(make).items()
           if type(p.default) in (int, float)]  # fmt: skip
FACTS = {"participants": 4, "population": 8, "rounds": 3, "local_lr": 0.1, "signature": SIGNATURE}
FACTS |= {"sampling": EVERYBODY, "uses": 1}


@pytest.mark.parametrize(("name", "key"), OPTIONS)
def test_every_number_of_every_method_and_wrapper_is_looked_at(name, key):
    """In the library itself, by name; and on the command line with the part that it belongs to."""
    make = PARTS[name]
    asked = {fact: FACTS[fact] for fact in inspect.signature(make).parameters if fact in FACTS}
    inner = [fedit()] if name in methods.wrappers() else []
    make(*inner, **asked)
    kind = type(methods.settable(make)[key].default)
    for value in NO_NUMBERS if kind is float else (2**31, -(10**12)):
        with pytest.raises(ValueError, match=f"(?s){key}.*{re.escape(f'{value}')}"):
            make(*inner, **asked, **{key: value})
        if kind is float and isinstance(value, int):
            continue  # as text a real number like any other
        part = f"{name}:{key}={value}".replace("e+", "e")  # a plus begins a wrapper
        with pytest.raises(ValueError, match=re.escape(f"'{part}': {key} must be a finite number")):
            methods.check(f"fedit+{part}" if inner else part)


def test_a_run_whose_numbers_are_none_or_stay_as_they_are_ends_before_it_writes_them():
    """Two seeds, three rounds, four clients; some of the numbers of a row become infinite before the loss does."""
    one = np.ones((2, 3, 4))
    good = Info(one * 5, one, Aggregation(*np.ones((4, 2, 3))), {}, one, np.zeros((2, 3)))
    check_moved("fedit", (0, 7), good, 3, first=True)
    last = lambda x, value: np.where(np.arange(3)[:, None] == 2, value, x)
    second = np.stack([one[0], last(one, 0.0)[1]])
    one_clients = np.where(np.arange(4) == 1, np.nan, one)
    check_moved("fedit", (0, 7), good._replace(loss=one_clients), 3, first=True)
    for field in Aggregation._fields:
        wrong = good.aggregation._replace(**{field: last(one, np.inf)[..., 0]})
        with pytest.raises(Failed, match="what clients sent, became infinite by round 9; try"):
            check_moved("fedit", (0, 7), good._replace(aggregation=wrong), 9, first=True)
    with pytest.raises(Failed, match="look at what the model makes of an image"):
        check_moved("fedit", (0, 7), good._replace(loss=one * np.nan), 3, first=True)
    with pytest.raises(Failed, match="nothing that is trained moved by round 3"):
        check_moved("fedit", (0, 7), good._replace(moved=last(one, 0.0)), 3, first=False)
    with pytest.raises(Failed, match=re.escape("fedit, one seed of 2 (7): nothing")):
        check_moved("fedit", (0, 7), good._replace(moved=second), 3, first=False)
