"""Shares of variance against drawn ones whose shares are known; draws needed against published tables."""

import numpy as np
import pytest

from experiments.results.variance import MANY, components, draws_needed, lines, of_run, with_draws

SPREADS = {"partition": 2.0, "crossed": 1.5, "seed": 0.7, "rest": 0.5}


def drawn(methods: int, partitions: np.ndarray) -> np.ndarray:
    """``[methods, seeds]`` with the components of ``SPREADS``, around means far apart."""
    rng, seeds, count = np.random.default_rng(0), len(partitions), partitions.max() + 1
    shared = rng.normal(0, SPREADS["partition"], count) + rng.normal(0, SPREADS["crossed"], (methods, count))
    training = rng.normal(0, SPREADS["seed"], seeds) + rng.normal(0, SPREADS["rest"], (methods, seeds))
    return 10.0 * np.arange(methods)[:, None] + shared[:, partitions] + training


def test_shares_are_those_that_were_drawn():
    """Of many partitions with one to five seeds each, so that a share is off by a few hundredths."""
    partitions = np.repeat(np.arange(5000), np.resize([1, 3, 5], 5000))
    found = components(drawn(5, partitions), partitions)
    squares = {name: x**2 for name, x in SPREADS.items()}
    total = sum(squares.values())
    expected = squares["partition"], squares["crossed"], squares["seed"] + squares["rest"]
    np.testing.assert_allclose(list(found.values()), np.array(expected) / total, atol=0.02)


def test_of_partitions_with_one_seed_each_training_is_a_part_and_of_one_partition_all_there_is():
    alone = np.arange(20_000)
    found = components(drawn(5, alone), alone)
    squares = {name: x**2 for name, x in SPREADS.items()}
    shared = (squares["partition"] + squares["seed"]) / sum(squares.values())
    np.testing.assert_allclose([found["shared"], found["method"]], [shared, 1 - shared], atol=0.02)
    assert found["training"] is None
    assert components(drawn(3, alone[:9] * 0), alone[:9] * 0) == {"shared": None, "method": None, "training": 1.0}


def test_of_two_methods_what_is_not_shared_is_half_the_variance_of_their_difference():
    values = np.random.default_rng(1).normal(size=(2, 7)) + 3 * np.random.default_rng(2).normal(size=7)
    found = components(values, np.arange(7))
    apart = np.var(values[0] - values[1], ddof=1) / 2
    np.testing.assert_allclose(found["method"] / found["shared"], apart / np.cov(values)[0, 1])
    assert components(np.ones((2, 3)), np.arange(3)) == {"shared": None, "method": None, "training": None}


@pytest.mark.parametrize(("effect", "pairs"), [(0.2, 199), (0.5, 34), (0.8, 15)])
def test_draws_are_those_of_published_tables(effect, pairs):
    """Of a paired t-test at 5 %, two-sided, power 0.8 (Faul et al., G*Power 3, 2007)."""
    assert draws_needed(effect + np.array([-1, 1]) / 2**0.5) == pairs
    assert draws_needed(-effect + np.array([-1, 1]) / 2**0.5) == pairs


def test_no_number_of_draws_tells_nothing_and_two_tell_what_never_varies():
    assert draws_needed([1.0, -1.0]) is None
    assert draws_needed([0.05 - 2.0, 0.05 + 2.0]) is None, MANY
    assert (draws_needed([0.1, 0.1]), draws_needed([0.0, 0.0])) == (2, None)


def test_a_draw_is_a_partition_not_a_seed():
    """Four partitions with two seeds each, or fewer, or one that all seeds have; said in words."""
    seeds = {"fedit": [0.5, 0.5, 0.7, 0.8, 0.6, 0.6, 0.7, 0.7], "better": [0.6, 0.7, 0.7, 0.9, 0.6, 0.7, 0.8, 0.9]}
    of = lambda own: {"last5": {"seeds": own}}
    entries = {n: {"global_accuracy": of(own), "personal_accuracy": of([None] * 8)} for n, own in seeds.items()}
    apart = (np.array(seeds["better"]) - seeds["fedit"]).tolist()
    found = with_draws({"better": {"seeds": apart}, "same": {"seeds": [0.0] * 8}}, np.repeat([7, 8, 9, 5], 2))
    run = lambda dealt: {"methods": entries, "paired": with_draws({"better": {"seeds": apart}}, dealt),
                         "variance": of_run(entries, dealt)}  # fmt: skip
    several = run(np.repeat([7, 8, 9, 5], 2))
    assert list(several["variance"]) == ["global_accuracy"]
    expected = draws_needed(np.mean(np.reshape(apart, (4, 2)), 1).tolist())
    assert (found["better"]["draws"], found["better"]["draws_needed"]) == (4, expected)
    first, last = lines(several)
    assert "of global accuracy" in first
    assert "training" in first
    assert "guessed from 4" in last
    assert last.endswith(f"better {expected}")
    assert lines({**several, "paired": found})[-1].endswith("same none, there is no difference")
    few, one = run(np.repeat([7, 8], 4)), run([7] * 8)
    assert few["paired"]["better"]["draws_needed"] is one["paired"]["better"]["draws_needed"] is None
    assert lines(few)[-1].startswith("2 draws of clients are too few")
    assert lines(one)[-1] == "all seeds share their clients: what another draw of them would change is not known"
    assert "training is part of both" in lines(run(range(8)))[0]
    unknown = with_draws({"better": {"seeds": [None, *apart[1:]]}}, range(8))
    assert len(lines({**run(range(8)), "paired": unknown})) == 1
    alone = {"fedit": entries["fedit"]}
    assert lines({"methods": alone, "paired": {}, "variance": of_run(alone, range(8))}) == []
