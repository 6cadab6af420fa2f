"""Everything a run needs before its first round, for all seeds: model, clients, adapters. No federated logic."""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments.config import Config
from experiments.setup import data, descriptions, memory
from experiments.setup.data import Images
from fedlora_jax import lora, partition
from fedlora_jax.clients import Population, padded
from fedlora_jax.lora import Adapter, Params
from fedlora_jax.signatures import Signature
from models import vit
from models.pretrained import Pretrained, load_vit
from models.vit import normalise

FORWARD = 256  # images that a frozen model sees at once
STEM = "stem"  # the name under which a base holds the blocks that come before the adapted ones
KEPT = 0.25  # of the memory there is, at most, for what the stem makes of all images
NANO = Path(__file__).parents[1] / "data" / "nano_glyphs.npz"


class Clients(NamedTuple):
    """All clients, the training ones first, then the unseen ones (in ``Problem`` with a leading axis of seeds)."""

    population: Population  # [N + K]
    test_rows: Array  # [N + K, m] rows of each client's test images, padded at the end
    test_counts: Array  # [N + K] how many of them are the client's

    def training(self, count: int) -> Population:
        return jax.tree.map(lambda x: x[:count], self.population)


class Arrays(NamedTuple):
    """What the programs read; arguments, so that no image becomes a constant of a program."""

    base: Any
    train: tuple[Array, Array]
    test: tuple[Array, Array]


class Seed(NamedTuple):
    """What a run of one seed starts from (of ``Problem.everyone`` with a leading axis of seeds)."""

    clients: Clients
    adapter: Adapter
    key: Array


class Problem(NamedTuple):
    """A data set on a model, split over clients for each seed."""

    images: Images
    pretrained: Pretrained
    base: Params
    train: tuple[Array, Array]  # x [n, H, W, 3] uint8 (or tokens [n, ...], where the model begins later), y [n]
    test: tuple[Array, Array, Array]  # x, y, domain
    clients: Clients  # every array with a leading axis of seeds
    adapters: Adapter  # [seeds, ...]
    keys: Array  # [seeds]
    signature: Signature  # the shapes of one client's
    smallest: int  # training images of the smallest client over all seeds
    loss_fn: Callable
    correct_fn: Callable  # (base, adapter, (x, y)) -> 1 where the prediction is right, [n]
    record: dict[str, Any]  # what identifies it, for config.json

    def arrays(self) -> Arrays:
        return Arrays(self.base, self.train, self.test[:2])

    def everyone(self) -> Seed:
        return Seed(self.clients, self.adapters, self.keys)


