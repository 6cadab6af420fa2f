"""Numbers that are none, or that no device holds, are refused by name: nan, infinity, beyond float32 or int32."""

import jax
import numpy as np
import pytest

from fedlora_jax.method import in_words, refuse_outside

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
