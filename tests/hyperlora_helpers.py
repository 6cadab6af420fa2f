"""Thetas and uploads for the tests of HyperLoRA, and how they look in NumPy."""

import functools

import jax
import numpy as np
from helpers import (
    ADAPTER,
    CLIENTS,
    SIGNATURE,
    array,
    cohort,
    copies,
    dense,
    host,
    is_float,
    jit,
    normalised,
    nudged,
    take,
)

from fedlora_jax import lora
from fedlora_jax.hyper import corrector, generator, synthesizer
from fedlora_jax.hyper.synthesizer import Uploads
from fedlora_jax.lora import LoRA
from fedlora_jax.methods.hyperlora import Theta, aggregated, hyperlora
from fedlora_jax.signatures import Signature

KERNELS = ["blocks/kernel", "mix/kernel"]
FORMS = ["mix", "bases"]
generate = jit(generator.generate, static_argnames="form")
everything = functools.partial(hyperlora, CLIENTS, SIGNATURE, form="mix", server="full", factors="balanced")
learner = functools.partial(everything, warmup=0)


@functools.partial(jit, static_argnames="factors")
def synthesize(theta, x, factors="balanced"):
    return aggregated(theta, x, factors)


def doubles(tree):
    """The tree in float64 where that is enabled."""
    return jax.tree.map(lambda x: array(np.asarray(x, float)) if is_float(x) else x, host(tree))


@functools.partial(jit, static_argnums=0)
def _init(form) -> Theta:
    keys = jax.random.split(jax.random.key(0), 3)
    return Theta(
        generator.init(keys[0], ADAPTER, SIGNATURE, form),
        synthesizer.init(keys[1], ADAPTER, SIGNATURE),
        corrector.init(keys[2], ADAPTER, SIGNATURE, own=False),
    )


def neutral(form="mix") -> Theta:
    return doubles(_init(form))


def learned(form="mix") -> Theta:
    """Parameters as if trained: nothing is zero."""
    theta = nudged(neutral(form), 3, 0.05)
    steps, gains = nudged(theta.synthesizer.steps, 4), nudged(theta.synthesizer.gains, 5)
    return theta._replace(synthesizer=theta.synthesizer._replace(steps=steps, gains=gains))


def center() -> Signature:
    return doubles(take(cohort(9).signatures, 0))


def uploads(seed=0, clients=CLIENTS) -> Uploads:
    """A round's uploads from clients around one adapter that is not zero anywhere."""
    c, previous = normalised(cohort(seed, clients)), nudged(doubles(ADAPTER), seed)
    received = nudged(copies(previous, clients), seed + 1)
    return Uploads(received, c.weights, c.signatures, previous)


def products(adapter) -> dict[str, np.ndarray]:
    return {name: product(lora.flatten(adapter)[name]) for name in KERNELS}


def product(x: LoRA) -> np.ndarray:
    return x.scale * dense(x)


def means(x: Uploads) -> dict[str, np.ndarray]:
    return {name: np.tensordot(np.float64(x.weights), m, 1) for name, m in products(x.received).items()}


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