def build(
    config: Config,
    accept: Callable[[Signature, Adapter], None] = lambda signature, adapter: None,
    pretrained: Pretrained | None = None,
) -> Problem:
    """Load, split and describe the data.

    Args:
      config: the options.
      accept: is shown the shapes of one client's signature and of one adapter while nothing has compiled yet; it may
        raise ValueError.
      pretrained: the model, where it has been loaded before.
    """
    # Everything that can be refused is looked at on the host first; only then does anything compile.
    images = data.load(config.data)
    if config.validation:
        images = data.validation(images, config.validation)
    side = config.image_size or _side(images)
    _check_room_for_images(config, images, side)
    pretrained = pretrained or load_weights(config, images.classes, side)
    _check_room_for_activations(pretrained, len(images.x), side)
    blocks = config.adapt_last or pretrained.model.depth
    stem, top = (None, pretrained) if blocks == pretrained.model.depth else split_blocks(pretrained, blocks)
    new = partial(
        lora.new, params=top.params, rank=max(config.rank), targets=config.targets, full=config.full, scale=config.scale
    )
    shapes = jax.eval_shape(new, jax.eval_shape(jax.random.key, 0))
    accept(descriptions.shapes_of_one(config.signature, len(images.classes)), shapes)
    train_rows, test_rows = np.flatnonzero(~images.test), np.flatnonzero(images.test)
    made = [_clients(config, images, train_rows, test_rows, seed) for seed in config.seeds]

    images, base = data.resized(images, side), top.params
    shown = images.x
    if stem is not None and is_stored(config, stem, images):
        stem, shown = None, _applied(stem, images.x)
    elif stem is not None:
        base = {**base, STEM: stem.params}
    base = jax.device_put(base)
    loss_fn, correct_fn = objectives(top, stem)
    features = frozen_features(pretrained, images.x[train_rows])
    stacked = _stack(config, made, features, images.y[train_rows], len(images.classes))
    keys = jax.vmap(jax.random.key)(jnp.asarray(config.seeds))
    partition_hash = lambda parts, tests: hashlib.sha256(b"".join(own.tobytes() for own in (*parts, *tests)))
    return Problem(
        images=images,
        pretrained=pretrained,
        base=base,
        train=(jnp.asarray(shown[train_rows]), jnp.asarray(images.y[train_rows])),
        test=tuple(jnp.asarray(a[test_rows]) for a in (shown, images.y, images.domain)),  # type: ignore[arg-type]
        clients=stacked,
        adapters=jax.vmap(new)(keys),
        keys=keys,
        signature=descriptions.shapes_of_one(config.signature, len(images.classes)),
        smallest=min(len(part) for parts, _, _ in made for part in parts),
        loss_fn=loss_fn,
        correct_fn=correct_fn,
        record={
            "data_hash": images.fingerprint(),
            "weights": pretrained.name,
            "weights_hash": _hash_tree(pretrained.params),
            **pretrained.facts(),
            "partition_hash": [partition_hash(parts, tests).hexdigest()[:16] for parts, tests, _ in made],  # by seed
            "largest": int(stacked.population.rows.shape[-1]),  # images of a client of any seed: draws depend on it
            "adapted": sorted(lora.adapted(top.params, config.targets)),
            "trained_in_full": sorted(lora.select(top.params, config.full)),
        },
    )


def load_weights(config: Config, classes: Sequence[str], side: int | None) -> Pretrained:
    """The model of ``--weights``; of all but the built-in one, stderr says what is used beside the arrays."""
    built_in = config.weights == "nano"
    options = {name: getattr(config, name) for name in ("mean", "std", "heads", "epsilon", "keep_head")}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pretrained = load_vit(NANO if built_in else config.weights, classes, side, **options)
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    if not built_in:
        facts = "; ".join(f"{fact} {value}" for fact, value in pretrained.facts().items())
        print(f"weights {pretrained.name}: {facts}", file=sys.stderr)
    return pretrained


def of_seeds(problem: Problem, start: int, stop: int) -> Problem:
    """What some of the seeds begin with; how they draw stays that of all."""
    part = jax.tree.map(lambda x: x[start:stop], (problem.clients, problem.adapters, problem.keys))
    return problem._replace(clients=part[0], adapters=part[1], keys=part[2])


def _check_room_for_images(config: Config, images: Images, side: int) -> None:
    """Refuse a size, or draws, that memory cannot hold."""
    size = len(images.x) * side * side * 3
    memory.refuse_more_than_there_is(
        size if images.x.shape[1:3] == (side, side) else 2 * size,  # on the device, and resized ones on the host too
        f"{len(images.x)} images of {side} x {side}",
        "use a smaller --image-size or fewer images",
    )
    memory.refuse_draws(_image(side), config.clients_per_round or config.clients, config.local_steps, config.batch)


def _check_room_for_activations(pretrained: Pretrained, count: int, side: int) -> None:
    """Refuse a model whose largest array, of ``count`` images at most, memory cannot hold."""
    image = _image(side)
    batch = jax.ShapeDtypeStruct((min(FORWARD, count), *image.shape), image.dtype)
    memory.refuse_more_than_there_is(
        memory.largest(partial(_forward, pretrained), pretrained.params, batch),
        f"{pretrained.name} on {batch.shape[0]} images of {side} x {side} makes an array that would",
        "use a smaller --image-size or model",
    )


