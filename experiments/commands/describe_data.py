"""``python -m experiments data``: what is in a source of images, and what a partition of it would give every client."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from experiments.commands.list_methods import lines
from experiments.config import Config
from experiments.options import check_fields
from experiments.requests import Data
from experiments.results.folder import write_atomically
from experiments.setup import columns, data, partition_file, problem
from experiments.setup.data import Images

SHOWN = 40  # classes, and clients, in a table
EACH, SIDE = 3, 64  # images of a class and domain in the picture, and the least side of one


class Plan:
    """The images of a source and, where that is asked for, who gets them; everything that can be refused has been."""

    def __init__(self, options: Data):
        check_fields(options)
        if options.save and not options.partition:
            raise ValueError("--save writes a partition: say which with --partition")
        given = ("clients", "holdout_clients", "minimum", "seed")
        if unread := [x for x in given if getattr(options, x) != getattr(Data, x) and not options.partition]:
            raise ValueError(f"--{unread[0].replace('_', '-')} is of a partition: say which with --partition")
        for path, suffix in ((options.save, ".npz"), (options.sheet, ".png")):
            if path and (Path(path).suffix != suffix or not Path(path).parent.is_dir()):
                raise ValueError(f"cannot write {path}: expected a name that ends in {suffix}, in an existing folder")
        self.options = options
        self.images = data.load(options.source, options.image_size, skip=options.skip_damaged, classes=options.classes)
        data.note_untrained(self.images)
        self.train, self.test = np.flatnonzero(~self.images.test), np.flatnonzero(self.images.test)
        self.config = Config(
            partition=options.partition or "iid",
            clients=options.clients,
            holdout_clients=options.holdout_clients,
            minimum=options.minimum,
            seeds=(options.seed,),
        )
        self.dealt = None
        if options.partition:
            self.dealt = problem.dealt(self.config, self.images, self.train, self.test, options.seed)

    def execute(self) -> None:
        """Print, and write what was asked for."""
        print("\n".join([*summary(self.images), "", *table(self.images), "", *duplicates(self.images)]))
        if self.dealt is not None:
            parts, tests, _ = self.dealt
            print("\n".join(["", *clients(self.images, self.train, parts, tests, self.config)]))
            if self.options.save:
                held = parts, len(self.train), tests, len(self.test)
                content = partition_file.content(*held, partition_file.fingerprint(self.images, self.train))
                write_atomically(Path(self.options.save), content)
                print(f"\nwrote {self.options.save}")
        if self.options.sheet:
            write_atomically(Path(self.options.sheet), sheet(self.images))
            print(f"\nwrote {self.options.sheet}")


def summary(images: Images) -> list[str]:
    (height, width), count = images.x.shape[1:3], len(images.x)
    domains = f", {len(images.domains)} domains" if images.has_domains else ""
    groups = "" if images.superclass is None else f" in {len(set(images.superclass.tolist()))} superclasses"
    return [
        f"{images.name}: {count:,} images of {height} x {width}, {len(images.classes)} classes{groups}{domains}",
        f"{int((~images.test).sum()):,} for training, {int(images.test.sum()):,} for testing; "
        f"{images.x.nbytes / 2**20:,.0f} MiB; fingerprint {images.fingerprint()}",
        *([f"columns: {', '.join(images.columns.names)}"] if images.columns.names else []),
    ]


def table(images: Images) -> list[str]:
    """Training and test images of each class in each domain."""
    n, m = len(images.classes), len(images.domains)
    cell = images.domain * n + images.y
    train, test = (np.bincount(cell[where], minlength=n * m).reshape(m, n) for where in (~images.test, images.test))
    entry = lambda a, b: f"{a} + {b}"
    names = images.domains if images.has_domains else ()
    rows = [
        (name, entry(train[:, j].sum(), test[:, j].sum()), *(entry(train[d, j], test[d, j]) for d in range(len(names))))
        for j, name in enumerate(images.classes)
    ]
    more = [f"... and {n - SHOWN} more classes"] if n > SHOWN else []
    total = ("all", entry(train.sum(), test.sum()), *(entry(train[d].sum(), test[d].sum()) for d in range(len(names))))
    return ["training + test images", *lines(("class", "all", *names), [*rows[:SHOWN], total]), *more]


def duplicates(images: Images) -> list[str]:
    """Images that are there more than once, pixel for pixel: what they can spoil, first."""
    seen: dict[bytes, list[int]] = {}
    for i, image in enumerate(images.x):
        seen.setdefault(hashlib.sha256(image.tobytes()).digest(), []).append(i)
    several = [rows for rows in seen.values() if len(rows) > 1]
    leaked = [rows for rows in several if len({bool(images.test[i]) for i in rows}) > 1]
    torn = [rows for rows in several if len({int(images.y[i]) for i in rows}) > 1]
    if not several:
        return ["no image is there twice"]
    called = _called(images)
    say = lambda what, groups: f"{what}: {len(groups)}" + (f" (first: {called(groups[0])})" if groups else "")
    return [
        say("images that are there more than once", several),
        say("  of these both for training and for testing", leaked),
        say("  of these of more than one class", torn),
    ]


def clients(images: Images, train: np.ndarray, parts: list, tests: list, config: Config) -> list[str]:
    """How much every client has, of how many classes and of which domains."""
    sizes, rows = [len(part) for part in parts], []
    for i, (part, own) in enumerate(zip(parts, tests, strict=True)):
        held = images.domain[train[part]]
        domains = ", ".join(images.domains[d] for d, _ in Counter(held.tolist()).most_common(3))
        who = f"{i}" if i < config.clients else f"{i} (unseen)"
        rows.append((who, f"{len(part)} + {len(own)}", f"{len(set(images.y[train[part]].tolist()))}", domains))
    header = ("client", "training + test images", "classes", "domains")
    if not images.has_domains:
        header, rows = header[:3], [row[:3] for row in rows]
    more = [f"... and {len(rows) - SHOWN} more clients"] if len(rows) > SHOWN else []
    least, middle, most = min(sizes), int(np.median(sizes)), max(sizes)
    return [
        f"{config.partition}: {least} to {most} training images a client, median {middle}; partition hash "
        f"{problem.partition_hash(parts, tests)}",
        *lines(header, rows[:SHOWN]),
        *more,
    ]


def sheet(images: Images) -> bytes:
    """A picture: a row for each class, the first images of each domain beside one another."""
    classes, domains = images.classes[:SHOWN], images.domains[:12]
    scale = max(1, -(-SIDE // images.x.shape[1]))
    height, width = (scale * n for n in images.x.shape[1:3])
    left, top, gap = 120, 20, 4
    across = len(domains) * (EACH * (width + gap) + gap)
    picture = Image.new("RGB", (left + across, top + len(classes) * (height + gap)), "white")
    draw: Any = ImageDraw.Draw(picture)
    for d, domain in enumerate(domains):
        x = left + d * (EACH * (width + gap) + gap)
        draw.text((x, 4), _plain(domain if images.has_domains else images.name), "black")
        for j, name in enumerate(classes):
            y = top + j * (height + gap)
            draw.text((4, y + height // 2 - 6), _plain(name)[:18], "black")
            found = np.flatnonzero((images.y == j) & (images.domain == d))[:EACH]
            for k, i in enumerate(found):
                own = Image.fromarray(np.asarray(images.x[i])).resize((width, height), Image.Resampling.NEAREST)
                picture.paste(own, (x + k * (width + gap), y))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _called(images: Images) -> Callable[[list[int]], str]:
    """What some images are called: their files, else their rows."""
    files = columns.of(images, columns.IMAGE) if columns.IMAGE in images.columns.names else None
    names = lambda rows: map(str, rows if files is None else files[rows])
    return lambda rows: "rows " * (files is None) + ", ".join(names(rows[:4])) + " ..." * (len(rows) > 4)


def _plain(text: str) -> str:
    """What Pillow's own font has letters for."""
    return text.encode("latin-1", "replace").decode("latin-1")
