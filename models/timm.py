"""Names of timm's ``VisionTransformer`` for the parameters of ``models.vit``."""

from __future__ import annotations

from types import MappingProxyType

from .tables import QKV, Table

TIMM = Table(
    "timm",
    {"embed": "patch_embed.proj", "norm_pre": "norm_pre", "norm": "norm", "head": "head"},
    {
        "norm1": "blocks.{i}.norm1",
        "attn/qkv": "blocks.{i}.attn.qkv",
        "attn/out": "blocks.{i}.attn.proj",
        "norm2": "blocks.{i}.norm2",
        "mlp/fc1": "blocks.{i}.mlp.fc1",
        "mlp/fc2": "blocks.{i}.mlp.fc2",
    },
    torch=True,
    tokens=MappingProxyType({"cls": "cls_token", "registers": "reg_token", "pos": "pos_embed"}),
    packed=MappingProxyType({"attn/qkv": QKV}),
    scales=MappingProxyType({"attn/out": "blocks.{i}.ls1.gamma", "mlp/fc2": "blocks.{i}.ls2.gamma"}),
    may=("head", "norm_pre", "cls", "registers", "attn/qkv/bias", "attn/out/scale", "mlp/fc2/scale"),
)
# the norm of the mean of tokens has a name of its own; that of tokens is not there then
TIMM_OF_MEAN = TIMM._replace(top={**TIMM.top, "norm": "fc_norm"})
# without biases where tokens are normalised before the blocks
TIMM_PRE = TIMM._replace(plain=("embed",), may=tuple(x for x in TIMM.may if x != "norm_pre"))
BASE = "timm.create_model(MODEL, pretrained=True, num_classes={classes})"  # how such a model is made
TABLES = (TIMM, TIMM_OF_MEAN, TIMM_PRE)
# arrays of other networks, and what they do there
OTHERS = {
    r".*(q_norm|k_norm)\.": "queries and keys are normalised",
    r"dist_token|head_dist\.": "there is a further token, for distillation, with a head of its own",
    r"pre_logits\.": "there is a layer between features and head",
    r"patch_embed\.": "patches are embedded by more than one convolution",
    r"attn_pool\.": "tokens are pooled by attention",
    r".*(rope|freqs|rel_pos|relative_position)": "positions are rotary or relative",
    r"blocks\.\d+\.(attn|mlp)\.norm\.": "layers of a block are normalised inside",
    r"(fc_norm|norm)\.": "tokens are normalised, and their mean once more",
}