def _image(side: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((side, side, 3), jnp.uint8)


def is_stored(config: Config, stem: Pretrained, images: Images) -> bool:
    """Is what the stem makes of all images computed once and kept?"""
    if config.prefix != "auto":
        return config.prefix == "stored"
    apply = lambda x: stem.model.apply({"params": stem.params}, x)[0]
    tokens = jax.eval_shape(apply, jax.ShapeDtypeStruct(images.x.shape, jnp.float32))
    have = memory.available()
    return have is None or tokens.size * tokens.dtype.itemsize <= KEPT * have


def objectives(pretrained: Pretrained, stem: Pretrained | None = None) -> tuple[Callable, Callable]:
    """Cross-entropy of a batch, and which predictions are right, for images as uint8 (or tokens of a stem).

    Args:
      pretrained: the model that is trained.
      stem: what comes before it and is computed anew each time; its parameters are ``base[STEM]``.
    """
    # Unrolled blocks are faster to differentiate, and only that; a loop over blocks compiles faster.
    unrolled, looped = pretrained.model.clone(unroll=True), pretrained.model.clone(unroll=False)

    def logits(model: vit.ViT, base: Params, adapter: Adapter, x: Array) -> Array:
        if stem is not None:
            base, before = {name: x for name, x in base.items() if name != STEM}, base[STEM]
            x = stem.model.apply({"params": before}, inputs(stem, x))[0]  # type: ignore[assignment, index]
        return model.apply(lora.variables(base, adapter), inputs(pretrained, x))[0]  # type: ignore[index]

    def loss_fn(base, adapter, batch, key):
        x, y = batch
        return optax.softmax_cross_entropy_with_integer_labels(logits(unrolled, base, adapter, x), y).mean()

    def correct_fn(base, adapter, examples):
        one = lambda xy: (logits(looped, base, adapter, xy[0][None])[0].argmax(-1) == xy[1]).astype(jnp.float32)
        return jax.lax.map(one, examples, batch_size=256)  # bounds memory whatever the number of examples

    return loss_fn, correct_fn


def own_accuracy(correct: Array, counts: Array) -> Array:
    """Share of right answers ``[C]`` on each client's own test images, of ``correct [C, m]`` the first ``counts``.

    nan for a client without test images.
    """
    return jnp.sum(correct * (jnp.arange(correct.shape[1]) < counts[:, None]), 1) / counts


def domain_accuracies(problem: Problem, correct: np.ndarray) -> dict[str, float]:
    """Share of right answers in each domain, of ``correct [n_test]``."""
    domain = np.asarray(problem.test[2])
    return {name: float(np.mean(correct[domain == j])) for j, name in enumerate(problem.images.domains)}


def make_optimizer(config: Config, lr: float | Array | None = None) -> optax.GradientTransformation:
    """The local optimizer, at the configured learning rate or at another (which may be traced)."""
    makers = {
        "sgd": optax.sgd,
        "momentum": lambda lr: optax.sgd(lr, momentum=0.9),
        "adam": optax.adam,
        "adamw": optax.adamw,
    }
    return makers[config.optimizer](config.lr if lr is None else lr)


def _side(images: Images) -> int:
    height, width = images.x.shape[1:3]
    if height != width:
        raise ValueError(f"{images.name} has images of {height} x {width}: use --image-size to make them square")
    return height


def frozen_features(pretrained: Pretrained, x: np.ndarray) -> np.ndarray:
    """What the frozen model makes of images, ``[n, width]``."""
    return _applied(pretrained, x, lambda out: out[1]["features"])


def _applied(pretrained: Pretrained, x: np.ndarray, read: Callable = lambda out: out[0]) -> np.ndarray:
    """A model's output for all images, in batches of one size (so one compilation: the last one starts earlier)."""
    params = jax.device_put(pretrained.params)
    apply = jax.jit(lambda params, x: read(_forward(pretrained, params, x)))
    size = min(FORWARD, len(x))
    starts = [min(i, len(x) - size) for i in range(0, len(x), size)]
    parts = {i: np.asarray(apply(params, x[i : i + size])) for i in starts}
    out = np.zeros((len(x), *parts[0].shape[1:]), np.float32)
    for i, part in parts.items():
        out[i : i + size] = part
    return out


def _forward(pretrained: Pretrained, params: Params, x: Any) -> Any:
    return pretrained.model.apply({"params": params}, inputs(pretrained, x))


def inputs(pretrained: Pretrained, x: Any) -> Array:
    """What a model reads, of images as uint8 (or of tokens of a stem, which pass)."""
    return x if pretrained.model.part == "top" else normalise(x, pretrained.mean, pretrained.std)


def split_blocks(pretrained: Pretrained, top: int) -> tuple[Pretrained, Pretrained]:
    """The blocks before the last ``top``, and the rest: a model each."""
    (first, before), (last, rest) = vit.split_blocks(pretrained.model, pretrained.params, top)
    return pretrained._replace(model=first, params=before), pretrained._replace(model=last, params=rest)


def _clients(config: Config, images: Images, train: np.ndarray, test: np.ndarray, seed: int):
    """Rows (of the training and of the test images) and rank of every client of one seed."""
    rng = np.random.default_rng([seed, 1])
    total = config.clients + config.holdout_clients
    domains = images.domain[train] if images.has_domains else None
    groups = None if images.superclass is None else images.superclass[images.y[train]]
    parts = partition.split(config.partition, images.y[train], domains, total, rng, config.minimum, groups)
    cell = images.domain * len(images.classes) + images.y
    tests = partition.matching_tests(parts, cell[train], cell[test], rng)
    if config.test_images is not None:
        tests = [np.sort(rng.permutation(own)[: config.test_images]) for own in tests]
    ranks = rng.permutation(np.resize(config.rank, total))
    return parts, tests, ranks


def _stack(config: Config, made: list, features: np.ndarray, labels: np.ndarray, classes: int) -> Clients:
    """Pad every client of every seed to a common size, and describe each by its signature."""
    widest_test = max(1, *(len(own) for _, tests, _ in made for own in tests))
    rows = _widened([padded(parts) for parts, _, _ in made])
    sizes = np.array([[len(part) for part in parts] for parts, _, _ in made])
    tests = np.stack([_padded(own, widest_test) for _, own, _ in made])
    counts = np.array([[len(own) for own in tests] for _, tests, _ in made])
    ranks = np.stack([ranks for _, _, ranks in made])
    of_data = partial(descriptions.of_clients, jnp.asarray(features), jnp.asarray(labels))
    describe = lambda rows, sizes, key: of_data(rows, sizes, key, config.clients, classes, config.signature)
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 1))(jnp.asarray(config.seeds))
    signatures = jax.vmap(describe)(rows, sizes, keys)
    alike = jnp.ones(sizes.shape) if config.weights_of_clients == "uniform" else ()
    population = Population(jnp.asarray(rows), jnp.asarray(sizes), jnp.asarray(ranks), signatures, alike)
    return Clients(population, jnp.asarray(tests), jnp.asarray(counts))


def _widened(rows: list[np.ndarray]) -> np.ndarray:
    """Every seed's clients at the width of the widest; what is added is padding like the rest."""
    widest = max(part.shape[1] for part in rows)
    return np.stack([np.pad(part, ((0, 0), (0, widest - part.shape[1])), mode="edge") for part in rows])


def _padded(parts: list[np.ndarray], width: int) -> np.ndarray:
    return np.stack([np.concatenate([part, np.zeros(width - len(part), int)]) for part in parts]).astype(np.int32)


def _hash_tree(tree: Any) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]
