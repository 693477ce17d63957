"""Masks, positions, blocks, encoder, decoder, cross-scale heads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.models import MODEL, some_noise, some_views
from xsmae.methods import METHODS
from xsmae.models.build import build_encoder
from xsmae.models.cross_scale_mae import PositionBatchNorm
from xsmae.models.mae import Views
from xsmae.models.masking import random_masking, take_tokens
from xsmae.models.position import patch_positions, relative_box, sincos_2d
from xsmae.models.vit import (
    Block,
    LayerNorm,
    patchify,
    run_blocks,
    stacked_blocks,
    unpatchify,
)
from xsmae.ops.attention.api import attention
from xsmae.ops.gelu import gelu
from xsmae.ops.layer_norm import layer_norm


def build(method="cross_scale_mae", seed=0, **changes):
    model = {**MODEL, **changes}
    return METHODS[method].build(model, channels=3, view_size=16, rngs=nnx.Rngs(seed))


@given(
    patches=st.integers(2, 80), ratio=st.floats(0, 0.95), seed=st.integers(0, 2**31 - 1)
)
@settings(max_examples=30, deadline=None)
def test_masking_keeps_the_smallest_noise(patches, ratio, seed):
    noise = np.random.default_rng(seed).permutation(3 * patches).reshape(3, patches)
    kept = int(patches * (1 - ratio))
    if kept == 0:
        with pytest.raises(ValueError, match="keeps 0 of"):
            random_masking(jnp.asarray(noise), ratio)
        return
    masking = random_masking(jnp.asarray(noise, jnp.float32), ratio)
    assert masking.ids_keep.shape == (3, kept)
    np.testing.assert_array_equal(masking.mask.sum(axis=1), patches - kept)
    for row in range(3):
        keep = np.asarray(masking.ids_keep[row])
        assert set(keep) == set(np.argsort(noise[row])[:kept])
        np.testing.assert_array_equal(np.asarray(masking.mask[row])[keep], 0)
        # ids_restore undoes the shuffle: position ids_restore[i] holds patch i.
        shuffled = np.argsort(noise[row])
        np.testing.assert_array_equal(
            shuffled[np.asarray(masking.ids_restore[row])], np.arange(patches)
        )


def test_masks_of_rows_and_views_differ():
    output = build()(some_views(), some_noise())
    masks = np.asarray(output.mask).reshape(6, -1)
    assert len({tuple(mask) for mask in masks}) == 6
    assert (masks.sum(axis=1) == 12).all()


def test_take_tokens_of_one_or_each():
    tokens = jnp.arange(24.0).reshape(2, 4, 3)
    ids = jnp.array([[3, 0], [1, 1]])
    np.testing.assert_array_equal(take_tokens(tokens, ids)[1, 0], tokens[1, 1])
    np.testing.assert_array_equal(take_tokens(tokens[:1], ids)[1, 0], tokens[0, 1])


def test_patchify_is_inverted_and_ordered_by_row():
    images = jnp.arange(2 * 8 * 12 * 3.0).reshape(2, 8, 12, 3)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    np.testing.assert_array_equal(patches[1, 4], images[1, 4:8, 4:8].reshape(-1))
    np.testing.assert_array_equal(unpatchify(patches, 4, (2, 3)), images)


def test_sincos_by_hand():
    # embed_dim 8: x then y, each with two sines and two cosines, frequencies 1, 1/100.
    grid = sincos_2d(jnp.array([0.0, 1.0]), jnp.array([0.0, 1.0, 2.0]), 8)
    x, y = 2.0, 1.0
    expected = [
        *np.sin([x, x / 100]), *np.cos([x, x / 100]),
        *np.sin([y, y / 100]), *np.cos([y, y / 100]),
    ]  # fmt: skip
    np.testing.assert_allclose(grid[5], expected, rtol=1e-5)
    np.testing.assert_array_equal(patch_positions((2, 3), 8)[0], grid)


def test_gsd_positions_scale_and_agree_on_the_ground():
    def positions(gsd, offset=None):
        return patch_positions(
            (4, 4), 16, position="gsd", gsd=jnp.array([gsd]), reference_gsd=10.0,
            offset=None if offset is None else jnp.array([offset]),
        )  # fmt: skip

    fixed = patch_positions((4, 4), 16)
    np.testing.assert_allclose(positions([10.0, 10.0]), fixed, atol=1e-6)
    # Half the GSD, shifted by one patch of 10 m: patches 0, 2 match patches 1, 2.
    fine = positions([5.0, 5.0], [1.0, 1.0]).reshape(4, 4, 16)
    coarse = fixed.reshape(4, 4, 16)
    np.testing.assert_allclose(fine[::2, ::2], coarse[1:3, 1:3], atol=1e-5)
    with pytest.raises(ValueError, match="needs gsd"):
        patch_positions((4, 4), 16, position="gsd")
    with pytest.raises(ValueError, match="expected one of"):
        patch_positions((4, 4), 16, position="learned")
    with pytest.raises(ValueError, match="multiple of 4"):
        patch_positions((4, 4), 18)


def test_relative_box_with_flips():
    box = jnp.array([[[10.0, 20, 30, 60], [12.0, 20, 22, 30]]])
    for vertical in (0, 1):
        for horizontal in (0, 1):
            flip = jnp.array([[vertical, horizontal]])
            view1, view2 = relative_box(box, flip)[0]
            np.testing.assert_allclose(view1, [0, 0, 1, 1])
            top, bottom = (0.4, 0.9) if vertical else (0.1, 0.6)
            left, right = (0.75, 1.0) if horizontal else (0, 0.25)
            np.testing.assert_allclose(view2, [top, left, bottom, right], atol=1e-6)


def test_attention_equals_numpy():
    rng = np.random.default_rng(0)
    qkv = rng.normal(size=(2, 5, 3 * 12)).astype(np.float32)
    out = attention(jnp.asarray(qkv), num_heads=3)
    q, k, v = np.moveaxis(qkv.reshape(2, 5, 3, 3, 4), 2, 0)
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) / 2
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("bhnm,bmhd->bnhd", weights, v).reshape(2, 5, 12)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected one of"):
        attention(jnp.asarray(qkv), num_heads=3, implementation="magic")


@pytest.mark.parametrize("norm_style", ["pre", "post"])
def test_block_equals_its_formula(norm_style):
    block = Block(8, 2, norm_style=norm_style, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))

    def attend(x):
        return block.proj(attention(block.qkv(x), num_heads=2))

    def mlp(x):
        return block.fc2(jax.nn.gelu(block.fc1(x), approximate=False))

    if norm_style == "pre":
        y = x + attend(block.norm1(x))
        expected = y + mlp(block.norm2(y))
    else:
        y = block.norm1(x + attend(x))
        expected = block.norm2(y + mlp(y))
        np.testing.assert_allclose(expected.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(block(x), expected, rtol=1e-5, atol=1e-5)


def test_layers_of_a_stack_differ():
    blocks = stacked_blocks(3, 8, 2, rngs=nnx.Rngs(0))
    kernel = np.asarray(blocks.qkv.kernel[...])
    assert kernel.shape == (3, 8, 24)
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1


@pytest.mark.parametrize("remat", ["none", "elementwise", "dots", "full"])
@pytest.mark.parametrize("scan", [True, False])
def test_scan_and_remat_change_nothing(scan, remat):
    blocks = stacked_blocks(3, 8, 2, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    graphdef, state = nnx.split(blocks)

    def loss(state, x, **options):
        return jnp.square(run_blocks(nnx.merge(graphdef, state), x, **options)).mean()

    expected = jax.value_and_grad(functools.partial(loss, remat="none"))(state, x)
    found = jax.value_and_grad(functools.partial(loss, scan=scan, remat=remat))(
        state, x
    )
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)


def test_what_is_computed_again_is_not_kept():
    """In a loop this is automatic; unrolled, XLA must not merge repeated values."""
    blocks = stacked_blocks(4, 64, 2, rngs=nnx.Rngs(0))
    x = jnp.ones((8, 32, 64))
    graphdef, state = nnx.split(blocks)

    def lowered(**options):
        def loss(state, x):
            return jnp.square(
                run_blocks(nnx.merge(graphdef, state), x, **options)
            ).sum()

        return jax.jit(jax.grad(loss)).lower(state, x)

    def temporary(remat):
        return lowered(remat=remat).compile().memory_analysis().temp_size_in_bytes

    assert temporary("full") < 0.8 * temporary("elementwise") < 0.7 * temporary("none")
    # The CPU compiler drops these barriers; the GPU compiler keeps them.
    kept_apart = lowered(remat="full", scan=False).as_text()
    assert kept_apart.count("optimization_barrier") == 4 + 8  # blocks and their norms


def test_unknown_options_are_refused():
    blocks = stacked_blocks(1, 8, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="expected one of"):
        run_blocks(blocks, jnp.ones((1, 2, 8)), remat="some")
    with pytest.raises(ValueError, match="expected one of"):
        Block(8, 2, norm_style="mid", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="multiple"):
        Block(8, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="expected one of"):
        build(predictor_norm="none")
    encoder = build_encoder(MODEL, channels=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="17x16 px"):
        encoder(jnp.ones((1, 17, 16, 3)))


def test_the_encoder_sees_the_visible_patches_alone():
    encoder = build_encoder(MODEL, channels=3, rngs=nnx.Rngs(0))
    images = some_views(2, 1).images[:, 0]
    ids = jnp.array([[3, 7, 9], [0, 1, 15]])
    tokens = encoder(images, ids_keep=ids)
    assert tokens.shape == (2, 4, 16)
    hidden = np.array(patchify(images, 4))
    for row in range(2):
        for patch in set(range(16)) - set(np.asarray(ids[row]).tolist()):
            hidden[row, patch] = 1e3
    changed = unpatchify(jnp.asarray(hidden), 4, (4, 4))
    np.testing.assert_array_equal(encoder(changed, ids_keep=ids), tokens)


def test_all_patches_kept_equals_no_mask():
    encoder = build_encoder(MODEL, channels=3, rngs=nnx.Rngs(0))
    images = some_views(2, 1).images[:, 0]
    order = jnp.tile(jnp.arange(16), (2, 1))
    np.testing.assert_allclose(
        encoder(images, ids_keep=order), encoder(images), rtol=1e-5, atol=1e-5
    )


def test_both_views_in_one_batch_equal_each_alone():
    model = build(position="gsd").mae
    views, noise = some_views(), some_noise()
    both = model(views, noise)
    alone = model(
        Views(views.images[:, :1], views.gsd[:, :1], views.box[:, :1]), noise[:, :1]
    )
    np.testing.assert_allclose(both.pred[:, 0], alone.pred[:, 0], rtol=1e-4, atol=1e-5)
    assert both.pred.shape == (3, 2, 16, 48)
    assert both.encoder_tokens.shape == (3, 2, 5, 16)
    assert both.decoder_tokens.shape == (3, 2, 17, 8)


def test_view_2_is_placed_in_view_1_by_its_box():
    """View 1 spans 16 x 32 m; view 2 starts at 1/2 of its height, 1/4 of its width."""
    model = build(position="gsd", mask_ratio=0.0, reference_gsd=0.5).mae
    images = jax.random.normal(jax.random.key(0), (1, 2, 16, 16, 3))
    gsd = jnp.array([[[1.0, 2.0], [0.5, 1.0]]])
    box = jnp.array([[[0.0, 0, 1, 1], [0.5, 0.25, 1.0, 0.75]]])
    noise = some_noise(1)
    tokens = model(Views(images, gsd, box), noise).encoder_tokens
    order = jnp.argsort(noise[:, 1], axis=1)
    # A reference patch is 4 px of 0.5 m, so 8 m down and 8 m across are 4 patches each.
    for offset, same in (([4.0, 4.0], True), ([4.0, 8.0], False)):
        expected = model.encoder(
            images[:, 1], gsd=gsd[:, 1], offset=jnp.array([offset]), ids_keep=order
        )
        assert np.allclose(tokens[:, 1], expected, rtol=1e-4, atol=1e-4) == same


def test_encoder_norm_off_leaves_the_tokens_unnormalised():
    on, off = build(encoder_norm=True), build(encoder_norm=False)
    views, noise = some_views(), some_noise()
    raw = off.mae(views, noise).encoder_tokens
    normed = on.mae(views, noise).encoder_tokens
    np.testing.assert_allclose(on.encoder.norm(raw), normed, rtol=1e-4, atol=1e-5)
    assert np.abs(np.asarray(normed).mean(-1)).max() < 1e-5 < np.abs(raw.mean(-1)).max()


def test_heads():
    views, noise = some_views(), some_noise()
    with_head = build()(views, noise)
    assert with_head.embedding.shape == (3, 2, 8)
    without = build(projection_dim=0)(views, noise)
    np.testing.assert_allclose(
        without.embedding, without.encoder_tokens[:, :, 1:].mean(axis=2), rtol=1e-5
    )
    model = build()
    np.testing.assert_allclose(
        with_head.predicted_tokens,
        model.predictor(with_head.decoder_tokens[:, 1, 1:]),
        rtol=1e-4,
        atol=1e-5,
    )


def test_position_batch_norm_by_hand():
    norm = PositionBatchNorm(4)
    x = jax.random.normal(jax.random.key(0), (5, 4, 7)) * 3 + 1
    y = norm(x)
    wide = np.asarray(x)
    mean, var = wide.mean((0, 2)), wide.var((0, 2))
    expected = (wide - mean[:, None]) / np.sqrt(var + 1e-5)[:, None]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.mean[...], 0.1 * mean, rtol=1e-4)
    np.testing.assert_allclose(norm.var[...], 0.9 + 0.1 * var * 35 / 34, rtol=1e-4)


def test_layer_norm_is_float32_inside():
    norm = LayerNorm(64, epsilon=1e-6, out_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    # bfloat16 has 8 bits, so it loses both: the scale's excess over 1 and the bias.
    norm.scale[...] = jnp.full(64, 1 + 2.0**-10)
    norm.bias[...] = jnp.full(64, 2.0**-10)
    x = 10 + jax.random.normal(jax.random.key(0), (4, 64))
    wide = np.asarray(x, np.float64)
    wide = (wide - wide.mean(-1, keepdims=True)) / wide.std(-1, keepdims=True)
    expected = jnp.asarray(wide * (1 + 2.0**-10) + 2.0**-10, jnp.bfloat16)
    assert norm(x).dtype == jnp.bfloat16
    assert (norm(x) == expected).mean() > 0.98


def test_bfloat16_is_near_float32():
    views, noise = some_views(), some_noise()
    full, half = build()(views, noise), build(dtype="bfloat16")(views, noise)
    assert half.pred.dtype == jnp.bfloat16
    for name in ("pred", "decoder_tokens", "predicted_tokens"):
        a, b = (np.asarray(getattr(o, name), np.float32) for o in (full, half))
        assert np.abs(a - b).mean() < 0.03 * np.abs(a).mean() + 0.01, name


@pytest.mark.parametrize(
    ("size", "millions"), [("base", 111.66), ("large", 329.24), ("huge", None)]
)
def test_published_parameter_counts(size, millions):
    """Cross-Scale MAE, NeurIPS 2023: encoder + decoder without positions."""
    from xsmae.configs import common

    config = common.get_common("published", size)
    model = nnx.eval_shape(
        lambda: METHODS["cross_scale_mae"].build(
            config.model, channels=3, view_size=128, rngs=nnx.Rngs(0)
        )
    )
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model.mae, nnx.Param))) / 1e6
    if millions is None:
        assert count > 600
    else:
        assert round(count, 2) == millions


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gelu_and_its_gradient(dtype):
    x = jnp.concatenate([jnp.linspace(-12, 12, 481), jnp.array([0.0, -0.0])])
    x = x.astype(dtype)

    def exact(x):
        return jax.nn.gelu(x.astype(jnp.float32), approximate=False)

    tolerance = 2e-7 if dtype == jnp.float32 else 8e-3
    for derived in (lambda f: f, lambda f: jax.grad(lambda x: f(x).sum())):
        np.testing.assert_allclose(
            np.asarray(derived(gelu)(x), np.float32),
            np.asarray(derived(exact)(x), np.float32),
            rtol=tolerance,
            atol=5 * tolerance,
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_norm_and_its_gradient(dtype):
    """Compared with the formula in float64, for rows far from zero."""
    rng = np.random.default_rng(0)
    x, out_bar = rng.normal(5, 3, (4, 7, 24)), rng.normal(size=(4, 7, 24))
    x, out_bar = (jnp.asarray(a, dtype) for a in (x, out_bar))
    scale, bias = jnp.asarray(rng.normal(size=(2, 24)), jnp.float32)

    def run(x, scale, bias):
        return layer_norm(x, scale, bias, epsilon=1e-6, out_dtype=dtype)

    def exact(x, scale, bias):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        normed = (x - mean) / jnp.sqrt(variance + 1e-6)
        return normed * scale[None, None] + bias[None, None]

    out, pullback = jax.vjp(run, x, scale, bias)
    found = (out, *pullback(out_bar))
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (x, scale, bias)]
        out, pullback = jax.vjp(exact, *wide)
        expected = (out, *pullback(jnp.asarray(np.asarray(out_bar, np.float64))))
    tolerance = 1e-6 if dtype == jnp.float32 else 8e-3
    for ours, theirs in zip(found, expected, strict=True):
        size = np.abs(theirs).max()
        np.testing.assert_allclose(
            np.asarray(ours, np.float64), theirs, rtol=0, atol=tolerance * size
        )
    assert [x.dtype for x in found] == [dtype, dtype, jnp.float32, jnp.float32]


def test_a_block_keeps_its_hidden_layer_once():
    """The backward pass keeps one array of the hidden layer's width per block."""
    batch, tokens, width = 3, 5, 8
    blocks = stacked_blocks(2, width, 2, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(blocks)

    def run(params, x):
        return run_blocks(nnx.merge(graphdef, params), x)

    _, backward = jax.vjp(run, params, jnp.ones((batch, tokens, width)))
    kept = [x.shape for x in jax.tree.leaves(backward) if x.shape[-1] == 4 * width]
    of_tokens = [shape for shape in kept if batch * tokens in shape]
    assert len(of_tokens) == 1
