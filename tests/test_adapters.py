"""Adapters: chosen by name, refused with a reason, added without forming a dense update, neutral where they must be."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ADAPTER, BASE, KEY, RANK, SCALE, assert_near, examples, jit, logits, nudged

from fedlora_jax import lora
from fedlora_jax.lora import LoRA
from models.vit import ViT, vit

# --- new


def test_a_fresh_adapter_is_zero_has_the_right_shapes_and_is_reproducible():
    assert set(lora.flatten(ADAPTER)) == {"blocks/kernel", "mix/kernel", "head/kernel", "head/bias"}
    assert not lora.flatten(ADAPTER)["head/kernel"].any()
    for x, shape in zip(lora.low_rank_leaves(ADAPTER), [(2, 6, 4), (4, 6)], strict=True):
        assert (x.a.shape, x.b.shape) == ((*shape[:-1], RANK), (*shape[:-2], RANK, shape[-1]))
        assert not x.b.any()
        assert 0.5 / shape[-2] ** 0.5 < jnp.abs(x.a).max() <= 1 / shape[-2] ** 0.5
        assert x.scale == SCALE
    again = lora.new(jax.random.key(0), BASE, RANK, targets="mix", scale=SCALE)
    assert_near(again["mix"]["kernel"].a, ADAPTER["mix"]["kernel"].a, 0)  # targets do not disturb one another


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_a_rank_that_does_not_fit_is_refused(rank):
    with pytest.raises(ValueError, match=r"does not fit 'mix/kernel' of shape \(4, 6\): choose a rank from 1 to 4"):
        lora.new(KEY, BASE, rank, targets="mix")


def test_a_pattern_that_finds_nothing_names_what_is_near():
    with pytest.raises(ValueError, match=r"no parameter matches 'blocks/kernal'; near names: .*blocks/kernel"):
        lora.new(KEY, BASE, 1, targets="blocks/kernal")
    with pytest.raises(ValueError, match=r"no parameter matches 'zzz'; near names: blocks/kernel, blocks/bias"):
        lora.new(KEY, BASE, 1, targets="mix", full=["head", "zzz"])


def test_what_is_not_an_expression_or_not_a_matrix_is_refused():
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
        lora.new(KEY, BASE, 1, targets="(")
    with pytest.raises(ValueError, match=r"target 'kernel' has shape \(3,\)"):
        lora.new(KEY, {"kernel": jnp.zeros(3)}, 1, targets="kernel")


def test_kernels_alone_are_adapted_whatever_else_an_expression_finds():
    """Stacked biases ``[layers, out]`` have the shape of matrices."""
    names = lambda **options: set(lora.flatten(lora.new(KEY, BASE, 2, **options)))
    assert names(targets="blocks") == {"blocks/kernel"}
    assert names(targets=["blocks/", "mix"], full="head/bias") == {"blocks/kernel", "mix/kernel", "head/bias"}
    with pytest.raises(ValueError, match=r"target 'blocks/bias' finds no kernel, only blocks/bias"):
        lora.new(KEY, BASE, 2, targets=["mix", "blocks/bias"])
    own = {"w1": jnp.zeros((4, 4)), "b1": jnp.zeros((4, 4))}
    with pytest.raises(ValueError, match=r"finds no kernel, only w1, b1.*an argument of lora.new"):
        lora.new(KEY, own, 2, targets="1")
    assert list(lora.new(KEY, own, 2, targets="1", kernel="^w")) == ["w1"]


def test_a_parameter_is_adapted_or_trained_in_full_and_not_both():
    with pytest.raises(ValueError, match=r"mix/kernel would be adapted \(targets '.'\) and trained in full \('mix'\)"):
        lora.new(KEY, BASE, 1, targets=".", full="mix")


# --- using an adapter


class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return lora.Dense(3, name="second")(jnp.tanh(lora.Dense(5, name="first")(x)))


def test_dense_equals_the_merged_kernel_and_plain_dense():
    x = jax.random.normal(KEY, (4, 7))
    params = Two().init(KEY, x)["params"]
    plain = nn.Dense(5).apply({"params": params["first"]}, x)
    assert_near(lora.Dense(5).apply({"params": params["first"]}, x), plain, 1e-6)

    fresh = lora.new(KEY, params, 2, targets="kernel", full="second/bias", scale=SCALE)
    adapter = nudged(fresh)
    out = Two().apply(lora.variables(params, adapter), x)
    assert_near(out, Two().apply({"params": lora.merge(params, adapter)}, x))
    assert_near(Two().apply(lora.variables(params, fresh), x), Two().apply({"params": params}, x), 0)
    assert jnp.abs(out - Two().apply({"params": params}, x)).max() > 0.1


def test_variables_leave_all_other_leaves_the_very_same_arrays():
    params = lora.variables(BASE, ADAPTER)["params"]
    for name, x in lora.flatten(params).items():
        assert (x is lora.flatten(BASE)[name]) == (not name.startswith("head/")), name
    merged = lora.merge(BASE, ADAPTER)
    assert merged["blocks"]["bias"] is BASE["blocks"]["bias"]


def test_split_and_zero_deltas():
    low_rank, full = lora.split(ADAPTER)
    assert list(lora.flatten(low_rank)) == ["blocks/kernel", "mix/kernel"]
    assert sorted(lora.flatten(full)) == ["head/bias", "head/kernel"]
    zeros = lora.flatten(lora.zero_deltas(ADAPTER))
    assert {k: x.shape for k, x in zeros.items()} == {"blocks/kernel": (2, 6, 4), "mix/kernel": (4, 6)}
    assert lora.max_rank(ADAPTER) == RANK


def test_restart_draws_a_anew_and_keeps_full_differences():
    old = nudged(ADAPTER)
    new = lora.restart(jax.random.key(9), old)
    assert new["head"]["kernel"] is old["head"]["kernel"]
    for x, y in zip(lora.low_rank_leaves(old), lora.low_rank_leaves(new), strict=True):
        assert (x.a != y.a).all()
        assert not y.b.any()
    assert_near(lora.restart(jax.random.key(9), old), new, 0)


def test_trees_of_different_scales_do_not_mix():
    one, other = (lora.new(KEY, BASE, 1, targets="mix", scale=scale) for scale in (1.0, 2.0))
    with pytest.raises(ValueError, match="metadata"):
        jax.tree.map(jnp.add, one, other)


# --- several ranks


def test_masks_of_ranks():
    mask = lora.rank_mask(ADAPTER, jnp.asarray([1, 2, 0]))
    x = mask["blocks"]["kernel"]
    assert (x.a.shape, x.b.shape) == ((3, 1, 1, 2), (3, 1, 2, 1))
    np.testing.assert_array_equal(x.a[:, 0, 0], [[1, 0], [1, 1], [0, 0]])
    np.testing.assert_array_equal(x.b[:, 0, :, 0], x.a[:, 0, 0])
    np.testing.assert_array_equal(mask["head"]["kernel"], np.ones((3, 1, 1)))


def test_zero_padding_leaves_logits_unchanged():
    """A client of rank 1 computes the same whether it holds one column or two of which one is masked."""
    wide, x = nudged(ADAPTER), examples()["x"]
    mask = jax.tree.map(lambda m: m[0], lora.rank_mask(wide, jnp.asarray([1])))
    padded = jax.tree.map(jnp.multiply, wide, mask)
    small = lora.first_columns(wide, 1)
    assert lora.max_rank(small) == 1
    assert_near(logits(BASE, padded, x), logits(BASE, small, x), 1e-6)
    assert_near(lora.merge(BASE, padded), lora.merge(BASE, small), 1e-6)


def test_updates_are_never_formed_with_a_client_axis():
    """Under vmap over clients the program holds no array [clients, in, out]."""
    x, clients = jnp.zeros((3, 2, 40)), 3
    layer = lora.Dense(50, use_bias=False)
    params = layer.init(KEY, x[0])["params"]
    rows = LoRA(jnp.zeros((clients, 40, 2)), jnp.zeros((clients, 2, 50)))
    run = jax.vmap(lambda row, x: layer.apply({"params": params, "lora": {"kernel": row}}, x))
    assert "[3,40,50]" not in str(jax.make_jaxpr(run)(rows, x))


# --- the vision transformer


def small_vit(**options) -> ViT:
    return ViT(classes=3, patch=2, width=12, depth=2, heads=2, mlp_width=20, **options)


IMAGES = jax.random.normal(jax.random.key(1), (3, 4, 6, 3))


@functools.cache
def vit_params():
    return jit(small_vit().init)(KEY, IMAGES)["params"]


@pytest.mark.long
def test_scanned_unrolled_and_rematerialised_blocks_are_the_same_network():
    params = vit_params()
    adapter = nudged(lora.new(KEY, params, 2, targets="attn/(query|value)/kernel", full="head", scale=SCALE))

    def value_and_grad(model):
        def loss(adapter):
            scores, out = model.apply(lora.variables(params, adapter), IMAGES)
            return jnp.sum(jnp.sin(scores)) + jnp.sum(out["features"] ** 2)

        return jit(jax.value_and_grad(loss))(adapter)

    expected = value_and_grad(small_vit())
    for options in ({"unroll": True}, {"remat": True}, {"unroll": True, "remat": True}):
        shapes = jax.eval_shape(small_vit(**options).init, KEY, IMAGES)["params"]
        assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)
        assert_near(value_and_grad(small_vit(**options)), expected)


@pytest.mark.long
def test_the_vit_reads_its_adapters():
    params, apply = vit_params(), jit(small_vit().apply)
    adapter = nudged(lora.new(KEY, params, 2, targets="kernel", scale=SCALE))
    scores, _ = apply(lora.variables(params, adapter), IMAGES)
    assert_near(scores, apply({"params": lora.merge(params, adapter), "lora": {}}, IMAGES)[0])
    assert jnp.abs(scores - apply({"params": params, "lora": {}}, IMAGES)[0]).max() > 0.1


def test_stacked_blocks_have_adapters_of_their_own():
    adapter = lora.new(KEY, vit_params(), 2, targets="mlp/fc1/kernel")
    x = adapter["blocks"]["mlp"]["fc1"]["kernel"]
    assert (x.a.shape, x.b.shape) == ((2, 12, 2), (2, 2, 20))
    assert (x.a[0] != x.a[1]).any()


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_pooling_and_leading_axes(pool):
    apply = jit(small_vit(pool=pool).apply)
    scores, out = apply({"params": vit_params()}, jnp.stack([IMAGES, 2 * IMAGES]))
    assert scores.shape == (2, 3, 3)
    assert out["features"].shape == (2, 3, 12)
    assert_near(scores[0], apply({"params": vit_params()}, IMAGES)[0])


def test_unknown_models_and_images_that_cannot_be_cut_are_refused():
    with pytest.raises(ValueError, match="SIZE/PATCH"):
        vit("Huge/16", 3)
    with pytest.raises(ValueError, match="cannot be cut into patches of 2 x 2"):
        jax.eval_shape(small_vit().init, KEY, jnp.zeros((1, 5, 4, 3)))
    assert vit("Ti/16", 10).width == 192
