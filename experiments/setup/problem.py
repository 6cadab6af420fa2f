"""Everything a run needs before its first round, for all seeds: model, clients, adapters. No federated logic."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments import attack
from experiments.config import Config
from experiments.setup import (
    adapter,
    data,
    descriptions,
    head,
    local_training,
    memory,
    on_disk,
    user_code,
)
from experiments.setup import backbone as backbones
from experiments.setup.caches import caches
from experiments.setup.data import Images
from experiments.setup.dealing import dealt, partition_hash
from experiments.setup.decoding import FOLDER
from experiments.setup.on_disk import taken
from experiments.setup.task import STEM, TASKS, objectives
from fedlora_jax import lora
from fedlora_jax.attacks import Attack
from fedlora_jax.clients import Population, padded
from fedlora_jax.lora import Adapter, Params
from fedlora_jax.signatures import Signature
from models.backbone import Backbone, Stem

LONG = 5e10  # images trained on, each times the parameters it meets: a guess, seven times the main job


class Clients(NamedTuple):
    """All clients, the training ones first, then the unseen ones (in ``Problem`` with a leading axis of seeds)."""

    population: Population  # [N + K]
    test_rows: Array  # [N + K, m] rows of each client's test images, padded at the end
    test_counts: Array  # [N + K] how many of them are the client's
    scored: Any = ()  # [E] numbers of those that are scored, the training ones first; (): all, in their order

    def who(self, places: Array) -> Array:
        """Numbers of the clients at some places among those of one seed that are scored."""
        return places if isinstance(self.scored, tuple) else self.scored[places]

    def all_scored(self) -> np.ndarray:
        """``[seeds, E]`` who is scored, on the host."""
        shape = self.test_counts.shape
        return (
            np.broadcast_to(np.arange(shape[1]), shape) if isinstance(self.scored, tuple) else np.asarray(self.scored)
        )

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
    backbone: Backbone
    base: Params
    train: tuple[Any, Any]  # x [n, H, W, 3] uint8 (or tokens [n, ...], where the model begins later), y [n]: on the
    #   device; where images are staged, on the host or on disk
    test: tuple[Any, Any, Any]  # x, y, domain; those of novel classes behind all others
    clients: Clients  # every array with a leading axis of seeds
    adapters: Adapter  # [seeds, ...]
    keys: Array  # [seeds]
    signature: Signature  # the shapes of one client's
    smallest: int  # training images of the smallest client over all seeds
    fewest: tuple[int, ...]  # of each seed, training images of the smallest client that trains
    longest: int | None  # local steps of the client that takes the most; None: all take those of the options
    loss_fn: Callable
    correct_fn: Callable  # these four as of task.Objectives
    judge_fn: Callable
    counted_fn: Callable
    attack: Attack  # of those whom the population says to be malicious
    record: dict[str, Any]  # what identifies it, for config.json

    @property
    def staged(self) -> bool:
        """Are programs given only those images that they draw?"""
        return not isinstance(self.train[0], Array)

    def arrays(self) -> Arrays:
        assert not self.staged
        return Arrays(self.base, self.train, self.test[:2])

    def everyone(self) -> Seed:
        return Seed(self.clients, self.adapters, self.keys)


def build(
    config: Config,
    accept: Callable[[Signature, Adapter], None] = lambda signature, adapter: None,
    backbone: Backbone | None = None,
    may_stage: bool = False,
) -> Problem:
    """Load, split and describe the data.

    Args:
      config: the options.
      accept: is shown the shapes of one client's signature and of one adapter while nothing has compiled yet; it may
        raise ValueError.
      backbone: the model, where it has been loaded before.
      may_stage: whether images may be left where they are, to be staged; else all of them are brought to the device.
    """
    # Everything that can be refused is looked at on the host first; only then does anything compile.
    config, images, resized = _images(config)
    side = config.image_size or _side(images)
    _refuse_too_many(config, images, side, may_stage)
    backbone = backbone or backbones.load(config, images.classes, side)
    backbones.refuse_too_large(backbone, len(images.classes), len(images.x), side)
    stem, top = backbones.cut(backbone, config.adapt_last)
    config, top, start = adapter.begins(config, backbone, top, images.classes)
    _refuse_without_effect(config, backbone, top, side)
    new, targets = lambda key: start.onto(new_adapter(config, top, key)), top.patterns(config.targets)
    shapes = jax.eval_shape(new, jax.eval_shape(jax.random.key, 0))
    accept(descriptions.shapes_of_one(config.signature, len(images.classes)), shapes)
    harm = attack.build(config.attack, len(images.classes) if images.known is None else images.known)
    train_rows, *sides = (np.flatnonzero(part) for part in (~images.test, *_tested(images)))
    made = [dealt(config, images, train_rows, sides[0], seed) for seed in config.dealt_by]

    images, base = data.resized(images, side), backbones.kept_as(config.base_dtype, top.params, config.full)
    stem, shown, stay = _shown(config, stem, images.x, may_stage)
    if stem is not None:
        base = {**base, STEM: backbones.kept_as(config.base_dtype, stem.params, ())}
    base = jax.device_put(base)
    features = _features(config, backbone, taken(images.x, train_rows))
    told = descriptions.basis(config.signature, images, train_rows, features)
    stacked = _stack(config, made, told, images.y[train_rows], len(images.classes))
    longest = local_training.longest(config, stacked.population.examples)
    vary = config.label_smoothing, config.augment, config.dropout, unrolls(config, base, longest)
    keys = jax.vmap(jax.random.key)(jnp.asarray(config.seeds))
    adapters = _with_heads(config, jax.vmap(new)(keys), made, features, images.y[train_rows], len(images.classes))
    return Problem(
        images=images,
        backbone=backbone,
        base=base,
        train=_placed((shown, images.y), train_rows, stay),
        test=_placed((shown, images.y, images.domain), np.concatenate(sides), stay),  # type: ignore[arg-type]
        clients=stacked,
        adapters=adapters,
        keys=keys,
        signature=descriptions.shapes_of_one(config.signature, len(images.classes)),
        **_smallest(config, made),
        longest=longest,
        **objectives(TASKS[config.task], top, stem, *vary, images.known, config.contrast)._asdict(),
        attack=harm,
        record={
            **backbone.facts,
            **resized,
            "data_hash": images.fingerprint(),
            "weights": backbone.name,
            "weights_hash": _hash_tree(backbone.params),
            **({"theta": _hash_file(theta)} if (theta := backbones.theta_of(config)) else {}),
            **start.record,
            "partition_hash": [partition_hash(parts, tests) for parts, tests, _ in made],  # by seed
            **_draws(config, stacked.population),
            "adapted": sorted(lora.adapted(top.params, targets)),
            "trained_in_full": sorted(lora.select(top.params, config.full)),
        },
    )


def _images(config: Config) -> tuple[Config, Images, dict[str, str]]:
    """The options in the order of the classes, the images of a run, and what is said of how they were resized."""
    size, resized = backbones.sizing(config)
    images = data.load(config.data, size, skip=config.skip_damaged, classes=config.classes)
    if config.resplit is not None:
        images = data.resplit(images, config.resplit)
    images = data.validation(images, config.validation) if config.validation else images
    data.note_untrained(images)
    descriptions.refuse_without_groups(images, config.signature)
    own = data.base_to_novel(images, config.novel)
    return backbones.in_order(config, images.classes, own.classes), own, resized


def _tested(images: Images) -> tuple[np.ndarray, np.ndarray]:
    """Which images are test images, ``[N]``, of classes that are trained on, and of others."""
    known = len(images.classes) if images.known is None else images.known
    return images.test & (images.y < known), images.test & (images.y >= known)


def _features(config: Config, backbone: Backbone, x: Any) -> np.ndarray:
    """Of training images; a model of one's own must make numbers of them."""
    features = backbones.frozen_features(backbone, x)
    if user_code.is_own(config.model or ""):
        backbones.refuse_not_finite(backbone, features, x)
    return features


