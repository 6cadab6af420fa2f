"""All that a user can set of a run, what follows from it, and which of it does not go together."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from dataclasses import dataclass
from typing import Any

from experiments import attack
from experiments.groups.problem import Adapter, Clients, Data, Faults, Head, Run, Text, Weights
from experiments.groups.training import Files, Hosts, Local, Optimizer, Scoring, Search, Speed
from experiments.options import check_fields, flag_of

SPARE = 5  # standard deviations above the average for which there are places in a cohort of Poisson sampling
SEEDS = 20  # a larger count is asked about: it may have been meant as the one seed
CHECKPOINTS = 10  # rounds between them, at least, where nothing else is asked for


@dataclass(frozen=True)
class Config(
    Search, Hosts, Speed, Files, Scoring, Optimizer, Local, Faults, Clients, Adapter, Text, Head, Weights, Data, Run
):
    """One comparison of methods on one data set; the same seeds, clients and batches for every method.

    Its groups of options are its bases, the last first, which is the order in which dataclasses inherit fields.
    """

    @property
    def cohort(self) -> int:
        """Clients of a round, or places for them."""
        n, many = self.clients, self.clients_per_round or self.clients
        spare = SPARE * (many * (1 - many / n)) ** 0.5 if self.sampling == "poisson" and many < n else 0
        return many if not spare else min(n, many + math.ceil(spare))

    @property
    def join_rate(self) -> float:
        """Probability with which a client joins a round, before any is cut off."""
        return (self.clients_per_round or self.clients) / self.clients if self.sampling == "poisson" else 1.0

    @property
    def dealt_by(self) -> tuple[int, ...]:
        """Of each seed, the seed that deals data out."""
        return tuple(itertools.islice(itertools.cycle(self.partition_seed or self.seeds), len(self.seeds)))

    @property
    def sharing_seeds(self) -> int:
        """Devices that share the seeds, whole runs: all of one host where fewer are idle then, else 1."""
        most = lambda n: -(-n // self.devices) / n  # of all work, what the device has that has most of it
        return self.devices if self.hosts == 1 and most(len(self.seeds)) < most(self.cohort) else 1

    @property
    def sharing(self) -> int:
        """Devices that share the clients of one seed, of all processes."""
        return self.devices * self.hosts // self.sharing_seeds

    @property
    def scored(self) -> tuple[int, int]:
        """Training and unseen clients that are scored."""
        most = self.eval_clients or max(self.clients, self.holdout_clients)
        return min(self.honest, most), min(self.holdout_clients, most)

    @property
    def honest(self) -> int:
        """Clients that train and do not attack: of these some are scored, or all."""
        return self.clients - attack.malicious(self.attack, self.clients)

    @property
    def scores_all_images(self) -> bool:
        """Is something scored on all test images, which have to be there then?"""
        return bool(self.novel) or attack.has_trigger(self.attack)

    @property
    def factor(self) -> float:
        """Of every low-rank update: ``scale``, or ``alpha`` over the largest rank."""
        return self.scale if self.alpha is None else self.alpha / max(self.rank)

    def deciding(self, what: str) -> dict[str, Any]:
        """The options that decide the ``RESULTS``, which identify a run; or its ``SPEED``; or its ``RECORD``."""
        own = [entry.name for entry in dataclasses.fields(self) if entry.metadata["decides"] == what]
        return {name: getattr(self, name) for name in own}

    def rounds_between_checkpoints(self) -> int:
        """As set, or the smallest multiple of ``eval_every`` that is not below ``CHECKPOINTS``."""
        return self.checkpoint_every or -(-CHECKPOINTS // self.eval_every) * self.eval_every


def check(config: Config) -> None:
    """Refuse what can be seen to be wrong without looking at data or weights."""
    check_fields(config)
    if config.alpha is not None and config.scale != Config.scale:
        raise ValueError(f"--alpha {config.alpha:g} and --scale {config.scale:g} both set the factor: give one of them")
    if config.keep_head and config.head == "prototype":
        raise ValueError("--keep-head and --head prototype both say where the head starts: give one of them")
    if not config.targets and not config.full:
        raise ValueError("--targets '' and --full '' leave nothing to be trained: name kernels or parameters in one")
    attack.check(config.attack, config.clients)
    what = "--novel scores every model" if config.novel else "a backdoor is scored"
    if config.scores_all_images and config.images == "staged":
        raise ValueError(f"--images staged reads what is drawn, and {what} on all test images: leave one of them out")
    if config.scores_all_images and config.kept == "staged":
        raise ValueError(f"--kept staged serves clients in parts, and {what} at once: leave one of them out")
    if attack.has_trigger(config.attack) and config.adapt_last is not None and config.prefix != "anew":
        raise ValueError(
            "--attack backdoor changes images, and with --adapt-last what their first blocks make of them may be "
            "stored: use --prefix anew"
        )
    if config.scale == 0:
        raise ValueError("--scale must not be 0: nothing that adapters learn would count")
    _check_lists(config)
    cohort = config.cohort
    if (config.clients_per_round or 0) > config.clients:
        raise ValueError(f"--clients-per-round {config.clients_per_round} is more than --clients {config.clients}")
    own = -(-cohort // config.sharing)
    if config.sharing > cohort:
        hosts = f" of each of {config.hosts} hosts" * (config.hosts > 1)
        seeds = f", or more than {cohort} seeds, which devices share then" * (config.hosts == 1)
        raise ValueError(
            f"--devices {config.devices}{hosts}: more devices than the {cohort} clients of a round; use at most "
            f"{cohort}{seeds}"
        )
    if config.chunk is not None and own % config.chunk:
        near = ", ".join(map(str, _divisors_near(own, config.chunk)))
        raise ValueError(f"--chunk {config.chunk} does not divide the {own} clients of a device: {near} would")
    _check_hosts(config)
    if config.rounds % config.eval_every:
        near = ", ".join(map(str, _divisors_near(config.rounds, config.eval_every)))
        longer = -(-config.rounds // config.eval_every) * config.eval_every
        raise ValueError(
            f"--eval-every {config.eval_every} does not divide --rounds {config.rounds}: {near} would, or "
            f"--rounds {longer}"
        )
    if config.rounds_between_checkpoints() % config.eval_every:
        raise ValueError(f"--checkpoint-every {config.checkpoint_every} is no multiple of --eval-every")
    _check_steps(config)
    if config.augment and config.prefix == "stored":
        raise ValueError("--augment makes other images in every step, and --prefix stored keeps what one makes of each")
    each = -(-len(config.seeds) // config.sharing_seeds)
    if config.seeds_at_once is not None and each % config.seeds_at_once:
        which = f"the {each} seeds of a device" if config.sharing_seeds > 1 else f"{each} seeds"
        near = ", ".join(map(str, _divisors_near(each, config.seeds_at_once)))
        raise ValueError(f"--seeds-at-once {config.seeds_at_once} does not divide {which}: {near} would")


def _check_steps(config: Config) -> None:
    """Refuse numbers of local steps that do not go together."""
    if config.local_steps_from is not None and config.local_steps_from > config.local_steps:
        raise ValueError(
            f"--local-steps-from {config.local_steps_from} is more than --local-steps {config.local_steps}"
        )
    both = config.local_epochs is not None and config.local_steps != Config.local_steps
    if both and not config.resume:  # a run that has begun so goes on
        raise ValueError(
            f"--local-epochs {config.local_epochs:g} and --local-steps {config.local_steps} both say how much each "
            "client does: give one of them"
        )
    if config.stragglers and config.local_epochs is None and config.local_steps == 1:
        raise ValueError(
            f"--stragglers {config.stragglers:g}: clients stop before their last local step, and --local-steps 1 has "
            "no step before it: raise it, or leave --stragglers out"
        )
    if config.local_steps_from is not None and config.local_epochs is not None:
        raise ValueError("--local-epochs and --local-steps-from both say how much each client does: give one of them")


def _check_lists(config: Config) -> None:
    """Refuse lists that name something twice, or more than there is a use for."""
    for name in ("methods", "seeds", "partition_seed", "lrs", "budgets", "tuning_seeds"):
        values = getattr(config, name)
        if len(set(values)) < len(values):
            raise ValueError(f"--{flag_of(name)} must name each once, got {','.join(map(str, values))}")
    if len(config.partition_seed) > len(config.seeds):
        raise ValueError(
            f"--partition-seed names {len(config.partition_seed)} deals and --seeds {len(config.seeds)}: at most one "
            "deal for each seed"
        )


def _check_hosts(config: Config) -> None:
    """Refuse what processes that share a run cannot do, or are not told."""
    if config.hosts == 1:
        given = [f"--{flag_of(name)}" for name in ("coordinator", "process_id") if getattr(config, name) is not None]
        if given:
            raise ValueError(f"{given[0]} is of processes that share a run: say how many, --hosts N")
        return
    if config.dry_run:
        raise ValueError("--dry-run is of one process: leave --hosts out, its memory is that of each of them")
    if (config.coordinator is None) != (config.process_id is None):
        raise ValueError("--coordinator and --process-id are given together, or are both found out: got one of them")
    if config.process_id is not None and config.process_id >= config.hosts:
        raise ValueError(f"--process-id {config.process_id} is none of --hosts {config.hosts}: they count from 0")
    if config.coordinator is not None and not (
        (port := re.fullmatch(r".+:([0-9]{1,5})", config.coordinator)) and 0 < int(port[1]) < 2**16
    ):
        raise ValueError(f"--coordinator must be HOST:PORT with a port from 1 to 65535, got {config.coordinator}")


def _divisors_near(number: int, wanted: int) -> list[int]:
    """The divisors of ``number`` next to ``wanted`` on either side."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below, above = [d for d in divisors if d < wanted], [d for d in divisors if d > wanted]
    return below[-1:] + above[:1]
