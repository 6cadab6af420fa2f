"""A run on more images than should be in memory: its peak memory, and its rounds beside those with resident images.

A folder of JPEG files is generated and decoded where temporary files lie, which takes the room of the decoded images
(60,000 of 224 x 224: 9 GB). ``decoding`` and ``staged`` are whole runs on all of them, each in a process of its own, of
which the first finds nothing decoded. ``in turns`` are rounds in one process, on the images of three classes alone.
"""

from __future__ import annotations

import dataclasses
import io
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from experiments.bench import machine, works
from experiments.bench.children import whole_run
from experiments.bench.contenders import fedlora_jax as ours
from experiments.bench.measure import Line, line, times
from experiments.bench.options import Options
from experiments.bench.works import Work
from experiments.config import Config
from experiments.engine.facts import describe
from experiments.engine.trial import Trial
from experiments.setup import problem
from models.backbone import Backbone
from models.pretrained import Pretrained, backbone

RESIDENT = 3  # classes that are compared
BLOCK = 5  # rounds of one measurement
WORKS = {8: "toy", 224: "photos"}  # by the side of the images


def run(options: Options) -> Iterator[Line]:
    work = works.find(options.work)
    with tempfile.TemporaryDirectory(prefix="fedlora-staging-") as folder:
        source = generated(Path(folder) / "images", options.images, work)
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")  # of the children too
        for contender in ("decoding", "staged"):  # the first of the two finds nothing decoded
            yield line(options.bench, work, contender, images=options.images, **of_a_run(work, source), **describe())
        calls = {images: blocks(work, source, images) for images in ("resident", "staged")}
        for call in calls.values():
            call()  # what is read for the first time, and allocated
        turns: dict[str, list[dict[str, Any]]] = {images: [] for images in calls}
        for _ in tqdm(range(options.repeats), desc="turns", dynamic_ncols=True):
            for images, call in calls.items():
                watch = machine.Watch()
                call()
                turns[images].append(watch.read())
        for images, own in turns.items():
            median = lambda name, images=images: statistics.median(turn[name] for turn in turns[images])
            found = {"cpu_seconds": median("cpu_seconds") / BLOCK}
            found |= zip(("seconds_per_round", "spread"), times(turn["seconds"] / BLOCK for turn in own), strict=True)
            others = [turn["others_share"] for turn in own if turn["others_share"] is not None]
            found["quiet"] = max(others) <= machine.NOISE if others else None
            count = options.images * min(RESIDENT, work.classes) // work.classes
            yield line(options.bench, work, f"{images}, in turns", images=count, **found, **describe())


def config_of(work: Work, source: Path, **more: Any) -> Config:
    """A run of a work on a folder of images."""
    return Config(methods=("fedit",), data=str(source), model=f"{__file__}:model", image_size=work.side, seeds=(0,),
                  clients=work.clients, holdout_clients=2, partition="iid", minimum=1, rank=(work.rank,),
                  local_steps=work.steps, batch=work.batch, **more)  # fmt: skip


def of_a_run(work: Work, source: Path) -> dict[str, Any]:
    """What a whole run takes that stages its images."""
    config = config_of(work, source, images="staged", rounds=4, eval_every=2)
    changed = {name: x for name, x in dataclasses.asdict(config).items() if x != getattr(Config, name)}
    shown = lambda x: f"{','.join(map(str, x))}," if isinstance(x, tuple) else f"{x}"
    return whole_run([text for name, x in changed.items() for text in (f"--{name.replace('_', '-')}", shown(x))])


def blocks(work: Work, source: Path, images: str) -> Callable[[], Any]:
    """Rounds between two evaluations, one call after another."""
    classes = (f"{RESIDENT}",)
    config = config_of(work, source, images=images, rounds=BLOCK, eval_every=BLOCK, classes=classes)
    trial = Trial(config, problem.build(config, may_stage=True), "fedit")
    trial.compile()
    start = trial.programs.start(trial.problem.adapters, trial.problem.keys)

    def call() -> Any:
        trial.course.begin(0)  # so that the images of the first round are waited for
        return trial.course.block(jax.tree.map(jax.numpy.copy, start))

    return call


def generated(root: Path, count: int, work: Work) -> Path:
    """A folder of so many JPEG files, of classes that differ in colour."""

    def one(i: int) -> None:
        rng = np.random.default_rng(i)
        coarse = rng.integers(0, 256, (7, 7, 3), np.uint8)
        coarse[..., 0] = coarse[..., 0] // 2 + 127 * (i % work.classes) // work.classes
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((work.side, work.side)).save(buffer, "JPEG", quality=60)
        (root / f"class{i % work.classes}" / f"{i}.jpg").write_bytes(buffer.getvalue())

    for j in range(work.classes):
        (root / f"class{j}").mkdir(parents=True)
    with ThreadPoolExecutor() as pool:
        for _ in tqdm(pool.map(one, range(count)), total=count, desc="generating images", dynamic_ncols=True):
            pass
    return root


def model(classes: tuple[str, ...], image_size: int) -> Backbone:
    """The model of the work with images of that size."""
    work = works.find(WORKS[image_size])._replace(classes=len(classes))
    params = ours.problem(work._replace(clients=1, steps=1)).base
    return backbone(Pretrained(ours.model(work), params, np.full(3, 0.5), np.full(3, 0.5), work.name))
