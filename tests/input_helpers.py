"""What tests of bad input share: a small data file, changed; and a command that is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.__main__ import main

FEW = "--clients 4 --holdout-clients 0 --minimum 2 --rounds 2 --seeds 1 --batch 4".split()
SMALL = [*FEW, "--local-steps", "1"]
# Where a test is of no particular model: the rounds of this one compile in half of the time.
PLAIN = ["--model", f"{Path(__file__).parents[1] / 'examples' / 'own_backbones.py'}:plain"]


def good_arrays(n: int = 96) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.integers(0, 256, (n, 16, 16, 3), np.uint8),
        "y": np.arange(n) % 3,
        "domain": np.arange(n) // 3 % 2,
        "split": (np.arange(n) // 6 % 4 == 0).astype(int),
        "classes": np.array(["a", "b", "c"]),
        "domains": np.array(["left", "right"]),
    }


def change(**changes):
    """A data file like the good one but for these arrays (``None``: left out)."""

    def write(path: Path) -> None:
        arrays = good_arrays() | changes
        np.savez(path, **{name: value for name, value in arrays.items() if value is not None})

    return write


def cut_in_half(path: Path) -> None:
    change()(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def refused(arguments: list[str], capsys, monkeypatch) -> str:
    monkeypatch.setattr(sys, "argv", ["experiments", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    output = capsys.readouterr()
    assert not output.out
    assert output.err.startswith("error: "), output.err
    assert output.err.count("\n") == 1
    return output.err
