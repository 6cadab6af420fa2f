"""Federated LoRA fine-tuning as one XLA program. See README.md.

Methods and wrappers are functions of this module: ``fedlora_jax.proximal(fedlora_jax.fedit(), 0.1)``.
"""

from fedlora_jax import (
    accountant,
    attacks,
    audit,
    batches,
    clients,
    clustering,
    diagnostics,
    dropout,
    lora,
    meta,
    method,
    methods,
    partition,
    pool,
    product,
    rounds,
    signatures,
    task,
    training,
    wrappers,
)
from fedlora_jax.batches import Padded
from fedlora_jax.clients import Population, Sampling
from fedlora_jax.lora import Dense, LoRA
from fedlora_jax.method import About, Cohort, Dispatch, Method, Traffic
from fedlora_jax.methods.adf_lora import adf_lora
from fedlora_jax.methods.centralized import centralized
from fedlora_jax.methods.ditto import ditto
from fedlora_jax.methods.fdlora import fdlora
from fedlora_jax.methods.fed_hello import fed_hello
from fedlora_jax.methods.fed_sb import fed_sb
from fedlora_jax.methods.fed_talora import fed_talora
from fedlora_jax.methods.fedalt import fedalt
from fedlora_jax.methods.feddpa import feddpa
from fedlora_jax.methods.fedex_lora import fedex_lora
from fedlora_jax.methods.fedglomo import fedglomo
from fedlora_jax.methods.fedhl import fedhl
from fedlora_jax.methods.fedimpro import fedimpro
from fedlora_jax.methods.fedit import fedit
from fedlora_jax.methods.fedper import fedper
from fedlora_jax.methods.fedpgp import fedpgp
from fedlora_jax.methods.fedproto import fedproto
from fedlora_jax.methods.fedra import fedra
from fedlora_jax.methods.fedrep import fedrep
from fedlora_jax.methods.fedsa_lora import fedsa_lora
from fedlora_jax.methods.fedsvd import fedsvd
from fedlora_jax.methods.fedvlm import fedvlm
from fedlora_jax.methods.ffa_lora import ffa_lora
from fedlora_jax.methods.finetune import finetune
from fedlora_jax.methods.flexlora import flexlora
from fedlora_jax.methods.flora import flora
from fedlora_jax.methods.florist import florist
from fedlora_jax.methods.frozen import frozen
from fedlora_jax.methods.fslora import fslora
from fedlora_jax.methods.gossip import gossip
from fedlora_jax.methods.hetlora import hetlora
from fedlora_jax.methods.hilora import hilora
from fedlora_jax.methods.hyperlora import hyperlora
from fedlora_jax.methods.ifca import ifca
from fedlora_jax.methods.local_only import local_only
from fedlora_jax.methods.lora_a2 import lora_a2
from fedlora_jax.methods.lora_fair import lora_fair
from fedlora_jax.methods.mime import mime
from fedlora_jax.methods.per_fedavg import per_fedavg
from fedlora_jax.methods.pf2lora import pf2lora
from fedlora_jax.methods.pfedhn import pfedhn
from fedlora_jax.methods.pfedme import pfedme
from fedlora_jax.methods.rac_lora import rac_lora
from fedlora_jax.methods.ravan import ravan
from fedlora_jax.methods.rolora import rolora
from fedlora_jax.methods.sdflora import sdflora
from fedlora_jax.methods.spectral import spectral
from fedlora_jax.rounds import MetricFn, make_evaluate, make_round, make_step, scan_rounds
from fedlora_jax.signatures import Signature
from fedlora_jax.training import LossFn
from fedlora_jax.wrappers.dp_sgd import dp_sgd
from fedlora_jax.wrappers.fairness import afl, qffl
from fedlora_jax.wrappers.fedbc import fedbc
from fedlora_jax.wrappers.feddecorr import feddecorr
from fedlora_jax.wrappers.feddyn import feddyn
from fedlora_jax.wrappers.fedga import fedga
from fedlora_jax.wrappers.fedlc import fedlc
from fedlora_jax.wrappers.fedlesam import fedlesam
from fedlora_jax.wrappers.fednova import fednova
from fedlora_jax.wrappers.fedopt import fedadagrad, fedadam, fedavgm, fedyogi
from fedlora_jax.wrappers.moon import moon
from fedlora_jax.wrappers.over_the_air import over_the_air
from fedlora_jax.wrappers.privacy import clip, dp
from fedlora_jax.wrappers.proximal import proximal
from fedlora_jax.wrappers.robust import geometric_median, krum, median, norm_bound, trimmed_mean, trust
from fedlora_jax.wrappers.scaffold import scaffold
from fedlora_jax.wrappers.signature_adapter import signature_adapter
from fedlora_jax.wrappers.signature_bias import signature_bias

__version__ = "0.1.0"

__all__ = [
    "About",
    "Cohort",
    "Dense",
    "Dispatch",
    "LoRA",
    "LossFn",
    "Method",
    "MetricFn",
    "Padded",
    "Population",
    "Sampling",
    "Signature",
    "Traffic",
    "accountant",
    "adf_lora",
    "afl",
    "attacks",
    "audit",
    "batches",
    "centralized",
    "clients",
    "clip",
    "clustering",
    "diagnostics",
    "ditto",
    "dp",
    "dp_sgd",
    "dropout",
    "fdlora",
    "fed_hello",
    "fed_sb",
    "fed_talora",
    "fedadagrad",
    "fedadam",
    "fedalt",
    "fedavgm",
    "fedbc",
    "feddecorr",
    "feddpa",
    "feddyn",
    "fedex_lora",
    "fedga",
    "fedglomo",
    "fedhl",
    "fedimpro",
    "fedit",
    "fedlc",
    "fedlesam",
    "fednova",
    "fedper",
    "fedpgp",
    "fedproto",
    "fedra",
    "fedrep",
    "fedsa_lora",
    "fedsvd",
    "fedvlm",
    "fedyogi",
    "ffa_lora",
    "finetune",
    "flexlora",
    "flora",
    "florist",
    "frozen",
    "fslora",
    "geometric_median",
    "gossip",
    "hetlora",
    "hilora",
    "hyperlora",
    "ifca",
    "krum",
    "local_only",
    "lora",
    "lora_a2",
    "lora_fair",
    "make_evaluate",
    "make_round",
    "make_step",
    "median",
    "meta",
    "method",
    "methods",
    "mime",
    "moon",
    "norm_bound",
    "over_the_air",
    "partition",
    "per_fedavg",
    "pf2lora",
    "pfedhn",
    "pfedme",
    "pool",
    "product",
    "proximal",
    "qffl",
    "rac_lora",
    "ravan",
    "rolora",
    "rounds",
    "scaffold",
    "scan_rounds",
    "sdflora",
    "signature_adapter",
    "signature_bias",
    "signatures",
    "spectral",
    "task",
    "training",
    "trimmed_mean",
    "trust",
    "wrappers",
]
