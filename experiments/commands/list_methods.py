"""``python -m experiments methods``: what every method trains, sends and keeps, for a chosen model; by shapes alone."""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments import attack
from experiments.config import Config, check
from experiments.engine import methods, traffic
from experiments.setup import backbone, data, descriptions
from experiments.setup.memory import bytes_of
from experiments.setup.problem import new_adapter
from fedlora_jax import attacks
from fedlora_jax.lora import Adapter
from fedlora_jax.signatures import Signature

TESTS = Path(__file__).parents[2] / "tests"
MOST = 10_000  # clients of a round: some methods send all of them what each of them has sent, here one by one
DIGITS, SIDE = tuple("0123456789"), 16  # of the built-in data, which need not be drawn for this


class Sizes(NamedTuple):
    """Bytes: of what one client of average rank sends and receives, of the server's state beside the adapter, and of
    what a client keeps."""

    up: float
    down: float
    state: int
    memory: int


def table(config: Config) -> str:
    """Two tables of all methods (papers and tests; what moves, for the configured model), wrappers, attacks.

    Raises:
      ValueError: an option is wrong, or more than ``MOST`` clients take part in a round.
    """
    check(config)
    count = config.cohort
    if count > MOST:
        raise ValueError(f"{count} clients in a round: sizes are of at most {MOST}, use a smaller --clients-per-round")
    adapter, signature = shapes(config)
    who, what = [], []
    for name in methods.names():
        about = methods.about(name)
        who.append((name, about.name, about.paper, about.arxiv, about.exact, shortened(guards(name))))
        own = name, about.trains, about.travels, about.personal, about.tells
        what.append((*own, *cells(config, name, adapter, signature)))
    around = [(name, *entry, methods.wrapper_options(name)) for name, entry in methods.wrappers().items()]
    harm = [(name, *entry, attack.options_of(name)) for name, entry in attacks.ABOUT.items()]
    adapted = sum(math.prod(x.shape) for x in jax.tree.leaves(adapter))
    return "\n".join(
        [
            *lines(("name", "method", "paper", "arXiv", "exact", "tests"), who),
            "",
            f"{config.model or config.weights} at rank {','.join(map(str, config.rank))}, {count} clients a round, "
            f"{adapted} numbers trained; up, down: KiB a client and round;",
            "state: KiB the server keeps beside the adapter; memory: KiB a client keeps between rounds; tells: what",
            "the server learns of a client beside its upload and its weight",
            "",
            *lines(("name", "trains", "travels", "personal", "tells", "up", "down", "state", "memory"), what),
            "",
            "wrappers, around methods and each other: NAME:OPTION=VALUE+WRAPPER:OPTION=VALUE+...",
            "",
            *lines(("name", "wrapper", "paper", "arXiv", "does", "tells", "options"), around),
            "",
            "attacks, of some of the training clients: --attack NAME:share=SHARE:OPTION=VALUE",
            "",
            *lines(("name", "attack", "paper", "arXiv", "does", "options"), harm),
        ]
    )


def shapes(config: Config) -> tuple[Adapter, Signature]:
    """The shapes of one adapter of the configured model, and of one client's signature."""
    images = (
        None
        if config.data == "digits"
        else data.load(config.data, config.image_size, skip=config.skip_damaged, classes=config.classes)
    )
    classes, side = (DIGITS, SIDE) if images is None else (images.classes, images.x.shape[1])
    _, top = backbone.cut(backbone.load(config, classes, config.image_size or side), config.adapt_last)
    adapter = jax.eval_shape(partial(new_adapter, config, top), jax.eval_shape(jax.random.key, 0))
    return adapter, descriptions.shapes_of_one(config.signature, len(classes))


def sizes(config: Config, name: str, adapter: Adapter, signature: Signature) -> Sizes:
    """Of one method, by shapes alone."""
    clients = config.cohort
    facts = {"participants": clients, "signature": signature, "population": config.clients, "rounds": config.rounds}
    method = methods.build(name, theta=None, **facts)
    state = jax.eval_shape(method.init, jax.eval_shape(jax.random.key, 0), adapter)
    up, down = traffic.whole_round(method, adapter, tuple(int(r) for r in np.resize(config.rank, clients)))
    memory = jax.eval_shape(method.init_client, adapter)
    return Sizes(
        up / clients, down / clients, bytes_of(state) - bytes_of(getattr(state, "adapter", ())), bytes_of(memory)
    )


def cells(config: Config, name: str, adapter: Adapter, signature: Signature) -> tuple[str, ...]:
    """The sizes in KiB, or why there are none."""
    try:
        found = sizes(config, name, adapter, signature)
    except ValueError as error:
        return f"not for this model: {error}"[:60], "", "", ""
    return tuple((f"{x / 1024:.1f}" if x >= 100 else f"{x:g} B") if x else "-" for x in found)


def guards(name: str) -> list[str]:
    """Files in ``tests`` that name the method, by how often; first ``every_method``, where the battery runs it."""
    counts = {}
    for path in sorted(TESTS.glob("test_*.py")):
        counts[path.stem.removeprefix("test_")] = len(re.findall(rf"\b{name}\b", path.read_text()))
    helpers = TESTS / "helpers.py"
    battery = helpers.exists() and re.search(rf'^    "{name}": ', helpers.read_text(), re.MULTILINE)
    counts["every_method"] = 10**6 if battery else 0
    return sorted((stem for stem, count in counts.items() if count), key=lambda stem: -counts[stem])


def shortened(found: list[str], most: int = 3) -> str:
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return (", ".join(found[:most]) + more) or "none"


def lines(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Columns as wide as what is in them."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    line = lambda row: "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    return [line(header), "  ".join("-" * width for width in widths), *map(line, rows)]
