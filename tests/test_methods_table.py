"""``python -m experiments methods`` tells the truth: sizes, and which tests guard a method."""

import dataclasses

import pytest

from experiments.cli import parse
from experiments.commands import list_methods
from experiments.config import Config
from experiments.engine import methods

RANK, WIDTH, DEPTH, CLASSES = 4, 64, 4, 10  # of the nano ViT; query and value are adapted
PARAMETERS, HEAD = 2 * DEPTH * 2 * WIDTH * RANK, (WIDTH + 1) * CLASSES
DENSE = 2 * DEPTH * WIDTH * WIDTH


@pytest.fixture(scope="module")
def shapes():
    return list_methods.shapes(Config())


@pytest.mark.long
def test_every_method_has_a_line_in_both_tables_with_its_sizes():
    text = list_methods.table(Config())
    first, second = text.split("\n\n")[0], text.split("\n\n")[2]
    for name in methods.names():
        assert sum(line.startswith(f"{name} ") for line in first.splitlines()) == 1
        assert sum(line.startswith(f"{name} ") for line in second.splitlines()) == 1
    assert "not for this model" not in text


@pytest.mark.parametrize(
    ("name", "numbers"),
    {
        "fedit": (PARAMETERS + HEAD, PARAMETERS + HEAD, 0, 0),
        "fedex_lora": (PARAMETERS + HEAD, PARAMETERS + HEAD + DENSE, DENSE, 0),
        "fedhl": (PARAMETERS + HEAD, PARAMETERS + HEAD, DENSE, 0),
        "fedsa_lora": (PARAMETERS // 2 + HEAD, PARAMETERS // 2 + HEAD, 0, PARAMETERS // 2),
        "fed_sb": (2 * DEPTH * RANK**2 + HEAD, 2 * DEPTH * RANK**2 + HEAD, PARAMETERS, 0),
    }.items(),
)
def test_sizes_are_four_bytes_for_each_number(shapes, name, numbers):
    assert list_methods.sizes(Config(), name, *shapes) == tuple(4 * n for n in numbers)


def test_ranks_are_averaged_over_the_clients_of_a_round():
    config = dataclasses.replace(Config(), rank=(2, 4), clients=6)
    up = list_methods.sizes(config, "fedit", *list_methods.shapes(config)).up
    assert up == 4 * (PARAMETERS * 3 / 4 + HEAD)


def test_every_method_is_guarded_by_the_battery_and_by_a_test_of_its_own():
    for name in methods.names():
        found = list_methods.guards(name)
        assert found[0] == "every_method", name
        assert set(found) - {"every_method", "methods_table"}, name
    assert list_methods.guards("no_such_" + "method") == []
    assert list_methods.shortened(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


@pytest.mark.long
def test_a_method_that_does_not_fit_the_model_says_so():
    command, config = parse(["methods", "--targets", "embed/kernel", "--rank", "2"])
    assert command == "methods"
    assert config is not None
    line = next(
        line for line in list_methods.table(config).splitlines() if line.startswith("fedra ") and "held" in line
    )
    assert "not for this model" in line


def test_sizes_of_more_clients_in_a_round_than_can_be_listed_are_refused():
    with pytest.raises(ValueError, match=r"10001 clients in a round: .* --clients-per-round"):
        list_methods.table(Config(clients=10_001))
    few = Config(clients=1_000_000, clients_per_round=4, rank=(2, 4))
    assert list_methods.sizes(few, "fedit", *list_methods.shapes(few)).up == 4 * (PARAMETERS * 3 / 4 + HEAD)
