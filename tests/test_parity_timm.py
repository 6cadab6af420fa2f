"""ViTs of timm and a CLIP of OpenCLIP, small and random, against ours in both directions."""

import json
from functools import partial

import numpy as np
import pytest
from clip_helpers import MERGES, encode, vocabulary
from safetensors.numpy import save_file

from models.pretrained import vit_backbone
from models.pretrained_clip import clip_backbone

torch = pytest.importorskip("torch")

SIDE, NAMES = 16, ["cat", "giant_panda", "eel", "fox", "gnu"]
IMAGES = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3)).astype(np.uint8)
SIZES = {
    "img_size": SIDE,
    "patch_size": 4,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 5,
    "mlp_ratio": 2,
}
NORM = partial(torch.nn.LayerNorm, eps=1e-5)
VARIANTS = {
    "plain": {},
    "MAE": {"global_pool": "avg"},
    "mean of the normalised": {"global_pool": "avg", "fc_norm": False},
    "no class token": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "DINOv2 with registers": {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.1},
    "registers with positions": {"reg_tokens": 2},
    "registers, no class token": {"class_token": False, "reg_tokens": 4, "no_embed_class": True, "global_pool": "avg"},
    "DeiT III": {"no_embed_class": True, "init_values": 0.1},
    "CLIP": {"pre_norm": True, "act_layer": "quick_gelu", "norm_layer": NORM},
    "OpenCLIP": {"pre_norm": True, "act_layer": "gelu", "norm_layer": NORM},
    "no biases": {"qkv_bias": False},
}
# positions that timm lays out in another way than we write them, for the same network
MOVED = {"registers with positions": {"no_embed_class": True}, "DeiT III": {"no_embed_class": False}}


def drawn(made):
    torch.manual_seed(0)
    with torch.no_grad():
        for x in made.parameters():
            x.copy_(0.3 * torch.randn_like(x))
    return made.eval()


def shown():
    return torch.tensor(((IMAGES / 255 - 0.5) / 0.25).transpose(0, 3, 1, 2), dtype=torch.float32)


def save(path, made, config):
    save_file({name: x.numpy() for name, x in made.state_dict().items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"mean": [0.5] * 3, "std": [0.25] * 3, **config}))


@pytest.mark.parametrize("case", VARIANTS)
def test_a_vit_of_timm_gives_its_logits_and_goes_back(case, tmp_path):
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    made = drawn(vision_transformer.VisionTransformer(**SIZES, **VARIANTS[case]))
    said = {name: x for name, x in VARIANTS[case].items() if isinstance(x, str)}
    save(tmp_path, made, {"num_heads": 3, "ln_eps": made.norm.eps if hasattr(made.norm, "eps") else 1e-6, **said})
    backbone = vit_backbone(tmp_path, NAMES, SIDE, keep_head=True)
    expected = made(shown()).detach().numpy()
    found = np.asarray(backbone.apply(backbone.params, {}, IMAGES)[0])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    folded = {name: x for name, x in VARIANTS[case].items() if name not in ("init_values", "qkv_bias")}
    again = vision_transformer.VisionTransformer(**SIZES, **{**folded, **MOVED.get(case, {})}).eval()
    again.load_state_dict({name: torch.tensor(x) for name, x in backbone.publish(backbone.params).arrays.items()})
    np.testing.assert_allclose(again(shown()).detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("quick", [True, False])
def test_a_clip_of_open_clip_gives_its_logits_and_goes_back(quick, tmp_path):
    clip = pytest.importorskip("open_clip.model")
    vision = {"image_size": SIDE, "layers": 2, "width": 24, "head_width": 8, "patch_size": 4}
    text = {"context_length": 40, "vocab_size": len(vocabulary()), "width": 20, "heads": 5, "layers": 2}
    config = {"embed_dim": 12, "quick_gelu": quick, "vision_cfg": vision, "text_cfg": text}
    made = drawn(clip.CLIP(**config))
    rows = [encode(f"a photo of a {name.replace('_', ' ')}.") for name in NAMES]
    tokens = torch.tensor([[*row, *[0] * (40 - len(row))] for row in rows])

    def logits(made):
        with torch.no_grad():
            image, words = made.encode_image(shown(), normalize=True), made.encode_text(tokens, normalize=True)
            return (made.logit_scale.exp() * image @ words.T).numpy()

    save(tmp_path, made, {})
    (tmp_path / "model.safetensors").rename(tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary()))
    (tmp_path / "merges.txt").write_text("\n".join(map(" ".join, MERGES)))
    backbone = clip_backbone(tmp_path, NAMES)
    np.testing.assert_allclose(backbone.apply(backbone.params, {}, IMAGES)[0], logits(made), atol=1e-5)
    published = backbone.publish(backbone.params).arrays
    again = clip.CLIP(**config).eval()
    again.load_state_dict({name: torch.tensor(x) for name, x in published.items() if "classifier" not in name})
    np.testing.assert_allclose(logits(again), logits(made), atol=1e-5)
