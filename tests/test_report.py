"""The report holds what the run found, stands alone, and survives missing values and hostile names."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from experiments import figures, report
from experiments.summary import paired, summarise

FIGURES = ("curves", "accuracies", "domains", "bias", "clients", "traffic", "holdings")
DOMAINS = ("ink", "chalk", "_neon $x$")
ABOUT = {"paper": "Zhang et al. 2023", "arxiv": "2305.05644", "trains": "a, b", "travels": "a, b", "exact": "no"}
SHARES = (0.4, 3e-7, 0.0, 0.05)


def make_rows(method, index, seeds, rounds=8, clients=10, unseen=True, every=1, domains=DOMAINS):
    rows = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)  # the same for every method: paired
        for r in range(1, rounds + 1):
            row = {"method": method, "seed": seed, "round": r, "clients": list(range(clients)), "loss": 1.0 / r,
                   "update": 0.3, "bias": 0.01, "bias_share": SHARES[index % 4] * rng.uniform(0.5, 1),
                   "factor_bias": 0.01, "bytes_up": 40_000 * clients, "bytes_down": 40_000 * clients * (1 + index)}  # fmt: skip
            if r % every == 0:
                accuracy = 0.8 - 0.6 * np.exp(-(2 + index) * r / rounds) + 0.02 * rng.normal() + 0.01 * index
                own = np.clip(accuracy + 0.15 * rng.normal(size=clients), 0, 1)
                tuned = np.clip(own + 0.1, 0, 1)
                final = r == rounds
                row |= {"global_accuracy": accuracy, "pooled_accuracy": accuracy, "personal_std": own.std()}
                row |= {"per_domain": {d: accuracy - 0.05 * j for j, d in enumerate(domains)}}
                for suffix, values in (("", own), ("_tuned", tuned)):
                    if suffix and r <= rounds - 5:
                        continue
                    row[f"personal_accuracy{suffix}"] = values.mean()
                    row[f"worst10_accuracy{suffix}"] = values.min()
                    row[f"unseen_accuracy{suffix}"] = values.mean() - 0.1 if unseen else None
                    if final:
                        row[f"client_accuracies{suffix}"] = [None, *values[1:].tolist()]
            rows.append(row)
    return rows


def make(names=("FedIT", "FLoRA"), seeds=3, classes=4, held=3, **options):
    """Summary, rows and holdings of a made-up run."""
    methods = {name.lower(): name for name in names}
    by_method = {key: make_rows(key, i, seeds, unseen=held > 0, **options) for i, key in enumerate(methods)}
    timings = {"seconds_per_round": 0.0512, "compile_seconds": None}
    entries = {
        key: {"about": {"name": methods[key], **ABOUT}, **summarise(rows, 0.7), **timings}
        for key, rows in by_method.items()
    }
    rows = [row for rows in by_method.values() for row in rows]
    clients, rounds = len(rows[0]["clients"]), max(row["round"] for row in rows)
    config = {"methods": list(methods), "data": "digits", "weights": "nano", "clients": clients,
              "clients_per_round": None, "holdout_clients": held, "partition": "domain_dirichlet:1.0", "rank": [4],
              "rounds": rounds, "local_steps": 5, "batch": 16, "optimizer": "sgd", "lr": 0.3,
              "seeds": list(range(seeds)), "target": 0.7, "eval_every": options.get("every", 1)}  # fmt: skip
    summary = {"schema": 1, "command": "compare", "config": config,
               "record": {"data_hash": "abc123", "weights": "nano", "adapted": ["blocks/attn/query/kernel"]},
               "versions": {"jax": "0.10.2"}, "device": "cpu (cpu), x86_64", "date": "2026-11-21",
               "methods": entries, "paired": paired(entries)}  # fmt: skip
    domains = list(rows[-1]["per_domain"])
    rng, total = np.random.default_rng(0), clients + held
    counts = rng.poisson(8 * rng.dirichlet(np.ones(classes), total))[:, None].repeat(len(domains), 1)
    counts *= (np.arange(total)[:, None] % len(domains) == np.arange(len(domains)))[:, :, None]
    counts[0] = 3  # one client with several domains
    holdings = {"counts": counts, "training": clients, "domains": domains,
                "classes": [f"class {c}" for c in range(classes)], "seed": 0}  # fmt: skip
    return summary, rows, holdings
