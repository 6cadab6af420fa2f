"""A whole round computed step by step, without any compiled loop, against the compiled one."""

import jax
import pytest
from helpers import BASE, KEY, assert_near, compiled, effective


@pytest.mark.long
def test_jit_changes_nothing():
    """Of one method: every operation by itself takes a while. Loops over clients and steps are those of all; what is
    computed in them is looked at method by method."""
    m = compiled("fedit")
    c = m.cohort(1)
    state, _, info = m.fast(BASE, m.state, c, KEY)
    with jax.disable_jit():
        slow_state, _, slow_info = m.round_fn(BASE, m.state, c, KEY)
    assert_near(effective(m.method, BASE, state, c), effective(m.method, BASE, slow_state, c))
    assert_near(info.loss, slow_info.loss)
