"""Who has which images: one deal of a data set over clients for each seed, by a rule, a column or a file."""

from __future__ import annotations

import hashlib
import sys

import numpy as np

from experiments.config import Config
from experiments.setup import columns, partition_file
from experiments.setup.data import Images
from fedlora_jax import partition


def dealt(config: Config, images: Images, train: np.ndarray, test: np.ndarray, seed: int):
    """Rows (of the training and of the test images) and rank of every client, as a seed of ``dealt_by`` deals them."""
    rng = np.random.default_rng([seed, 1])
    total = config.clients + config.holdout_clients
    cell = images.domain * len(images.classes) + images.y
    if config.partition.startswith(columns.PREFIX):
        values = columns.of(images, config.partition.removeprefix(columns.PREFIX))
        parts, names = columns.natural(values[train], total, config.minimum, rng, config.partition)
        tests, note = columns.of_same(names, values[test], parts, cell[train], cell[test], rng)
        if note and seed == config.dealt_by[0]:
            print(f"note: --partition {config.partition}, seed {seed}: {note}", file=sys.stderr)
    else:
        parts, tests = _parts(config, images, train, rng), []
        if config.partition.startswith(partition_file.PREFIX) and not config.validation:
            path = config.partition.removeprefix(partition_file.PREFIX)
            tests = partition_file.tests_of(path, len(test), total)
    if not tests:
        tests = partition.matching_tests(parts, cell[train], cell[test], rng)
    if config.test_images is not None:
        tests = [np.sort(rng.permutation(own)[: config.test_images]) for own in tests]
    ranks = np.resize(config.rank, total)
    ranks = ranks if config.ranks_in_order else rng.permutation(ranks)
    if config.shots is not None:
        parts = [partition.few(own, images.y[train], config.shots, rng) for own in parts]
    return parts, tests, ranks


def _parts(config: Config, images: Images, train: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Rows of every client's training images, by a rule or by a file."""
    total, y, domain = config.clients + config.holdout_clients, images.y[train], images.domain[train]
    if not config.partition.startswith(partition_file.PREFIX):
        try:
            partition.parse(config.partition)
        except ValueError as error:
            raise ValueError(f"{error}; or {columns.PREFIX}NAME, {partition_file.PREFIX}PATH") from None
        groups = None if images.superclass is None else images.superclass[y]
        domains = domain if images.has_domains else None
        return partition.split(config.partition, y, domains, total, rng, config.minimum, groups)
    # A file is of all training images, of which --validation has set some apart.
    whole = np.arange(len(images.y)) if config.validation else train
    path, print_ = config.partition.removeprefix(partition_file.PREFIX), partition_file.fingerprint(images, whole)
    place = np.full(len(images.y), -1)
    place[train] = np.arange(len(train))
    own = [place[whole[part]] for part in partition_file.read(path, len(whole), total, config.minimum, print_)]
    return [part[part >= 0] for part in own]


def partition_hash(parts: list[np.ndarray], tests: list[np.ndarray]) -> str:
    """Of which training and test images every client has."""
    return hashlib.sha256(b"".join(own.tobytes() for own in (*parts, *tests))).hexdigest()[:16]
