"""Options from files: what is typed goes before them, what is in none stays; recipes resolve and run."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from input_helpers import refused

from experiments.__main__ import main
from experiments.cli import parse
from experiments.commands import prelude
from experiments.commands.compare import Plan
from experiments.config import Config, check
from experiments.setup import data, dealing, option_files

RECIPES = option_files.recipes()


def written(tmp_path, text):
    path = tmp_path / "own.toml"
    path.write_text(text)
    return str(path)


def test_what_is_typed_goes_before_a_file_and_a_file_before_a_recipe(tmp_path):
    path = written(tmp_path, 'lr = 1\nseeds = "0:3"\nrank = [4, 8]\nclip-norm = 2.5\n[about]\nwhy = "a test"\n')
    _, config = parse(["compare", "--config", path, "--recipe", "hilora/cifar100_scdir", "--rank", "2"])
    expected = Config(**{**_of_recipe("hilora/cifar100_scdir"), "lr": 1.0, "seeds": (0, 1, 2), "clip_norm": 2.5})
    assert config == dataclasses.replace(expected, rank=(2,))


def _of_recipe(name):
    values = option_files.read(option_files.recipe(name))
    del values["about"]
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def test_one_number_stands_for_several(tmp_path):
    config = parse(["compare", "--config", written(tmp_path, "rank = 8\nseeds = 3\nmean = 0.5")])[1]
    assert (config.rank, config.seeds, config.mean) == ((8,), (0, 1, 2), (0.5,))


def test_what_is_printed_repeats_a_run(tmp_path, capsys):
    typed = "--methods fedit,hilora:k_min=1 --lr 0.3 --seeds 2 --mean 0.1,0.2,0.3 --keep-head --targets qv".split()
    with pytest.raises(SystemExit):
        parse(["compare", *typed, "--print-config"])
    path = written(tmp_path, capsys.readouterr().out)
    assert parse(["compare", "--config", path]) == parse(["compare", *typed])


def test_what_would_be_refused_is_not_printed(capsys, monkeypatch):
    typed = ["compare", "--recipe", "clip/fedclip", "--weights-of-clients", "equal", "--print-config"]
    assert "--weights-of-clients must be one of counts, uniform; got equal" in refused(typed, capsys, monkeypatch)


def test_a_command_that_knows_no_novel_classes_says_so(capsys):
    parse(["bounds", "--recipe", "clip/base_to_novel"])
    assert "note: the file's novel = half is left out, in this command nothing is novel" in capsys.readouterr().err
    parse(["sweep", "--recipe", "clip/base_to_novel"])
    assert "is left out" not in capsys.readouterr().err


def test_a_run_repeats_another_by_its_config_json(tmp_path):
    config = Config(methods=("fedit",), lr=0.3, rank=(4, 8), chunk=2)
    about = {"config": config.deciding("results"), "speed": config.deciding("speed")}
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert parse(["compare", "--config", str(tmp_path / "config.json")])[1] == config
    assert parse(["run", "--config", str(tmp_path / "config.json")])[1] == config


@pytest.mark.parametrize(
    ("command", "own"),
    [
        ("sweep", {"methods": ("fedit+proximal",), "lrs": (0.1, 0.3), "vary": "mu=0,1", "local_epochs": 2.0}),
        ("budget", {"methods": ("fedit", "ditto"), "lrs": (0.1,), "budgets": (1, 5), "tuning_seeds": (7,)}),
        ("meta", {"methods": ("hyperlora:mode=frozen",), "unroll": 3, "meta_lr": 0.01, "local_steps": 3}),
        ("bounds", {"optimizer": "adam", "lr": 0.3, "local_epochs": 1.0, "augment": ("flip",)}),
    ],
)
def test_what_other_commands_write_or_print_repeats_them(command, own, tmp_path, capsys):
    config = Config(**own, rank=(4, 8), seeds=(1, 4), partition_seed=(3, 5))
    about = {"config": config.deciding("results"), "speed": config.deciding("speed")}
    (tmp_path / "config.json").write_text(json.dumps(about))
    again = parse([command, "--config", str(tmp_path / "config.json")])[1]
    assert dataclasses.replace(again, methods=config.methods) == config
    assert command == "bounds" or again.methods == config.methods
    with pytest.raises(SystemExit):
        parse([command, "--config", str(tmp_path / "config.json"), "--print-config"])
    assert parse([command, "--config", written(tmp_path, capsys.readouterr().out)])[1] == again


def test_a_file_may_say_that_a_run_goes_on(tmp_path):
    """Then what neither file nor command line says stays as it was in the folder."""
    config = Config(methods=("fedit",), lr=0.3, rounds=4, seeds=(0,), out=str(tmp_path))
    about = {"config": config.deciding("results"), "speed": config.deciding("speed")}
    (tmp_path / "config.json").write_text(json.dumps(about))
    path = written(tmp_path, f'resume = true\nrounds = 6\nout = "{tmp_path}"')
    assert parse(["run", "--config", path])[1] == dataclasses.replace(config, rounds=6, resume=True)
    assert parse(["run", "--config", path, "--rounds", "8"])[1].rounds == 8


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("--local-steps 3", {"local_steps": 3, "local_epochs": None, "local_cap": None}),
        ("--local-steps-from 2", {"local_steps_from": 2, "local_epochs": None, "local_cap": None}),
        ("--alpha 16", {"alpha": 16.0, "scale": Config.scale}),
        ("--optimizer adam", {"optimizer": "adam", "momentum": None}),
        ("--optimizer momentum", {}),
        ("--local-cap default", {"local_cap": None}),
        ("--clip-norm default --mean default", {"clip_norm": None, "mean": None}),
        ("--classes default", {"classes": ()}),
        ("--lr default --rank default", {"lr": Config.lr, "rank": Config.rank}),
        ("--optimizer default", {"optimizer": Config.optimizer, "momentum": None}),
        ("--no-ranks-in-order", {}),
    ],
)
def test_what_is_typed_takes_back_what_a_recipe_says_in_another_way(typed, expected):
    recipe = "fedra/domainnet_compat"
    config = parse(["compare", "--recipe", recipe, *typed.split()])[1]
    assert config == Config(**{**_of_recipe(recipe), **expected})


def test_a_switch_of_a_file_is_taken_back(tmp_path):
    path = written(tmp_path, "ranks_in_order = true\nkeep_head = true")
    config = parse(["compare", "--config", path, "--no-ranks-in-order"])[1]
    assert (config.ranks_in_order, config.keep_head) == (False, True)
    path = written(tmp_path, 'local_steps = 4\nmean = "default"')  # goes before a recipe as what is typed does
    config = parse(["compare", "--config", path, "--recipe", "fedra/domainnet_compat"])[1]
    assert (config.local_steps, config.local_epochs, config.local_cap, config.mean) == (4, None, None, None)


@pytest.mark.parametrize(
    "typed", ["--local-steps 5 --local-epochs 1", "--local-epochs 1 --local-steps-from 2", "--scale 2 --alpha 8"]
)
def test_what_says_the_same_in_two_ways_is_refused(typed, capsys, monkeypatch):
    assert "in two ways: give one of them" in refused(["compare", *typed.split()], capsys, monkeypatch)


def test_a_run_that_began_with_steps_and_epochs_goes_on():
    both = Config(local_steps=3, local_epochs=1.0)
    with pytest.raises(ValueError, match="both say how much"):
        check(both)
    check(dataclasses.replace(both, resume=True))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("local-steps = 3\nlocal_steps = 4", "both local-steps and local_steps, which are one option"),
        ("local_steps = 3\nlocal_epochs = 1", "both say how much each client does"),
        ("lrr = 0.1", "the key 'lrr', which is no option; did you mean 'lr'?"),
        ('lr = "fast"', "lr = 'fast'"),
        ("rounds = 1.5", "rounds = 1.5 is not what --rounds takes"),
        ("rounds = [1]", "rounds = [1] is not what --rounds takes"),
        ('keep_head = "true"', "keep_head = 'true' is not what --keep-head takes"),
        ("qqqqqq = 1", "the key 'qqqqqq', which is no option"),
        ("resume = 1", "resume = 1 is not what --resume takes"),
        ("lr = ", "is no TOML"),
        ("rounds = 0", "--rounds"),
    ],
)
def test_wrong_files_are_refused(text, said, tmp_path, capsys, monkeypatch):
    assert said in refused(["compare", "--config", written(tmp_path, text)], capsys, monkeypatch)


def test_what_a_recipe_leaves_to_whoever_runs_it_is_said_where_it_is_not_given(capsys):
    recipe = ["compare", "--recipe", "fedra/domainnet_compat"]
    parse(recipe)
    data, weights = capsys.readouterr().err.splitlines()
    assert data.startswith("note: --recipe fedra/domainnet_compat leaves --data to you (folder of DomainNet with ")
    assert " leaves --weights to you (" in weights
    parse([*recipe, "--data", "some.npz", "--weights", "some.npz"])
    parse([*recipe, "--data", "some.npz", "--model", "mine.py:model"])
    assert capsys.readouterr().err == ""


def test_files_and_recipes_that_are_not_there_are_refused(capsys, monkeypatch):
    assert "cannot be read" in refused(["compare", "--config", "nowhere.toml"], capsys, monkeypatch)
    says = refused(["compare", "--recipe", "hilora/cifar100"], capsys, monkeypatch)
    assert "hilora/cifar100_scdir" in says
    assert "no recipe" in refused(["recipes", "../../setup"], capsys, monkeypatch)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """100 classes in 20 superclasses, six domains or four: what recipes can be tried on. Ten, with more images, are
    DomainNet's."""
    names = [
        "bird",
        "feather",
        "headphones",
        "ice_cream",
        "teapot",
        "tiger",
        "whale",
        "windmill",
        "wine_glass",
        "zebra",
    ]
    n, rng, folder = 6_000, np.random.default_rng(0), tmp_path_factory.mktemp("data")
    for domains in (6, 4):
        np.savez(
            folder / f"{domains}.npz",
            x=rng.integers(0, 256, (n, 16, 16, 3), np.uint8),
            y=np.where(np.arange(n) < n / 2, np.arange(n) % 100, np.arange(n) % 10),
            domain=np.arange(n) // 100 % domains,
            split=(np.arange(n) // 600 % 5 == 0).astype(int),
            classes=np.array([*names, *(f"class {i}" for i in range(90))]),
            domains=np.array(list("abcdef")[:domains]),
            superclass=np.arange(100) // 5,
        )
    return folder


def tried(name, images, *more):
    data = images / f"{4 if 'office' in name or name == 'clip/fedclip' else 6}.npz"
    small = f"--data {data} --weights nano --image-size 16 --rounds 2 --eval-every 2 --batch 4 --seeds 1"
    values = option_files.read(option_files.recipe(name))
    small += " --local-epochs 0.05" if "local_epochs" in values else " --local-steps 1"
    if "context" in values:  # the small text tower has 16 places in all
        small += " --context 4"
    if "bridge" in values:  # and two blocks
        small += " --bridge 2:8:0.1"
    return parse(["compare", "--recipe", name, *small.split(), "--minimum", "4", "--test-images", "2", *more])[1]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_resolves_and_says_what_it_is(name, images):
    """And every client of it has as many images as it says."""
    about = option_files.read(option_files.recipe(name))["about"]
    assert {"title", "source", "data", "weights", "published", "ours", "traps", "expected"} == about.keys()
    config = tried(name, images)
    assert set(about["expected"]) <= {method.partition(":")[0] for method in config.methods}
    prelude.checked(config)
    own = data.load(config.data, classes=config.classes)
    assert len(own.classes) == (10 if config.classes[2:] else 100)
    own = data.base_to_novel(own, config.novel)
    parts, _, ranks = dealing.dealt(config, own, *(np.flatnonzero(own.test == part) for part in (False, True)), 0)
    assert len(parts) == len(ranks) == config.clients + config.holdout_clients
    assert min(map(len, parts)) >= config.minimum


@pytest.mark.long
def test_a_recipe_of_a_clip_runs(images, tmp_path):
    """Two rounds of the cheapest method, with prompts that are learned and texts held apart.

    What other recipes train of a CLIP: ``test_clip_baselines``, ``test_heads``. Of those of a ViT one runs below.
    """
    plan = Plan("compare", tried("clip/fedpgp", images, "--methods", "fedit", "--out", str(tmp_path / "out")))
    (trial,), p = plan.trials.values(), plan.problem
    start = trial.programs.start(p.adapters, p.keys)
    _, info = trial.course.lowered.compile()(p.base, p.train, p.clients, start, p.keys)
    assert info.loss.shape[:2] == (1, 2)
    assert (np.asarray(info.moved) > 0).all()


@pytest.mark.long
def test_a_run_of_a_recipe_writes_a_file_that_repeats_it(images, tmp_path):
    config = tried("fedra/domainnet_compat", images, "--methods", "fedit", "--out", str(tmp_path / "out"))
    Plan("compare", config).execute()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["methods"]
    again = parse(["compare", "--config", str(tmp_path / "out" / "config.json")])[1]
    assert again.deciding("results") == config.deciding("results")


def test_the_list_of_recipes_is_shown(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiments", "recipes"])
    main()
    shown = capsys.readouterr().out
    assert all(name in shown for name in RECIPES)
