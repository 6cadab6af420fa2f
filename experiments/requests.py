"""What commands that run nothing can be told: frozen dataclasses of options, each of one command."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.options import COUNT, INT32, RECORD, option
from fedlora_jax import partition

FORMS = ("merged", "peft", "npz")  # of what is exported
ROUTERS = ("everyone", "nearest", "retrieval", "likelihood")
ASKING = ("client", "image")  # of a pool of adapters
SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class Export:
    """Which models of a finished run are written, and as what."""

    run: str = option("", "the folder of a finished compare or run")
    method: str | None = option(None, "the method, as it was named in the run (default: the run's only one)")
    model: str = option(
        "global",
        "global; client:ID, the model of one client as it was last served, ID from 0, unseen clients after those that "
        "trained; or all",
    )
    to: str = option(
        "merged",
        "merged, weights with everything folded in that --weights reads again (.safetensors); peft, a folder for "
        "peft.PeftModel.from_pretrained; or npz, the adapter's own arrays",
        among=FORMS,
    )
    layout: str | None = option(
        None,
        "whose names the modules of --to peft have: timm or, of weights in that form, transformers (version 5), "
        "transformers4, or transformers-bare and transformers4-bare, those without a classifier (default: the first)",
    )
    seed: int | None = option(None, "the seed (default: the run's first)", INT32)
    out: str | None = option(None, "folder to write (default: runs/ and the time)", decides=RECORD)


@dataclass(frozen=True)
class Pool:
    """Who serves clients that never trained, of the adapters that those of a finished run left behind."""

    run: str = option("", "the folder of a finished compare or run, with unseen clients")
    method: str | None = option(None, "the method, as it was named in the run (default: the run's only one)")
    router: tuple[str, ...] = option(
        ROUTERS,
        "comma-separated: everyone, all adapters alike; nearest, that of the client whose mean feature is nearest in "
        "direction; retrieval, the --count nearest alike (RAMoLE); likelihood, by each owner's Gaussian, rank-one "
        "components of as many as one adapter has (HiLoRA's routing)",
        among=ROUTERS,
    )
    count: int = option(3, "adapters that retrieval finds", COUNT)
    by: str = option(
        "client", "what asks: client, all of its training images at once; image, each test image", among=ASKING
    )
    local_steps: int | None = option(
        None,
        "steps that clients adapt what they are served by before they leave it (default: as in the run)",
        "[0, inf)",
    )
    out: str | None = option(None, "folder to write (default: runs/ and the time)", decides=RECORD)


@dataclass(frozen=True)
class Data:
    """One source of images, and what a partition would make of it."""

    source: str = option("digits", "the data, as for --data of compare")
    classes: tuple[str, ...] = option((), "these classes alone, or the first N (default: all)", empty=True)
    image_size: int | None = option(None, "resize images to this side (default: as they are)", "[1, 16384]")
    skip_damaged: bool = option(False, "leave out images that cannot be read")
    partition: str | None = option(None, f"also deal it out to clients: {partition.FORMS}, column:NAME or file:PATH")
    clients: int = option(12, "clients that train", COUNT)
    holdout_clients: int = option(6, "further clients, the unseen ones", "[0, 1000000]")
    minimum: int = option(10, "training images of the smallest client, at least", COUNT)
    seed: int = option(0, "the seed that deals it out", INT32)
    save: str | None = option(None, "a .npz to write: the partition, for --partition file:PATH of other commands")
    sheet: str | None = option(None, "a .png to write: some images of every class and domain")


@dataclass(frozen=True)
class CompareRuns:
    """Finished runs."""

    runs: tuple[str, ...] = option((), "folders of finished runs, the first of which the others are compared with")


@dataclass(frozen=True)
class Doctor:
    """This machine; there is nothing to choose."""


@dataclass(frozen=True)
class Completion:
    """Of what is typed behind ``fedlora``."""

    shell: str = option("bash", "bash, zsh or fish (default: bash)", among=SHELLS)


@dataclass(frozen=True)
class Recipes:
    """Published protocols, as files of options."""

    name: str | None = option(None, "the recipe to show whole (default: all, a line each)")


@dataclass(frozen=True)
class Models:
    """What there is to be adapted: all families of models, or one model."""

    file: str | None = option(None, "weights, as for --weights of compare: what they are (default: all families)")
    model: str | None = option(None, "the family, or FILE.py:FUNCTION of your own (default: as the names in FILE tell)")
    image_size: int | None = option(
        None, "side of the images to come (default: as the weights have it, or as usual for a size)", "[1, 16384]"
    )
    head: str | None = option(
        None, "text: the model that compare has with --head text, its text tower in it (of a clip)", among=("text",)
    )
    targets: tuple[str, ...] = option(
        (), "sets of kernels or regular expressions, comma-separated, as in compare (default: all sets)", empty=True
    )
    rank: int = option(4, "rank of the adapters", "[1, 100000]")
