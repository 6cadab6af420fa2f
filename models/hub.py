"""Weights by name from the Hugging Face hub, through its own package ``huggingface_hub`` (the extra ``hub``).

``hf:OWNER/NAME``, or ``hf:OWNER/NAME@REVISION`` for a branch, tag or commit. Of a repository only what is read here is
fetched, into that package's cache (``HF_HOME``), where it is found again without a network. Where a repository has
weights for transformers and for OpenCLIP, it is the first that are fetched.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from .files import INDEX, OPEN_CLIP, SINGLE
from .tokenizer import MERGES, VOCABULARY, WHOLE

PREFIX = "hf:"
NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
FILES = (SINGLE, INDEX, "model-*-of-*.safetensors", "config.json", "preprocessor_config.json", "open_clip_config.json")
FILES += ("processor_config.json", VOCABULARY, MERGES, WHOLE)


def is_name(weights: str | Path) -> bool:
    """Is it a name on the hub, and no path?"""
    return str(weights).startswith(PREFIX)


@functools.cache  # a name means one thing in a process, whoever asks
def fetched(name: str) -> tuple[Path, str]:
    """The folder of a repository's files, and ``OWNER/NAME@COMMIT``, what they are for good.

    Raises:
      ValueError: it is no such name, the package is not installed, there is nothing of that name or no network, or it
        has no weights that can be read.
    """
    match = NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"no weights {name!r}: expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    repository, revision = match.groups()
    try:
        from huggingface_hub import snapshot_download  # type: ignore[import-not-found]
    except ImportError:
        raise ValueError(
            f"{name} needs the package huggingface_hub: pip install huggingface_hub, or give the path of a folder with "
            f"its {SINGLE} and config.json"
        ) from None
    has = lambda folder, some: any((folder / file).is_file() for file in some)
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(FILES)))
        if not has(folder, (SINGLE, INDEX)):
            folder = Path(snapshot_download(repository, revision=revision, allow_patterns=[*FILES, *OPEN_CLIP]))
    except Exception as error:  # of the network, of the hub, of the disk: it has many
        why = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"cannot fetch {name}: {type(error).__name__}: {why}; see to the name and the network, or fetch it where "
            f"there is one (hf download {repository}) and give the path of the folder"
        ) from None
    if not has(folder, (SINGLE, INDEX, *OPEN_CLIP)):
        raise ValueError(
            f"{name} has no {SINGLE} or {OPEN_CLIP[0]}, at most pickles, which run code of their own: use a repository "
            f"or a revision (hf:{repository}@REVISION) that has one"
        )
    return folder, f"{repository}@{folder.name}"
