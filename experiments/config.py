"""What a user can set of a run: a frozen dataclass, the only place where a default lives."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from dataclasses import dataclass
from typing import Any

from experiments import attack
from experiments.options import COUNT, INT32, PLACE, RECORD, SPEED, check_fields, flag_of, option
from fedlora_jax import partition

PREFIXES = ("auto", "stored", "anew")
IMAGES = KEPT = ("auto", "resident", "staged")
BLOCKS = ("auto", "loop", "unrolled")
CONTROLS = ("noisy", "shuffled", "constant", "random")  # of signatures
SIGNATURES = ("full", "prototypes", "label_free", "group", *CONTROLS, *(f"prototypes+{name}" for name in CONTROLS))
WEIGHTS = ("counts", "uniform")
SAMPLINGS = ("fixed", "poisson")
SPARE = 5  # standard deviations above the average for which there are places in a cohort of Poisson sampling
TASKS = ("softmax", "sigmoid", "pairs")
DTYPES = ("float32", "bfloat16")
HEADS = ("linear", "cosine", "prototype", "zero_shot", "text", "transport", "gate")
SCHEDULES = ("constant", "linear", "cosine")
TRACKERS = ("csv", "tensorboard", "wandb", "mlflow")
OPTIMIZERS = ("sgd", "momentum", "adam", "adamw")
BUDGETS = (1, 2, 5, 10)
SEEDS = 20  # a larger count is asked about: it may have been meant as the one seed
CHECKPOINTS = 10  # rounds between them, at least, where nothing else is asked for


@dataclass(frozen=True)
class Config:
    """One comparison of methods on one data set; the same seeds, clients and batches for every method."""

    methods: tuple[str, ...] = option(
        ("fedit", "lora_fair", "hyperlora"),
        "methods by file name, comma-separated ('python -m experiments methods'); "
        "options follow in the form NAME:OPTION=VALUE, as in hyperlora:mode=exact:kappa=1, "
        "and wrappers after a plus sign, as in fedit+proximal:mu=0.1+fedadam:lr=0.01; "
        "PATH.py:NAME is the function NAME of a file of yours",
    )
    data: str = option(
        "digits",
        "digits or digits:domain, :rotation, :concept, :mixed (built in), the path of a .npz file, a folder of images, "
        "[train|test/][DOMAIN/]CLASS/IMAGE, "
        "tfds:NAME[/CONFIG,...][:VERSION] of TensorFlow Datasets, hf:NAME[:CONFIG] or a saved folder of Hugging Face",
    )
    skip_damaged: bool = option(
        False, "leave out images that cannot be read; they are named and counted (else: they are refused)"
    )
    classes: tuple[str, ...] = option(
        (),
        "these classes alone, by name, comma-separated, or the first N of them, where none is called N; of digits name "
        "them, as in 0,1,2 (default: all)",
        empty=True,
    )
    novel: tuple[str, ...] = option(
        (),
        "classes that nobody trains on, by name, comma-separated, or half, those behind the first half: the model that "
        "each client is sent is also scored on all test images of the others (base), and on those of the novel ones, "
        "each among its own side's classes (default: none)",
        empty=True,
    )
    image_size: int | None = option(None, "resize images to this side (default: as they are)", "[1, 16384]")
    resize: str | None = option(
        None,
        "how images that are read from files become so large: crop (the shorter side is resized, the middle cut out), "
        "crop:SHARE (that share of it, as timm's crop_pct), squash (their shape is lost) (default: as "
        "preprocessor_config.json, open_clip_config.json or config.json beside the weights says, else crop)",
    )
    resample: str | None = option(
        None,
        "with which filter: bicubic, bilinear, lanczos (these antialiased), nearest, or bicubic_aliased, as PyTorch "
        "resizes tensors (default: as for --resize, else bicubic)",
    )
    model: str | None = option(
        None,
        "the family of the weights, vit, mixer or clip (default: as their names tell); or FILE.py:FUNCTION of your own "
        "that returns a models.backbone.Backbone",
    )
    weights: str = option(
        "nano",
        "'nano' (built in: a vit, with --model mixer a mixer), a .npz or .safetensors file, a Hugging Face folder, or "
        "hf:OWNER/NAME, with @REVISION if need be, for a repository on its hub (pip install huggingface_hub)",
    )
    mean: tuple[float, ...] | None = option(
        None,
        "mean of the images that the weights were trained on, per channel, of x / 255 (default: as the weight file or "
        "config.json or preprocessor_config.json beside it says)",
        "[0, 1]",
    )
    std: tuple[float, ...] | None = option(None, "their standard deviation (default: as for --mean)", "(0, 1]")
    heads: int | None = option(None, "attention heads of the weights (default: as for --mean)", COUNT)
    epsilon: float | None = option(None, "epsilon of the weights' layer norms (default: as for --mean)", "(0, 0.1)")
    keep_head: bool = option(
        False, "begin with the weights' head although nothing says that it is for the data's classes (else: a new one)"
    )
    head: str | None = option(
        None,
        "what makes logits of features: linear; cosine, a temperature times cosines; prototype, by distance from the "
        "mean features of each class, over the training clients, to start from; where a model reads text, zero_shot, "
        "of the names of classes, to start from, or text, its text tower, computed in every step: for --targets in it, "
        "or to train head/logit_scale or --context; transport, the same of two prompts, head/context and head/local, "
        "which an optimal transport brings to an image's patches; gate, that of names (or as the model has it) behind "
        "a softmax gate on features, head/gate (default: as the model has it). What --full finds of it is trained and "
        "shared (of fedper and fedrep each client's own), the rest is frozen",
        among=HEADS,
    )
    prompts: str | None = option(
        None,
        "what a zero-shot head or the text tower is given, with {} for the name of a class; several, with | between "
        "them, are averaged; or published templates by data set: caltech101, dtd, eurosat, fgvc_aircraft, food101, "
        "imagenet, imagenet_seven, oxford_flowers, oxford_pets, stanford_cars, sun397, ucf101 (default: as --data is "
        "called, where that is one of these, else 'a photo of a {}.'; with --context '{}.')",
    )
    context: str | None = option(
        None,
        "with --head text (or transport), vectors to be learned before the words of every prompt, head/context: how "
        "many, or the words that they begin as; of a vit, how many prompts beside the tokens of every image, registers "
        "(VPT: --targets '' --full '^registers$,^head/') (default: none)",
    )
    bridge: str | None = option(
        None,
        "with --head text, BLOCKS:WIDTH:SCALE, adapters in the last blocks of both towers, blocks/bridge and "
        "text/blocks/bridge, whose middle projection is one for both, bridge/kernel and bridge/bias (default: none)",
    )
    class_names: tuple[str, ...] = option(
        (),
        "what these prompts call the classes, comma-separated, in the data's order (default: as the data does)",
        empty=True,
    )
    dtype: str = option(
        "float32",
        "in which the model computes activations; adapters, head, norms and losses stay float32",
        among=DTYPES,
    )
    base_dtype: str = option(
        "float32", "in which the frozen weights are kept, but for what is trained in full", among=DTYPES
    )
    adapter: str | None = option(
        None,
        "a folder of PEFT to start from, as peft or export --to peft writes it: its layers are --targets, --rank and "
        "--scale are its own, and its head is taken where it is for the data's classes, or with --keep-head "
        "(default: a fresh adapter)",
    )
    targets: tuple[str, ...] = option(
        ("default",),
        "kernels that get low-rank adapters, comma-separated ('': none): sets of the model by name (of a vit or clip "
        "qv, default, and qkv, qkvo, attn, mlp, all, out_fc2, with --head text of both towers, or image_qv, default, "
        "text_qv and so on of one; of a mixer out_fc2, default, and tokens, channels, all), "
        "or regular expressions such as attn/(query|value)/kernel",
        empty=True,
    )
    adapt_last: int | None = option(
        None,
        "adapt the last N blocks only; what the others compute can be stored, see --prefix (default: all blocks)",
        "[1, 1000]",
    )
    full: tuple[str, ...] = option(
        ("^head/",),
        "regular expressions, comma-separated: parameters trained in full ('': none, the head stays as it is)",
        empty=True,
    )
    task: str = option(
        "softmax",
        "what is minimised: softmax, the cross-entropy of one distribution over classes; sigmoid, the binary "
        "cross-entropy of each class on its own; or pairs, CLIP's contrastive loss of the images of a batch and the "
        "texts (columns of the head) of their classes, both ways",
        among=TASKS,
    )
    contrast: float = option(
        0.0,
        "with --head text, how much it counts in the loss that texts of what is trained in full (--context, say) stay "
        "near those they began as, and away from texts with low-rank updates too (of text/own, say): FedPGP's 0.5",
        "[0, 1000000]",
    )
    clients: int = option(12, "clients that train", COUNT)
    clients_per_round: int | None = option(None, "clients drawn each round (default: all)", COUNT)
    sampling: str = option(
        "fixed",
        "how they are drawn: fixed, so many; or poisson, each client joins on its own, so many on average",
        among=SAMPLINGS,
    )
    holdout_clients: int = option(
        6, "further clients with data of their own that never train: the unseen ones", "[0, 1000000]"
    )
    partition: str = option(
        "domain_dirichlet:1.0",
        f"{partition.FORMS}; column:NAME, a client for each value of a column of the data, as a writer or hospital; "
        "file:PATH, as 'data' saves it",
    )
    minimum: int = option(10, "training images of the smallest client, at least", COUNT)
    partition_seed: tuple[int, ...] = option(
        (),
        "deal data out by this seed whatever the run's, so that seeds share one split; or by these in turn, "
        "comma-separated, so that each is shared by several seeds (default: each seed its own)",
        INT32,
        empty=True,
    )
    shots: int | None = option(
        None, "training images that a client keeps of each of its classes, at most; its test images stay", COUNT
    )
    resplit: float | None = option(
        None,
        "join training and test images and set this share of each class and domain apart for testing, whatever the "
        "data say (published code that does so is not comparable)",
        "(0, 1)",
    )
    weights_of_clients: str = option(
        "counts",
        "how much each client counts: counts, by how many images it holds, or uniform, all alike",
        among=WEIGHTS,
    )
    signature: str = option(
        "full",
        "what clients tell of their data: full, prototypes (full, and where each class lies), label_free; group, what "
        "an oracle knows (the column group of their images); or a control: noisy, shuffled, constant, random of full, "
        "prototypes+shuffled of these",
        among=SIGNATURES,
    )
    test_images: int | None = option(
        None, "score a client on so many of its test images at most (default: all)", "[1, 2147483647]"
    )
    rank: tuple[int, ...] = option(
        (4,), "rank of the adapters; a list (4,8,16) is dealt out to clients at random", "[1, 100000]"
    )
    ranks_in_order: bool = option(
        False, "give --rank to clients in their order, which with domains is that of domains, not at random"
    )
    scale: float = option(
        2.0, "factor s of every low-rank update, the same for all clients and ranks", "[-1000000, 1000000]"
    )
    alpha: float | None = option(
        None, "scale = alpha / rank, as PEFT has it, of the largest rank; in place of --scale", "(0, 1000000]"
    )
    dropout: float = option(
        0.0, "share of the inputs of low-rank updates that are dropped in local steps (LoRA dropout)", "[0, 1)"
    )
    validation: float = option(
        0.0,
        "set this share of the training images apart and score on it instead of the test images; to tune on",
        "[0, 1)",
    )
    eval_clients: int | None = option(
        None,
        "score so many of the training clients, and of the unseen ones, at most, drawn once for each seed; intervals "
        "of mean accuracies then also hold what drawing them adds (default: all are scored)",
        COUNT,
    )
    dropouts: float = option(
        0.0,
        "share of the clients of a round that never answer, others each round; rows of metrics.jsonl count them as "
        "dropped, with those whose training failed",
        "[0, 1)",
    )
    stragglers: float = option(
        0.0,
        "share of the clients of a round that stop before their last local step, others each round, after any step "
        "equally likely",
        "[0, 1]",
    )
    attack: str | None = option(
        None,
        "NAME:share=SHARE:OPTION=VALUE, some of the training clients, for each seed its own, are malicious, and what "
        "they do: sign_flip, gaussian, alie, ipm, collusion or free_rider (they send other updates), label_flip or "
        "backdoor (they train on other data; 'python -m experiments methods' lists options); they are not scored "
        "(default: nobody is)",
    )
    rounds: int = option(10, "rounds", COUNT)
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
    optimizer: str = option(
        "sgd", "local optimizer: sgd, momentum (0.9), adam or adamw; fresh each round", among=OPTIMIZERS
    )
    augment: tuple[str, ...] = option(
        (),
        "how training images are varied in every local step, comma-separated, one after another: flip, crop:PIXELS, "
        "resized_crop:SMALLEST (share of the area), jitter:STRENGTH (brightness, contrast, saturation), hue:SHARE (of "
        "the colour circle), randaugment:COUNT:STRENGTH (of 10), mixup:ALPHA, cutmix:ALPHA (default: not at all)",
        empty=True,
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
    seeds: tuple[int, ...] = option(
        (0, 1, 2, 3, 4),
        "seeds: a count (5 means 0 to 4), a range (0:5 means the same) or a list (3,7; 42, is the seed 42 alone)",
        INT32,
    )
    target: float = option(
        0.8, "accuracy for rounds to target (global; in budget, of personal models as sent)", "(0, 1]"
    )
    eval_every: int = option(1, "rounds between evaluations; the last round is always evaluated", COUNT)
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
        "devices that share the clients of a round or an evaluation, of a CPU parts of it; of each of --hosts so many",
        "[1, 1024]",
        decides=SPEED,
    )
    seeds_at_once: int | None = option(
        None, "seeds run side by side; must divide their number (default: by device)", COUNT, decides=SPEED
    )
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
    best_test_leaky: bool = option(
        False,
        "also say in summary.json which accuracy the best round had on the test images: chosen on what it is measured "
        "on, as some published figures are",
    )
    checkpoint_every: int | None = option(
        None,
        "rounds between checkpoints, a multiple of --eval-every (default: the smallest from 10)",
        COUNT,
        decides=RECORD,
    )
    theta: str | None = option(
        None, "a METHOD.theta.npz of an earlier run: what the method learned there, to start from (or mode=frozen)"
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
    out: str | None = option(None, "folder to write (default: runs/ and the time)", decides=RECORD)
    resume: bool = option(
        False,
        "go on with the run in --out: what it has finished is kept, options that are not given stay as they were; "
        "there may be more rounds, methods and seeds (in budget methods and budgets), and another speed (see below)",
        decides=RECORD,
    )
    dry_run: bool = option(
        False, "say what the run would need (memory, traffic, arithmetic, time) and write nothing", decides=RECORD
    )

    budgets: tuple[int, ...] = option(
        (1, 2, 5, 10), "numbers of local steps per round to compare (1, 2, 5 and 10 only)", among=BUDGETS
    )
    lrs: tuple[float, ...] = option(
        (0.05, 0.1, 0.2),
        "local learning rates: in sweep to show, in budget to choose from for each method and budget",
        "(0, inf)",
    )
    vary: str | None = option(
        None,
        "an option of the methods or their wrappers and its values, as in mu=0,0.01,0.1 (or proximal:mu=0,0.01,0.1 "
        "where more than one has it); with each learning rate",
    )
    unroll: int = option(2, "rounds that a meta-step differentiates through", "[1, 1000]")
    meta_lr: float = option(0.003, "learning rate of a meta-step (Adam)", "(0, inf)")
    tuning_seeds: tuple[int, ...] = option((100, 101, 102), "seeds of the runs that choose the learning rate", INT32)

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
    def sharing(self) -> int:
        """Devices that share the clients, of all processes."""
        return self.devices * self.hosts

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
        raise ValueError(f"--devices {config.devices}{hosts}: more devices than the {cohort} clients of a round")
    if config.chunk is not None and own % config.chunk:
        raise ValueError(f"--chunk {config.chunk} does not divide the {own} clients of a device")
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
    if config.local_steps_from is not None and config.local_epochs is not None:
        raise ValueError("--local-epochs and --local-steps-from both say how much each client does: give one of them")
    if config.augment and config.prefix == "stored":
        raise ValueError("--augment makes other images in every step, and --prefix stored keeps what one makes of each")
    if config.seeds_at_once is not None and len(config.seeds) % config.seeds_at_once:
        raise ValueError(f"--seeds-at-once {config.seeds_at_once} does not divide {len(config.seeds)} seeds")


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
