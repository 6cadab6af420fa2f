"""The networks that transformers computes, small and random, against ours: in both directions."""

import json
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from experiments.setup import resizing
from models import huggingface, tables
from models.positions import resize_positions
from models.pretrained import load_vit
from models.resizing import beside
from models.vit import normalise

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIDE = 12
SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": SIDE, "patch_size": 4}
NAMES = ["cat", "dog", "eel", "fox", "gnu"]
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
VIT = {**SIZES, "intermediate_size": 40}
PROCESSOR = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "rescale_factor": 1 / 255}
IMAGES = np.random.default_rng(1).integers(0, 256, (4, SIDE, SIDE, 3)).astype(np.uint8)

MODELS = {
    "ViTModel": lambda: transformers.ViTModel(transformers.ViTConfig(**VIT)),
    "ViTModel without pooler": lambda: transformers.ViTModel(transformers.ViTConfig(**VIT), add_pooling_layer=False),
    "without biases": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**VIT, **LABELS, qkv_bias=False)
    ),
    "ViTForImageClassification": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**VIT, **LABELS, layer_norm_eps=1e-3)
    ),
    "Dinov2WithRegistersModel": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, num_register_tokens=3)
    ),
    "Dinov2Model": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, mlp_ratio=2)),
    "Dinov2ForImageClassification": lambda: transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(**SIZES, **LABELS, mlp_ratio=2)
    ),
    "Dinov2WithRegistersForImageClassification": lambda: transformers.Dinov2WithRegistersForImageClassification(
        transformers.Dinov2WithRegistersConfig(**SIZES, **LABELS, mlp_ratio=2, num_register_tokens=3)
    ),
}


def model(name):
    """Every array random, so that none can be left out or mistaken for another."""
    torch.manual_seed(0)
    made = MODELS[name]().eval()
    with torch.no_grad():
        for x in made.parameters():
            x.copy_(0.3 * torch.randn_like(x))
    return made


def published(made, path, **options):
    made.save_pretrained(path, **options)
    (path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return path


def theirs(made, images=IMAGES, **options):
    """Their logits, or the class token behind the last norm."""
    x = (images / 255 - np.array(PROCESSOR["image_mean"])) / np.array(PROCESSOR["image_std"])
    with torch.no_grad():
        out = made(torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32), **options)
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state[:, 0]).numpy()


def ours(loaded, head, images=IMAGES):
    logits, out = loaded.model.apply({"params": loaded.params}, normalise(images, loaded.mean, loaded.std))
    return np.asarray(logits if head else out["features"])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "10KB"}], ids=["one file", "shards"])