def _draws(config: Config, population: Population) -> dict[str, Any]:
    """What draws depend on: how many images the largest client of any seed has, how much each goes through; and who of
    each seed is malicious."""
    bad = {} if config.attack is None else {"malicious": [np.flatnonzero(x).tolist() for x in _bad(config)]}
    return {"largest": int(population.rows.shape[-1]), **local_training.record(config, population.examples), **bad}


def new_adapter(config: Config, backbone: Backbone, key: Array) -> Adapter:
    """A fresh adapter of a model's parameters, as the options say."""
    targets = backbone.patterns(config.targets)
    return lora.new(key, backbone.params, rank=max(config.rank), targets=targets, full=config.full, scale=config.factor)


def _refuse_without_effect(config: Config, backbone: Backbone, top: Backbone, side: int) -> None:
    if config.head == "prototype":
        head.refuse_frozen(config.full, top.params)
    if config.dropout:
        backbones.refuse_without_dropout(backbone, partial(new_adapter, config, backbone), side)


def _with_heads(
    config: Config, adapters: Adapter, made: list, features: np.ndarray, labels: np.ndarray, classes: int
) -> Adapter:
    """Adapters ``[seeds, ...]`` with the head of each seed that clients' images say, where it is asked for."""
    if config.head != "prototype":
        return adapters
    heads = [head.prototypes(features, labels, parts[: config.clients], classes) for parts, _, _ in made]
    return head.started(adapters, heads)


