"""What a run has spent of privacy: epsilon from the rows, and in words what it covers and what not.

``privacy`` is of clients (``dp``), ``privacy_of_examples`` of each client's examples (``dp_sgd``).
"""

from __future__ import annotations

from typing import Any


def of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """``privacy`` and ``privacy_of_examples`` of a method's entry in a summary, from its rows; nothing where its method
    keeps no account."""
    end = max(row["round"] for row in rows)
    ends = [row for row in rows if row["round"] == end]
    found: dict[str, Any] = {}
    if "noise_multiplier" in ends[0]:
        keys = ("epsilon", "delta", "noise_multiplier", "clipping", "round")
        found["privacy"] = {key: ends[0].get(key) for key in keys}  # of every seed the same, but for the bound
    if "example_noise" in ends[0]:
        most = lambda key: max(row[key] for row in ends) if None not in [row[key] for row in ends] else None
        found["privacy_of_examples"] = {
            "epsilon": most("example_epsilon"),
            "epsilon_median": most("example_epsilon_median"),
            **{key: ends[0]["example_" + key] for key in ("delta", "noise", "clipping")},
            "round": end,
        }
    return found


def neighbours(config: dict[str, Any]) -> str:
    """Between which two populations what is told is nearly the same; how they are sampled."""
    n, drawn = config["clients"], config["clients_per_round"] or config["clients"]
    if drawn == n:
        return "one client of all more or less"
    if config.get("sampling") == "poisson":
        return f"one client more or less, who joins a round with probability {drawn / n:.3g}"
    return f"one client replaced, {drawn} of {n} drawn in a round"


def lines(summary: dict[str, Any]) -> list[str]:
    """What is said under tables, a line for each method and account that it keeps."""
    config, said = summary["config"], []
    for entry in summary["methods"].values():
        about = entry["about"]
        if "privacy" in entry:
            said.append(f"{about['name']} has {_of_clients(entry['privacy'], about['tells'], config)}")
        if "privacy_of_examples" in entry:
            said.append(f"{about['name']} has {_of_examples(entry['privacy_of_examples'], about['tells'], config)}")
    return said


def _of_clients(spent: dict[str, Any], told: str, config: dict[str, Any]) -> str:
    return (
        f"{_limit(spent['epsilon'])} at delta {spent['delta']:.3g} after {spent['round']} rounds, noise multiplier "
        f"{spent['noise_multiplier']:.4g} ({neighbours(config)}); covered: updates; not covered: "
        + f"{told}, " * (told != "-")
        + "losses and accuracies of this record, and the server that adds up sees every update"
    )


def _of_examples(spent: dict[str, Any], told: str, config: dict[str, Any]) -> str:
    head = "mean features of classes in the head that all start from, " * (config.get("head") == "prototype")
    return (
        f"{_limit(spent['epsilon'])} of examples of the client that spent most, {_limit(spent['epsilon_median'])} of "
        f"the one in the middle, at delta {spent['delta']:.3g} after {spent['round']} rounds, noise multiplier "
        f"{spent['noise']:.4g} (one example of a client counted or not); covered: all that clients send of what they "
        "trained; not covered: "
        + f"{told}, " * (told != "-")
        + head
        + "how many examples a client has, losses and accuracies of this record"
    )


def _limit(epsilon: float | None) -> str:
    return "no bound on epsilon" if epsilon is None else f"epsilon {epsilon:.4g}"
