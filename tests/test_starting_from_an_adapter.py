"""--adapter: what PEFT computes with a folder is what a run begins with; others are refused in a line."""

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import test_huggingface as theirs
from input_helpers import SMALL, change, refused
from peft_helpers import PREFIX, applied, folder, random_adapter
from safetensors.numpy import load_file, save_file
from weight_helpers import FACTS, reference_forward, timm_arrays, write

from experiments.cli import parse
from experiments.commands.export import Model, as_adapter, as_published
from experiments.config import Config
from experiments.setup import adapter as adapters
from experiments.setup import head
from experiments.setup.problem import new_adapter
from fedlora_jax import lora
from models import huggingface, peft
from models.families import find

IMAGES, NAMES = theirs.IMAGES, theirs.NAMES
MODULES = {"attention.q_proj": (12, 12), "mlp.fc2": (20, 12)}  # of a block: in, out


def made_by_peft(path, bare=False, rows=(0, 1), scale=0.3, **options):
    """A folder as PEFT's ``save_pretrained`` writes one of a ViT of transformers 5, random."""
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}
    config |= {"target_modules": ["q_proj", "fc2"], "modules_to_save": ["classifier"], "use_rslora": False}
    config |= {
        "base_model_name_or_path": "x",
        "task_type": None,
        "use_dora": False,
        "init_lora_weights": True,
    } | options
    draw, arrays = np.random.default_rng(4).normal, {}
    for i in rows:
        for name, (n_in, n_out) in MODULES.items():
            module = f"{'' if bare else 'vit.'}layers.{i}.{name}"
            rank = config["rank_pattern"].get(f"layers.{i}.{name}", 3)
            arrays[f"{module}.lora_A.weight"] = scale * draw(size=(rank, n_in))
            arrays[f"{module}.lora_B.weight"] = scale * draw(size=(n_out, rank))
    if not bare:
        arrays |= {"classifier.weight": draw(size=(5, 12)), "classifier.bias": draw(size=5)}
    path.mkdir()
    arrays = {f"{PREFIX}{name}": np.float32(x) for name, x in arrays.items()}
    save_file(arrays, path / "adapter_model.safetensors", {"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def begun(path, backbone, classes=NAMES, blocks=None, **given):
    """The model and the adapter with which a run starts."""
    config = Config(
        **{**adapters.options(str(path)), "adapter": str(path), "keep_head": True, "adapt_last": blocks, **given}
    )
    top = backbone if blocks is None else backbone.cut(blocks)[1]
    config, top, start = adapters.begins(config, backbone, top, tuple(classes))
    return top, start.onto(new_adapter(config, top, jax.random.key(0))), start


def vit(path):
    """A ViT of transformers 5 by the names of its modules, as a state dict and as a backbone."""
    arrays = theirs.by_hand(huggingface.TABLES[1])
    return arrays, find(None, theirs.folder(path, arrays))(path, NAMES)


@pytest.mark.long
def test_a_folder_of_peft_is_what_a_run_begins_with(tmp_path):
    """Ranks and factors of some layers are their own; the head is the adapter's."""
    patterns = {"rank_pattern": {"layers.1.mlp.fc2": 2, "layers.0.attention.q_proj": 1}, "alpha_pattern": {"fc2": 9}}
    path = made_by_peft(tmp_path / "a", **patterns)
    arrays, backbone = vit(tmp_path / "vit")
    top, adapter, start = begun(path, backbone)
    flat = lora.flatten(adapter)
    query, fc2 = flat["blocks/attn/query/kernel"], flat["blocks/mlp/fc2/kernel"]
    assert {name for name, x in flat.items() if lora.is_lora(x)} == {
        "blocks/attn/query/kernel",
        "blocks/mlp/fc2/kernel",
    }
    assert (query.a.shape, fc2.a.shape) == ((2, 12, 3), (2, 20, 3))
    assert not query.b[0, 1:].any()  # of rank 1 there
    assert (query.a[0, :, 1:] != 0).all()  # and can learn
    merged = applied(arrays, path)
    again = theirs.folder(tmp_path / "merged", {name: np.float32(x) for name, x in merged.items()})
    expected = find(None, again)(again, NAMES)
    got = top.apply(top.params, adapter, IMAGES)[0]
    np.testing.assert_allclose(got, expected.apply(expected.params, {}, IMAGES)[0], rtol=5e-4, atol=5e-4)
    assert start.record["adapter_head"] == "kept, as asked"


def test_prototypes_take_the_place_of_its_head(tmp_path):
    path, (_, backbone) = made_by_peft(tmp_path / "a"), vit(tmp_path / "vit")
    backbone = head.emptied(backbone)
    top, _, start = begun(path, backbone, keep_head=False, head="prototype")
    assert start.record["adapter_head"] == "left out, --head prototype starts from another"
    assert not np.any(top.params["head"]["kernel"])


@pytest.mark.parametrize("rslora", [False, True])
def test_the_factor_is_that_of_its_kind(rslora, tmp_path):
    """An adapter of a bare model, without a head."""
    path = made_by_peft(tmp_path / "a", bare=True, use_rslora=rslora)
    _, adapter, start = begun(path, vit(tmp_path / "vit")[1])
    assert {x.scale for x in lora.low_rank_leaves(adapter)} == {6 / 3**0.5 if rslora else 2.0}
    assert start.record["adapter_head"] == "not in the adapter"


def test_what_was_exported_comes_in_as_it_was(tmp_path):
    """Timm's queries, keys and values are one layer: each has its own rank again. The classes' names are there."""
    weights = write(tmp_path / "vit.safetensors")
    backbone = find(None, weights)(weights, 5)
    out = random_adapter(backbone.params, ("attn/(query|value)/kernel", "mlp/fc1/kernel"), scale=0.7)
    files = peft.files_of(backbone.layouts["timm"], backbone.params, out, {"classes": NAMES})
    top, adapter, start = begun(folder(tmp_path / "a", files), backbone, keep_head=False)
    assert start.record["adapter_head"] == "kept, for these classes"
    for name, x in lora.flatten(lora.split(adapter)[0]).items():
        assert x.scale == pytest.approx(0.7)
        for factor in "ab":
            np.testing.assert_allclose(getattr(x, factor), getattr(lora.flatten(out)[name], factor), rtol=1e-6)
    assert lora.flatten(lora.split(adapter)[0]).keys() == lora.flatten(lora.split(out)[0]).keys()
    expected = backbone.apply(backbone.params, out, IMAGES)[0]
    np.testing.assert_allclose(top.apply(top.params, adapter, IMAGES)[0], expected, rtol=1e-5, atol=1e-5)
    _, _, other = begun(tmp_path / "a", backbone, ("1", "2", "3", "4", "5"), keep_head=False)
    assert other.record["adapter_head"] == "new, the file's is for 5 other classes"


def test_an_adapter_of_a_packed_layer_is_for_all_that_is_in_it(tmp_path):
    """Made by PEFT on timm's ``qkv``, under a LayerScale."""
    draw = np.random.default_rng(5).normal
    arrays = timm_arrays(**{f"blocks.{i}.ls1.gamma": draw(size=12) for i in range(2)})
    weights = write(tmp_path / "vit.safetensors", arrays)
    backbone = find(None, weights)(weights, 5, keep_head=True)
    layers, found = {"qkv": 36, "proj": 12}, {}
    for name, outputs in layers.items():
        for module in (f"{PREFIX}blocks.{i}.attn.{name}" for i in range(2)):
            found[f"{module}.lora_A.weight"] = np.float32(draw(size=(2, 12)))
            found[f"{module}.lora_B.weight"] = np.float32(draw(size=(outputs, 2)))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": r".*\.(qkv|proj)", "use_rslora": False}
    config |= {"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None}
    path = tmp_path / "a"
    path.mkdir()
    save_file(found, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config))
    top, adapter, _ = begun(path, backbone)
    assert len(lora.low_rank_leaves(adapter)) == 4
    config["target_modules"] = ["qkv", "proj"]
    (path / "adapter_config.json").write_text(json.dumps(config))
    merged = applied(arrays, path)
    expected = [reference_forward(merged, image, FACTS) for image in IMAGES]
    np.testing.assert_allclose(top.apply(top.params, adapter, IMAGES)[0], expected, rtol=5e-4, atol=5e-4)


def test_an_adapter_of_the_last_blocks_is_for_a_model_that_is_cut_there(tmp_path):
    _, backbone = vit(tmp_path / "vit")
    path = made_by_peft(tmp_path / "a", rows=(1,))
    _, adapter, _ = begun(path, backbone, blocks=1)
    assert {x.a.shape[0] for x in lora.low_rank_leaves(adapter)} == {1}
    with pytest.raises(ValueError, match="in blocks 1 of 2, the run those from 0: use --adapt-last 1"):
        begun(path, backbone)
    with pytest.raises(ValueError, match="in blocks 0,1 of 2, the run those from 1: leave --adapt-last out"):
        begun(made_by_peft(tmp_path / "b"), backbone, blocks=1)
    with pytest.raises(ValueError, match="only the last blocks of a model can be adapted alone"):
        begun(made_by_peft(tmp_path / "c", rows=(0,)), backbone)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', expected 'LORA'"),
        ({"use_dora": True}, "sets use_dora to true: nothing here computes that"),
        ({"bias": "all"}, 'sets bias to "all": nothing here computes that'),
        ({"lora_bias": True}, "sets lora_bias to true: nothing here computes that"),
        ({"fan_in_fan_out": True}, "sets fan_in_fan_out to true: nothing here computes that"),
        ({"something_new": [1]}, "sets something_new to [1]: nothing here computes that"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the weights that it adapts"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq', which changes the weights that it adapts"),
        ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda', which changes the weights that it adapts"),
        ({"lora_alpha": float("nan")}, "r and lora_alpha are 3 and nan: expected finite numbers"),
        ({"lora_alpha": float("-inf")}, "r and lora_alpha are 3 and -inf: expected finite numbers"),
        ({"lora_alpha": 0}, "r and lora_alpha are 3 and 0: expected finite numbers, r above 0 and whole, lora_alpha"),
        ({"r": True}, "r and lora_alpha are True and 6: expected finite numbers"),
        ({"alpha_pattern": {"fc2": float("inf")}}, 'alpha_pattern is {"fc2": Infinity}: rank_pattern and'),
        ({"rank_pattern": {"fc2": 2.5}}, 'rank_pattern is {"fc2": 2.5}: rank_pattern and alpha_pattern must be'),
        ({"r": 4}, "has [3, 12] and [12, 3]: expected [rank, in] and [out, rank] of a linear layer and rank 4"),
        ({"r": None}, "r and lora_alpha are None and 6: expected finite numbers"),
        ({"target_modules": ["fc2"]}, "has an update of vit.layers.0.attention.q_proj, which target_modules of its"),
        ({"target_modules": "("}, "has a pattern that is no regular expression"),
        ({"rank_pattern": [1]}, "rank_pattern and alpha_pattern must be finite numbers by the names of modules"),
    ],
)
def test_what_nothing_here_computes_is_refused_by_name(options, said, tmp_path, capsys, monkeypatch):
    path = made_by_peft(tmp_path / "a")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **options}))
    assert said in refused(["run", "--method", "fedit", "--adapter", str(path)], capsys, monkeypatch)


