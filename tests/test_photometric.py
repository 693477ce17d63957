"""Photometric changes: factors, draws of each view, validity, workers, the ramp."""

import dataclasses

import numpy as np
import pytest
from xsmae.configs import common

from tests.test_pipeline import SAMPLER, NoiseSource, assert_same, batches
from xsmae.data.photometric import CHANGES, Photometric
from xsmae.data.raster_views import RasterImage
from xsmae.data.records import BaseSource, Record
from xsmae.errors import UserError
from xsmae.methods import METHODS
from xsmae.run.workdir import differences
from xsmae.trainer import create_sampler

ON = {"brightness": 0.3, "contrast": 0.4, "saturation": 0.5, "band_gain": 0.2}
CHANGED = dataclasses.replace(SAMPLER, **ON)


class Fake:
    """What `RasterImage` asks of a raster of five bands; the top has no value."""

    bands = ("a", "b", "c", "d", "e")

    def read(self, window, size=None, group=()):
        values = np.random.default_rng(0).normal(1000, 300, (40, 40, 5))
        valid = np.ones((40, 40), bool)
        valid[:18] = False
        return np.where(valid[..., None], values, 0).astype(np.float32), valid


class Rasters(BaseSource):
    bands, dtype = Fake.bands, "float32"
    class_names = ()
    labels = None

    def __len__(self):
        return 10

    def id(self, index):
        return str(index)

    def __getitem__(self, index):
        image = RasterImage(Fake(), (0, 0, 40, 40))
        return Record(image, 2.0, None, self.id(index))


