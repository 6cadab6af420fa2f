"""Options of a run by group: what is run, on which images, with which model and adapter, by which clients."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.options import COUNT, INT32, RECORD, option
from fedlora_jax import partition

CONTROLS = ("noisy", "shuffled", "constant", "random")  # of signatures
SIGNATURES = ("full", "prototypes", "label_free", "group", *CONTROLS, *(f"prototypes+{name}" for name in CONTROLS))
WEIGHTS = ("counts", "uniform")
SAMPLINGS = ("fixed", "poisson")
TASKS = ("softmax", "sigmoid", "pairs")
DTYPES = ("float32", "bfloat16")
HEADS = ("linear", "cosine", "prototype", "zero_shot", "text", "transport", "gate")


@dataclass(frozen=True)
class Run:
    """What is run, on what, and where results go."""

    methods: tuple[str, ...] = option(
        ("fedit", "lora_fair", "hyperlora"),
        "methods by file name, comma-separated ('python -m experiments methods' lists them); NAME:OPTION=VALUE sets an "
        "option, +WRAPPER wraps, as in fedit+proximal:mu=0.1+fedadam:lr=0.01; PATH.py:NAME is a function of yours",
    )
    data: str = option(
        "digits",
        "digits (built in, or digits: and domain, rotation, hue, contrast, blur, concept, mixed), a .npz file, a "
        "folder of images ([train|test/][DOMAIN/]CLASS/IMAGE), tfds:NAME[/CONFIG,...][:VERSION], hf:NAME[:CONFIG] or a "
        "folder that Hugging Face's datasets saved",
    )
    weights: str = option(
        "nano",
        "nano (built in: a vit, with --model mixer a mixer), a .npz or .safetensors file, a Hugging Face folder, or "
        "hf:OWNER/NAME[@REVISION] of its hub",
    )
    seeds: tuple[int, ...] = option(
        (0, 1, 2, 3, 4),
        "a count (5 means 0 to 4), a range (0:5, the same) or a list (3,7; 42, is 42 alone)",
        INT32,
    )
    rounds: int = option(10, "rounds", COUNT)
    out: str | None = option(None, "folder to write (default: runs/ and the time)", decides=RECORD)
    dry_run: bool = option(
        False, "say what the run would need (memory, traffic, arithmetic, time) and write nothing", decides=RECORD
    )


@dataclass(frozen=True)
class Data:
    """Which classes of the data, and what becomes of its images."""

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
    resplit: float | None = option(
        None,
        "join training and test images and set this share of each class and domain apart for testing, whatever the "
        "data say (published code that does so is not comparable)",
        "(0, 1)",
    )


@dataclass(frozen=True)
class Weights:
    """Which model, and what its weights do not say themselves."""

    model: str | None = option(
        None,
        "the family of the weights, vit, mixer or clip (default: as their names tell); or FILE.py:FUNCTION of your own "
        "that returns a models.backbone.Backbone",
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
    dtype: str = option(
        "float32",
        "in which the model computes activations; adapters, head, norms and losses stay float32",
        among=DTYPES,
    )
    base_dtype: str = option(
        "float32", "in which the frozen weights are kept, but for what is trained in full", among=DTYPES
    )


@dataclass(frozen=True)
class Head:
    """What makes logits of features, and the loss."""

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
    task: str = option(
        "softmax",
        "what is minimised: softmax, the cross-entropy of one distribution over classes; sigmoid, the binary "
        "cross-entropy of each class on its own; or pairs, CLIP's contrastive loss of the images of a batch and the "
        "texts (columns of the head) of their classes, both ways",
        among=TASKS,
    )


@dataclass(frozen=True)
class Text:
    """What a model that reads text is told of the classes."""

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
    contrast: float = option(
        0.0,
        "with --head text, how much it counts in the loss that texts of what is trained in full (--context, say) stay "
        "near those they began as, and away from texts with low-rank updates too (of text/own, say): FedPGP's 0.5",
        "[0, 1000000]",
    )


@dataclass(frozen=True)
class Adapter:
    """What is trained: low-rank pairs, and parameters in full."""

    targets: tuple[str, ...] = option(
        ("default",),
        "kernels that get low-rank adapters, comma-separated ('': none): sets of the model by name (of a vit or clip "
        "qv, default, and qkv, qkvo, attn, mlp, all, out_fc2, with --head text of both towers, or image_qv, default, "
        "text_qv and so on of one; of a mixer out_fc2, default, and tokens, channels, all), "
        "or regular expressions such as attn/(query|value)/kernel",
        empty=True,
    )
    full: tuple[str, ...] = option(
        ("^head/",),
        "regular expressions, comma-separated: parameters trained in full ('': none, the head stays as it is)",
        empty=True,
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
    adapt_last: int | None = option(
        None,
        "adapt the last N blocks only; what the others compute can be stored, see --prefix (default: all blocks)",
        "[1, 1000]",
    )
    adapter: str | None = option(
        None,
        "a folder of PEFT to start from, as peft or export --to peft writes it: its layers are --targets, --rank and "
        "--scale are its own, and its head is taken where it is for the data's classes, or with --keep-head "
        "(default: a fresh adapter)",
    )
    theta: str | None = option(
        None,
        "a METHOD.theta.npz of an earlier run: what the method learned there, to start from (or mode=frozen); nano: "
        "built in, HyperLoRA's of the digits",
    )


@dataclass(frozen=True)
class Clients:
    """How many, who holds what, who is drawn, what they tell."""

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
    partition_seed: tuple[int, ...] = option(
        (),
        "deal data out by this seed whatever the run's, so that seeds share one split; or by these in turn, "
        "comma-separated, so that each is shared by several seeds (default: each seed its own)",
        INT32,
        empty=True,
    )
    minimum: int = option(10, "training images of the smallest client, at least", COUNT)
    shots: int | None = option(
        None, "training images that a client keeps of each of its classes, at most; its test images stay", COUNT
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


@dataclass(frozen=True)
class Faults:
    """Clients that do not answer, stop early or attack."""

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
