"""What a run has spent of its clients' privacy: epsilon from the rows, and in words what it covers and what not."""

from __future__ import annotations

from typing import Any


def of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """``privacy`` of a method's entry in a summary, from its rows; nothing where its method keeps no account."""
    last = max(rows, key=lambda row: row["round"])
    if "noise_multiplier" not in last:
        return {}
    keys = ("epsilon", "delta", "noise_multiplier", "clipping", "round")
    return {"privacy": {key: last.get(key) for key in keys}}  # of every seed the same, but for the bound


def neighbours(config: dict[str, Any]) -> str:
    """Between which two populations what is told is nearly the same; how they are sampled."""
    n, drawn = config["clients"], config["clients_per_round"] or config["clients"]
    if drawn == n:
        return "one client of all more or less"
    if config.get("sampling") == "poisson":
        return f"one client more or less, who joins a round with probability {drawn / n:.3g}"
    return f"one client replaced, {drawn} of {n} drawn in a round"


def lines(summary: dict[str, Any]) -> list[str]:
    """What is said under tables, a line for each method that keeps an account."""
    said = []
    for entry in summary["methods"].values():
        if "privacy" not in entry:
            continue
        spent, about = entry["privacy"], entry["about"]
        limit = "no bound on epsilon" if spent["epsilon"] is None else f"epsilon {spent['epsilon']:.4g}"
        told = about["tells"]
        said.append(
            f"{about['name']} has {limit} at delta {spent['delta']:.3g} after {spent['round']} rounds, noise "
            f"multiplier {spent['noise_multiplier']:.4g} ({neighbours(summary['config'])}); covered: updates; not "
            + "covered: "
            + f"{told}, " * (told != "-")
            + "losses and accuracies of this record, and the server that adds up sees every update"
        )
    return said
