"""What every command that runs methods begins with: options, names and devices are refused before data are loaded."""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

from experiments.config import Config, check
from experiments.engine import methods
from experiments.engine.chunking import mesh_of
from experiments.engine.facts import acceptable, describe
from experiments.options import RESULTS, SPEED
from experiments.results import tracking
from experiments.results.folder import Folder, say
from experiments.setup import local_training, problem
from experiments.setup.problem import Problem
from fedlora_jax import lora
from models.backbone import Backbone

FILES = "method_files"  # in the record: the content of files that methods are from


def checked(config: Config) -> None:
    """Refuse what can be seen to be wrong before anything is read."""
    check(config)
    local_training.check(config)
    for name in config.methods:
        methods.check(name)
    tracking.check(config.track)
    mesh_of(config.devices)  # refuses more devices than there are


def opened(command: str, config: Config, grows: Iterable[str] = (), free: Collection[str] = ()) -> Folder:
    """The folder that a command which can go on writes.

    What it does not say, because the option is newer, is as by default.

    Raises:
      ValueError: ``--resume``, and its configuration differs by something else than more of what ``grows``, or what is
        ``free``.
    """
    folder = Folder(command, config.out, config.resume)
    if config.resume:
        said, default = folder.held("config"), Config()
        values = {name: x for name, x in config.deciding(RESULTS).items() if name not in free}
        newer = [name for name, x in values.items() if name not in said and x == getattr(default, name)]
        if "methods" in said:  # it is what a run writes
            values = {name: x for name, x in values.items() if name not in newer}
        folder.check_same("config", values, grows)
    return folder


def built(config: Config, backbone: Backbone | None = None, may_stage: bool = False) -> Problem:
    """The problem, if the methods accept it."""
    stages = may_stage and not config.scores_all_images
    made = problem.build(config, partial(acceptable, config, may_stage=stages), backbone, stages)
    if config.targets != Config().targets:
        for line in found(config, made):
            say(line)
    return made


def found(config: Config, problem: Problem) -> list[str]:
    """What each of ``--targets`` finds, a line for each."""
    adapters, said = lora.flatten(problem.adapters), []
    for target in config.targets:
        names = lora.adapted(problem.base, problem.backbone.patterns((target,)))
        sizes = {name: adapters[name].a.size + adapters[name].b.size for name in names if name in adapters}
        count = sum(sizes.values()) // len(config.seeds)
        said.append(f"--targets {target}: {', '.join(sizes)}, {count:,} parameters at rank {max(config.rank)}")
    return said


def about(command: str, config: Config, problem: Problem) -> dict[str, Any]:
    """What identifies a run, and with what it is computed, for ``config.json``."""
    files = methods.hashes(config.methods)
    record = problem.record | ({FILES: files} if files else {})
    own = {"config": config.deciding(RESULTS), "speed": config.deciding(SPEED)}
    return {"command": command, **own, "record": record, **describe()}


def going_on(folder: Folder, about: dict[str, Any], grows: Iterable[str] = ()) -> dict[str, Any]:
    """``about`` of a run that goes on, with the files of all methods that have run.

    Raises:
      ValueError: data, weights, clients or the content of a method's file differ from what the folder holds.
    """
    before, now = folder.held("record").get(FILES), about["record"].get(FILES, {})
    files = before | now if isinstance(before, dict) else now
    record = about["record"] | ({FILES: files} if files else {})
    folder.check_same("record", record, (*grows, FILES))
    return about | {"record": record}


def today() -> dict[str, Any]:
    return {"date": f"{datetime.date.today()}"}
