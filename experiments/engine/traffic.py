"""Bytes that clients send and receive, by shapes alone."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import jax

from experiments.setup.memory import bytes_of
from fedlora_jax import lora
from fedlora_jax.lora import Adapter
from fedlora_jax.method import Method, Traffic


def whole_round(method: Method, adapter: Adapter, ranks: tuple[int, ...]) -> tuple[int, int]:
    """Bytes that clients with these ranks send and receive in a round, all together, if they take part in every one."""
    sizes = of_clients(method, adapter, ranks, set(ranks))
    return sum(sizes[rank].up for rank in ranks), sum(sizes[rank].down + sizes[rank].missed for rank in ranks)


def of_clients(method: Method, adapter: Adapter, ranks: tuple[int, ...], own: Iterable[int]) -> dict[int, Traffic]:
    """``Method.traffic`` in bytes, of a client of each of the ranks ``own``, in a cohort of clients with ``ranks``."""
    shapes = {rank: jax.eval_shape(partial(lora.first_columns, rank=rank), adapter) for rank in {*own, *ranks}}
    bytes_ = lambda own, held: method.traffic(own, [held[rank] for rank in ranks])  # one adapter for all of a rank
    return {rank: Traffic(*map(bytes_of, jax.eval_shape(bytes_, shapes[rank], shapes))) for rank in own}
