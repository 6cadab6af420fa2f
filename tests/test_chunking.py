"""How much is computed at once, and with whose memory."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.config import Config
from experiments.engine import process
from experiments.engine.chunking import divisor, kept
from experiments.setup.backbone import load
from experiments.setup.memory import largest
from experiments.setup.problem import new_adapter, unrolls
from experiments.setup.task import TASKS, objectives


def loss_fn(base, adapter, batch, key):
    """The widest array is the hidden layer of a block, [10, 64] float32; four blocks, looped over."""

    def block(x, w):
        return jax.nn.tanh(x @ w) @ w.T * adapter, None

    return jax.lax.scan(block, batch, base)[0].sum()


BASE, ADAPTER, BATCH = jnp.ones((4, 8, 64)), jnp.ones(8), jnp.ones((10, 8))


def test_the_largest_array_of_a_step_is_found_inside_loops_and_is_no_stack_of_them():
    assert largest(jax.grad(loss_fn, 1), BASE, ADAPTER, BATCH, jax.random.key(0)) == 10 * 64 * 4


def test_what_is_kept_for_the_backward_pass_grows_with_depth_and_leaves_the_base_out():
    sizes = [kept(loss_fn, BASE[:depth], ADAPTER, BATCH, jax.random.key(0)) for depth in (1, 2, 4)]
    assert sizes[1] - sizes[0] == (sizes[2] - sizes[1]) / 2 > 10 * 64 * 4


@pytest.mark.parametrize(("number", "most", "expected"), [(12, 8, 6), (12, 100, 12), (7, 3, 1), (12, 0, 1), (1, 5, 1)])
def test_the_largest_divisor_that_fits(number, most, expected):
    assert divisor(number, most) == expected


def test_blocks_are_unrolled_where_training_is_long_or_where_one_says_so():
    params = {"blocks": jnp.zeros((4, 250_000))}
    of = lambda **options: unrolls(Config(clients=10, batch=10, seeds=(0,), **options), params, None)
    assert [of(rounds=rounds, local_steps=5) for rounds in (100, 101)] == [False, True]  # 5e4 images of 1e6 numbers
    assert unrolls(Config(clients=10, batch=10, seeds=(0, 1), rounds=100), params, 5)
    assert [of(blocks=how) for how in ("loop", "unrolled")] == [False, True]


@pytest.mark.long
def test_a_loop_and_unrolled_blocks_are_one_loss_and_the_arithmetic_of_all_blocks_is_counted():
    """The numbers are the same to rounding; of a loop XLA would count one turn."""
    model = load(Config(), tuple("0123456789"), 16)
    adapter = new_adapter(Config(), model, jax.random.key(0))
    batch = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8), jnp.arange(4)
    loop, unrolled = (objectives(TASKS["softmax"], model, unroll=unroll) for unroll in (False, True))
    step = lambda f: jax.jit(jax.value_and_grad(f, 1)).lower(model.params, adapter, batch, jax.random.key(0))
    one, other = (
        step(own.loss_fn).compile()(model.params, adapter, batch, jax.random.key(0)) for own in (loop, unrolled)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), one, other)
    whole, counted, one_turn = (
        step(f).cost_analysis()["flops"] for f in (unrolled.loss_fn, loop.counted_fn, loop.loss_fn)
    )
    assert whole == counted > 2 * one_turn


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is glibc's")
def test_a_process_starts_itself_again_once_and_keeps_its_arguments():
    code = "import os, sys; from experiments.engine import process; process.settle(); "
    code += "print(os.environ['GLIBC_TUNABLES'], sys.argv[1:])"
    call = lambda env: (
        subprocess.run(
            [sys.executable, "-c", code, "a b", "--c"], env=env, capture_output=True, text=True, check=True
        ).stdout
    )
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    tuned = call(env)
    assert tuned.endswith("['a b', '--c']\n")
    assert all(f"glibc.malloc.{name}={value}" in tuned for name, value in process.TUNABLES.items())
    assert call(env | {"GLIBC_TUNABLES": ""}) == " ['a b', '--c']\n", "what the user has set stays"


@pytest.mark.long
def test_where_a_plugin_for_an_accelerator_is_installed_it_gets_its_own_settings(tmp_path):
    (tmp_path / "jax_plugins").mkdir()  # a namespace package, as jax's plugins make it
    code = "import os; from experiments.engine import process; process.settle(); import jax; jax.devices('cpu'); "
    code += "print(process.accelerated(), os.environ.get('GLIBC_TUNABLES'), os.environ.get('XLA_FLAGS'))"
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(tmp_path)])
    plain = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "XLA_FLAGS", "JAX_PLATFORMS")}

    def call(**env: str) -> str:
        env = plain | {"PYTHONPATH": path} | env
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout

    assert call() == "True None --xla_gpu_enable_triton_gemm=false\n"  # and XLA knows the flag
    own = "--xla_gpu_enable_triton_gemm=true"
    assert call(XLA_FLAGS=own) == f"True None {own}\n", "what the user has set stays"
    assert call(JAX_PLATFORMS="cpu", GLIBC_TUNABLES="") == "False  None\n"
