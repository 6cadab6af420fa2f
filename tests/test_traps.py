"""What published code does and results do not tell: each a switch of its own, that does that and nothing else."""

import dataclasses

import numpy as np
import pytest
from input_helpers import FEW, good_arrays, refused

from experiments.config import Config, check
from experiments.results import summary
from experiments.setup import data, local_training, problem
from fedlora_jax import lora
from models.vit import vit

CONFIG = Config(clients=4, holdout_clients=2, rank=(4, 8, 16), partition="domain_dirichlet:5", minimum=2)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, **good_arrays(480))  # type: ignore[arg-type]
    return data.load(str(path))


def dealt(images, seed=0, **options):
    config = dataclasses.replace(CONFIG, **options)
    rows = [np.flatnonzero(images.test == part) for part in (False, True)]
    return problem.dealt(config, images, *rows, seed), rows


def same(some, others):
    return all(len(a) == len(b) and (a == b).all() for a, b in zip(some, others, strict=True))


def test_seeds_may_share_one_split_or_several_in_turn(images):
    of = lambda *shared: dataclasses.replace(CONFIG, seeds=(3, 4, 9), partition_seed=shared).dealt_by
    assert (of(), of(7), of(7, 8)) == ((3, 4, 9), (7, 7, 7), (7, 8, 7))
    for shared, said in (
        ((7, 8, 9, 1), "--partition-seed names 4 deals and --seeds 3"),
        ((7, 7), "must name each once"),
    ):
        with pytest.raises(ValueError, match=said):
            check(dataclasses.replace(CONFIG, seeds=(3, 4, 9), partition_seed=shared))
    words = lambda *shared: summary.meaning(
        {"eval_every": 1, "rounds": 9, "seeds": [0, 1, 2], "partition_seed": shared}
    )
    assert "share 2 draws of clients" in words(7, 8)
    assert "share" not in words().split(";")[0]
    (parts, tests, ranks), _ = dealt(images, 7)
    (again, same_tests, same_ranks), _ = dealt(images, 7, seeds=(4,), partition_seed=(7,))
    assert same([*parts, *tests, ranks], [*again, *same_tests, same_ranks])
    assert not same(parts, dealt(images, 3)[0][0])


def test_ranks_may_follow_the_order_of_clients_and_so_of_domains(images):
    (parts, tests, ranks), (train, _) = dealt(images, ranks_in_order=True)
    assert ranks.tolist() == [4, 8, 16, 4, 8, 16]
    assert [set(images.domain[train[part]]) for part in parts] == [{i % 2} for i in range(6)]
    (others, theirs, dealt_ranks), _ = dealt(images)
    assert same([*parts, *tests], [*others, *theirs])
    assert dealt_ranks.tolist() != ranks.tolist()


def test_clients_may_keep_a_few_images_of_each_class(images):
    (whole, tests, _), (train, _) = dealt(images, partition="iid")
    (parts, same_tests, _), _ = dealt(images, partition="iid", shots=3)
    assert same(tests, same_tests)
    for part, all_of_it in zip(parts, whole, strict=True):
        assert set(part) <= set(all_of_it)
        held = np.bincount(images.y[train[all_of_it]], minlength=3)
        np.testing.assert_array_equal(np.bincount(images.y[train[part]], minlength=3), np.minimum(held, 3))
    assert not same(parts, dealt(images, 1, partition="iid", shots=3)[0][0])


def test_training_and_test_images_may_be_joined_and_split_anew(images):
    own = data.resplit(images, 0.5)
    cells = images.domain * 3 + images.y
    np.testing.assert_array_equal(np.bincount(cells[own.test]), np.bincount(cells) / 2)
    assert (own.test & ~images.test).any()
    assert (~own.test & images.test).any()


def test_epochs_may_end_with_the_smallest_clients():
    sizes = np.array([10, 33, 64, 17, 3, 200])  # the last two never train
    of = lambda cap: local_training.examples_of_a_round(
        Config(clients=4, holdout_clients=2, batch=8, local_epochs=1.0, local_cap=cap), sizes, 0
    )
    np.testing.assert_array_equal(of("smallest+1"), [10, 24, 24, 17, 3, 24])  # the smallest has two batches
    np.testing.assert_array_equal(of("smallest+0"), [10, 16, 16, 16, 3, 16])
    np.testing.assert_array_equal(of("5"), [10, 33, 40, 17, 3, 40])


def test_the_best_round_on_test_images_is_no_result_and_may_be_said():
    rows = [
        {"seed": seed, "round": r, "global_accuracy": x}
        for seed in (0, 1)
        for r, x in enumerate((0.2, 0.5 + seed / 4, 0.5))
    ]
    rows.append({"seed": 0, "round": 9})  # a round that was not evaluated
    assert summary.best_on_test(rows)["seeds"] == [0.5, 0.75]


def test_the_patch_embedding_may_be_adapted_too():
    import jax

    model = vit("nano/4", classes=3)
    params = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]
    named = ("attn/out/kernel", "mlp/fc2/kernel")
    assert set(lora.adapted(params, (*named, "^embed/kernel"))) - set(lora.adapted(params, named)) == {"embed/kernel"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--local-cap 3", "it goes with --local-epochs"),
        ("--local-epochs 1 --local-cap largest", "smallest+N, as in smallest+1; got largest"),
        ("--local-epochs 1 --local-cap 0", "--local-cap must be"),
        ("--resplit 1", "--resplit"),
        ("--resplit 0.001", "leaves none; use another --resplit"),
        ("--shots 0", "--shots"),
    ],
)
def test_switches_that_mean_nothing_are_refused(options, said, capsys, monkeypatch):
    assert said in refused(["compare", *FEW, *options.split()], capsys, monkeypatch)
