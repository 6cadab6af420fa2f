"""Who holds what: splitting a labelled data set over clients (host side, NumPy).

Every function returns one array of example numbers per client: disjoint, covering all examples, none smaller than
``minimum``. Randomness comes from the generator that is passed in and from nowhere else.

The splits of personalised federated learning (HiLoRA, arXiv 2603.02785) by other names: GL-Dir(0.3) is
``dirichlet:0.3``, SC-Dir(3) is ``superclass_dirichlet:3`` and Patho(10) is ``classes:10`` (each class has exactly ten
owners where 100 clients share 100 classes).
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from fedlora_jax.checks import refuse_outside

KINDS = ("iid", "dirichlet", "classes", "blocks", "superclass_dirichlet", "domain", "domain_dirichlet")
FORMS = "iid, dirichlet:ALPHA, classes:N, blocks, superclass_dirichlet:ALPHA, domain or domain_dirichlet:ALPHA"
_TRIES = 100


class Partition(NamedTuple):
    """A parsed partition: one of ``KINDS`` and its number (alpha, or classes per client), if it has one."""

    kind: str
    value: float | None


def parse(text: str) -> Partition:
    """``iid``, ``dirichlet:0.5``, ``classes:2``, ``domain``, ``domain_dirichlet:0.5``; ``dirichlet(0.5)`` works too."""
    found = re.fullmatch(r"([a-z_ ]+?)\s*(?:[:(]\s*([0-9.eE+-]+)\s*\)?)?", text.strip())
    kind = re.sub(r"\s*( x |_| )\s*", "_", found[1]) if found else ""
    if found is None or kind not in KINDS:
        raise ValueError(f"unknown partition {text!r}: expected {FORMS}")
    needs_value = kind not in ("iid", "domain", "blocks")
    if needs_value != (found[2] is not None):
        raise ValueError(f"partition {text!r} {'lacks its number' if needs_value else 'takes no number'}: use {FORMS}")
    if not needs_value:
        return Partition(kind, None)
    try:
        value = float(found[2])
    except ValueError:
        raise ValueError(f"partition {text!r}: {found[2]!r} is not a number") from None
    refuse_outside("(0, inf)", **{f"the number of partition {text!r}": value})
    if kind == "classes" and value != int(value):
        raise ValueError(f"partition {text!r}: its number must be a whole number above 0")
    return Partition(kind, value)


def split(
    partition: Partition | str,
    labels: np.ndarray,
    domains: np.ndarray | None,
    clients: int,
    rng: np.random.Generator,
    minimum: int = 1,
    superclasses: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Split examples with ``labels [n]`` (and ``domains [n]``, ``superclasses [n]``) over ``clients``.

    In the domain kinds client ``j`` belongs to domain ``j mod n_domains``.

    Raises:
      ValueError: the kind needs domains or superclasses and there are none, or the minimum cannot be met.
    """
    kind, value = parse(partition) if isinstance(partition, str) else partition
    if clients < 1 or clients * minimum > len(labels):
        raise ValueError(
            f"{clients} clients with at least {minimum} examples each need {max(clients, 1) * minimum}, there are "
            f"{len(labels)}: use fewer clients or a smaller minimum"
        )
    everything = np.arange(len(labels))
    match kind:
        case "iid":
            return _shuffled(np.array_split(rng.permutation(everything), clients), rng)
        case "dirichlet":
            return _shuffled(_dirichlet(everything, labels, clients, float(value or 0), rng, minimum), rng)
        case "classes":
            return _shuffled(_classes(labels, clients, int(value or 0), rng, minimum), rng)
        case "blocks":
            return _shuffled(_blocks(labels, clients, minimum, rng), rng)
        case "superclass_dirichlet":
            if superclasses is None:
                raise ValueError(
                    "partition superclass_dirichlet needs data whose classes belong to superclasses: use "
                    "dirichlet:ALPHA or classes:N"
                )
            inside = _superclasses(labels, superclasses, clients, float(value or 0), rng, minimum)
            return _shuffled(inside, rng)
    if domains is None:
        raise ValueError(f"partition {kind} needs data with domains: use iid, dirichlet:ALPHA or classes:N")
    names = np.unique(domains)
    if clients < len(names):
        raise ValueError(f"partition {kind} needs a client for each of {len(names)} domains, got {clients} clients")
    parts: list[np.ndarray] = [everything[:0]] * clients
    for j, name in enumerate(names):
        own, share = everything[domains == name], range(j, clients, len(names))
        if kind == "domain":
            inside = np.array_split(rng.permutation(own), len(share))
        else:
            inside = _dirichlet(own, labels, len(share), float(value or 0), rng, minimum, f" in domain {name}")
        for client, part in zip(share, _shuffled(inside, rng), strict=True):
            parts[client] = part
    if min(map(len, parts)) < minimum:
        raise ValueError(
            f"{clients} clients with at least {minimum} examples each do not fit into these domains: use fewer clients"
        )
    return parts