def test_a_folder_of_theirs_gives_their_outputs(name, options, tmp_path):
    made = model(name)
    head = hasattr(made, "classifier")
    path = published(made, tmp_path / "a", **options)
    assert (path / "model.safetensors").exists() != bool(options)
    loaded = load_vit(path, NAMES, SIDE)
    assert loaded.origins["head"] == ("kept, for these classes" if head else "new, the file has none")
    np.testing.assert_allclose(ours(loaded, head), theirs(made), atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_names_of_a_state_dict_are_read_too(name, tmp_path):
    made = model(name)
    path = published(made, tmp_path / "a")
    save_file({name: x.numpy() for name, x in made.state_dict().items()}, path / "model.safetensors")
    np.testing.assert_allclose(ours(load_vit(path, NAMES), hasattr(made, "classifier")), theirs(made), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("ViTForImageClassification", huggingface.VIT),
        ("Dinov2Model", huggingface.TABLES[-2]),
        ("Dinov2WithRegistersModel", huggingface.TABLES[-2]),
    ],
)
def test_what_we_write_gives_our_outputs_there(name, table, tmp_path):
    made = model(name)
    head = hasattr(made, "classifier")
    loaded = load_vit(published(made, tmp_path / "a"), NAMES)
    arrays = {name: np.ascontiguousarray(x) for name, x in tables.write_params(table, loaded.params, 4).items()}
    arrays = {name: x for name, x in arrays.items() if head or not name.startswith("classifier")}
    save_file(arrays, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    again, info = type(made).from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not [name for name in info["missing_keys"] if "mask_token" not in name]
    assert not info["unexpected_keys"]
    np.testing.assert_allclose(theirs(again.eval()), ours(loaded, head), atol=1e-4)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_short_floats_are_read_as_they_are(kind, tmp_path):
    made = model("ViTForImageClassification").to(getattr(torch, kind))
    loaded = load_vit(published(made, tmp_path / "a"), NAMES)
    np.testing.assert_allclose(ours(loaded, True), theirs(made.float()), atol=1e-4)


def test_a_distilled_deit_is_refused(tmp_path):
    made = transformers.DeiTForImageClassification(transformers.DeiTConfig(**VIT, **LABELS))
    with pytest.raises(ValueError, match="token for distillation"):
        load_vit(published(made, tmp_path / "a"), NAMES)


def test_the_command_that_converts_a_pickle_does(tmp_path):
    made = model("ViTForImageClassification")
    path = published(made, tmp_path / "a folder")
    (path / "model.safetensors").unlink()
    torch.save(made.state_dict(), path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle") as refused:
        load_vit(path, NAMES)
    command = shlex.split(str(refused.value).partition("convert it: ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True)
    np.testing.assert_allclose(ours(load_vit(path, NAMES), True), theirs(made), atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(23, 31), (8, 40)])
def test_images_that_are_not_antialiased_are_those_of_pytorch(height, width):
    x = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    tensor = torch.tensor(x).permute(2, 0, 1)[None].double()
    expected = torch.nn.functional.interpolate(tensor, (9, 9), mode="bicubic", align_corners=False, antialias=False)
    got = resizing.resized(Image.fromarray(x), resizing.Resizing(9, 1.0, True, resizing.ALIASED))
    expected = np.clip(expected[0].permute(1, 2, 0).numpy(), 0, 255)
    np.testing.assert_allclose(np.asarray(got, float), expected, atol=0.51)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ViTImageProcessor", {}),
        ("CLIPImageProcessor", {}),
        ("DeiTImageProcessor", {}),
        ("BitImageProcessor", {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}),
    ],
)
def test_images_are_made_square_as_transformers_does(name, options, tmp_path):
    kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    processor = kind(**options)
    processor.save_pretrained(tmp_path)
    told, _ = beside(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 81, 3), np.uint8).repeat(8, 0).repeat(8, 1))
    theirs = processor(image, do_normalize=False, do_rescale=False, return_tensors="np")["pixel_values"][0]
    ours = resizing.resized(image, resizing.read(told["resize"], told["resample"], 224))
    np.testing.assert_array_equal(np.moveaxis(theirs, 0, -1), ours)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 4), (14, 3)])
def test_positions_are_resized_as_pytorch_does(old, new, antialias):
    positions = np.random.default_rng(0).normal(size=(1 + old**2, 8)).astype(np.float32)
    square = torch.tensor(positions[1:].reshape(1, old, old, 8)).permute(0, 3, 1, 2)
    out = torch.nn.functional.interpolate(square, (new, new), mode="bicubic", align_corners=False, antialias=antialias)
    expected = out.permute(0, 2, 3, 1).reshape(-1, 8).numpy()
    np.testing.assert_allclose(resize_positions(positions, new, 1, antialias)[1:], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "Dinov2Model", "Dinov2WithRegistersModel"])
def test_images_of_another_size_are_seen_as_theirs(name, tmp_path):
    made, images = model(name), np.random.default_rng(2).integers(0, 256, (2, 20, 20, 3)).astype(np.uint8)
    loaded = load_vit(published(made, tmp_path / "a"), NAMES, 20)
    more = {"interpolate_pos_encoding": True} if name.startswith("ViT") else {}
    head = hasattr(made, "classifier")
    np.testing.assert_allclose(ours(loaded, head, images), theirs(made, images, **more), atol=1e-4)
