"""A whole round computed step by step, without any compiled loop, against the compiled one."""

import jax
import pytest
from helpers import BASE, KEY, assert_near, compiled, effective

# Each takes seconds: of methods whose clients take the same local steps, one, and servers that decompose.
SHORT = ["flexlora", "fed_sb", "fedra", "ditto", "corrected"]
LONG = ["lora_fair", "fedex_lora", "hetlora", "fedsa_lora", "fslora", "hilora", "defended"]


@pytest.mark.parametrize("name", [*SHORT, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])
def test_jit_changes_nothing(name):
    m = compiled(name)
    c = m.cohort(1)
    state, _, info = m.fast(BASE, m.state, c, KEY)
    with jax.disable_jit():
        slow_state, _, slow_info = m.round_fn(BASE, m.state, c, KEY)
    assert_near(effective(m.method, BASE, state, c), effective(m.method, BASE, slow_state, c))
    assert_near(info.loss, slow_info.loss)