def test_what_is_no_adapter_of_this_model_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    say = lambda *options: refused(["run", "--method", "fedit", *options], capsys, monkeypatch)
    assert "no adapter in nowhere: expected a folder of PEFT, with adapter_config.json" in say("--adapter", "nowhere")
    made_by_peft(tmp_path / "a")
    assert "a is not of this model: it has classifier, vit.layers.0.attention.q_proj," in say("--adapter", "a")
    shutil.copytree("a", "b")
    weights = tmp_path / "b" / "adapter_model.safetensors"
    arrays = load_file(weights)
    save_file({**arrays, f"{PREFIX}vit.layers.0.mlp.fc2.lora_magnitude_vector": np.zeros(3)}, weights)
    assert "holds base_model.model.vit.layers.0.mlp.fc2.lora_magnitude_vector: expected" in say("--adapter", "b")
    weights.write_bytes(weights.read_bytes()[:100])
    assert "b/adapter_model.safetensors is damaged or truncated" in say("--adapter", "b")
    weights.rename(weights.with_name("adapter_model.bin"))
    assert "but adapter_model.bin, a pickle, which runs code of its own" in say("--adapter", "b")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rank": (4,)}, "--rank 4 is not that of --adapter"),
        ({"scale": 1.0}, "--scale 1 is not that of --adapter"),
        ({"alpha": 1.0}, "--alpha 1 is not that of --adapter"),
        ({"targets": ("qv",)}, "--targets qv finds blocks/attn/query/kernel, blocks/attn/value/kernel, --adapter"),
        ({"full": ("head", "fc2/kernel")}, "would be adapted"),
        ({"head": "cosine"}, "none there has the head of --head cosine: leave one of them out"),
    ],
)
def test_options_that_say_otherwise_are_refused(given, said, tmp_path, capsys):
    _, backbone = vit(tmp_path / "vit")
    path = made_by_peft(tmp_path / "a")
    begun(path, backbone, rank=(1, 3), targets=("attn/query/kernel", "fc2/kernel"))
    assert "note: --rank 1,3: clients of less than 3 are sent a part of the adapter" in capsys.readouterr().err
    begun(path, backbone)
    assert "note:" not in capsys.readouterr().err
    with pytest.raises(ValueError, match=said):
        begun(path, backbone, **given)


