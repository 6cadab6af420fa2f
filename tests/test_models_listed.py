"""``python -m experiments models`` tells the truth: of families against published counts, of a file what a run uses."""

import re

import numpy as np
import pytest
from input_helpers import SMALL, change, refused
from weight_helpers import timm_arrays, write

from experiments.cli import parse
from experiments.commands import list_models, prelude
from experiments.requests import Models
from models.families import FAMILIES

# with a head of 1000 classes, as timm counts them (its results-imagenet.csv, in millions)
PUBLISHED = {
    ("vit", "Ti/16"): (5.72, 192),
    ("vit", "S/16"): (22.05, 384),
    ("vit", "B/16"): (86.57, 768),
    ("vit", "B/32"): (88.22, 768),
    ("vit", "L/16"): (304.33, 1024),
    ("mixer", "B/16"): (59.88, 768),
    ("mixer", "L/16"): (208.20, 1024),
}


def rows(text):
    """Rows of each table by family and size, as dicts."""
    found, family, header = {}, "", None
    for line in text.splitlines():
        if title := re.match(r"(\w+): reads", line):
            family = title[1]
        cells = re.split(r"\s{2,}", line)
        if cells[0] == "size":
            header = cells
        elif header and len(cells) == len(header) and not line.startswith("-"):
            found[family, cells[0]] = dict(zip(header, cells, strict=True))
    return found


@pytest.fixture(scope="module")
def listed():
    return rows(list_models.table(Models(rank=8)))


def number(text):
    return int(text.replace(",", ""))


@pytest.mark.parametrize("which", PUBLISHED, ids="-".join)
def test_parameters_are_those_that_are_published(which, listed):
    millions, width = PUBLISHED[which]
    assert number(listed[which]["parameters"]) + 1000 * (width + 1) == pytest.approx(1e6 * millions, abs=5001)


# of the image tower with its projection, in millions (OpenCLIP's model_profile.csv)
CLIP = {"B/32": 87.85, "B/16": 86.19, "L/14": 303.97, "H/14": 632.08}


@pytest.mark.parametrize("size", CLIP)
def test_image_towers_of_clip_are_as_large_as_published(size, listed):
    assert number(listed["clip", size]["parameters"]) == pytest.approx(1e6 * CLIP[size], abs=7000)


TEXT = {"B/32": 63.43, "B/16": 63.43, "L/14": 123.65, "H/14": 354.03}  # of the text tower, without the scale (same)


def test_with_its_text_tower_a_clip_is_as_large_as_published_and_has_sets_of_either(listed):
    both = rows(list_models.table(Models(rank=8, head="text", targets=("qv", "image_qv", "text_qv"))))
    assert {family for family, _ in both} == {"clip"}
    for size, millions in TEXT.items():
        found = {name: number(x) for name, x in both["clip", size].items() if name not in ("size", "images")}
        assert found["parameters"] - number(listed["clip", size]["parameters"]) == pytest.approx(
            1e6 * millions, abs=7e3
        )
        assert found["image_qv"] == number(listed["clip", size]["qv"])
        assert found["qv"] == found["image_qv"] + found["text_qv"]
    assert number(both["clip", "B/16"]["text_qv"]) == 12 * 8 * 2 * (512 + 512)


def test_a_file_with_a_text_tower_has_its_sets_where_it_is_in_the_model():
    from experiments.setup.backbone import BUILT_IN

    path = str(BUILT_IN["clip"])
    with pytest.raises(ValueError, match="--targets text_qv is a set of a model with its text tower in it: add --head"):
        list_models.table(Models(path, targets=("text_qv",)))
    text = list_models.table(Models(path, head="text"))
    assert text.startswith("nano_clip: clip nano/4 in 4 blocks")
    assert "text_qv" in text
    assert "text/blocks/attn/query/kernel [2, 64, 64]" in text


def test_adapters_have_a_column_of_a_and_a_row_of_b_for_each_rank(listed):
    vit, mixer = listed["vit", "B/16"], listed["mixer", "B/16"]
    assert number(vit["qv"]) == 12 * 8 * 2 * (768 + 768)
    assert number(vit["out_fc2"]) == 12 * 8 * ((768 + 768) + (3072 + 768))
    assert number(mixer["out_fc2"]) == 12 * 8 * ((384 + 14**2) + (3072 + 768))
    assert {name for name, _ in listed} == {name for name, family in FAMILIES.items() if family.shapes}


def test_what_no_kernel_holds_has_no_number():
    found = rows(list_models.table(Models(targets=("qv", "fc2"), rank=50)))
    assert found["mixer", "nano/4"]["qv"] == "-"
    assert found["mixer", "nano/4"]["fc2"] == "-", "its token MLPs are 32 wide"
    assert number(found["mixer", "L/16"]["fc2"]) > 0


