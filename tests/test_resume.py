"""What is left of a run that was killed: rows that are whole, and checkpoints of which no leaf is missing.

Runs that are killed and go on: ``test_faults``.
"""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.results.checkpoints import Checkpoints
from experiments.results.record import Metrics, complete


def test_a_line_cut_short_or_changed_is_no_row(tmp_path):
    metrics, path = Metrics(tmp_path), tmp_path / "metrics.jsonl"
    rows = [{"method": m, "seed": 0, "round": r, "loss": 0.1 * r} for m in ("fedit", "flora") for r in (1, 2, 3)]
    metrics.append(rows)
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    assert metrics.read() == rows
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        lost = whole[:at].count(b"\n")
        assert metrics.read() == [row for i, row in enumerate(rows) if i not in (lost, lost + (whole[at] == 10))]
    path.write_bytes(whole + whole.split(b"\n")[1] + b"\n")
    assert metrics.read() == rows, "the same row twice is one"
    metrics.append([{**rows[4], "loss": 7.0}])
    assert metrics.read() == rows[:4] + rows[5:], "two that contradict are none"
    left = metrics.read()
    assert [complete(left, *of) for of in (("fedit", [0]), ("flora", [0]), ("flora", [0, 1]))] == [3, 1, 0]


def test_a_checkpoint_gives_back_every_leaf_that_of_no_size_included(tmp_path):
    """Signatures without labels have an array of size zero, which orbax does not write."""
    run = {"labels": jnp.zeros((2, 0)), "key": jax.random.key(3), "x": jnp.arange(3.0)}
    store = Checkpoints(tmp_path, {"method": "hyperlora"})
    store.save(1, run)
    back = store.restore(1, {"labels": run["labels"], "key": jax.random.key(0), "x": jnp.zeros(3)})
    assert jax.tree.structure(back) == jax.tree.structure(run)
    assert back["labels"].shape == (2, 0)
    np.testing.assert_array_equal(jax.random.key_data(back["key"]), jax.random.key_data(run["key"]))
    np.testing.assert_array_equal(back["x"], run["x"])
