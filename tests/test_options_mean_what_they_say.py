"""What is typed after an option, and what is left out, means one thing."""

import dataclasses

import pytest

from experiments.cli import parse
from experiments.config import Config, check
from experiments.start import main


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("5", (0, 1, 2, 3, 4)), ("0:5", (0, 1, 2, 3, 4)), ("3:5", (3, 4)), ("42,", (42,)), ("3,7", (3, 7)), ("1", (0,))],
)
def test_seeds_are_a_count_a_range_or_a_list(text, seeds):
    assert parse(["run", "--method", "fedit", "--seeds", text])[1].seeds == seeds


@pytest.mark.parametrize(
    ("seeds", "said"), [("21", "to run the one seed 21, write --seeds 21,"), ("20", ""), ("21,", "")]
)
def test_many_seeds_are_remarked_on(seeds, said, monkeypatch, capsys):
    arguments = ["experiments", "run", "--method", "fedit", "--dry-run", "--seeds", seeds]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr("experiments.start.planned", lambda command, options: (None, lambda: None))
    main()
    assert (said in capsys.readouterr().err) if said else capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("every", "checkpoints", "expected"), [(1, None, 10), (3, None, 12), (20, None, 20), (10, None, 10), (4, 8, 8)]
)
def test_checkpoints_follow_evaluations(every, checkpoints, expected):
    config = Config(rounds=60, eval_every=every, checkpoint_every=checkpoints)
    check(config)
    assert config.rounds_between_checkpoints() == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eval_every": 20}, "--eval-every 20 does not divide --rounds 10: 10 would, or --rounds 20"),
        ({"eval_every": 7, "rounds": 50}, "--eval-every 7 does not divide --rounds 50: 5, 10 would, or --rounds 56"),
        ({"eval_every": 5, "checkpoint_every": 7}, "--checkpoint-every 7 is no multiple of --eval-every"),
    ],
)
def test_evaluations_that_do_not_fit_are_refused_with_what_would(changes, said):
    with pytest.raises(ValueError, match=said):
        check(dataclasses.replace(Config(), **changes))


def test_nothing_may_be_trained_in_full():
    assert parse(["run", "--method", "fedit", "--full", ""])[1].full == ()
    check(Config(full=()))
