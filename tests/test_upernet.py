"""Token maps of chosen blocks, and UperNet on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.support.models import MODEL
from xsmae.models import upernet
from xsmae.models.build import build_encoder
from xsmae.models.drop_path import drop_path_scales
from xsmae.models.taps import tapped_blocks, token_maps
from xsmae.models.vit import run_blocks


def images(*shape):
    return jax.random.normal(jax.random.key(0), shape)


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [
        (12, (3, 5, 7, 11)),
        (24, (7, 11, 15, 23)),
        (32, (10, 15, 21, 31)),
        (3, (0, 1, 1, 2)),
        (1, (0, 0, 0, 0)),
    ],
)
def test_which_blocks_are_tapped(depth, blocks):
    assert tapped_blocks(depth) == blocks


@pytest.mark.parametrize(("scan", "dropped"), [(True, True), (False, False)])
def test_maps_are_the_tokens_after_each_block(scan, dropped):
    model = {**MODEL, "encoder_norm": False, "scan": scan, "remat": "elementwise"}
    encoder = build_encoder(model, channels=3, rngs=nnx.Rngs(0))
    x, scales = images(2, 16, 24, 3), None
    if dropped:
        scales = drop_path_scales(jax.random.key(1), rate=0.5, depth=3, batch=2)
    graphdef, layers = nnx.split(encoder.blocks)
    first = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[:2], layers))

    @jax.jit
    def run(x):
        begun = None if scales is None else scales[:2]
        return (
            token_maps(encoder, x, (1, 1, 2), branch_scales=scales),
            encoder(x, branch_scales=scales),
            run_blocks(first, encoder.embed(x), branch_scales=begun, scan=scan),
        )

    found, *expected = run(x)
    late, early = (tokens[:, 1:].reshape(2, 4, 6, 16) for tokens in expected)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_allclose(found[2], late, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[1], early, rtol=1e-5, atol=1e-5)


def test_maps_of_groups_of_bands_are_their_mean():
    groups = {"channel_groups": ((0, 2), (1,)), "group_dim": 4, "encoder_norm": False}
    encoder = build_encoder({**MODEL, **groups}, channels=3, rngs=nnx.Rngs(0))
    x = images(2, 16, 8, 3)
    (found,) = jax.jit(lambda x: token_maps(encoder, x, (2,)))(x)
    tokens = np.asarray(jax.jit(encoder)(x))[:, 1:].reshape(2, 2, 4, 2, 16)
    np.testing.assert_allclose(found, tokens.mean(axis=1), rtol=1e-5, atol=1e-6)


def test_the_neck_has_four_strides():
    neck = upernet.Neck(
        8, norm="batch", tap_norm=False, dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    taps = [images(3, 5, 4, 8) + i for i in range(4)]
    maps = neck(taps, training=False)
    assert [m.shape[1:3] for m in maps] == [(20, 16), (10, 8), (5, 4), (2, 2)]
    np.testing.assert_array_equal(maps[2], taps[2])
    coarse = np.asarray(taps[3])[:, :4].reshape(3, 2, 2, 2, 2, 8).max(axis=(2, 4))
    np.testing.assert_array_equal(maps[3], coarse)
    # A transposed convolution of stride 2: each token makes a square of its own.
    kernel = np.asarray(neck.up2.proj.kernel[...]).reshape(8, 2, 2, 8)
    for y, x in ((0, 0), (7, 3), (9, 7)):
        expected = np.asarray(taps[1])[:, y // 2, x // 2] @ kernel[:, y % 2, x % 2]
        np.testing.assert_allclose(maps[1][:, y, x], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="1x4 patches"):
        neck([images(1, 1, 4, 8)] * 4, training=False)


def test_a_norm_per_tap_removes_the_scale_of_a_frozen_block():
    neck = upernet.Neck(
        8, norm="group", tap_norm=True, dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    x = images(1, 4, 4, 8)
    near, far = (
        neck([x * factor] * 4, training=False) for factor in (1, jnp.float32(100))
    )
    for found, scaled in zip(near, far, strict=True):
        np.testing.assert_allclose(found, scaled, rtol=1e-3, atol=1e-3)


def test_upernet_scores_quarters_of_a_patch():
    def scores():
        net = upernet.UperNet(8, 3, norm="batch", tap_norm=False, rngs=nnx.Rngs(0))
        assert net.head.classifier.in_features == 128
        return net([jnp.zeros((2, 4, 6, 8))] * 4, training=True)

    assert nnx.eval_shape(scores).shape == (2, 16, 24, 3)


def test_sizes_of_heads():
    widths = [upernet.head_channels(width) for width in (192, 384, 768, 1024, 1280)]
    assert widths == [128, 256, 512, 512, 512]
    assert [upernet.norm_for(size) for size in (7, 8)] == ["group", "batch"]
    with pytest.raises(ValueError, match="layer"):
        upernet.Norm(4, "layer", dtype=jnp.float32, rngs=nnx.Rngs(0))


def test_dropout_hides_whole_channels():
    x = jnp.ones((4, 3, 2, 500))
    found = np.asarray(upernet.drop_channels(jax.random.key(0), x, rate=0.1))
    assert (found == found[:, :1, :1]).all()
    kept = found[:, 0, 0] > 0
    assert 0.86 < kept.mean() < 0.94
    np.testing.assert_allclose(found[:, 0, 0][kept], 1 / 0.9, rtol=1e-6)
