"""Adapters out and in: what PEFT computes with a folder is what we do, of published models trained in two rounds."""

import json
import re

import jax
import numpy as np
import pytest
from input_helpers import SMALL, change
from peft_helpers import federated
from safetensors.numpy import save_file

from experiments.cli import parse
from experiments.commands.compare import Plan
from experiments.commands.export import Plan as Export
from experiments.config import Config
from experiments.setup import adapter as adapters
from experiments.setup.backbone import cut
from experiments.setup.problem import new_adapter
from fedlora_jax import lora
from models import peft as ours
from models.families import find

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
# what peft asks transformers, which has another name for it now
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SIDE, WIDTH, CLASSES = 16, 24, 3
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": SIDE, "patch_size": 4}
FACTS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "heads": 3, "ln_eps": 1e-6}
PROCESSOR = {"image_mean": FACTS["mean"], "image_std": FACTS["std"], "rescale_factor": 1 / 255}
IMAGES = np.random.default_rng(1).integers(0, 256, (4, SIDE, SIDE, 3)).astype(np.uint8)


class Layers(torch.nn.Module):
    """Modules by name, as timm nests them."""

    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


class Block(Layers):
    def __init__(self):
        linear, norm = torch.nn.Linear, torch.nn.LayerNorm
        attn = Layers(qkv=linear(WIDTH, 3 * WIDTH), proj=linear(WIDTH, WIDTH))
        mlp = Layers(fc1=linear(WIDTH, 40), fc2=linear(40, WIDTH))
        super().__init__(
            norm1=norm(WIDTH, 1e-6), attn=attn, norm2=norm(WIDTH, 1e-6), mlp=mlp, ls1=Layers(), ls2=Layers()
        )
        for scale in (self.ls1, self.ls2):
            scale.gamma = torch.nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (3, -1)).transpose(1, 2) for y in self.attn.qkv(self.norm1(x)).chunk(3, -1))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.ls1.gamma * self.attn.proj(mixed)
        return x + self.ls2.gamma * self.mlp.fc2(torch.nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


class Timm(Layers):
    """The plain ViT of timm, by its names: queries, keys and values in one layer, and a LayerScale."""

    def __init__(self):
        super().__init__(
            patch_embed=Layers(proj=torch.nn.Conv2d(3, WIDTH, 4, 4)),
            blocks=torch.nn.ModuleList([Block(), Block()]),
            norm=torch.nn.LayerNorm(WIDTH, 1e-6),
            head=torch.nn.Linear(WIDTH, CLASSES),
        )
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, 1 + (SIDE // 4) ** 2, WIDTH))

    def forward(self, images):
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class MixerBlock(Layers):
    def __init__(self):
        mlp = lambda width, hidden: Layers(fc1=torch.nn.Linear(width, hidden), fc2=torch.nn.Linear(hidden, width))
        super().__init__(
            norm1=torch.nn.LayerNorm(WIDTH, 1e-6),
            mlp_tokens=mlp((SIDE // 4) ** 2, 10),
            norm2=torch.nn.LayerNorm(WIDTH, 1e-6),
            mlp_channels=mlp(WIDTH, 40),
        )

    def forward(self, x):
        apply = lambda mlp, x: mlp.fc2(torch.nn.functional.gelu(mlp.fc1(x)))
        x = x + apply(self.mlp_tokens, self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + apply(self.mlp_channels, self.norm2(x))


class TimmMixer(Layers):
    """The MLP-Mixer of timm, by its names."""

    def __init__(self):
        super().__init__(
            stem=Layers(proj=torch.nn.Conv2d(3, WIDTH, 4, 4)),
            blocks=torch.nn.ModuleList([MixerBlock(), MixerBlock()]),
            norm=torch.nn.LayerNorm(WIDTH, 1e-6),
            head=torch.nn.Linear(WIDTH, CLASSES),
        )

    def forward(self, images):
        x = self.stem.proj(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def vit_config():
    return transformers.ViTConfig(**SIZES, intermediate_size=40, num_labels=CLASSES, layer_norm_eps=1e-6)


def dino_config():
    return transformers.Dinov2Config(**SIZES, mlp_ratio=2, num_labels=CLASSES)


MODELS = {
    "timm": Timm,
    "timm's Mixer": TimmMixer,
    "ViT": lambda: transformers.ViTForImageClassification(vit_config()),
    "DINOv2": lambda: transformers.Dinov2ForImageClassification(dino_config()),
}


def model(name):
    """Every array random, so that none can be left out or mistaken for another."""
    torch.manual_seed(0)
    made = MODELS[name]().eval()
    with torch.no_grad():
        for x in made.parameters():
            x.copy_(0.3 * torch.randn_like(x))
    return made


def published(made, path, bare=False):
    """As a folder; with "bare" a DINOv2 without its classifier, whose new head reads the class token alone."""
    path.mkdir()
    if isinstance(made, Layers):
        facts = {name: json.dumps(x) for name, x in FACTS.items()}
        save_file({name: x.numpy() for name, x in made.state_dict().items()}, path / "model.safetensors", facts)
        return path
    (made.dinov2 if bare else made).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return path


def logits(made, images=IMAGES):
    x = (images / 255 - np.array(FACTS["mean"])) / np.array(FACTS["std"])
    with torch.no_grad():
        out = made(torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32))
    return (out.logits if hasattr(out, "logits") else out).numpy()


def backbone_of(path):
    return find(None, path)(path, CLASSES, SIDE)


@pytest.mark.parametrize(("name", "bare"), [*((name, False) for name in MODELS), ("DINOv2", True)])
def test_a_published_model_trained_in_two_rounds_goes_back(name, bare, tmp_path):
    made = model(name)
    backbone = backbone_of(published(made, tmp_path / "weights", bare))
    start = lora.new(jax.random.key(0), backbone.params, 2, targets=backbone.targets["all"], full="^head/", scale=1.5)
    adapter = federated(backbone, start, SIDE, CLASSES)
    layout = next(iter(backbone.layouts.values()))
    assert not ours.unheld(layout, backbone.params, adapter)
    (tmp_path / "adapter").mkdir()
    for file, content in ours.files_of(layout, backbone.params, adapter, {}).items():
        (tmp_path / "adapter" / file).write_bytes(content)
    before = logits(made)
    whole = peft.PeftModel.from_pretrained(made, str(tmp_path / "adapter"))
    expected = backbone.apply(backbone.params, adapter, IMAGES)[0]
    np.testing.assert_allclose(logits(whole), expected, atol=1e-4)
    assert np.abs(logits(whole) - before).max() > 0.1
    np.testing.assert_allclose(logits(whole.merge_and_unload()), expected, atol=1e-4)


def test_what_the_command_line_writes_is_loaded_as_it_says(tmp_path, monkeypatch, capsys):
    """The last of its two blocks: the other is not named."""
    published(model("ViT"), tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    change()(tmp_path / "data.npz")
    run = ["compare", "--methods", "fedit", "--data", "data.npz", "--weights", "weights", "--adapt-last", "1"]
    Plan(*parse([*run, "--targets", "all", "--out", "run", *SMALL])).execute()
    plan = Export(parse(["export", "run", "--to", "peft", "--out", "out"])[1])
    capsys.readouterr()
    plan.execute()
    _, _, said = capsys.readouterr().out.strip().partition(", for ")
    made = eval(said, {"transformers": transformers, "MODEL": "weights"})
    whole = peft.PeftModel.from_pretrained(made.eval(), "out/global")
    (served,), images = plan.models, plan.problem.images.x[plan.problem.images.test]
    stem, top = plan.problem.backbone.cut(1)
    tokens = stem.apply(stem.params, images)
    np.testing.assert_allclose(logits(whole, images), top.apply(served.base, served.adapter, tokens)[0], atol=1e-4)
    assert len(whole.peft_config["default"].target_modules) == 6


HEAD = {"timm": "head", "timm's Mixer": "head", "ViT": "classifier", "DINOv2": "classifier"}
COMING = {
    "ViT, a list": ("ViT", {"target_modules": ["q_proj", "fc2", "o_proj"], "lora_alpha": 6}),
    "ViT, an expression and sqrt(r)": (
        "ViT",
        {"target_modules": r".*\.layers\.\d+\.(attention\.[kv]_proj|mlp\.fc1)", "lora_alpha": 3, "use_rslora": True},
    ),
    "ViT, ranks and factors of its own": (
        "ViT",
        {
            "target_modules": ["q_proj", "fc1"],
            "lora_alpha": 5,
            "rank_pattern": {"fc1": 2, r"layers\.0\.attention\.q_proj": 1},
            "alpha_pattern": {"layers.1.mlp.fc1": 9, "q_proj": -4},
        },
    ),
    "ViT, everything, orthogonal": (
        "ViT",
        {"target_modules": "all-linear", "lora_alpha": 4, "r": 2, "init_lora_weights": "orthogonal"},
    ),
    "ViT, a block alone": (
        "ViT",
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "DINOv2": (
        "DINOv2",
        {"target_modules": ["v_proj", "fc1", "fc2"], "lora_alpha": 7, "rank_pattern": {"fc2": 1}, "use_rslora": True},
    ),
    "timm's Mixer": ("timm's Mixer", {"target_modules": ["fc2"], "use_rslora": True}),
    "timm": ("timm", {"target_modules": r"blocks\.\d\.(attn\.qkv|mlp\.fc2)", "alpha_pattern": {"qkv": 3}}),
}


@pytest.mark.parametrize("case", COMING)
def test_what_peft_has_written_comes_in_as_it_is_there(case, tmp_path):
    name, options = COMING[case]
    made = model(name)
    weights, before = published(made, tmp_path / "weights"), logits(made)
    saved = peft.LoraConfig(**{"r": 3, "modules_to_save": [HEAD[name]], "lora_dropout": 0.1, **options})
    whole = peft.get_peft_model(made, saved).eval()
    with torch.no_grad():
        for x in (x for x in whole.parameters() if x.requires_grad):
            x.copy_(0.3 * torch.randn_like(x))
    whole.save_pretrained(tmp_path / "adapter")
    assert np.abs(logits(whole) - before).max() > 0.1
    blocks, path = 1 if "layers_to_transform" in options else None, str(tmp_path / "adapter")
    config = Config(**{**adapters.options(path), "adapter": path, "keep_head": True, "adapt_last": blocks})
    backbone = find(None, weights)(weights, CLASSES, SIDE)
    stem, top = cut(backbone, blocks)
    config, top, start = adapters.begins(config, backbone, top, tuple("abc"))
    adapter = start.onto(new_adapter(config, top, jax.random.key(0)))
    shown = IMAGES if stem is None else stem.apply(stem.params, IMAGES)
    np.testing.assert_allclose(top.apply(top.params, adapter, shown)[0], logits(whole), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "sets use_dora to true: nothing here computes that"),
        ({"bias": "all"}, 'sets bias to "all": nothing here computes that'),
        ({"bias": "lora_only"}, 'sets bias to "lora_only": nothing here computes that'),
        ({"lora_bias": True}, "sets lora_bias to true: nothing here computes that"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora', which changes the weights"),
        ({"target_parameters": ["fc1.weight"]}, "sets target_parameters to"),
        ({"trainable_token_indices": {"q_proj": [1]}}, "sets trainable_token_indices to"),
        ({"fan_in_fan_out": True}, "sets fan_in_fan_out to true"),
        ({"layer_replication": [(0, 1), (0, 1)]}, "sets layer_replication to"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the weights"),
        (peft.IA3Config, "peft_type is 'IA3', expected 'LORA'"),
        (peft.LoHaConfig, "peft_type is 'LOHA', expected 'LORA'"),
    ],
    ids=str,
)
def test_what_peft_has_written_and_nothing_here_computes_is_refused(options, said, tmp_path):
    """Its configuration says so, whatever the arrays are."""
    kind, more = (peft.LoraConfig, options) if isinstance(options, dict) else (options, {})
    kind(target_modules=["q_proj"], **more).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="^[^\n]*" + re.escape(said) + "[^\n]*$"):
        adapters.options(str(tmp_path))


@pytest.mark.parametrize(("name", "bare"), [("ViT", False), ("DINOv2", True)], ids=["ViT", "DINOv2, bare"])
def test_merged_weights_leave_as_a_folder_of_transformers(name, bare, tmp_path, monkeypatch):
    """Of a model that came so: cut, resized, with a new head; the folder is read there, and here again."""
    made = model(name)
    published(made, tmp_path / "weights", bare)
    monkeypatch.chdir(tmp_path)
    change()(tmp_path / "data.npz")
    run = ["compare", "--methods", "fedit", "--data", "data.npz", "--weights", "weights", "--adapt-last", "1"]
    Plan(*parse([*run, "--targets", "all", "--out", "run", *SMALL])).execute()
    plan = Export(parse(["export", "run", "--out", "out"])[1])
    plan.execute()
    again, info = transformers.AutoModelForImageClassification.from_pretrained("out/global", output_loading_info=True)
    assert not [name for name in info["missing_keys"] if "mask_token" not in name]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert again.config.id2label == dict(enumerate("abc"))
    (served,), images = plan.models, plan.problem.images.x[plan.problem.images.test]
    stem, top = plan.problem.backbone.cut(1)
    expected = top.apply(served.base, served.adapter, stem.apply(stem.params, images))[0]
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(logits(again.eval(), images), expected, atol=1e-4)
    read = find(None, tmp_path / "out/global")(tmp_path / "out/global", tuple("abc"))
    assert read.facts["head"] == "kept, for these classes"
    np.testing.assert_allclose(read.apply(read.params, {}, images)[0], expected, atol=1e-4)
    shown = transformers.AutoImageProcessor.from_pretrained("out/global", backend="pil")
    assert (shown.image_mean, shown.size["height"]) == (pytest.approx(PROCESSOR["image_mean"]), SIDE)