def some_views(dtype=np.float32, views=3, bands=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(60, 190, (views, 16, 16, bands)).astype(dtype)


def changed(views, valid=None, seed=0, strength=1.0, **fields):
    rng = np.random.default_rng(seed)
    return Photometric(**fields)(views, valid, rng=rng, strength=strength)


def test_brightness_is_one_factor_for_a_view():
    views = some_views()
    factors = changed(views, brightness=0.3) / views
    for view in factors:
        np.testing.assert_allclose(view, view[0, 0, 0], rtol=1e-6)
    assert len(np.unique(factors.round(4))) == 3
    assert np.abs(factors - 1).max() <= 0.3


def test_gain_is_one_factor_for_a_band():
    views = some_views(bands=5)
    factors = changed(views, band_gain=0.2) / views
    np.testing.assert_allclose(
        factors, np.broadcast_to(factors[:, :1, :1], factors.shape), rtol=1e-6
    )
    assert len(np.unique(factors[:, 0, 0].round(5))) == 15


def test_contrast_keeps_the_mean_of_each_band():
    views = some_views()
    found = changed(views, contrast=0.9)
    means = views.mean(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(found.mean(axis=(1, 2), keepdims=True), means, rtol=1e-4)
    apart, before = found - means, views - means
    factors = (apart * before).sum((1, 2, 3)) / np.square(before).sum((1, 2, 3))
    np.testing.assert_allclose(apart, factors[:, None, None, None] * before, atol=0.01)
    assert np.ptp(factors) > 0.1
    assert np.abs(factors - 1).max() <= 0.9


def test_saturation_keeps_the_mean_of_each_pixel():
    views = some_views()
    found = changed(views, saturation=0.9)
    np.testing.assert_allclose(found.mean(-1), views.mean(-1), rtol=1e-5)
    assert np.abs(found - views).max() > 5
    grey = np.repeat(views[..., :1], 3, axis=-1)
    np.testing.assert_allclose(changed(grey, saturation=0.9), grey, rtol=1e-6)


def test_8_bits_are_rounded_and_clipped():
    views = np.full((200, 4, 4, 3), 200, np.uint8)
    found = changed(views, brightness=1.0)
    assert found.dtype == np.uint8
    assert found.min() < 10
    assert found.max() == 255
    exact = changed(views.astype(np.float32), brightness=1.0)
    np.testing.assert_array_equal(found, np.clip(np.rint(exact), 0, 255))


def test_factors_are_uniform_in_their_range():
    views = np.ones((4000, 1, 1, 1), np.float32)
    factors = changed(views, brightness=0.4).ravel()
    assert 0.6 <= factors.min() < 0.61
    assert 1.39 < factors.max() <= 1.4
    assert abs(factors.mean() - 1) < 0.02
    weak = changed(views, brightness=0.4, strength=0.25).ravel()
    np.testing.assert_allclose(weak - 1, (factors - 1) / 4, atol=1e-6)


def test_switching_one_on_leaves_the_draws_of_the_others():
    views = np.full((3, 4, 4, 3), 100, np.float32)
    bright, gained = (changed(views, **{n: 0.3}) for n in ("brightness", "band_gain"))
    both = changed(views, brightness=0.3, band_gain=0.3)
    np.testing.assert_allclose(both, bright * gained / 100, rtol=1e-5)
    # Views of one colour have no contrast, and saturation keeps the mean of a pixel.
    flat = changed(views, brightness=0.3, band_gain=0.3, contrast=0.5)
    np.testing.assert_allclose(flat, both, rtol=1e-5)
    vivid = changed(views, brightness=0.3, band_gain=0.3, saturation=0.5)
    np.testing.assert_allclose(vivid.mean(-1), both.mean(-1), rtol=1e-5)


def test_pixels_without_a_value_stay_and_do_not_count():
    views = some_views(bands=5)
    valid = np.random.default_rng(1).random(views.shape[:3]) > 0.4
    valid[2] = False
    found = []
    for poison in (0.0, 1e6, np.nan):
        given = np.where(valid[..., None], views, np.float32(poison))
        result = changed(given, valid, contrast=0.5, brightness=0.3, band_gain=0.3)
        np.testing.assert_array_equal(result[~valid], given[~valid])
        found.append(result[valid])
    assert np.isfinite(found[0]).all()
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
    assert np.abs(found[0] - views[valid]).max() > 5


@pytest.mark.parametrize("source", [NoiseSource(10), Rasters()])
def test_off_is_bit_identical(source):
    """Also at the first step of a ramp, and with fields that are 0."""
    expected = batches(source, num_steps=1)
    ramp = dataclasses.replace(CHANGED, saturation=0.0, photometric_ramp=4)
    zeros = dataclasses.replace(SAMPLER, **dict.fromkeys(ON, 0.0), photometric_ramp=4)
    for sampler in (zeros, ramp):
        assert_same(batches(source, sampler, num_steps=1), expected)


@pytest.mark.parametrize("view2_from", ["source", "view1"])
@pytest.mark.parametrize("kind", ["8 bits", "raster"])
def test_only_the_values_change(kind, view2_from):
    source = NoiseSource(10) if kind == "8 bits" else Rasters()
    # A smallest valid part makes some views to be drawn again.
    changes = {"min_valid": 0.0 if kind == "8 bits" else 0.5, "batch_size": 8}
    before, after = (
        batches(
            source,
            dataclasses.replace(sampler, saturation=0.0, view2_from=view2_from),
            **changes,
        )
        for sampler in (SAMPLER, CHANGED)
    )
    for one, other in zip(before, after, strict=True):
        for name in one.keys() - {"image"}:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)
        different = (one["image"] != other["image"]).mean(axis=(2, 3, 4))
        assert (different > 0.2).all()
        if "valid" in one:
            assert not one["valid"].all()
            assert not other["image"][~one["valid"]].any()
            # One factor for both views would give one ratio.
            sums = [b["image"].sum(axis=(2, 3)) for b in (one, other)]
            ratios = sums[1] / sums[0]
            assert np.abs(ratios[:, 0] - ratios[:, 1]).min() > 1e-4


def test_workers_threads_and_resuming_change_nothing():
    sampler = dataclasses.replace(CHANGED, photometric_ramp=3)
    expected = batches(sampler=sampler)
    assert_same(batches(sampler=sampler, num_workers=2), expected)
    assert_same(batches(sampler=sampler, num_threads=1), expected)
    assert_same(batches(sampler=sampler, start_step=2), expected[2:])
    other = batches(sampler=sampler, seed=4)
    assert (other[-1]["image"] != expected[-1]["image"]).any()
    parts = [
        batches(sampler=sampler, process_index=i, process_count=2) for i in range(2)
    ]
    for whole, *halves in zip(expected, *parts, strict=True):
        found = np.concatenate([half["image"] for half in halves])
        np.testing.assert_array_equal(found, whole["image"])


def test_the_ramp_grows_linearly():
    ramp = Photometric(brightness=0.1, ramp=4)
    assert [ramp.strength(step) for step in (0, 1, 4, 9)] == [0, 0.25, 1, 1]
    assert Photometric(brightness=0.1).strength(0) == 1
    assert Photometric(ramp=4).strength(9) == 0
    source = NoiseSource(10)
    before, full = batches(source), batches(source, CHANGED)
    after = batches(source, dataclasses.replace(CHANGED, photometric_ramp=3))
    apart = [
        [np.abs(b["image"].astype(float) - a["image"]).mean() for b, a in pairs]
        for pairs in (zip(before, x, strict=True) for x in (after, full))
    ]
    assert apart[0][0] == 0
    assert 0 < apart[0][1] < apart[0][2] < 0.9 * apart[1][2]
    assert apart[0][3:] == apart[1][3:]


def test_every_preset_is_off_by_default():
    for name, method in METHODS.items():
        for preset in method.presets:
            views = common.get_common(preset, "tiny", name).views
            assert [views[change] for change in CHANGES] == [0.0] * 4
            assert views.photometric_ramp == 0


def test_saturation_needs_red_green_and_blue():
    config = common.get_common("published", "tiny", "mae")
    config.views.saturation = 0.2
    assert create_sampler(config).photometric.saturation == 0.2
    for bands in (("red", "green", "blue", "nir"), ("nir", "red", "green"), ("red",)):
        config.bands = bands
        with pytest.raises(UserError, match=rf"saturation=0\.2.*{', '.join(bands)}"):
            create_sampler(config)
    config.views.saturation = 0.0
    config.views.band_gain = 0.2
    create_sampler(config)


@pytest.mark.parametrize(
    ("field", "value"), [("brightness", 1.5), ("contrast", -0.1), ("ramp", -1)]
)
def test_wrong_fields_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"views\..*{field}={value}"):
        Photometric(**{field: value})


def test_a_run_that_began_before_these_fields_resumes():
    config = common.get_common("published", "tiny", "mae").to_dict()
    old = {**config, "views": {**config["views"]}}
    for name in (*CHANGES, "photometric_ramp"):
        del old["views"][name]
    assert differences(old, config) == []
    config["views"] = {**config["views"], "brightness": 0.2}
    assert differences(old, config) == ["views.brightness was 0.0, is 0.2"]
