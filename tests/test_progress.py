"""What is being done is said by a bar on a terminal and in lines elsewhere: how far, how good, how long."""

import pytest
from tqdm import tqdm

from experiments import progress
from experiments.engine.rows import so_far


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def test_lines_come_now_and_then_and_at_the_end(clock, capsys):
    with progress.bar(40, "round") as bar:
        assert isinstance(bar, progress.Lines)
        bar.set_description("fedit, seeds 0,1")
        for i in range(40):
            clock.now += 0.5
            bar.set_postfix_str(f"round {i + 1}")
            bar.update()
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "fedit, seeds 0,1, 20 of 40 rounds, round 20, 00:10 so far, some 00:10 left",
        "fedit, seeds 0,1, 40 of 40 rounds, round 40, 00:20 so far, some 00:00 left",
    ]


def test_what_is_over_at_once_says_nothing(clock, capsys):
    assert list(progress.following([1, 2, 3], "seed")) == [1, 2, 3]
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar(monkeypatch):
    monkeypatch.setattr(progress, "has_width", lambda: True)
    with progress.bar(3, "round", leave=False) as bar:
        assert isinstance(bar, tqdm)


def test_accuracies_so_far_are_means_over_seeds_of_what_is_known():
    rows = [{"round": 1}, {"global_accuracy": 0.5, "personal_accuracy": None}, {"global_accuracy": 0.7}]
    assert so_far(rows) == "global 60.0 %"
    assert so_far([{"global_accuracy": 0.5, "personal_accuracy": 0.25}]) == "global 50.0 %, personal 25.0 %"
