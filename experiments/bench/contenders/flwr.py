"""Flower's simulation (ray workers) of ``torch_peft``'s clients under Flower's FedAvg.

A simulation starts workers, and each builds its model once; neither is part of a round. So every turn simulates two
rounds from the same weights and counts the second, from its first message to the aggregated weights. Memory is of
all processes together, those of ray included.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from experiments.bench import machine, works
from experiments.bench.contenders import torch_common as common
from experiments.bench.contenders import torch_peft
from experiments.bench.measure import Contender
from experiments.bench.works import Work


@functools.cache
def _worker(name: str) -> tuple[torch_peft.Trainer, tuple[torch.Tensor, torch.Tensor]]:
    """The model and everybody's batches, once in each worker."""
    work = works.find(name)
    return torch_peft.Trainer(work), common.batches(work)


def _client_app(name: str) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        trainer, (images, labels) = _worker(name)
        client = int(context.node_config["partition-id"])
        trainer.load(message.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
        trainer.train(images[client], labels[client])
        trained = {key: p.detach().cpu() for key, p in trainer.trained.items()}
        metrics = MetricRecord({"num-examples": labels[client].numel()})
        content = RecordDict({"arrays": ArrayRecord(trained), "metrics": metrics})  # type: ignore[arg-type]
        return Message(content=content, reply_to=message)

    return app


class _Clocked(FedAvg):
    """FedAvg over everybody; every round starts from the first weights, and the last one is timed."""

    def __init__(self, clients: int, start: ArrayRecord):
        everybody = {"min_train_nodes": clients, "min_available_nodes": clients}
        super().__init__(fraction_train=1.0, fraction_evaluate=0.0, **everybody)  # type: ignore[arg-type]
        self.start_arrays = start

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: Any, grid: Grid):
        self.watch = machine.Watch()
        return super().configure_train(server_round, self.start_arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Any):
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.measured = self.watch.read() | {"peak_memory_mb": machine.family_memory_mb()}
        self.arrays = arrays
        return arrays, metrics


def contender(work: Work, chunk: int | None = None) -> Contender:
    start = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in torch_peft.start(work).items()}
    resources = {"num_cpus": 1, "num_gpus": 0.25 if common.ON_GPU else 0}

    def simulate() -> _Clocked:
        strategy = _Clocked(work.clients, ArrayRecord(start))  # type: ignore[arg-type]
        server = ServerApp()

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            strategy.start(grid=grid, initial_arrays=strategy.start_arrays, num_rounds=2)

        run_simulation(server, _client_app(work.name), work.clients, backend_config={"client_resources": resources})
        if getattr(strategy, "arrays", None) is None:
            raise RuntimeError("the simulation ended without aggregated weights; see its messages")
        return strategy

    def adapter(strategy: _Clocked) -> works.Arrays:
        return torch_peft.ours(work, {k: x.numpy() for k, x in strategy.arrays.to_torch_state_dict().items()})

    about = common.about("transformers", "peft", "flwr", "ray", workers=f"{os.cpu_count()} of 1 thread")
    measured = lambda strategy: strategy.measured
    return Contender(simulate, adapter, common.matmul(work), about, common.device_memory_mb, measured)
