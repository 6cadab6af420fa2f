"""Prompts: templates with the names of classes, as tokens that a text tower reads."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedlora_jax.lora import Params

from . import tokenizer as vocabularies
from .clip import PROMPT, Text
from .tokenizer import Tokenizer

DRAWN = 0.02  # deviation of vectors to be learned that begin as no words: CoOp's code
PUBLISHED = {  # by data set: Zhou et al., *CoOp*, IJCV 2022, arXiv 2109.01134 and its code; seven are of CLIP's own
    "caltech101": ("a photo of a {}.",),
    "dtd": ("{} texture.",),
    "eurosat": ("a centered satellite photo of {}.",),
    "fgvc_aircraft": ("a photo of a {}, a type of aircraft.",),
    "food101": ("a photo of {}, a type of food.",),
    "imagenet": ("a photo of a {}.",),
    "imagenet_seven": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
    "oxford_flowers": ("a photo of a {}, a type of flower.",),
    "oxford_pets": ("a photo of a {}, a type of pet.",),
    "stanford_cars": ("a photo of a {}.",),
    "sun397": ("a photo of a {}.",),
    "ucf101": ("a photo of a person doing {}.",),
}
CALLED = {  # other names of these data sets, letters and digits alone: of TensorFlow Datasets, Hugging Face, papers
    "caltech101": ("caltech",),
    "dtd": ("describabletextures",),
    "fgvc_aircraft": ("fgvcaircraft100", "aircraft"),
    "imagenet": ("imagenet2012", "imagenet1k", "ilsvrc2012"),
    "oxford_flowers": ("oxfordflowers102", "flowers102", "oxfordflowers"),
    "oxford_pets": ("oxfordiiitpet", "oxfordiiitpets", "oxfordpets"),
    "stanford_cars": ("cars196", "stanfordcars"),
}
FEWEST = 3  # tokens of a text: its start, a word, its end


def templates(asked: str) -> tuple[str, ...]:
    """Templates with ``|`` between them, each with ``{}``, or the name of a set of them in ``PUBLISHED``."""
    return tuple(prompt for one in asked.split("|") for prompt in PUBLISHED.get(one, (one,)))


def of_data(name: str) -> tuple[str, ...]:
    """Templates as published for a data set, by its name however that is written; ``PROMPT`` of others."""
    plain = lambda text: re.sub(r"[^a-z0-9]", "", text.lower())
    known = {plain(one): own for own in PUBLISHED for one in (own, *CALLED.get(own, ()))}
    return PUBLISHED.get(known.get(plain(name), ""), (PROMPT,))


def texts(classes: int | Sequence[str] | None, prompts: Sequence[str], class_names: Sequence[str]) -> list[list[str]]:
    """Of every prompt, one for each class."""
    if classes is None or isinstance(classes, int):
        raise ValueError(f"a zero-shot head is made of the classes' names, got {classes}: give them, or head='linear'")
    if wrong := [prompt for prompt in prompts if "{}" not in prompt]:
        named = f"nor is it one of the sets {', '.join(PUBLISHED)}"
        raise ValueError(f"the prompt {wrong[0]!r} has no {{}} for the name of a class, {named}")
    if class_names:
        refuse_other_count(classes, class_names)
    names = list(class_names) or [name.replace("_", " ") for name in classes]
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        alike = f"two classes are called {twice!r}, and what reads their names cannot tell them apart"
        if class_names:
            raise ValueError(f"--class-names: {alike}: give each a name of its own")
        warnings.warn(f"{alike}: --class-names calls them otherwise", stacklevel=2)
    return [[prompt.replace("{}", name) for name in names] for prompt in prompts]


def refuse_other_count(classes: Sequence[str], class_names: Sequence[str]) -> None:
    """Refuse names that are not one for each class."""
    if len(class_names) != len(classes):
        raise ValueError(
            f"--class-names are {len(class_names)}, the data has {len(classes)} classes: name each in its order "
            f"({', '.join(classes[:3])}{', ...' * (len(classes) > 3)})"
        )


def tokens(prompts: list[list[str]], tokenizer: Tokenizer, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Of all texts, prompt by prompt, ``[texts, tokens]``, and where each ends ``[texts]``.

    Raises:
      ValueError: two classes cannot be told apart, as a text is longer than ``length`` and is cut.
    """
    for own in prompts:
        seen: dict[tuple[int, ...], str] = {}
        for text in own:
            whole = tokenizer.encode(text)
            other = seen.setdefault(tuple(whole[: length - 1]), text)
            if len(whole) > length and other != text:
                raise ValueError(
                    f"{text!r} has {len(whole)} tokens and is cut at {length}, where it is the same as {other!r}: use "
                    "shorter --prompts or --class-names"
                )
    return tokenizer.encode_all([text for own in prompts for text in own], length)


def tokenizer_of(path: Path, text: Text, what: str) -> Tokenizer:
    """The vocabulary beside weights, which the text tower reads."""
    tokenizer = vocabularies.find(path.parent)
    if tokenizer is None:
        raise ValueError(
            f"{path} has no vocabulary beside it, which {what} needs: put {vocabularies.VOCABULARY} and "
            f"{vocabularies.MERGES}, or {vocabularies.WHOLE}, there, or use --head linear, which reads no text"
        )
    if max(tokenizer.ids.values()) >= text.vocabulary:
        raise ValueError(
            f"the vocabulary beside {path} has {len(tokenizer.ids)} tokens, its text tower {text.vocabulary}: they are "
            "not of one model"
        )
    return tokenizer


def contexts_of(asked: str, text: Text, params: Params, tokenizer: Tokenizer) -> np.ndarray:
    """Where learned vectors of two prompts begin, ``[2, n, width]``: at random, or both as embeddings of words."""
    if re.fullmatch(r"[-+]?[\d.]+", asked) and not asked.isdecimal():
        raise ValueError(f"--context {asked} is no count and no words: expected how many vectors, as in 16, or words")
    words = [] if asked.isdecimal() else tokenizer.encode(asked)[1:-1]
    count = len(words) if words or not asked.isdecimal() else int(asked)
    if not 1 <= count <= text.length - FEWEST:
        raise ValueError(
            f"--context {asked} is {count} vectors, and the text tower has {text.length} places in all: choose 1 to "
            f"{text.length - FEWEST}"
        )
    if words:
        return np.asarray(params["tokens"], np.float32)[[words, words]]
    return np.asarray(DRAWN * np.random.default_rng(0).normal(size=(2, count, text.width)), np.float32)


def said(prompts: Sequence[str], class_names: Sequence[str]) -> str:
    names = ", ".join(class_names) if class_names else "the classes' names"
    return f"{', '.join(map(repr, prompts))} with {names}"


def said_of_text(prompts: Sequence[str], class_names: Sequence[str], context: str | None) -> str:
    whole = f"the text tower, {said(prompts, class_names)}"
    if context is None:
        return whole
    return f"{whole}, behind {f'{context} vectors' if context.isdecimal() else repr(context)} to be learned"
