"""Our idea in PyTorch: ``torch.func`` gradients, local steps vmapped over clients in chunks."""

# pyright: reportMissingImports=false

from __future__ import annotations

import time

import torch
from torch.func import grad, vmap
from torch.nn import functional as F

from experiments.bench import works
from experiments.bench.contenders import torch_common as common
from experiments.bench.measure import Contender
from experiments.bench.works import Work

CPU_CHUNK = 4  # what a CPU's memory likes; all at once elsewhere


def contender(work: Work, chunk: int | None = None) -> Contender:
    base, sent, (images, labels) = common.frozen(work), common.tensors(works.adapter(work)), common.batches(work)
    chunk = chunk or work.chunk or (work.clients if common.ON_GPU else CPU_CHUNK)
    # On a CPU the derivative of fused attention has no batching rule: clients would follow one another in it.
    attention = F.scaled_dot_product_attention if common.ON_GPU else common.attention_by_products
    gradient = grad(lambda adapter, x, y: common.loss_fn(work, base, adapter, x, y, attention))

    def client(images: torch.Tensor, labels: torch.Tensor) -> common.Tensors:
        adapter = sent
        for x, y in zip(images, labels, strict=True):
            gradients = gradient(adapter, x, y)
            adapter = {name: p - work.lr * gradients[name] for name, p in adapter.items()}
        return adapter

    def round_(images: torch.Tensor = images, labels: torch.Tensor = labels) -> common.Tensors:
        received = vmap(client, chunk_size=chunk)(images, labels)
        return common.finished({name: x.mean(0) for name, x in received.items()})

    begin = time.perf_counter()
    round_(images[:chunk, :1], labels[:chunk, :1])  # warm
    about = common.about(chunk=chunk, first_step_seconds=time.perf_counter() - begin)
    return Contender(round_, common.arrays, common.matmul(work), about, common.device_memory_mb)
