"""What a budget experiment says: its claims, and the terminal's table, from the entries of ``budget.json``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.results import summary

GROUPS = {"training_clients": "clients that train", "unseen_clients": "clients never seen"}


def served_at(entry: dict[str, Any], group: str) -> dict[str, Any]:
    """The accuracies of a group of clients after the number of local steps that validation chose."""
    return entry[group][str(entry["tau"])]


def claims(entries: list[dict[str, Any]], factor: int = 5) -> list[dict[str, Any]]:
    """What generates from signatures against the best baseline, the one that validation prefers at its budget, by seed.

    ``training``: ``E / factor`` local steps per round against the baseline's ``E``. ``sent``: the same, with the models
    of both used as sent, and the baseline that validation prefers so at the rate it chose. ``serving``: trained with
    the same ``E``, but used as sent, without any local step. ``needed`` is what the best baseline itself loses by the
    same saving: where it is not clearly above 0, the pair shows nothing.
    """
    baselines = [e for e in entries if not _is_learned(e)]
    budgets = {e["steps"] for e in baselines}
    best, sent = (
        {steps: max((e for e in baselines if e["steps"] == steps), key=prefer) for steps in budgets}
        for prefer in (_preference, _preference_as_sent)
    )
    out = []
    for e in filter(_is_learned, entries):
        steps, more = e["steps"], factor * e["steps"]
        for group in GROUPS:
            as_sent = lambda x, group=group: x[group]["0"]
            if {steps, more} <= budgets:
                pair = (served_at(x, group) for x in (e, best[more], best[steps]))
                out.append({"kind": "training", "baseline_steps": more, **_claim(e, best[more], group, *pair)})
                pair = map(as_sent, (e, sent[more], sent[steps]))
                out.append({"kind": "sent", "baseline_steps": more, **_claim(e, sent[more], group, *pair)})
            if steps in budgets:
                pair = (as_sent(e), served_at(best[steps], group), as_sent(best[steps]))
                out.append({"kind": "serving", "baseline_steps": steps, **_claim(e, best[steps], group, *pair)})
    return out


def _claim(e, baseline, group: str, own, other, less) -> dict[str, Any]:
    difference = lambda u, v: summary.spread([a - b for a, b in zip(u["seeds"], v["seeds"], strict=True)])
    return {
        "method": e["method"],
        "steps": e["steps"],
        "baseline": baseline["method"],
        "group": group,
        "difference": difference(own, other),
        "needed": difference(other, less),
        "passes": e["passes"],
        "baseline_passes": baseline["passes"],
    }


def _is_learned(entry: dict[str, Any]) -> bool:
    """Are clients served by what is generated from their signatures, within the method or beside its models?"""
    return entry["method"].startswith("hyperlora") or "+signature_" in entry["method"]


def _preference(entry: dict[str, Any]) -> float:
    return max(v["accuracy"] for v in entry["validation"])


def _preference_as_sent(entry: dict[str, Any]) -> float:
    return next(v["accuracy"] for v in entry["validation"] if (v["lr"], v["tau"]) == (entry["lr"], 0))


def to_target(entry: dict[str, Any], target: float) -> tuple[int, float] | None:
    """Rounds, and passes of a client, until models of training clients reach ``target`` as sent, mean over seeds."""
    mean = np.mean(entry["personal_by_round"], 0)
    reached = [r for r, accuracy in zip(entry["rounds"], mean, strict=True) if accuracy >= target]
    return (reached[0], reached[0] * entry["passes"]) if reached else None


def table(result: dict[str, Any]) -> str:
    """The terminal's: per cent, mean and half-width of the 95 % interval."""
    budgets = sorted({e["steps"] for e in result["entries"]})
    find = {(e["method"], e["steps"]): e for e in result["entries"]}
    names = list(dict.fromkeys(e["method"] for e in result["entries"]))
    target = result["config"]["target"]

    def part(title: str, read: Callable[[dict[str, Any]], str]) -> list[str]:
        cells = [[name, *(read(find[name, b]) if (name, b) in find else "-" for b in budgets)] for name in names]
        return [title, *summary.aligned([["local steps per round", *map(str, budgets)], *cells]), ""]

    lines = []
    for group, title in GROUPS.items():
        at = lambda e, group=group: f"{summary.percent(served_at(e, group))} @{e['tau']}"
        lines += part(f"{title}, after @ local steps (chosen on validation images)", at)
        lines += part(f"{title}, as sent", lambda e, group=group: summary.percent(e[group]["0"]))

    def reached(e: dict[str, Any]) -> str:
        found = to_target(e, target)
        return f"{found[0]} / {found[1]:g}" if found else "-"

    lines += part(f"rounds / passes of a client until personal models as sent reach {100 * target:g} %", reached)
    return "\n".join([*lines, *map(_sentence, result["claims"])]).rstrip()


def _sentence(c: dict[str, Any]) -> str:
    how = {"training": "", "sent": ", both used as sent", "serving": ", used as sent"}[c["kind"]]
    return (
        f"{c['method']} ({summary.counted(c['steps'], 'step')} per round{how}) against {c['baseline']} "
        f"({c['baseline_steps']}), {GROUPS[c['group']]}: "
        f"{summary.percent(c['difference'], signed=True)}; the baseline itself loses {summary.percent(c['needed'])}"
    )