def _smallest(config: Config, made: list) -> dict[str, Any]:
    sizes = [[len(part) for part in parts] for parts, _, _ in made]
    return {"smallest": min(map(min, sizes)), "fewest": tuple(min(own[: config.clients]) for own in sizes)}


def of_seeds(problem: Problem, start: int, stop: int) -> Problem:
    """What some of the seeds begin with; how they draw stays that of all."""
    part = jax.tree.map(lambda x: x[start:stop], (problem.clients, problem.adapters, problem.keys))
    return problem._replace(clients=part[0], adapters=part[1], keys=part[2])


def is_staged(config: Config, size: int) -> bool:
    """Do images (or tokens) of so many bytes stay where they are, and only those that are drawn go to the device?"""
    have = memory.available()
    return config.images == "staged" or (config.images == "auto" and have is not None and size > memory.RESIDENT * have)


def unrolls(config: Config, params: Any, longest: int | None) -> bool:
    """Are blocks written out one after another where they are differentiated?

    That runs a few per cent faster, and costs some tenths of a second of compilation for each block and method.
    """
    if config.blocks != "auto":
        return config.blocks == "unrolled"
    examples = config.rounds * config.cohort * (longest or config.local_steps) * config.batch * len(config.seeds)
    work = examples * sum(x.size for x in jax.tree.leaves(params))
    return work > (LONG if jax.default_backend() == "cpu" else 100 * LONG)


def _shown(config: Config, stem: Stem | None, x: Any, may_stage: bool) -> tuple[Stem | None, Any, bool]:
    """What comes before the model that is trained, what the two are shown of images ``x``, and whether that is staged.

    Where what the stem makes of all images is stored, it takes their place.
    """
    if stem is None or not backbones.is_stored(config, stem, x):
        return stem, x, may_stage and is_staged(config, x.nbytes)
    stay = may_stage and is_staged(config, memory.bytes_of(backbones.shape_of_tokens(stem, x)))
    return None, backbones.tokens_of(stem, x, partial(on_disk.scratch, caches() / FOLDER) if stay else np.empty), stay


def _placed(arrays: tuple, rows: np.ndarray, staged: bool) -> tuple:
    """Rows of all of them: on the device, or as they are."""
    return tuple(taken(a, rows) if staged else jnp.asarray(a[rows]) for a in arrays)


