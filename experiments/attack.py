"""``--attack NAME:share=SHARE:OPTION=VALUE``: how many of the clients that train are malicious, and what they do."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from experiments.options import read_options, settable
from fedlora_jax import attacks
from fedlora_jax.attacks import Attack
from fedlora_jax.checks import refuse_outside

SHARE = {"share": inspect.Parameter("share", inspect.Parameter.KEYWORD_ONLY, default=0.2)}


class Named(NamedTuple):
    """What stands behind ``--attack``."""

    make: Callable[..., Attack]
    share: float  # of the clients that train, who are malicious
    options: dict[str, Any]


def parse(text: str) -> Named:
    """An attack by its name, its share and its options.

    Raises:
      ValueError: no such name or option, or a value that is none.
    """
    name, *texts = text.split(":")
    if name not in attacks.ABOUT:
        near = difflib.get_close_matches(name, attacks.ABOUT, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"--attack: unknown attack {name!r}: did you mean {near}? There are {', '.join(attacks.ABOUT)}"
        )
    make = getattr(attacks, name)
    options = read_options(text, name, texts, SHARE | settable(make))
    share = options.pop("share", SHARE["share"].default)
    refuse_outside("[0, 1)", **{f"--attack {text}: share": share})
    return Named(make, share, options)


def build(text: str | None, classes: int) -> Attack:
    """The attack of a run on data of so many classes.

    Raises:
      ValueError: an option out of range.
    """
    if text is None:
        return attacks.NOBODY
    named = parse(text)
    facts = {"classes": classes} if "classes" in inspect.signature(named.make).parameters else {}
    try:
        made = named.make(**facts, **named.options)
    except ValueError as error:
        raise ValueError(f"--attack {text}: {error}") from None
    if made.target >= classes:
        raise ValueError(f"--attack {text}: target {made.target} is none of {classes} classes, which count from 0")
    return made


def malicious(text: str | None, clients: int) -> int:
    """How many of the clients that train are.

    Raises:
      ValueError: a share that is nobody, or everybody.
    """
    if text is None:
        return 0
    share = parse(text).share
    count = round(share * clients)
    if (count == 0 and share > 0) or count == clients:
        raise ValueError(
            f"--attack {text}: share {share:g} of {clients} clients is {count} of them: expected at least one, and one "
            "that is honest (share=0: nobody attacks)"
        )
    return count


def check(text: str | None, clients: int) -> None:
    """Refuse what can be seen to be wrong without data."""
    build(text, 2**31)
    malicious(text, clients)


def drawn(text: str | None, clients: int, seed: int) -> np.ndarray:
    """``[malicious]`` numbers of a seed's malicious clients."""
    return np.sort(np.random.default_rng([seed, 4]).permutation(clients)[: malicious(text, clients)])


def has_trigger(text: str | None) -> bool:
    """Is it a backdoor, of which is counted how often it opens?"""
    return text is not None and parse(text).make is attacks.backdoor


def options_of(name: str) -> str:
    """An attack's options and their defaults, to be shown."""
    return ", ".join(f"{k}={p.default}" for k, p in (SHARE | settable(getattr(attacks, name))).items())