@pytest.mark.parametrize("full", [(), ("^head/",)])
def test_the_head_that_an_adapter_came_with_leaves_with_the_next(full, tmp_path):
    """Frozen or trained on, it is in no weights: a new folder has it, and makes the same model of them."""
    _, backbone = vit(tmp_path / "vit")
    top, started, _ = begun(made_by_peft(tmp_path / "a"), backbone, full=full)
    own, brought = as_published(Config(full=full), SimpleNamespace(base=top.params), backbone)  # type: ignore[arg-type]
    assert brought == ["head/bias", "head/kernel"]
    adapter, beyond = as_adapter(own, Model("global", top.params, started), brought)
    assert not beyond
    expected = top.apply(top.params, started, IMAGES)[0]
    np.testing.assert_allclose(backbone.apply(backbone.params, adapter, IMAGES)[0], expected, atol=1e-5)
    (tmp_path / "b").mkdir()
    for name, content in peft.files_of(next(iter(backbone.layouts.values())), own, adapter, {}).items():
        (tmp_path / "b" / name).write_bytes(content)
    again, restarted, _ = begun(tmp_path / "b", backbone, full=full)
    np.testing.assert_allclose(again.apply(again.params, restarted, IMAGES)[0], expected, atol=1e-5)


@pytest.mark.long
def test_a_run_goes_on_from_what_another_has_learned(tmp_path, monkeypatch):
    """Through the command line: the model of the first run is what the second sends first."""
    from experiments.commands.compare import Plan
    from experiments.commands.export import Plan as Export

    monkeypatch.chdir(tmp_path)
    change()(tmp_path / "data.npz")
    run = ["compare", "--data", "data.npz", *SMALL]
    Plan(*parse([*run, "--methods", "fedit", "--rank", "3", "--scale", "0.5", "--out", "first"])).execute()
    first = Export(parse(["export", "first", "--to", "peft", "--out", "out"])[1])
    first.execute()
    arguments = [*run, "--methods", "flora", "--adapter", "out/global", "--out", "second"]
    plan = Plan(*parse(arguments))
    assert (plan.config.rank, plan.config.scale) == ((3,), pytest.approx(0.5))
    problem, x = plan.problem, plan.problem.test[0]
    (served,) = first.models
    own = jax.tree.map(lambda x: x[0], problem.adapters)
    expected = problem.backbone.apply(served.base, served.adapter, x)[0]
    np.testing.assert_allclose(problem.backbone.apply(problem.base, own, x)[0], expected, atol=1e-5)
    assert problem.record["adapter_head"] == "kept, for these classes"
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "config.json").write_text(json.dumps(plan.about))  # as if it had begun
    Plan(*parse(["compare", "--out", "second", "--resume"]))  # its own options stand in the folder
    (path := tmp_path / "out" / "global" / "adapter_config.json").write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match="adapter was"):
        Plan(*parse(["compare", "--out", "second", "--resume"]))