def _refuse_too_many(config: Config, images: Images, side: int, may_stage: bool) -> None:
    """Refuse a size, or draws, that memory cannot hold; and to stage images of a whole run that is one program."""
    if config.images == "staged" and not may_stage:
        raise ValueError("--images staged is of compare and run: this command needs all images at once, leave it out")
    size, as_they_are = len(images.x) * side * side * 3, images.x.shape[1:3] == (side, side)
    if not (may_stage and as_they_are and is_staged(config, size)):
        memory.refuse_more_than_there_is(
            size if as_they_are else 2 * size,  # on the device, and resized ones on the host too
            f"{len(images.x)} images of {side} x {side}",
            f"use {'--images staged, ' * (may_stage and as_they_are)}a smaller --image-size or fewer images"
            + ", or compare and run, which need not hold all of them" * (not may_stage),
        )
    steps = 1 if config.local_epochs else config.local_steps  # epochs: when it is known how much each client has
    memory.refuse_draws(backbones.image_of(side), config.cohort, steps, config.batch)


def own_accuracy(correct: Array, counts: Array) -> Array:
    """Share of right answers ``[C]`` on each client's own test images, of ``correct [C, m]`` the first ``counts``.

    nan for a client without test images.
    """
    return jnp.sum(correct * (jnp.arange(correct.shape[1]) < counts[:, None]), 1) / counts


def domain_accuracies(problem: Problem, domain: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """Share of right answers in each domain, of ``correct [n]`` in ``domain [n]``."""
    return {name: float(np.mean(correct[domain == j])) for j, name in enumerate(problem.images.domains)}


def _side(images: Images) -> int:
    height, width = images.x.shape[1:3]
    if height != width:
        raise ValueError(f"{images.name} has images of {height} x {width}: use --image-size to make them square")
    return height


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
    if local_training.are_unequal(config):
        own = zip(sizes, config.seeds, strict=True)
        work = np.stack([local_training.examples_of_a_round(config, *one) for one in own])
        population = population._replace(examples=jnp.asarray(work))
    if config.attack is not None:
        population = population._replace(malicious=jnp.asarray(_bad(config)))
    return Clients(population, jnp.asarray(tests), jnp.asarray(counts), _scored(config))


def _bad(config: Config) -> np.ndarray:
    """``[S, N + K]`` who attacks."""
    bad = np.zeros((len(config.seeds), config.clients + config.holdout_clients), np.float32)
    for row, seed in zip(bad, config.seeds, strict=True):
        row[attack.drawn(config.attack, config.clients, seed)] = 1
    return bad


def _scored(config: Config) -> Any:
    """Who is scored, ``[S, E]``, where these are not all; of those that train the honest ones."""
    of, most = (config.clients, config.holdout_clients), config.scored
    if most == of:
        return ()
    draw = lambda rng, whose, most: np.sort(whose[rng.permutation(len(whose))[:most]])
    rngs = [np.random.default_rng([seed, 3]) for seed in config.seeds]
    honest = [np.flatnonzero(row[: of[0]] == 0) for row in _bad(config)]
    unseen = of[0] + np.arange(of[1])
    own = [
        np.concatenate([draw(rng, whose, most[0]), draw(rng, unseen, most[1])])
        for rng, whose in zip(rngs, honest, strict=True)
    ]
    return jnp.asarray(np.stack(own).astype(np.int32))


def _widened(rows: list[np.ndarray]) -> np.ndarray:
    """Every seed's clients at the width of the widest; what is added is padding like the rest."""
    widest = max(part.shape[1] for part in rows)
    return np.stack([np.pad(part, ((0, 0), (0, widest - part.shape[1])), mode="edge") for part in rows])


def _padded(parts: list[np.ndarray], width: int) -> np.ndarray:
    return np.stack([np.concatenate([part, np.zeros(width - len(part), int)]) for part in parts]).astype(np.int32)


def _hash_file(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def _hash_tree(tree: Any) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]
