"""Bytes are counted as they are drawn: who was away is sent what it missed, by hand-written sums."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ADAPTER, BASE, CLIENTS, KEY, jit, loss_fn, members

from experiments.config import Config
from experiments.engine.rows import Rows
from fedlora_jax import lora, rounds
from fedlora_jax.clients import Population
from fedlora_jax.methods.fedex_lora import fedex_lora
from fedlora_jax.methods.fedit import fedit
from fedlora_jax.methods.flora import flora
from fedlora_jax.methods.hetlora import hetlora, numbers
from fedlora_jax.methods.hilora import hilora
from fedlora_jax.methods.rac_lora import rac_lora
from fedlora_jax.methods.rolora import rolora
from fedlora_jax.wrappers.scaffold import scaffold

HEAD = 6 * 3 + 3
COLUMN = 3 * (6 + 4)  # of every kernel: two stacked and a single one
DENSE = 3 * 24
A, B = 2 * 6 + 4, 2 * 4 + 6  # numbers of one column of a, of one row of b
DRAWN = [[0, 1], [2, 1], [0, 2], [1, 2], [2, 0], [0, 1]]  # of clients 0 to 3; 3 never takes part
N = 4


class Problem:
    def __init__(self, ranks):
        ranks = np.asarray([ranks])
        self.clients = type("Clients", (), {"population": Population((), np.ones_like(ranks), ranks)})  # type: ignore[arg-type]
        self.adapters = jax.tree.map(lambda x: x[None], ADAPTER)


def counted(method, drawn=DRAWN, ranks=(1, 2, 2, 1), reports=None, cut=None):
    """Bytes of every round: up, down, and until all hold the model. ``cut``: go on from rows after that many rounds."""
    config = Config(clients=N, holdout_clients=0, seeds=(7,))
    made = []
    rows = Rows(config, Problem(ranks), "m", method)
    for t, ids in enumerate(drawn):
        if t == cut:
            rows = Rows(config, Problem(ranks), "m", method)
            rows.go_on(made)
        row = {"seed": 7, "clients": ids, **(reports[t] if reports else {})}
        made.append(row | rows._bytes(0, np.asarray(ids), row))
    return np.asarray([[row[key] for key in ("bytes_up", "bytes_down", "bytes_behind")] for row in made])


def by_hand(down, left, whole=None, drawn=DRAWN):
    """``down [N]`` numbers at every draw; ``left [rounds]`` that everybody needs of a round, ``whole`` at most."""
    last, rows = [0] * N, []
    owed = lambda i, t: min(sum(left[last[i] : t]), np.inf if whole is None else whole)
    for t, ids in enumerate(drawn):
        sent = sum(down[i] + owed(i, t) for i in ids)
        for i in ids:
            last[i] = t
        rows.append([4 * sent, 4 * sum(down[i] + owed(i, t + 1) for i in range(N))])
    return np.asarray(rows)


RANKS = (1, 2, 2, 1)
OWN = [COLUMN * r + HEAD for r in RANKS]
STACKS = [COLUMN * sum(RANKS[i] for i in ids) for ids in DRAWN]


def residual(ids):
    """Of two clients, in three kernels: every column that either holds adds one to the rank of what the mean misses."""
    return 3 * min(10 * max(RANKS[i] for i in ids), 24)


CASES = {
    "fedit": (fedit(), OWN, [0] * 6, None),
    "flora": (flora(), [HEAD] * N, STACKS, None),
    "fedex_lora": (fedex_lora(), OWN, [residual(ids) for ids in DRAWN], DENSE),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cut", [None, 3])
def test_who_was_away_is_sent_what_it_missed_and_no_more_than_all_of_it(name, cut):
    method, down, left, whole = CASES[name]
    got = counted(method, cut=cut)
    np.testing.assert_array_equal(got[:, 1:], by_hand(down, left, whole))
    np.testing.assert_array_equal(got[:, 0], [4 * sum(OWN[i] for i in ids) for ids in DRAWN])


def test_a_chain_of_blocks_is_sent_by_its_finished_factors():
    ranks = (2, 2, 2, 2)
    got = counted(rac_lora(), ranks=ranks)
    np.testing.assert_array_equal(got[:, 1:], by_hand([HEAD] * N, [2 * B] * 6))
    # A block of two rounds: half of b comes before a round, half is left behind, in the mean.
    np.testing.assert_array_equal(counted(rac_lora(2), ranks=ranks)[:, 1:], by_hand([HEAD + B] * N, [B] * 6))


def test_rolora_sends_the_other_factor_to_who_missed_it():
    got = counted(rolora(), ranks=(2, 2, 2, 2))
    half = A + B  # of 2 (A + B), in the mean of two rounds; each of the two kernels' is a whole number
    np.testing.assert_array_equal(got[:, 1:], by_hand([HEAD] * N, [half] * 6, whole=2 * half))


def test_a_tier_comes_down_once_more_when_it_is_frozen():
    method, own = hilora(N, 6), 2 * COLUMN + HEAD
    shares = lambda sends, ends: {"travels_up": sends, "travels_down": sends, "travels_missed": ends}
    reports = [shares(*pair) for pair in ((1, 0), (1, 1), (1, 0), (1, 1), (0, 0), (0, 0))]
    got = counted(method, ranks=(2, 2, 2, 2), reports=reports)
    expected = by_hand([own] * N, [0, own, 0, own, 0, 0])[:, 0]
    expected[4:] -= 4 * 2 * own
    np.testing.assert_array_equal(got[:, 1], expected)
    np.testing.assert_array_equal(got[4:, 0], [0, 0])


def test_a_wrapper_passes_on_what_was_missed():
    plain, around = (m.traffic(ADAPTER, [ADAPTER] * 3) for m in (flora(), scaffold(flora(), 8, 0.1)))
    assert jax.tree.structure(around.missed) == jax.tree.structure(plain.missed)


def test_hetlora_counts_the_columns_that_are_left(x64):
    """Of a cohort of ranks 2, 2, 1, 2 that has pruned: what it is sent at its ranks, and what it sends after."""
    method = hetlora(min_rank=1)
    c = members(method, ranks=[2, 2, 1, 2])._replace(memory=np.asarray([1, 0, 0, 0]), ids=np.arange(CLIENTS))
    state = method.init(jax.random.key(0), ADAPTER)
    _, memory, info = jit(rounds.make_round(method, loss_fn, optax.sgd(0.1)))(BASE, state, c, KEY)
    numbers = lambda ranks: COLUMN * sum(ranks) + CLIENTS * HEAD
    before, after = 2 - np.asarray([1, 0, 1, 0]), np.asarray([2, 2, 1, 2]) - np.asarray(memory)
    whole = numbers([2, 2, 1, 2])
    np.testing.assert_allclose(info.learned["travels_down"], numbers(before) / whole)
    np.testing.assert_allclose(info.learned["travels_up"], numbers(after) / whole)
    assert numbers(before) < whole


def test_hetlora_counts_cohorts_whose_numbers_int32_cannot_hold_together():
    adapter = {"k": lora.LoRA(jnp.zeros((24, 1024, 8)), jnp.zeros((24, 8, 4096)))}
    got = numbers(adapter, jnp.asarray([4, 8] * 5000))
    np.testing.assert_allclose(got, 6 * 24 * 5120)


def test_rows_go_on_after_those_they_are_given_and_nothing_else():
    """One maker of rows serves all points of a sweep: what clients missed at one is nothing to the next."""
    rows = Rows(Config(clients=N, holdout_clients=0, seeds=(7,)), Problem(RANKS), "m", flora())
    count = lambda: [rows._bytes(0, np.asarray(ids), {}) for ids in DRAWN]
    first = count()
    rows.go_on(())
    assert count() == first


def test_flora_of_four_of_twelve_clients_on_digits_by_hand():
    """Six rounds of ``run --method flora --rank 4,8 --clients-per-round 4``, stack by stack; then the last heads."""
    rng = np.random.default_rng(0)
    ids = [rng.permutation(12)[:4].tolist() for _ in range(6)]
    ranks = rng.permutation(np.resize([4, 8], 12))
    adapter = {"k": lora.LoRA(jnp.zeros((4, 64, 8)), jnp.zeros((4, 8, 64))), "head": jnp.zeros(650)}
    config = Config(clients=12, holdout_clients=0, seeds=(0,))
    shown = Problem(ranks)
    shown.adapters = jax.tree.map(lambda x: x[None], adapter)
    rows = Rows(config, shown, "flora", flora())
    got = [rows._bytes(0, np.asarray(i), {}) for i in ids]
    stack = [4 * 4 * 128 * int(ranks[i].sum()) for i in ids]
    missed = sum(sum(stack[max([s for s in range(t) if i in ids[s]], default=0) : t]) for t in range(6) for i in ids[t])
    assert sum(row["bytes_down"] for row in got) == missed + 24 * 4 * 650
    assert sum(row["bytes_down"] for row in got) + got[-1]["bytes_behind"] == 12 * sum(stack) + 36 * 4 * 650
