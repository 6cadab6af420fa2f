"""What most people run: transformers' ViT with peft's LoRA, an SGD optimizer, one client after another."""

# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import time

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from experiments.bench import works
from experiments.bench.contenders import torch_common as common
from experiments.bench.measure import Contender
from experiments.bench.works import Arrays, Work
from fedlora_jax import lora
from models import huggingface, tables

LAYER = "base_model.model.vit.layers.{}.attention.{}.lora_{}.default.weight"
HEAD = "base_model.model.classifier.modules_to_save.default.{}"
FACTORS = {  # ours: theirs
    f"blocks/attn/{ours}/kernel/{factor}": (theirs, factor.upper())
    for ours, theirs in (("query", "q_proj"), ("value", "v_proj"))
    for factor in "ab"
}


def build(work: Work) -> torch.nn.Module:
    """The model with the weights of a work, a LoRA on query and value and a trained classifier; nothing is fetched."""
    config = ViTConfig(
        hidden_size=work.width,
        num_hidden_layers=work.depth,
        num_attention_heads=work.heads,
        intermediate_size=work.mlp,
        image_size=work.side,
        patch_size=work.patch,
        num_labels=work.classes,
        layer_norm_eps=1e-6,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = ViTForImageClassification(config)
    model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in _named(work).items()})
    lora = LoraConfig(
        r=work.rank,
        lora_alpha=work.scale * work.rank,  # type: ignore[arg-type]
        target_modules=["q_proj", "v_proj"],
        lora_dropout=0.0,
        modules_to_save=["classifier"],
    )
    model = get_peft_model(model, lora).to(common.DEVICE).train()  # type: ignore[arg-type]
    for p in model.parameters():
        if not p.requires_grad:  # what is frozen is converted once, not in every step
            p.data = p.data.to(getattr(torch, work.dtype))
    return model


def _named(work: Work) -> Arrays:
    """The weights under the names and in the layouts of transformers, version 5."""
    params = lora.unflatten(works.weights(work))
    return {name: np.array(x) for name, x in tables.write_params(huggingface.VIT_5, params, work.patch).items()}


def start(work: Work) -> Arrays:
    """The trained parameters under peft's names, where a round starts."""
    given, base = works.adapter(work), works.weights(work)
    named = {
        LAYER.format(i, theirs, factor): given[ours][i].T
        for ours, (theirs, factor) in FACTORS.items()
        for i in range(work.depth)
    }
    for theirs, ours in (("weight", "head/kernel"), ("bias", "head/bias")):
        named[HEAD.format(theirs)] = (base[ours] + given[ours]).T
    return named


def ours(work: Work, trained: Arrays) -> Arrays:
    """Those parameters, named as in ``works.adapter``."""
    base = works.weights(work)
    named = {
        name: np.stack([trained[LAYER.format(i, theirs, factor)].T for i in range(work.depth)])
        for name, (theirs, factor) in FACTORS.items()
    }
    heads = (("weight", "head/kernel"), ("bias", "head/bias"))
    return named | {name: trained[HEAD.format(theirs)].T - base[name] for theirs, name in heads}


class Trainer:
    """One model that plays one client after another."""

    def __init__(self, work: Work):
        self.work, self.model = work, build(work)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def load(self, named: common.Tensors) -> None:
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(named[name])

    def train(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Local steps of one client from where the model is: images ``[T, B, 3, side, side]``, labels ``[T, B]``."""
        optimizer = torch.optim.SGD(self.trained.values(), lr=self.work.lr)
        half = self.work.dtype != "float32"
        for x, y in zip(images, labels, strict=True):
            with torch.autocast(common.DEVICE.type, torch.bfloat16) if half else contextlib.nullcontext():
                loss = self.model(pixel_values=common.normalise(x), labels=y).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def contender(work: Work, chunk: int | None = None) -> Contender:
    trainer, (images, labels) = Trainer(work), common.batches(work)
    sent = common.tensors({name: np.ascontiguousarray(x) for name, x in start(work).items()})

    def round_() -> common.Tensors:
        mean = {name: torch.zeros_like(x) for name, x in sent.items()}
        for x, y in zip(images, labels, strict=True):
            trainer.load(sent)
            trainer.train(x, y)
            for name, p in trainer.trained.items():
                mean[name] += p.detach() / work.clients
        return common.finished(mean)

    begin = time.perf_counter()
    trainer.load(sent)
    common.finished(trainer.train(images[0, :1], labels[0, :1]))  # warm
    about = common.about("transformers", "peft", compile_seconds=None, first_step_seconds=time.perf_counter() - begin)
    adapter = lambda mean: ours(work, common.arrays(mean))
    return Contender(round_, adapter, common.matmul(work), about, common.device_memory_mb)
