"""The fixed works: one federated round each, in NumPy, so that every contender computes the same thing.

Weights, adapters and batches are drawn with a seed; names and layouts are those of ``models/vit.py`` (kernels
``[in, out]``, blocks stacked). The adapter is one of the middle of a run: b is small, not zero, so that every gradient
is alive. One round: every client takes ``steps`` SGD steps from the same adapter, the server takes the mean (FedIT).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]
ADAPTED = ("blocks/attn/query/kernel", "blocks/attn/value/kernel")


class Work(NamedTuple):
    """One round: sizes of the model, of its adapter, and of what clients do."""

    name: str
    width: int
    depth: int
    heads: int
    mlp: int
    patch: int
    side: int  # of the square images
    classes: int
    rank: int
    clients: int
    steps: int
    batch: int
    dtype: str = "float32"  # of the activations
    matmul: int = 2048  # side of the square product whose rate is a CPU's peak
    chunk: int | None = None  # clients at once where a run would take all and they do not fit
    lr: float = 0.1
    scale: float = 2.0

    @property
    def tokens(self) -> int:
        return 1 + (self.side // self.patch) ** 2

    @property
    def images(self) -> int:
        return self.clients * self.steps * self.batch


LONG = 8192  # side of a product that takes an accelerator much longer than to launch it

WORKS = {
    work.name: work
    for work in (
        Work("toy", 16, 2, 2, 32, 4, 8, 3, 2, 4, 2, 3, matmul=64),  # for tests
        Work("nano", 64, 4, 4, 128, 4, 16, 10, 4, 256, 10, 16),  # the built-in model on the built-in digits
        Work("tiny", 192, 12, 3, 768, 4, 32, 10, 8, 16, 5, 32),  # ViT-Ti on images like CIFAR's
        Work("tiny16", 192, 12, 3, 768, 4, 32, 10, 8, 16, 5, 32, "bfloat16"),  # the same in half the bits
        Work("learning", 192, 12, 3, 768, 4, 32, 10, 8, 32, 5, 8),  # ViT-Ti, more clients, smaller batches
        Work("photos", 192, 4, 3, 768, 32, 224, 10, 4, 8, 5, 16),  # four blocks of ViT-Ti/32, on a CPU
        Work("base", 768, 12, 12, 3072, 16, 224, 100, 16, 32, 4, 32, "bfloat16", LONG, 8),  # ViT-B/16, for a GPU
    )
}


def find(name: str) -> Work:
    if name not in WORKS:
        raise ValueError(f"unknown work {name!r}: expected one of {', '.join(WORKS)}")
    return WORKS[name]


def product_side(work: Work, cpu: bool) -> int:
    """Of the square product whose rate is the peak."""
    return work.matmul if cpu else max(work.matmul, LONG)


def weights(work: Work, seed: int = 0) -> Arrays:
    """The frozen model by slash-joined name, float32: kernels of variance 1 / in, everything else near its start."""
    d, m, layers = work.width, work.mlp, work.depth
    dense = {"blocks/mlp/fc1": (layers, d, m), "blocks/mlp/fc2": (layers, m, d), "head": (d, work.classes)}
    dense |= {f"blocks/attn/{name}": (layers, d, d) for name in ("query", "key", "value", "out")}
    dense["embed"] = (work.patch**2 * 3, d)
    rng = np.random.default_rng(seed)
    normal = lambda shape, spread: rng.normal(0, spread, shape).astype(np.float32)
    drawn = {}
    for name, shape in dense.items():
        drawn[f"{name}/kernel"] = normal(shape, shape[-2] ** -0.5)
        drawn[f"{name}/bias"] = normal((*shape[:-2], shape[-1]), 0.02)
    for name, shape in {"blocks/norm1": (layers, d), "blocks/norm2": (layers, d), "norm": (d,)}.items():
        drawn[f"{name}/scale"], drawn[f"{name}/bias"] = 1 + normal(shape, 0.02), normal(shape, 0.02)
    return drawn | {"cls": normal((1, d), 0.02), "pos": normal((work.tokens, d), 0.02)}


def adapter(work: Work, seed: int = 1) -> Arrays:
    """Factors ``NAME/a [layers, in, rank]``, ``NAME/b [layers, rank, out]``; differences of the head's parameters."""
    rng = np.random.default_rng(seed)
    drawn = {}
    for name in ADAPTED:
        a = rng.uniform(-1, 1, (work.depth, work.width, work.rank)) / work.width**0.5
        drawn |= {f"{name}/a": a, f"{name}/b": rng.normal(0, 0.01, (work.depth, work.rank, work.width))}
    drawn["head/kernel"] = rng.normal(0, 0.01, (work.width, work.classes))
    drawn["head/bias"] = rng.normal(0, 0.01, work.classes)
    return {name: x.astype(np.float32) for name, x in drawn.items()}


def batches(work: Work, seed: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Images ``[C, T, B, side, side, 3]`` uint8 and labels ``[C, T, B]``."""
    rng = np.random.default_rng(seed)
    lead = (work.clients, work.steps, work.batch)
    images = rng.integers(0, 256, (*lead, work.side, work.side, 3), np.uint8)
    return images, rng.integers(0, work.classes, lead, np.int32)


def flops(work: Work) -> int:
    """Of the matrix products of one round, by count; a multiplication with an addition is two.

    Forward: every product. Backward: what the gradient of adapter and head needs, so no gradient of frozen weights,
    nothing below the first block's values and queries (nor its keys), nothing of the embedding.
    """
    d, m, r, n, layers = work.width, work.mlp, work.rank, work.tokens, work.depth
    square, attention, factors = 2 * n * d * d, 2 * n * n * d, len(ADAPTED) * 2 * 2 * n * d * r
    mlp = 2 * 2 * n * d * m
    forward = layers * (4 * square + mlp + 2 * attention + factors) + 2 * (n - 1) * 3 * work.patch**2 * d
    backward = layers * (4 * square + mlp + 4 * attention + 2 * factors)
    unneeded = 3 * square + attention + factors // 2  # query, key, value of the first block; its keys; its x
    head = 3 * 2 * d * work.classes
    return work.images * (forward + backward - unneeded + head)


def squares(adapter: Arrays) -> float:
    """Sum of squares of all entries, in float64: the number by which contenders are compared."""
    return float(sum(np.square(x.astype(np.float64)).sum() for x in adapter.values()))


def moved(work: Work, trained: Arrays) -> float:
    """Sum of squares of what one round changed: stricter, it forgets what nobody touched."""
    start = adapter(work)
    return squares({name: x.astype(np.float64) - start[name] for name, x in trained.items()})
