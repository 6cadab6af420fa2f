"""Weights by name: what is fetched, what a run keeps of it, and what is said where nothing can be."""

import fnmatch
import json
import subprocess
import sys
from types import SimpleNamespace

import clip_helpers
import pytest
from input_helpers import SMALL, change, refused
from weight_helpers import write

from experiments.cli import parse
from experiments.commands import list_models, prelude
from experiments.requests import Models
from models import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
THERE = (  # in repositories that are published
    *(
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "README.md",
        ".gitattributes",
        "tf_model.h5",
    ),
    *("pytorch_model.bin", "flax_model.msgpack", "model.onnx", "onnx/model.onnx", "model.fp16.safetensors"),
    *("model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin.index.json"),
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A hub with a ViT, and what was asked of it."""
    asked = []

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None):
        asked.append((repo_id, revision))
        assert repo_id == "somebody/small-vit", "OSError: nothing of that name\nand more"
        kept = {name for name in THERE if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)}
        folder = tmp_path / "snapshots" / COMMIT
        folder.mkdir(parents=True, exist_ok=True)
        if revision == "open_clip":
            if "open_clip_model.safetensors" in kept:
                clip_helpers.folder(
                    folder,
                    clip_helpers.as_open_clip(clip_helpers.arrays()),
                    clip_helpers.OPEN_CONFIG,
                    "open_clip_model.safetensors",
                )
            return str(folder)
        if revision != "pickles":
            assert kept == set(THERE[:4]) | {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}
            facts = {"num_attention_heads": 3, "layer_norm_eps": 1e-3, "image_mean": [0.1] * 3, "image_std": [0.2] * 3}
            write(folder / "model.safetensors", inside=None, config=facts)
        return str(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    hub.fetched.cache_clear()
    yield asked
    hub.fetched.cache_clear()


def test_a_run_keeps_the_revision_of_what_it_was_given_by_name(served, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    change()(tmp_path / "data.npz")
    options = ["--data", "data.npz", "--rank", "2", "--out", "out", "--weights", "hf:somebody/small-vit@main"]
    record = prelude.built(parse(["run", "--method", "fedit", *SMALL, *options])[1]).record
    assert record["hub"] == f"somebody/small-vit@{COMMIT}"
    assert record["weights"] == "small-vit"
    assert "weights small-vit: mean 0.1,0.1,0.1 (config.json)" in capsys.readouterr().err
    assert served == [("somebody/small-vit", "main")], "once in a process"


def test_a_listing_says_it_too(served):
    text = list_models.table(Models("hf:somebody/small-vit"))
    assert text.startswith("small-vit: vit of a size of its own in 2 blocks")
    assert f"  hub: somebody/small-vit@{COMMIT}\n" in text
    assert len(served) == 1


def test_weights_for_openclip_are_fetched_where_there_are_no_others(served):
    text = list_models.table(Models("hf:somebody/small-vit@open_clip"))
    assert text.startswith("small-vit: clip of a size of its own in 2 blocks")
    assert len(served) == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hf:small-vit", "no weights 'hf:small-vit': expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION"),
        ("hf:nobody/x", "cannot fetch hf:nobody/x: AssertionError: OSError: nothing of that name; see to the name and"),
        (
            "hf:somebody/small-vit@pickles",
            "has no model.safetensors or open_clip_model.safetensors, at most pickles, which run code of their own",
        ),
    ],
)
def test_what_cannot_be_had_is_said_in_one_line(name, said, served, capsys, monkeypatch):
    assert said in refused(["models", name], capsys, monkeypatch)


def test_without_the_package_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    said = refused(["models", "hf:somebody/small-vit@other"], capsys, monkeypatch)
    assert "pip install huggingface_hub, or give the path of a folder with its model.safetensors and" in said


def test_the_package_itself_finds_without_a_network_what_it_has_fetched(tmp_path):
    """In a cache as it lays it out."""
    pytest.importorskip("huggingface_hub")
    place = tmp_path / "hub" / "models--somebody--small-vit"
    for folder in (place / "refs", place / "snapshots" / COMMIT):
        folder.mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    write(place / "snapshots" / COMMIT / "model.safetensors")
    code = "import json; from models import hub; "
    code += "print(json.dumps([str(x) for x in hub.fetched('hf:somebody/small-vit')]))"
    code += "; hub.fetched('hf:somebody/another')"
    env = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert json.loads(done.stdout) == [str(place / "snapshots" / COMMIT), f"somebody/small-vit@{COMMIT}"], done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: cannot fetch hf:somebody/another: ")
    assert "give the path of the folder" in last
