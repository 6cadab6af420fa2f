"""What the PyTorch contenders share: tensors of a work, a functional ViT with LoRA, and the peak of this process."""

# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from experiments.bench import works
from experiments.bench.works import Arrays, Work

Tensors = dict[str, torch.Tensor]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
VECTORS = {"DEFAULT": 128, "AVX2": 256, "AVX512": 512}
if ON_GPU:  # as JAX does by default there: TensorFloat-32 products
    torch.set_float32_matmul_precision("high")


def tensors(arrays: Arrays) -> Tensors:
    return {name: torch.from_numpy(x).to(DEVICE) for name, x in arrays.items()}


def batches(work: Work) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 ``[C, T, B, 3, side, side]`` and labels ``[C, T, B]``."""
    images, labels = works.batches(work)
    return torch.from_numpy(images).movedim(-1, -3).contiguous().to(DEVICE), torch.from_numpy(labels).long().to(DEVICE)


def normalise(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return ((images.float() / 255 - 0.5) / 0.5).to(dtype)


def frozen(work: Work) -> Tensors:
    """The base in the dtype of the activations, converted once; layer norms and head stay float32."""
    dtype, kept = getattr(torch, work.dtype), ("norm", "head", "blocks/norm")
    return {name: x if name.startswith(kept) else x.to(dtype) for name, x in tensors(works.weights(work)).items()}


def attention_by_products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


def loss_fn(
    work: Work,
    base: Tensors,
    adapter: Tensors,
    images: torch.Tensor,
    labels: torch.Tensor,
    attention: Callable = F.scaled_dot_product_attention,
) -> torch.Tensor:
    """Mean cross-entropy of one batch ``[B, 3, side, side]``."""
    d, h = work.width, work.heads
    dtype = getattr(torch, work.dtype)

    def norm(name: str, x: torch.Tensor, layer: Any = ...) -> torch.Tensor:
        y = F.layer_norm(x.float(), (d,), base[f"{name}/scale"][layer], base[f"{name}/bias"][layer], 1e-6)
        return y.to(dtype)

    def dense(name: str, x: torch.Tensor, layer: int) -> torch.Tensor:
        y = x @ base[f"{name}/kernel"][layer] + base[f"{name}/bias"][layer]
        if f"{name}/kernel" in works.ADAPTED:
            a, b = (adapter[f"{name}/kernel/{factor}"][layer].to(dtype) for factor in "ab")
            y = y + work.scale * ((x @ a) @ b)
        return y

    side, p = work.side // work.patch, work.patch
    x = normalise(images, dtype).reshape(-1, 3, side, p, side, p).permute(0, 2, 4, 3, 5, 1)
    x = x.reshape(-1, side * side, p * p * 3) @ base["embed/kernel"] + base["embed/bias"]
    x = torch.cat([base["cls"].expand(x.shape[0], 1, d), x], 1) + base["pos"]
    for layer in range(work.depth):
        y = norm("blocks/norm1", x, layer)
        split = lambda z: z.reshape(*z.shape[:-1], h, d // h).transpose(-3, -2)
        q, k, v = (split(dense(f"blocks/attn/{name}", y, layer)) for name in ("query", "key", "value"))
        y = attention(q, k, v).transpose(-3, -2).reshape(x.shape)
        x = x + dense("blocks/attn/out", y, layer)
        y = F.gelu(dense("blocks/mlp/fc1", norm("blocks/norm2", x, layer), layer))
        x = x + dense("blocks/mlp/fc2", y, layer)
    features = norm("norm", x)[:, 0].float()
    kernel, bias = base["head/kernel"] + adapter["head/kernel"], base["head/bias"] + adapter["head/bias"]
    return F.cross_entropy(features @ kernel + bias, labels)


def finished(out: Any) -> Any:
    if ON_GPU:
        torch.cuda.synchronize()
    return out


def matmul(work: Work) -> Callable[[], float]:
    """A square product, as ``Contender.matmul``."""
    side = works.product_side(work, cpu=not ON_GPU)
    x = torch.randn(side, side, device=DEVICE, dtype=getattr(torch, work.dtype))

    def call() -> float:
        finished(x @ x)
        return 2.0 * side**3

    call()
    return call


def arrays(adapter: Tensors) -> Arrays:
    return {name: x.detach().float().cpu().numpy() for name, x in adapter.items()}


def about(*packages: str, **more: Any) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if ON_GPU else f"cpu, {torch.get_num_threads()} threads"
    versions = {name: importlib.metadata.version(name) for name in ("torch", *packages)}
    used = {"vector_bits": VECTORS.get(torch.backends.cpu.get_cpu_capability())}
    return {"versions": versions, "device": f"{device} (torch), {platform.machine()}", **used, **more}


def device_memory_mb() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**20 if ON_GPU else None
