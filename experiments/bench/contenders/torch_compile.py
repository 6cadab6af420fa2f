"""A lean loop, as fast as PyTorch goes on one client after another: ``torch.compile`` of loss and gradient."""

# pyright: reportMissingImports=false

from __future__ import annotations

import time

import torch

from experiments.bench import works
from experiments.bench.contenders import torch_common as common
from experiments.bench.measure import Contender
from experiments.bench.works import Work


def contender(work: Work, chunk: int | None = None) -> Contender:
    base, sent, (images, labels) = common.frozen(work), common.tensors(works.adapter(work)), common.batches(work)
    loss_fn = torch.compile(lambda adapter, x, y: common.loss_fn(work, base, adapter, x, y))

    def client(images: torch.Tensor, labels: torch.Tensor) -> common.Tensors:
        adapter = {name: x.clone().requires_grad_() for name, x in sent.items()}
        for x, y in zip(images, labels, strict=True):
            gradients = torch.autograd.grad(loss_fn(adapter, x, y), list(adapter.values()))
            with torch.no_grad():
                torch._foreach_add_(list(adapter.values()), gradients, alpha=-work.lr)
        return adapter

    def round_() -> common.Tensors:
        mean = {name: torch.zeros_like(x) for name, x in sent.items()}
        for x, y in zip(images, labels, strict=True):
            trained = [p.detach() for p in client(x, y).values()]
            torch._foreach_add_(list(mean.values()), trained, alpha=1 / work.clients)
        return common.finished(mean)

    begin = time.perf_counter()
    common.finished(client(images[0, :1], labels[0, :1]))
    about = common.about(compile_seconds=time.perf_counter() - begin)
    return Contender(round_, common.arrays, common.matmul(work), about, common.device_memory_mb)
