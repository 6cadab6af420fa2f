"""Federated LoRA fine-tuning as one XLA program. See README.md."""

from fedlora_jax import clients, diagnostics, lora, method, product, rounds, signatures
from fedlora_jax.lora import Dense, LoRA
from fedlora_jax.method import About, Cohort, Dispatch, Method, Traffic
from fedlora_jax.rounds import make_evaluate, make_round, make_step, scan_rounds

__version__ = "0.1.0"

__all__ = [
    "About",
    "Cohort",
    "Dense",
    "Dispatch",
    "LoRA",
    "Method",
    "Traffic",
    "clients",
    "diagnostics",
    "lora",
    "make_evaluate",
    "make_round",
    "make_step",
    "method",
    "product",
    "rounds",
    "scan_rounds",
    "signatures",
]
