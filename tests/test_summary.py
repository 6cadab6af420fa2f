"""The summary's statistics against SciPy, and its rules: last and last five, paired by seed, never a best round."""

import re

import numpy as np
import pytest
from scipy import stats

from experiments.results.metrics import worst_tenth
from experiments.results.summary import columns, meaning, paired, spread, summarise, window


def rows(method: str = "fedit", shift: float = 0.0, seeds: int = 4, rounds: int = 8) -> list[dict]:
    rng = np.random.default_rng(0)
    out = []
    for seed in range(seeds):
        for r in range(1, rounds + 1):
            accuracy = 0.1 * r + 0.01 * rng.normal() + shift
            out.append(
                {"method": method, "seed": seed, "round": r, "clients": [0, 1], "bias": 0.5, "bias_share": 0.1,
                 "bytes_up": 200, "bytes_down": 300, "bytes_behind": 70, "global_accuracy": accuracy,
                 "pooled_accuracy": accuracy, "per_domain": {"a": accuracy}, "personal_accuracy": accuracy,
                 "worst10_accuracy": 0.0, "unseen_accuracy": None}
            )  # fmt: skip
    return out


def test_intervals_are_t_intervals():
    values = [0.7, 0.8, 0.75, 0.71]
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    np.testing.assert_allclose(spread(values)["ci95"], [low, high])
    assert spread([0.5])["ci95"] is None
    assert spread([0.5, None]) == {"mean": None, "std": None, "ci95": None, "seeds": [0.5, None]}


def test_last_round_and_mean_of_the_last_five():
    data = rows()
    entry = summarise(data, target=0.45)
    own = [r["global_accuracy"] for r in data if r["seed"] == 0]
    assert entry["global_accuracy"]["last"]["seeds"][0] == own[-1]
    np.testing.assert_allclose(entry["global_accuracy"]["last5"]["seeds"][0], np.mean(own[-5:]))
    assert entry["rounds_to_target"]["seeds"] == [
        next(r["round"] for r in data if r["seed"] == s and r["global_accuracy"] >= 0.45) for s in range(4)
    ]
    assert entry["unseen_accuracy"]["last"]["mean"] is None
    assert entry["bytes_up"] == {"per_client_round": 100, "total": 1600}
    assert entry["bytes_down"] == {"per_client_round": 150, "total": 2400, "to_all": 2470}
    assert summarise(data, target=0.99)["rounds_to_target"]["mean"] is None


@pytest.mark.parametrize(
    ("every", "rounds", "said"),
    [(1, 10, "the last five rounds"), (1, 2, "the last two rounds"), (3, 9, "rounds 6 and 9"),
     (10, 10, "the last round"), (2, 10, "rounds 6, 8 and 10"), (5, 10, "the last round"), (4, 8, "rounds 4 and 8")],
)  # fmt: skip
def test_the_rounds_that_are_named_are_those_that_count(every, rounds, said):
    assert window({"eval_every": every, "rounds": rounds}) == said
    data = [r if r["round"] % every == 0 else {k: x for k, x in r.items() if "accuracy" not in k and k != "per_domain"}
            for r in rows(rounds=rounds)]  # fmt: skip
    named = [int(n) for n in re.findall(r"\d+", said)]
    named = named or list(range(rounds + 1 - {"five": 5, "two": 2, "round": 1}[said.split()[2]], rounds + 1))
    own = [r["global_accuracy"] for r in data if r["seed"] == 0 and r["round"] in named]
    np.testing.assert_allclose(summarise(data, 0.5)["global_accuracy"]["last5"]["seeds"][0], np.mean(own))


def test_the_mean_of_the_worst_tenth_stands_beside_the_10th_percentile_and_is_no_higher():
    """Of 12 clients two are counted, the tenth rounded up."""
    own = np.array([0.3, 0.9, 0.1, *[0.8] * 9])
    np.testing.assert_allclose(worst_tenth(own), 0.2)
    assert (columns()["worst10_accuracy"], columns()["p10_accuracy"]) == ("worst 10%", "p10")
    said = meaning({"eval_every": 1, "rounds": 9, "seeds": [0]})
    assert "worst 10%: mean over the lowest tenth of clients, rounded up" in said
    assert "p10: the 10th percentile" in said
    for n in range(1, 40):
        own = np.random.default_rng(n).uniform(size=n)
        assert worst_tenth(own) <= np.percentile(own, 10) + 1e-12


def test_differences_are_paired_by_seed():
    entries = {name: summarise(rows(name, shift), 0.5) for name, shift in (("fedit", 0.0), ("better", 0.05))}
    result = paired(entries)["better"]
    np.testing.assert_allclose(result["seeds"], 0.05)  # the noise is shared, so it cancels
    np.testing.assert_allclose(result["ci95"], [0.05, 0.05])
    assert result["baseline"] == "fedit"
