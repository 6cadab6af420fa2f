"""Names of Hugging Face transformers for the parameters of ``models.vit``: ViT, DINOv2 with and without registers.

``save_pretrained`` writes the names of old, in every version so far; a ``state_dict`` of version 5 has newer ones. Both
are read, of a bare model or of one with a classifier.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedlora_jax.lora import Params

from . import tables
from .backbone import Layout, Published
from .tables import Table

_PARTS = ("query", "key", "value")
_OUTSIDE = {"embed": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
_TOKENS = {"cls": "embeddings.cls_token", "pos": "embeddings.position_embeddings"}
_ATTENTION = {f"attn/{part}": f"attention.attention.{part}" for part in _PARTS} | {"attn/out": "attention.output.dense"}
_ATTENTION_5 = {f"attn/{part}": f"attention.{part[0]}_proj" for part in _PARTS} | {"attn/out": "attention.o_proj"}
_NORMS = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
_MLP = {"mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"}
_DINO = {"norm1": "norm1", "norm2": "norm2", **_MLP}
_SCALES = {"attn/out": "layer_scale1.lambda1", "mlp/fc2": "layer_scale2.lambda1"}
_CLASSES = {"vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}
_HEAD = "ForImageClassification.from_pretrained(MODEL, num_labels={classes}, ignore_mismatched_sizes=True)"
_MAY = ("head", *(f"attn/{part}/bias" for part in _PARTS))
# for what images do not have, and for a layer behind the features that no classifier reads
UNUSED = r"(\w+\.)?(pooler\.dense\.(weight|bias)|embeddings\.mask_token)"
# arrays of other networks, and what they do there
OTHERS = {
    r"(text_model|vision_model|beit|data2vec_vision|ijepa|yolos)\.": "these are names of a transformers model "
    "that is no plain ViT",
    r".*distillation_token": "a DeiT with a token for distillation: use the weights without one, such as "
    "facebook/deit-tiny-patch16-224, not deit-tiny-distilled-patch16-224",
    r".*weights_(in|out)\.": "MLPs are gated",
    r".*relative_position": "positions are relative",
    r".*decoder": "there is a decoder, which reconstructs images",
}


def _table(name: str, prefix: str, block: str, layers: dict[str, str], scales: dict[str, str] | None = None) -> Table:
    inside = lambda names: {ours: f"{prefix}{block}.{{i}}.{theirs}" for ours, theirs in names.items()}
    outside = lambda names: {ours: f"{prefix}{theirs}" for ours, theirs in names.items()}
    top = {**outside(_OUTSIDE), "head": "classifier"}
    return Table(name, top, inside(layers), torch=True, tokens=outside(_TOKENS), scales=inside(scales or {}), may=_MAY)


def _both(model: str, prefix: str) -> tuple[Table, ...]:
    """Of version 4 and of version 5."""
    name = f"transformers' {model}"
    if model == "DINOv2":
        layers = ({**_DINO, **_ATTENTION}, {**_DINO, **_ATTENTION_5})
        made = (_table(name, prefix, "encoder.layer", names, _SCALES) for names in layers)
        registers = {"registers": f"{prefix}embeddings.register_tokens"}
        return tuple(x._replace(tokens={**x.tokens, **registers}, may=(*x.may, "registers")) for x in made)
    old = {**_NORMS, **_ATTENTION, "mlp/fc1": "intermediate.dense", "mlp/fc2": "output.dense"}
    return (
        _table(name, prefix, "encoder.layer", old),
        _table(name, prefix, "layers", {**_NORMS, **_ATTENTION_5, **_MLP}),
    )


VIT, VIT_5 = _both("ViT", "vit.")  # of ``ViTForImageClassification``: what it saves; its modules in version 5
DINOV2 = _both("DINOv2", "dinov2.")[0]
TABLES = (
    *_both("ViT", "vit."),
    *_both("ViT", "deit."),
    *_both("ViT", ""),
    *_both("DINOv2", "dinov2."),
    *_both("DINOv2", "dinov2_with_registers."),
    *_both("DINOv2", ""),
)


def published(table: Table, pretrained: Any, classes: Sequence[str], params: Params) -> Published:
    """A folder that ``ForImageClassification.from_pretrained`` reads.

    Args:
      table: the names that the network came under.
      pretrained: what it is, a ``models.pretrained.Pretrained``.
      classes: the names of the outputs of its head.
      params: of the whole network.
    """
    model, dino = pretrained.model, bool(table.scales)
    prefix = _prefix(table, model.registers > 0)
    head, side = params["head"]["kernel"], round((len(params["pos"]) - 1) ** 0.5) * model.patch
    if dino and len(head) == model.width:  # of a bare model: there a classifier reads the mean of the patches as well
        params = {**params, "head": {**params["head"], "kernel": np.pad(head, ((0, model.width), (0, 0)))}}
    renamed = tables.write_params(_both("DINOv2" if dino else "ViT", prefix)[0], params, model.patch)
    arrays = {name: np.array(x, np.float32, order="C") for name, x in renamed.items()}
    act = {"gelu_tanh": "gelu_pytorch_tanh"}.get(model.act, model.act)
    own = {"mlp_ratio": _whole(model.mlp_width / model.width), "use_swiglu_ffn": False, "layerscale_value": 1.0}
    own |= {"num_register_tokens": model.registers} if model.registers else {}
    config = {
        "architectures": [f"{_CLASSES[prefix[:-1]]}ForImageClassification"],
        "model_type": prefix[:-1],
        **{"hidden_size": model.width, "num_hidden_layers": model.depth, "num_attention_heads": model.heads},
        **{
            "image_size": side,
            "patch_size": model.patch,
            "num_channels": len(params["embed"]["kernel"]) // model.patch**2,
        },
        **{"hidden_act": act, "layer_norm_eps": model.epsilon, "qkv_bias": True},
        **(own if dino else {"intermediate_size": model.mlp_width}),
        "id2label": {str(i): name for i, name in enumerate(classes)},
        "label2id": {name: i for i, name in enumerate(classes)},
    }
    mean, std = pretrained.mean.tolist(), pretrained.std.tolist()
    shown = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": side, "width": side}}
    shown |= {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": mean, "image_std": std}
    beside = {"config.json": config, "preprocessor_config.json": shown}
    written = {name: f"{json.dumps(x, indent=2)}\n".encode() for name, x in beside.items()}
    return Published(arrays, pretrained.said(), written)


def _whole(x: float) -> float:
    return int(x) if x == int(x) else x


def _prefix(table: Table, registers: bool) -> str:
    """What the names of a model with a classifier begin with."""
    own = table.top["embed"].partition("embeddings.")[0] or ("dinov2." if table.scales else "vit.")
    return "dinov2_with_registers." if registers else own


def layouts(table: Table, depth: int, gains: Mapping[str, np.ndarray], extra: int) -> dict[str, Layout]:
    """A network as PyTorch sees it: with a classifier or bare, its modules named as by version 5 or 4.

    Args:
      table: with the names of its arrays, fitted to them.
      depth: blocks.
      gains, extra: as for ``tables.linears``.
    """
    own = "DINOv2" if table.scales else "ViT"
    prefix = _prefix(table, "registers" in table.tokens)
    name = f"transformers.{_CLASSES[prefix[:-1]]}"
    found = {}
    for version, of in zip(("4", ""), _both(own, prefix), strict=True):
        found[f"transformers{version}"] = Layout(tables.linears(of, depth, gains, extra), f"{name}{_HEAD}")
    for version, of in zip(("4-bare", "-bare"), _both(own, ""), strict=True):
        linears = {module: x for module, x in tables.linears(of, depth, gains).items() if module != of.top["head"]}
        found[f"transformers{version}"] = Layout(linears, f"{name}Model.from_pretrained(MODEL)")
    return {version: found[version] for version in ("transformers", *sorted(found.keys() - {"transformers"}))}