def matching_tests(
    parts: list[np.ndarray], train_cells: np.ndarray, test_cells: np.ndarray, rng: np.random.Generator
) -> list[np.ndarray]:
    """Deal test examples to clients in proportion to what they train on; disjoint.

    Args:
      parts: training examples of each client.
      train_cells, test_cells: ``[n]`` a number per example that says what must be alike, such as
        ``domain * classes + label``. Test examples of a cell that nobody trains on go to nobody.
    """
    tests: list[list[np.ndarray]] = [[] for _ in parts]
    for cell in np.unique(test_cells):
        held = np.array([np.count_nonzero(train_cells[part] == cell) for part in parts])
        if not held.any():
            continue
        members = rng.permutation(np.flatnonzero(test_cells == cell))
        # Random order of clients, so that what rounding leaves over does not always fall to the same ones.
        order = rng.permutation(len(parts))
        cuts = np.round(np.cumsum(held[order]) / held.sum() * len(members)).astype(int)[:-1]
        for client, piece in zip(order, np.split(members, cuts), strict=True):
            tests[client].append(piece)
    empty = np.arange(0)
    return [np.concatenate([empty, *pieces]) for pieces in tests]


def few(part: np.ndarray, labels: np.ndarray, shots: int, rng: np.random.Generator) -> np.ndarray:
    """Of one client's examples ``part`` those that are drawn: at most so many of each class of ``labels [n]``."""
    part = rng.permutation(part)
    kept = np.concatenate([np.flatnonzero(labels[part] == name)[:shots] for name in np.unique(labels[part])])
    return part[np.sort(kept)]


