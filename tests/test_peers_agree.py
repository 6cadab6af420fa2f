"""A round of ours is the round that PyTorch computes: transformers' ViT with peft's LoRA, and a vmapped one."""

from importlib import import_module

import numpy as np
import pytest

from experiments.bench import works
from experiments.bench.contenders import fedlora_jax

TOY = works.find("toy")
NEEDS = {"torch_peft": ("torch", "transformers", "peft"), "torch_vmap": ("torch",)}


@pytest.fixture(scope="module")
def ours():
    contender = fedlora_jax.contender(TOY)
    return contender.adapter(contender.round())


@pytest.mark.parametrize("name", NEEDS)
@pytest.mark.filterwarnings("ignore")  # other people's
def test_a_round_is_the_same_in_pytorch(ours, name):
    for package in NEEDS[name]:
        pytest.importorskip(package)
    contender = import_module(f"experiments.bench.contenders.{name}").contender(TOY)
    theirs = contender.adapter(contender.round())
    start = works.adapter(TOY)
    assert theirs.keys() == ours.keys()
    for key, x in ours.items():
        moved = np.linalg.norm(x - start[key])
        assert moved > 1e-3  # the comparison is about something
        assert np.linalg.norm(theirs[key] - x) < 1e-4 * moved, key
    np.testing.assert_allclose(works.squares(theirs), works.squares(ours), rtol=1e-5)
