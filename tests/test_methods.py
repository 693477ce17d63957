"""SatMAE's groups of bands, Scale-MAE's two frequency bands, their pictures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from tests.support.models import MODEL, some_noise, some_views
from xsmae import losses
from xsmae.bands import BANDS, Bands
from xsmae.methods import METHODS
from xsmae.methods.scale_mae import frequencies_of
from xsmae.models.mae import MAE, Views
from xsmae.models.position import TokenPositions, patch_positions, sincos_1d
from xsmae.models.scale_mae import Frequencies, combine
from xsmae.models.vit import patchify
from xsmae.ops import resize
from xsmae.train_state import prepare_views

GROUPS = ((0, 3), (2, 1), (4,))
SAT = {
    **MODEL,
    "channel_groups": GROUPS,
    "group_dim": 8,
    "decoder_group_dim": 4,
    "spatial_mask": False,
    "band_order": "grouped",
}
SCALE = {
    **MODEL,
    "target_scale": 2,
    "head_dim": 8,
    "head_depth": 1,
    "independent_heads": True,
    "progressive": False,
    "position": "gsd",
}
SAT_LOSS = {"reconstruction": {"norm_pix_loss": False}}
SCALE_LOSS = {
    "low_frequency": {"through": 0},
    "high_frequency": {"absolute": True, "cutoff": 1 / 8},
}


def sat_mae(**changes):
    model = SAT | changes
    built = METHODS["sat_mae"].build(model, channels=5, view_size=16, rngs=nnx.Rngs(0))
    return built, model


def scale_mae(**changes):
    model = SCALE | changes
    built = METHODS["scale_mae"].build(
        model, channels=3, view_size=16, rngs=nnx.Rngs(0)
    )
    return built, model


def band_views(bands=5, batch=3, seed=0):
    images = np.random.default_rng(seed).normal(size=(batch, 1, 16, 16, bands))
    views = some_views(batch, 1)
    return Views(jnp.asarray(images, jnp.float32), views.gsd, views.box)


def band_noise(model, batch=3):
    return some_noise(batch, 1, model.noise_size(16, 16))


def target_views(scale=2, batch=3):
    shape = (batch, 1, 16 * scale, 16 * scale, 3)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, shape, dtype=np.uint8),
        "gsd": np.full((batch, 1, 2), 1.5, np.float32),
        "box": np.tile(np.array([0.0, 0, 16, 16], np.float32), (batch, 1, 1)),
        "flip": np.zeros((batch, 2), bool),
    }
    bands = Bands(BANDS, (0.4,) * 3, (0.2,) * 3)
    return prepare_views(batch, bands=bands, target_scale=scale)


def test_every_method_shares_the_blocks():
    """All methods use the same blocks, encoder and decoder classes."""
    models = [
        METHODS["cross_scale_mae"]
        .build(MODEL, channels=3, view_size=16, rngs=nnx.Rngs(0))
        .mae,
        METHODS["mae"].build(MODEL, channels=3, view_size=16, rngs=nnx.Rngs(0)),
        sat_mae()[0],
        scale_mae()[0],
    ]
    for part in ("encoder", "decoder"):
        assert len({type(getattr(model, part)) for model in models}) == 1
        assert len({type(getattr(model, part).blocks) for model in models}) == 1
    assert all(isinstance(model, MAE) for model in models)


def test_sat_mae_without_groups_is_the_mae():
    build = functools.partial(METHODS["sat_mae"].build, channels=3, view_size=16)
    model = build(SAT | {"channel_groups": ()}, rngs=nnx.Rngs(0))
    expected = METHODS["mae"].build(MODEL, channels=3, view_size=16, rngs=nnx.Rngs(0))
    views, noise = some_views(3, 1), some_noise(3, 1)
    for a, b in zip(
        jax.tree.leaves(model(views, noise)),
        jax.tree.leaves(expected(views, noise)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("spatial", [False, True])
def test_masks_of_groups(spatial):
    model, _ = sat_mae(spatial_mask=spatial)
    noise = band_noise(model)
    assert noise.shape == (3, 1, 16 if spatial else 48)
    output = model(band_views(), noise)
    mask = np.asarray(output.mask)
    assert mask.shape == (3, 1, 3, 16)
    np.testing.assert_array_equal(mask.sum((2, 3)), 36)
    assert output.encoder_tokens.shape == (3, 1, 1 + 12, 16)
    assert output.pred.shape == (3, 1, 16, 16 * 5)
    same = (mask == mask[:, :, :1]).all()
    assert same == spatial


@pytest.mark.parametrize("spatial", [False, True])
def test_restored_tokens_lie_where_they_were(spatial):
    """Kept tokens return to their group and patch; the rest is hidden."""
    model, _ = sat_mae(spatial_mask=spatial)
    masking = model.random_masking(band_noise(model)[:, 0])
    for row in range(3):
        kept = np.asarray(masking.ids_keep[row])
        # Follow the index of each token through masking and restoring.
        shuffled = np.concatenate([kept, np.full(48 - len(kept), -1)])
        restored = shuffled[np.asarray(masking.ids_restore[row])]
        hidden = np.asarray(masking.mask[row]).reshape(-1) == 1
        np.testing.assert_array_equal(restored[hidden], -1)
        np.testing.assert_array_equal(restored[~hidden], np.arange(48)[~hidden])
        assert sorted(np.asarray(masking.ids_restore[row])) == list(range(48))


def test_an_encoder_of_groups_reads_its_bands_alone():
    model, _ = sat_mae()
    images = band_views().images[:, 0]
    tokens = model.encoder.patch_embed(images)
    changed = model.encoder.patch_embed(images.at[..., 1].add(1.0))
    differs = np.abs(np.asarray(tokens - changed)).reshape(3, 3, 16, 16).max((0, 2, 3))
    np.testing.assert_array_equal(differs > 0, [False, True, False])


def test_positions_of_groups():
    positions = TokenPositions(16, groups=3, group_dim=8)
    found = np.asarray(positions((2, 2))).reshape(3, 4, 16)
    for group in range(3):
        np.testing.assert_array_equal(
            found[group, :, :8], patch_positions((2, 2), 8)[0]
        )
        expected = np.tile(sincos_1d(jnp.array([group]), 8), (4, 1))
        np.testing.assert_array_equal(found[group, :, 8:], expected)
    token = np.asarray(positions.of_class_token())[0, 0]
    np.testing.assert_array_equal(token[:8], 0)
    np.testing.assert_array_equal(token[8:], sincos_1d(jnp.array(3.0), 8))


def test_band_orders_permute_the_prediction():
    views = band_views()
    grouped, concatenated = (
        sat_mae(band_order=order)[0] for order in ("grouped", "concatenated")
    )
    noise = band_noise(grouped)
    a, b = (
        np.asarray(model(views, noise).pred).reshape(3, 1, 16, 16, 5)
        for model in (grouped, concatenated)
    )
    np.testing.assert_array_equal(a[..., [0, 3, 2, 1, 4]], b)


def test_wrong_groups_are_refused():
    for groups in (((0, 1), (1, 2)), ((0, 1), (2,)), ((0, 1, 2, 3, 4, 5),)):
        with pytest.raises(ValueError, match=r"channel_groups=\(.* 0 to 4 "):
            sat_mae(channel_groups=groups)
    with pytest.raises(ValueError, match="band_order="):
        sat_mae(band_order="random")


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_reconstruction_of_groups_by_hand(norm_pix_loss):
    rng = np.random.default_rng(0)
    pred, target = rng.normal(size=(2, 2, 1, 4, 4 * 5)).astype(np.float32)
    mask = rng.integers(0, 2, (2, 1, 3, 4)).astype(np.float32)
    found = losses.reconstruction(
        jnp.asarray(pred), jnp.asarray(target), jnp.asarray(mask),
        norm_pix_loss=norm_pix_loss, channel_groups=GROUPS, channels=5,
    )  # fmt: skip
    if norm_pix_loss:
        std = np.sqrt(target.var(-1, keepdims=True, ddof=1) + 1e-6)
        target = (target - target.mean(-1, keepdims=True)) / std
    error = ((pred - target) ** 2).reshape(2, 1, 4, 4, 5)
    total = 0.0
    for group, bands in enumerate(GROUPS):
        per_patch = error[..., list(bands)].mean((-2, -1))
        total += (per_patch * mask[:, :, group]).sum()
    np.testing.assert_allclose(found, [total / mask.sum()], rtol=1e-5)


def test_one_group_of_all_bands_is_the_plain_loss():
    rng = np.random.default_rng(0)
    pred, target = rng.normal(size=(2, 2, 1, 4, 12)).astype(np.float32)
    mask = jnp.asarray(rng.integers(0, 2, (2, 1, 4)), jnp.float32)
    plain = losses.reconstruction(pred, target, mask, norm_pix_loss=True)
    grouped = losses.reconstruction(
        pred, target, mask[:, :, None], norm_pix_loss=True,
        channel_groups=((0, 1, 2),), channels=3,
    )  # fmt: skip
    np.testing.assert_allclose(plain, grouped, rtol=1e-6)


@pytest.mark.parametrize("spatial", [False, True])
def test_pictures_hide_the_bands_of_the_hidden_groups(spatial):
    model, config = sat_mae(spatial_mask=spatial)
    views = band_views()
    output = model(views, band_noise(model))
    pictures = METHODS["sat_mae"].pictures(output, views, model=config, loss=SAT_LOSS)
    hidden = np.asarray(pictures.hidden)
    mask = np.asarray(output.mask).reshape(3, 1, 3, 4, 4)
    for group, bands in enumerate(GROUPS):
        of_group = mask[:, :, group].repeat(4, axis=2).repeat(4, axis=3) > 0.5
        for band in bands:
            np.testing.assert_array_equal(hidden[..., band], of_group)
    shown = np.asarray(pictures.panels[0])
    np.testing.assert_array_equal(shown[~hidden], np.asarray(views.images)[~hidden])
    by_patch = np.asarray(patchify(jnp.asarray(shown[:, 0]), 4))
    predicted = np.asarray(output.pred[:, 0])
    at = np.asarray(patchify(jnp.asarray(hidden[:, 0]), 4))
    np.testing.assert_allclose(by_patch[at], predicted[at], rtol=1e-6)


def test_pictures_put_a_perfect_prediction_back():
    """With `norm_pix_loss`, the prediction has no mean and no deviation."""
    views, loss = some_views(3, 1), {"reconstruction": {"norm_pix_loss": True}}
    model = METHODS["mae"].build(MODEL, channels=3, view_size=16, rngs=nnx.Rngs(0))
    output = model(views, some_noise(3, 1))
    target = patchify(views.images[:, 0], 4)
    mean, std = losses.patch_statistics(target)
    perfect = ((target - mean) / std)[:, None]
    output = type(output)(
        perfect, output.mask, output.encoder_tokens, output.decoder_tokens
    )
    pictures = METHODS["mae"].pictures(output, views, model=MODEL, loss=loss)
    np.testing.assert_allclose(pictures.panels[0], views.images, rtol=1e-4, atol=1e-5)
    assert np.asarray(pictures.hidden).mean() == 0.75


# Scale-MAE


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("independent", [False, True])
def test_sizes_of_the_two_bands(progressive, independent):
    model, _ = scale_mae(progressive=progressive, independent_heads=independent)
    views = target_views()
    output = model(views, some_noise(3, 1))
    assert output.pred.low.shape == (3, 1, 16, 16, 3)
    assert output.pred.high.shape == views.target.shape == (3, 1, 32, 32, 3)
    # The decoder has no class token.
    assert output.decoder_tokens.shape == (3, 1, 16, 8)


def test_impossible_targets_are_refused():
    with pytest.raises(ValueError, match="multiple of 8"):
        scale_mae(target_scale=3)
    with pytest.raises(ValueError, match="head_dim=6"):
        scale_mae(head_dim=6)


def test_the_targets_of_the_two_bands_add_up():
    """Low-pass copy plus the rest: `combine` restores the image."""
    views = target_views()
    target = frequencies_of(views, SCALE_LOSS)
    assert target.cutoff == 4
    whole = combine(Frequencies(target.low, target.high), target.cutoff)
    np.testing.assert_allclose(whole, views.target, rtol=1e-4, atol=1e-4)
    # Averaging to 8 pixels first removes detail that 16 pixels can show.
    through = SCALE_LOSS | {"low_frequency": {"through": 8}}
    coarse = frequencies_of(views, through).low
    assert np.abs(np.asarray(coarse - target.low)).max() > 0.1


def test_the_models_image_is_the_targets_mean():
    views = target_views()
    expected = rearrange(
        np.asarray(views.target), "b v (h p) (w q) c -> b v h w (p q) c", p=2, q=2
    ).mean(axis=-2)
    np.testing.assert_allclose(views.images, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(views.gsd, 3.0)


@pytest.mark.parametrize("absolute", [False, True])
def test_frequency_band_by_hand(absolute):
    rng = np.random.default_rng(0)
    pred, target = rng.normal(size=(2, 2, 1, 8, 8, 3)).astype(np.float32)
    mask = rng.integers(0, 2, (2, 1, 4)).astype(np.float32)
    found = losses.frequency_band(
        jnp.asarray(pred), jnp.asarray(target), jnp.asarray(mask),
        absolute=absolute, grid=(2, 2),
    )  # fmt: skip
    error = np.abs(pred - target) if absolute else (pred - target) ** 2
    pixels = mask.reshape(2, 1, 2, 2).repeat(4, axis=2).repeat(4, axis=3)
    expected = (error.sum(-1) * pixels).sum() / pixels.sum()
    np.testing.assert_allclose(found, [expected], rtol=1e-5)


def test_scale_mae_losses_and_pictures():
    model, config = scale_mae()
    views = target_views()
    output = model(views, some_noise(3, 1))
    method = METHODS["scale_mae"]
    terms, extras = method.losses(output, views, model=config, loss=SCALE_LOSS)
    assert set(terms) == {"low_frequency", "high_frequency"}
    assert extras == {}
    assert all(np.isfinite(value) and value > 0 for value in terms.values())
    pictures = method.pictures(output, views, model=config, loss=SCALE_LOSS)
    assert pictures.titles[-1] == "target"
    np.testing.assert_array_equal(pictures.panels[-1], views.target)


# Resizing


def test_area_is_the_mean_of_what_is_covered():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 7, 3)))
    found = resize.area(images, (3, 3))
    np.testing.assert_allclose(
        found[:, 1, 0], images[:, 2:4, 0:3].mean((1, 2)), rtol=1e-5
    )
    # 7 to 3 pixels: from floor(7 / 3) to ceil(14 / 3).
    np.testing.assert_allclose(
        found[:, 0, 1], images[:, 0:2, 2:5].mean((1, 2)), rtol=1e-5
    )
    larger = resize.area(images, (12, 14))
    np.testing.assert_allclose(larger[:, ::2, ::2], images, rtol=1e-6)


def test_bilinear_and_nearest_by_hand():
    row = jnp.array([0.0, 4.0]).reshape(1, 1, 2, 1)
    found = resize.bilinear(row, (1, 4))[0, 0, :, 0]
    np.testing.assert_allclose(found, [0, 1, 3, 4], atol=1e-6)
    found = resize.nearest(row, (1, 4))[0, 0, :, 0]
    np.testing.assert_array_equal(found, [0, 0, 4, 4])