def _shuffled(parts: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """Clients in random order (so that the last ones can be held out), each with its examples in random order."""
    return [rng.permutation(parts[i]) for i in rng.permutation(len(parts))]


def _dirichlet(
    members: np.ndarray,
    labels: np.ndarray,
    clients: int,
    alpha: float,
    rng: np.random.Generator,
    minimum: int,
    where: str = "",
) -> list[np.ndarray]:
    """Per class, shares over clients from Dirichlet(alpha), none for clients that already hold their mean.

    The algorithm of FedRA's and PFLlib's public code, with empty bins at every retry and a bounded number of them.
    """
    for _ in range(_TRIES):
        bins: list[list[np.ndarray]] = [[] for _ in range(clients)]
        sizes = np.zeros(clients, int)
        for label in np.unique(labels[members]):
            own = rng.permutation(members[labels[members] == label])
            share = rng.dirichlet(np.full(clients, alpha)) * (sizes < len(members) / clients)
            # At a tiny alpha all of the mass may fall on clients that are full.
            share = share / share.sum() if share.sum() > 0 else (sizes == sizes.min()) / (sizes == sizes.min()).sum()
            for j, piece in enumerate(np.split(own, (np.cumsum(share)[:-1] * len(own)).astype(int))):
                bins[j].append(piece)
                sizes[j] += len(piece)
        if sizes.min() >= minimum:
            return [np.concatenate(pieces) for pieces in bins]
    raise ValueError(
        f"dirichlet with alpha {alpha:g} over {clients} clients{where} left one with fewer than {minimum} examples in "
        f"{_TRIES} tries: use a larger alpha, fewer clients or a smaller minimum"
    )


def _classes(
    labels: np.ndarray, clients: int, per_client: int, rng: np.random.Generator, minimum: int
) -> list[np.ndarray]:
    """Each client holds ``per_client`` different classes; a class is shared evenly among its owners."""
    names = np.unique(labels)
    if per_client > len(names):
        raise ValueError(f"classes:{per_client} asks for more classes than there are ({len(names)})")
    if clients * per_client < len(names):
        raise ValueError(
            f"{clients} clients with {per_client} classes each cannot cover {len(names)} classes: use more of either"
        )
    for _ in range(_TRIES):
        # Deal passes over shuffled classes; a pass that would give a client a class twice is redrawn.
        deck = np.concatenate([rng.permutation(names) for _ in range(-(-clients * per_client // len(names)))])
        hands = deck[: clients * per_client].reshape(clients, per_client)
        if any(len(set(hand)) < per_client for hand in hands):
            hands = np.stack([_without_repeats(hand, names, rng) for hand in hands])
        bins: list[list[np.ndarray]] = [[] for _ in range(clients)]
        owned = [np.flatnonzero((hands == name).any(1)) for name in names]
        if not all(map(len, owned)):
            continue
        for name, owners in zip(names, owned, strict=True):
            pieces = np.array_split(rng.permutation(np.flatnonzero(labels == name)), len(owners))
            for owner, piece in zip(owners, pieces, strict=True):
                bins[owner].append(piece)
        parts = [np.concatenate(pieces) for pieces in bins]
        if min(map(len, parts)) >= minimum:
            return parts
    raise ValueError(
        f"classes:{per_client} over {clients} clients left one with fewer than {minimum} examples in {_TRIES} tries: "
        "use fewer clients, more classes per client or a smaller minimum"
    )


def _blocks(labels: np.ndarray, clients: int, minimum: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Classes in random order, round(classes / clients) for each client, whatever is left for the last one.

    The pathological split of FedPGP's and pFedMMA's public code, in which no class has two owners.
    """
    names = rng.permutation(np.unique(labels))
    each = max(1, round(len(names) / clients))
    if each * (clients - 1) >= len(names):
        raise ValueError(
            f"blocks: {clients} clients with {each} of {len(names)} classes each leave the last one without any: use "
            "fewer clients, or classes:N"
        )
    hands = np.split(names, each * np.arange(1, clients))
    parts = [np.flatnonzero(np.isin(labels, hand)) for hand in hands]
    if min(map(len, parts)) < minimum:
        raise ValueError(
            f"blocks over {clients} clients leave one with fewer than {minimum} examples: use fewer clients or a "
            "smaller minimum"
        )
    return parts


def _superclasses(
    labels: np.ndarray, superclasses: np.ndarray, clients: int, alpha: float, rng: np.random.Generator, minimum: int
) -> list[np.ndarray]:
    """Each client holds one or two superclasses; per class, shares over its owners from Dirichlet(alpha).

    Our reading of HiLoRA's SC-Dir: how many superclasses a client holds is a fair coin, and they are dealt in passes,
    so that each has about as many owners.
    """
    names = np.unique(superclasses)
    for _ in range(_TRIES):
        counts = rng.integers(1, min(2, len(names)) + 1, clients)
        if counts.sum() < len(names):
            continue
        deck = np.concatenate([rng.permutation(names) for _ in range(-(-counts.sum() // len(names)))])
        hands = np.split(deck[: counts.sum()], np.cumsum(counts)[:-1])
        hands = [hand if len(set(hand)) == len(hand) else _without_repeats(hand, names, rng) for hand in hands]
        owned = {name: [j for j, hand in enumerate(hands) if name in hand] for name in names}
        if not all(owned.values()):
            continue
        bins: list[list[np.ndarray]] = [[labels[:0].astype(int)] for _ in range(clients)]
        for name, label in np.unique(np.stack([superclasses, labels]), axis=1).T:
            own = rng.permutation(np.flatnonzero((superclasses == name) & (labels == label)))
            share = rng.dirichlet(np.full(len(owned[name]), alpha))
            for j, piece in zip(
                owned[name], np.split(own, (np.cumsum(share)[:-1] * len(own)).astype(int)), strict=True
            ):
                bins[j].append(piece)
        parts = [np.concatenate(pieces) for pieces in bins]
        if min(map(len, parts)) >= minimum:
            return parts
    raise ValueError(
        f"superclass_dirichlet with alpha {alpha:g}: {clients} clients with one or two of {len(names)} superclasses "
        f"each left a superclass without an owner or a client with fewer than {minimum} examples in {_TRIES} tries: "
        "use another number of clients, a larger alpha or a smaller minimum"
    )


def _without_repeats(hand: np.ndarray, names: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    kept = np.unique(hand)
    others = rng.permutation(np.setdiff1d(names, kept))
    return np.concatenate([kept, others[: len(hand) - len(kept)]])