def test_a_file_says_what_it_is_and_what_would_be_adapted(tmp_path):
    path = write(
        tmp_path / "some.npz", inside={"heads": 3, "ln_eps": 1e-3}, config={"mean": [0.5] * 3, "std": [0.5] * 3}
    )
    text = list_models.table(Models(str(path), targets=("qv", "mlp/fc1"), rank=2))
    body = sum(x.size for name, x in timm_arrays().items() if not name.startswith("head"))
    assert text.startswith(f"some: vit of a size of its own in 2 blocks, {body:,} parameters without a head\n")
    for fact in ("mean: 0.5,0.5,0.5 (config.json)", "heads: 3 (some.npz)", "epsilon: 0.001 (some.npz)"):
        assert f"  {fact}\n" in text
    table = [re.split(r"\s{2,}", line) for line in text.split("\n\n")[1].splitlines()[2:]]
    qv, mlp = 2 * 2 * 2 * 24, 2 * 2 * 32
    assert table == [
        ["qv", str(qv), f"{100 * qv / body:.2g} %", "blocks/attn/query/kernel [2, 12, 12]"],
        ["", "blocks/attn/value/kernel [2, 12, 12]"],
        ["mlp/fc1", str(mlp), f"{100 * mlp / body:.2g} %", "blocks/mlp/fc1/kernel [2, 12, 20]"],
    ]


@pytest.mark.long
def test_other_images_have_other_parameters_or_cannot_be_cut(listed):
    other = rows(list_models.table(Models(rank=8, image_size=256)))
    more = (256 // 16) ** 2 - (224 // 16) ** 2
    count = lambda table, which: number(table[which]["parameters"])
    assert count(other, ("vit", "B/16")) - count(listed, ("vit", "B/16")) == 768 * more
    assert count(other, ("mixer", "B/16")) - count(listed, ("mixer", "B/16")) == 12 * (2 * 384 + 1) * more
    assert set(other["vit", "S/14"].values()) == {"S/14", "256 x 256", "-"}


def test_a_rank_that_does_not_fit_is_explained(tmp_path):
    write(tmp_path / "some.npz", config={})
    text = list_models.table(Models(str(tmp_path / "some.npz"), targets=("qv", "mlp/fc1"), rank=13))
    assert text.splitlines()[-2:] == [
        "qv: rank 13 does not fit 'blocks/attn/query/kernel' of shape (2, 12, 12): choose a rank from 1 to 12",
        "mlp/fc1: rank 13 does not fit 'blocks/mlp/fc1/kernel' of shape (2, 12, 20): choose a rank from 1 to 12",
    ]


def test_a_published_size_is_known_by_its_name():
    from experiments.setup.backbone import BUILT_IN

    for family, path in BUILT_IN.items():
        text = list_models.table(Models(str(path)))
        assert text.startswith(f"{path.stem}: {family} nano/4 in 4 blocks")
        assert [line.split("  ")[0] for line in text.split("\n\n")[1].splitlines() if line[:1].isalpha()][1:] == list(
            FAMILIES[family].targets
        )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("half.npz", "lacks blocks.1.norm2.bias"),
        ("more.npz", "it has blocks.0.gate"),
        ("nan.npz", "norm.bias holds numbers that are not finite"),
        ("int8.npz", "norm.bias is int8, expected floats"),
        ("cut.npz", "cut.npz is damaged, truncated"),
        ("good.npz --model mixer", "is not an MLP-Mixer with timm names: it lacks"),
        ("good.npz --targets nothing", "no parameter matches 'nothing'"),
        ("good.npz --targets", "--targets: expected one argument"),
        ("--model other", "no family of models 'other'"),
        ("nowhere.npz", "no weight file nowhere.npz"),
        ("adapter", "adapter is an adapter of PEFT, and no model: give it as --adapter, with the weights of its model"),
    ],
)
def test_what_cannot_be_used_is_refused_with_what_is_wrong(options, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "good.npz")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    write(tmp_path / "half.npz", timm_arrays(**{"blocks.1.norm2.bias": None}))
    write(tmp_path / "more.npz", timm_arrays(**{"blocks.0.gate": np.ones(3)}))
    write(tmp_path / "nan.npz", timm_arrays(**{"norm.bias": np.full(12, np.nan)}))
    write(tmp_path / "int8.npz", timm_arrays(**{"norm.bias": np.ones(12, np.int8)}))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:2000])
    assert said in refused(["models", *options.split()], capsys, monkeypatch)


@pytest.mark.long
def test_a_run_says_what_each_of_its_targets_finds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    change()(tmp_path / "data.npz")
    options = ["run", "--method", "fedit", *SMALL, "--data", "data.npz", "--out", "out", "--rank", "2,3"]
    prelude.built(parse(options)[1])
    assert "--targets" not in capsys.readouterr().err
    prelude.built(parse([*options, "--targets", "mlp/fc1,qv", "--adapt-last", "3", "--seeds", "2"])[1])
    said = capsys.readouterr().err.splitlines()
    qv = 3 * 3 * 2 * (64 + 64)
    assert said == [
        f"note: --targets mlp/fc1: blocks/mlp/fc1/kernel, {3 * 3 * (64 + 128):,} parameters at rank 3",
        f"note: --targets qv: blocks/attn/query/kernel, blocks/attn/value/kernel, {qv:,} parameters at rank 3",
    ]
