"""Options of a run by group: local steps and their optimizer, scores, speed, hosts, and what is searched for."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.options import COUNT, INT32, PLACE, RECORD, SPEED, option

PREFIXES = ("auto", "stored", "anew")
IMAGES = KEPT = ("auto", "resident", "staged")
BLOCKS = ("auto", "loop", "unrolled")
SCHEDULES = ("constant", "linear", "cosine")
TRACKERS = ("csv", "tensorboard", "wandb", "mlflow")
OPTIMIZERS = ("sgd", "momentum", "adam", "adamw")
BUDGETS = (1, 2, 5, 10)


@dataclass(frozen=True)
class Local:
    """What a client does in a round: how many steps, on what."""

    local_steps: int = option(5, "local optimizer steps per round", COUNT)
    local_steps_from: int | None = option(
        None,
        "clients take unequal numbers of local steps: each always its own, drawn from this one to --local-steps",
        COUNT,
    )
    local_epochs: float | None = option(
        None,
        "how often (E) a client goes through its training images in a round, in place of --local-steps: with n of them "
        "it takes ceil(E n / batch) steps, not E ceil(n / batch): an epoch begins in the batch in which the one before "
        "ends, and the last step alone has what is left",
        "(0, 1000]",
    )
    local_cap: str | None = option(
        None,
        "with --local-epochs, the most steps of a client in a round: a number, or smallest+N, N more than the client "
        "with the fewest (as published code cuts clients short)",
    )
    batch: int = option(16, "images per local step", COUNT)
    augment: tuple[str, ...] = option(
        (),
        "how training images are varied in every local step, comma-separated, one after another: flip, crop:PIXELS, "
        "resized_crop:SMALLEST (share of the area), jitter:STRENGTH (brightness, contrast, saturation), hue:SHARE (of "
        "the colour circle), randaugment:COUNT:STRENGTH (of 10), mixup:ALPHA, cutmix:ALPHA (default: not at all)",
        empty=True,
    )


@dataclass(frozen=True)
class Optimizer:
    """The local optimizer and its learning rate."""

    optimizer: str = option(
        "sgd", "local optimizer: sgd, momentum (0.9), adam or adamw; fresh each round", among=OPTIMIZERS
    )
    lr: float = option(0.1, "local learning rate, of the first step", "(0, inf)")
    schedule: str = option(
        "constant", "it over rounds: constant, linear or cosine (down towards 0), or exponential:G (times G each round)"
    )
    local_schedule: str = option(
        "constant", "it over the local steps of each round: constant, linear or cosine", among=SCHEDULES
    )
    momentum: float | None = option(None, "of --optimizer momentum (default: 0.9)", "[0, 1)")
    weight_decay: float | None = option(
        None,
        "pulls what is trained to where it began (0 of adapters, the weights of what is trained in full): added to the "
        "gradient, of adamw apart from it (default: none, of adamw 0.0001)",
        "[0, 1]",
    )
    clip_norm: float | None = option(None, "longest gradient of a local step; longer ones are shortened", "(0, inf)")
    label_smoothing: float = option(0.0, "share of each label that goes to all classes alike, while training", "[0, 1)")


@dataclass(frozen=True)
class Scoring:
    """When and on what models are scored."""

    eval_every: int = option(1, "rounds between evaluations; the last round is always evaluated", COUNT)
    eval_clients: int | None = option(
        None,
        "score so many of the training clients, and of the unseen ones, at most, drawn once for each seed; intervals "
        "of mean accuracies then also hold what drawing them adds (default: all are scored)",
        COUNT,
    )
    test_images: int | None = option(
        None, "score a client on so many of its test images at most (default: all)", "[1, 2147483647]"
    )
    validation: float = option(
        0.0,
        "set this share of the training images apart and score on it instead of the test images; to tune on",
        "[0, 1)",
    )
    target: float = option(
        0.8, "accuracy for rounds to target (global; in budget, of personal models as sent)", "(0, 1]"
    )
    best_test_leaky: bool = option(
        False,
        "also say in summary.json which accuracy the best round had on the test images: chosen on what it is measured "
        "on, as some published figures are",
    )


@dataclass(frozen=True)
class Files:
    """Options from files, going on, checkpoints, who else is told."""

    resume: bool = option(
        False,
        "go on with the run in --out: what it has finished is kept, options that are not given stay as they were; "
        "there may be more rounds, methods and seeds (in budget methods and budgets), and another speed",
        decides=RECORD,
    )
    checkpoint_every: int | None = option(
        None,
        "rounds between checkpoints, a multiple of --eval-every (default: the smallest from 10)",
        COUNT,
        decides=RECORD,
    )
    track: tuple[str, ...] = option(
        (),
        "who is also told of rows of metrics.jsonl, comma-separated, in OUT/tracked: csv, tensorboard, wandb (offline, "
        "unless WANDB_MODE says otherwise), mlflow (a local database, unless MLFLOW_TRACKING_URI says otherwise); pip "
        "install 'fedlora-jax[track]' (default: nobody)",
        among=TRACKERS,
        empty=True,
        decides=RECORD,
    )


@dataclass(frozen=True)
class Speed:
    """Speed and memory alone: results agree to rounding."""

    prefix: str = option(
        "auto",
        "what the blocks before --adapt-last compute: 'stored' once per image, 'anew' in every step, "
        "or 'auto': stored where that takes at most a quarter of the memory there is",
        among=PREFIXES,
        decides=SPEED,
    )
    blocks: str = option(
        "auto",
        "how the blocks of a model are differentiated: 'unrolled', one after the other, which runs faster where they "
        "are large, in a 'loop', which compiles faster, or 'auto': unrolled where training takes minutes",
        among=BLOCKS,
        decides=SPEED,
    )
    images: str = option(
        "auto",
        "where images (or what is stored of them) are while a run goes on: 'resident', all on the device; 'staged', on "
        "disk or the host, and those drawn next are read while a round computes; or 'auto': staged where all take more "
        "than half of the memory there is",
        among=IMAGES,
        decides=SPEED,
    )
    kept: str = option(
        "auto",
        "where is what clients keep between rounds, as of Ditto a model each: 'resident', all on the device; 'staged', "
        "on the host, and what those keep who take part next, or are scored next, is brought to the device; or 'auto': "
        "staged where all of it takes more than half of the memory there is",
        among=KEPT,
        decides=SPEED,
    )
    chunk: int | None = option(
        None, "clients trained at once; must divide those of a device (default: chosen by device)", COUNT, decides=SPEED
    )
    devices: int = option(
        1,
        "devices that share the clients of a round or an evaluation, or the seeds where fewer are idle then; of a CPU "
        "parts of it; of each of --hosts so many",
        "[1, 1024]",
        decides=SPEED,
    )
    seeds_at_once: int | None = option(
        None, "seeds run side by side; must divide their number (default: by device)", COUNT, decides=SPEED
    )


@dataclass(frozen=True)
class Hosts:
    """Which processes compute; a run that goes on forgets them."""

    hosts: int = option(
        1,
        "processes that share a run, usually one on each host: the same command is started in all of them, and the "
        "first alone writes and prints (docs/scale.md)",
        "[1, 1024]",
        decides=PLACE,
    )
    coordinator: str | None = option(
        None,
        "HOST:PORT on which the first of them can be reached by the others (default: as SLURM, a TPU, Open MPI or "
        "Kubernetes say)",
        decides=PLACE,
    )
    process_id: int | None = option(
        None, "which of them this one is, from 0 (default: as for --coordinator)", "[0, 1023]", decides=PLACE
    )


@dataclass(frozen=True)
class Search:
    """What is tried, and how it is learned."""

    lrs: tuple[float, ...] = option(
        (0.05, 0.1, 0.2),
        "learning rates: sweep shows all, budget chooses",
        "(0, inf)",
    )
    vary: str | None = option(
        None,
        "an option of the methods or their wrappers and its values, as in mu=0,0.01,0.1 (or proximal:mu=0,0.01,0.1 "
        "where more than one has it); with each learning rate",
    )
    budgets: tuple[int, ...] = option((1, 2, 5, 10), "local steps per round, of 1, 2, 5 and 10", among=BUDGETS)
    tuning_seeds: tuple[int, ...] = option((100, 101, 102), "seeds of the runs that choose it", INT32)
    unroll: int = option(2, "rounds that a meta-step differentiates through", "[1, 1000]")
    episode: int | None = option(
        None,
        "rounds after which each federation of --seeds begins anew, in turn (default: never)",
        "[1, 1000000]",
    )
    meta_lr: float = option(0.003, "learning rate of a meta-step (Adam)", "(0, inf)")
