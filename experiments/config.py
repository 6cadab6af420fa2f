"""What a user can set: frozen dataclasses, the only place where a default lives."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from fedlora_jax import partition


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


PREFIXES = ("auto", "stored", "anew")
SIGNATURES = ("full", "label_free", "noisy", "shuffled", "constant", "random")


@dataclass(frozen=True)
class Config:
    """One comparison of methods on one data set; the same seeds, clients and batches for every method."""

    methods: tuple[str, ...] = option(
        ("fedit", "lora_fair", "hyperlora"),
        "methods by file name, comma-separated ('python -m experiments methods'); "
        "options follow in the form NAME:OPTION=VALUE, as in hyperlora:mode=exact:kappa=1, "
        "and wrappers after a plus sign, as in fedit+proximal:mu=0.1+fedadam:lr=0.01",
    )
    data: str = option("digits", "'digits' (built in) or the path of a .npz file")
    image_size: int | None = option(None, "resize images to this side (default: as they are)")
    weights: str = option("nano", "'nano' (built in) or the path of a timm-named .npz or .safetensors file")
    targets: tuple[str, ...] = option(
        ("attn/(query|value)/kernel",), "regular expressions, comma-separated: kernels that get low-rank adapters"
    )
    adapt_last: int | None = option(
        None, "adapt the last N blocks only; what the others compute can be stored, see --prefix (default: all blocks)"
    )
    prefix: str = option(
        "auto",
        "what the blocks before --adapt-last compute: 'stored' once per image, 'anew' in every step, "
        "or 'auto': stored where that takes at most a quarter of the memory there is",
    )
    full: tuple[str, ...] = option(("^head/",), "regular expressions, comma-separated: parameters trained in full")
    clients: int = option(12, "clients that train")
    clients_per_round: int | None = option(None, "clients drawn each round (default: all)")
    holdout_clients: int = option(6, "further clients with data of their own that never train: the unseen ones")
    partition: str = option("domain_dirichlet:1.0", partition.FORMS)
    minimum: int = option(10, "training images of the smallest client, at least")
    signature: str = option(
        "full",
        "what clients tell of their data: full, label_free, noisy; or a control: shuffled, constant, random",
    )
    test_images: int | None = option(None, "score a client on so many of its test images at most (default: all)")
    rank: tuple[int, ...] = option((4,), "rank of the adapters; a list (4,8,16) is dealt out to clients at random")
    scale: float = option(2.0, "factor s of every low-rank update, the same for all clients and ranks")
    validation: float = option(
        0.0, "set this share of the training images apart and score on it instead of the test images; to tune on"
    )
    rounds: int = option(10, "rounds")
    local_steps: int = option(5, "local optimizer steps per round")
    batch: int = option(16, "images per local step")
    optimizer: str = option("sgd", "local optimizer: sgd, momentum (0.9), adam or adamw; fresh each round")
    lr: float = option(0.1, "local learning rate")
    seeds: tuple[int, ...] = option((0, 1, 2, 3, 4), "seeds: a count (5 means 0..4) or a list (3,7)")
    target: float = option(0.8, "accuracy for rounds to target (global; in budget, of personal models as sent)")
    eval_every: int = option(1, "rounds between evaluations; the last round is always evaluated")
    chunk: int | None = option(None, "clients trained at once; must divide the cohort (default: chosen by device)")
    devices: int = option(1, "devices that share the clients of a round, of a CPU parts of it; must divide the cohort")
    seeds_at_once: int | None = option(None, "seeds run side by side; must divide their number (default: by device)")
    checkpoint_every: int = option(10, "rounds between checkpoints, a multiple of --eval-every")
    theta: str | None = option(
        None, "a METHOD.theta.npz of an earlier run: what the method learned there, to start from (or mode=frozen)"
    )
    out: str | None = option(None, "folder to write (default: runs/ and the time)")
    resume: bool = option(False, "go on with the run in --out; what it has finished is kept")
    dry_run: bool = option(False, "say what the run would need (memory, traffic, arithmetic, time) and write nothing")

    budgets: tuple[int, ...] = option(
        (1, 2, 5, 10), "numbers of local steps per round to compare (1, 2, 5 and 10 only)"
    )
    lrs: tuple[float, ...] = option(
        (0.05, 0.1, 0.2), "local learning rates: in sweep to show, in budget to choose from for each method and budget"
    )
    vary: str | None = option(
        None,
        "an option of the methods or their wrappers and its values, as in mu=0,0.01,0.1 (or proximal:mu=0,0.01,0.1 "
        "where more than one has it); with each learning rate",
    )
    unroll: int = option(2, "rounds that a meta-step differentiates through")
    meta_lr: float = option(0.003, "learning rate of a meta-step (Adam)")
    tuning_seeds: tuple[int, ...] = option((100, 101, 102), "seeds of the runs that choose the learning rate")

    def identity(self) -> dict[str, Any]:
        """What decides the results: everything but where they are written and how fast they are computed."""
        free = {"out", "resume", "checkpoint_every", "dry_run"}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in free}


def check(config: Config) -> None:
    """Refuse what can be seen to be wrong without looking at data or weights."""
    for name in (
        "clients",
        "rounds",
        "local_steps",
        "batch",
        "eval_every",
        "checkpoint_every",
        "minimum",
        "devices",
        "unroll",
    ):
        _at_least(config, name, 1)
    if not 0 < config.meta_lr < float("inf"):
        raise ValueError(f"--meta-lr must be above 0 and finite, got {config.meta_lr:g}")
    _at_least(config, "holdout_clients", 0)
    for name in ("clients_per_round", "chunk", "seeds_at_once", "image_size", "adapt_last", "test_images"):
        if getattr(config, name) is not None:
            _at_least(config, name, 1)
    if not config.lr > 0 or config.lr == float("inf"):
        raise ValueError(f"--lr must be above 0 and finite, got {config.lr:g}")
    if not 0 < abs(config.scale) < float("inf"):
        raise ValueError(f"--scale must be finite and not 0, got {config.scale:g}")
    if not 0 <= config.validation < 1:
        raise ValueError(f"--validation is a share from 0 to below 1; got {config.validation:g}")
    if config.signature not in SIGNATURES:
        raise ValueError(f"--signature must be one of {', '.join(SIGNATURES)}; got {config.signature}")
    if config.prefix not in PREFIXES:
        raise ValueError(f"--prefix must be one of {', '.join(PREFIXES)}; got {config.prefix}")
    if not 0 < config.target <= 1:
        raise ValueError(f"--target is an accuracy above 0, at most 1; got {config.target:g}")
    if not config.rank or min(config.rank) < 1:
        raise ValueError(f"--rank must be at least 1, got {','.join(map(str, config.rank))}")
    if len(set(config.methods)) < len(config.methods) or not config.methods:
        raise ValueError(f"--methods must name each method once, got {','.join(config.methods)}")
    if (
        len(set(config.seeds)) < len(config.seeds)
        or not config.seeds
        or not 0 <= min(config.seeds) <= max(config.seeds) < 2**31
    ):
        raise ValueError(
            f"--seeds must be different numbers from 0 to 2147483647, got {','.join(map(str, config.seeds))}"
        )
    if config.clients_per_round is not None and config.clients_per_round > config.clients:
        raise ValueError(f"--clients-per-round {config.clients_per_round} is more than --clients {config.clients}")
    cohort = config.clients_per_round or config.clients
    if cohort % config.devices:
        raise ValueError(f"--devices {config.devices} does not divide the {cohort} clients of a round")
    if config.chunk is not None and cohort // config.devices % config.chunk:
        raise ValueError(f"--chunk {config.chunk} does not divide the {cohort // config.devices} clients of a device")
    if config.rounds % config.eval_every:
        raise ValueError(f"--eval-every {config.eval_every} does not divide --rounds {config.rounds}")
    for name in ("budgets", "lrs", "tuning_seeds"):
        if not getattr(config, name) or min(getattr(config, name)) < 0:
            raise ValueError(f"--{name.replace('_', '-')} needs at least one number, none below 0")
    if not set(config.budgets) <= {1, 2, 5, 10}:
        raise ValueError(f"--budgets may be 1, 2, 5 and 10, got {','.join(map(str, config.budgets))}")
    if config.seeds_at_once is not None and len(config.seeds) % config.seeds_at_once:
        raise ValueError(f"--seeds-at-once {config.seeds_at_once} does not divide {len(config.seeds)} seeds")


def _at_least(config: Config, name: str, least: int) -> None:
    if getattr(config, name) < least:
        raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(config, name)}")
