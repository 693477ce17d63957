"""Views of rasters: cut in float32, with their validity, box and GSD."""

import numpy as np
import pytest
from PIL import Image

from tests.support.rasters import REASON, land, north_up, write
from xsmae.data.pipeline import make_batches
from xsmae.data.raster_views import FloatPixels, RasterImage
from xsmae.data.records import BaseSource, Record
from xsmae.data.square import marked, square
from xsmae.data.views import ViewSampler
from xsmae.errors import BadImageError

VIEWS = {
    "num_views": 2,
    "size": 16,
    "area": (0.25, 1.0),
    "ratio": (3 / 4, 4 / 3),
    "area_distribution": "uniform",
    "interpolation": "bicubic",
    "horizontal_flip": 0.5,
    "vertical_flip": 0.5,
}


def values_of(height, width, bands=2, seed=0):
    return np.random.default_rng(seed).normal(size=(height, width, bands)).astype("f4")


def cut(values, valid, box, size, how=Image.Resampling.BICUBIC):
    view = FloatPixels(values, valid).cut(box, size, how)
    return view.values, view.valid


def test_a_whole_window_is_cut_as_pillow_cuts_each_band():
    values = values_of(40, 32)
    box = (3.25, 2.5, 29.0, 30.75)
    found, valid = cut(values, np.ones((40, 32), bool), box, 12)
    for band in range(2):
        expected = Image.fromarray(values[..., band]).resize(
            (12, 12), Image.Resampling.BICUBIC, box=(2.5, 3.25, 30.75, 29.0)
        )
        np.testing.assert_array_equal(found[..., band], np.asarray(expected))
    assert valid.all()


def test_a_gap_outside_of_the_box_changes_nothing():
    values, valid = values_of(40, 40), np.ones((40, 40), bool)
    valid[:, 30:] = False
    poisoned = np.where(valid[..., None], values, np.nan)
    found, good = cut(poisoned, valid, (0, 0, 20, 20), 10)
    expected, _ = cut(values[:, :30], np.ones((40, 30), bool), (0, 0, 20, 20), 10)
    np.testing.assert_array_equal(found, expected)
    assert good.all()


@pytest.mark.parametrize("poison", [np.nan, 1e9])
def test_pixels_without_a_value_reach_no_view(poison):
    values, valid = values_of(40, 40), np.ones((40, 40), bool)
    valid[10:20, :15] = False
    clean = cut(np.where(valid[..., None], values, 0), valid, (0, 0, 40, 40), 16)
    poisoned = cut(
        np.where(valid[..., None], values, poison), valid, (0, 0, 40, 40), 16
    )
    np.testing.assert_array_equal(clean[0], poisoned[0])
    np.testing.assert_array_equal(clean[1], poisoned[1])
    assert 0 < clean[1].mean() < 1


def test_beside_a_gap_a_constant_stays_the_constant():
    values = np.full((32, 32, 1), 0.3, np.float32)
    valid = np.ones((32, 32), bool)
    valid[:, :13] = False
    found, good = cut(values, valid, (0, 0, 32, 32), 8)
    np.testing.assert_allclose(found[good], 0.3, rtol=1e-6)
    assert (found[~good] == 0).all()
    # 13 of 32 columns are missing: three of eight of the view, and a quarter of one.
    np.testing.assert_array_equal(good[0], [False] * 3 + [True] * 5)


class Whole(BaseSource):
    """One record: an array, or a raster's window."""

    dtype, units, bands, class_names, labels = "float32", "", ("a", "b"), (), None
    fingerprint = "0" * 16

    def __init__(self, image, gsd, count=1):
        self.image, self.gsd, self.count = image, gsd, count

    def __len__(self):
        return self.count

    def id(self, index):
        return str(index)

    def __getitem__(self, index):
        return Record(self.image, self.gsd, None, self.id(index))


class Fake:
    """What `RasterImage` asks of a raster."""

    bands = ("a", "b")

    def __init__(self, values, valid):
        self.values, self.valid = values, valid

    def read(self, window, size=None, group=()):
        assert size is None
        top, left, height, width = window
        place = np.s_[top : top + height, left : left + width]
        return self.values[place], self.valid[place]


def draw(image, gsd, seed=0, **changes):
    rng = {"rng": np.random.default_rng(seed), "batch_rng": np.random.default_rng(9)}
    return ViewSampler(**{**VIEWS, **changes})(image, gsd, **rng)


@pytest.mark.parametrize("view2_from", ["source", "view1"])
def test_views_of_a_raster_are_those_of_an_image_of_8_bits(view2_from):
    """The same boxes, mirrored alike, and values within the rounding of 8 bits."""
    image = (np.random.default_rng(0).uniform(size=(48, 40, 3)) * 255).astype(np.uint8)
    image[10:] = 60 + image[10:] // 3
    raster = Fake(image.astype(np.float32), np.ones((48, 40), bool))
    raster.bands = ("red", "green", "blue")
    for seed in range(4):
        expected = draw(image, 2.0, seed, view2_from=view2_from)
        found = draw(RasterImage(raster, (0, 0, 48, 40)), 2.0, seed,
                     view2_from=view2_from)  # fmt: skip
        for name in ("box", "gsd", "flip"):
            np.testing.assert_array_equal(found[name], expected[name])
        assert found["image"].dtype == np.float32
        assert found["valid"].all()
        clipped = found["image"].clip(0, 255)
        # View 2 of view 1 is made of what view 1's clipping lost.
        worst = 1.01 if view2_from == "source" else 40
        np.testing.assert_allclose(clipped, expected["image"], atol=worst)
        assert np.abs(clipped - expected["image"]).mean() < 0.6


def test_gsd_and_validity_follow_the_crop():
    valid = np.ones((64, 64), bool)
    valid[:, :32] = False
    raster = Fake(values_of(64, 64), valid)
    for seed in range(6):
        found = draw(RasterImage(raster, (0, 0, 64, 64)), (2.0, 3.0), seed)
        for view in range(2):
            top, left, bottom, right = found["box"][view]
            expected = 2.0 * (bottom - top) / 16, 3.0 * (right - left) / 16
            np.testing.assert_allclose(found["gsd"][view], expected, rtol=1e-6)
            part = np.clip((32 - left) / (right - left), 0, 1)
            shown = found["valid"][view]
            assert abs((1 - part) - shown.mean()) <= 1 / 16 / 2 + 1e-6
            column = shown.all(axis=0) | ~shown.any(axis=0)
            assert column.all()
            first, last = (-1, 0) if found["flip"][1] else (0, -1)
            if 0.1 < part < 0.9:
                assert not shown[0, first]
                assert shown[0, last]


def test_views_with_too_little_valid_ground_are_drawn_again():
    valid = np.zeros((64, 64), bool)
    valid[:, 24:] = True
    image = RasterImage(Fake(values_of(64, 64), valid), (0, 0, 64, 64))
    source = Whole(image, 1.0, count=40)
    options = {
        "seed": 0, "batch_size": 40, "start_step": 0, "num_steps": 1,
        "max_rejected_fraction": 0.01,
    }  # fmt: skip
    sampler = ViewSampler(**VIEWS)
    (loose,) = make_batches(source, sampler, **options)
    (strict,) = make_batches(source, sampler, min_valid=0.7, **options)
    assert (loose["index"] == loose["requested"]).all()
    least = loose["valid"].mean(axis=(2, 3)).min(axis=1)
    assert (least < 0.7).any()
    assert (least >= 0.7).any()
    used = strict["index"] >= 0
    assert used.mean() > 0.8
    assert (strict["valid"][used].mean(axis=(2, 3)) >= 0.7).all()
    # Where the first draw was good enough it stays.
    good = (least >= 0.7) & used
    np.testing.assert_array_equal(strict["box"][good], loose["box"][good])


def test_an_image_without_enough_valid_ground_is_bad():
    image = RasterImage(
        Fake(values_of(32, 32), np.zeros((32, 32), bool)), (0, 0, 32, 32)
    )
    (batch,) = make_batches(
        Whole(image, 1.0, count=4),
        ViewSampler(**VIEWS),
        seed=0,
        batch_size=4,
        start_step=0,
        num_steps=1,
        max_rejected_fraction=0.5,
        min_valid=0.5,
    )
    assert (batch["index"] == -1).all()
    assert batch["image"].shape == (4, 2, 16, 16, 2)
    assert batch["image"].dtype == np.float32
    assert not batch["valid"].any()


def test_much_coarser_views_read_a_reduced_raster(tmp_path):
    rasterio = pytest.importorskip("rasterio", reason=REASON)
    del rasterio
    from xsmae.data.raster import open_raster

    path = write(tmp_path / "a.tif", land(512, 512), transform=north_up(5e5, 5e6, 2))
    with open_raster(path) as raster:
        image = RasterImage(raster, (0, 0, 512, 512))
        small = image.pixels(16.0)
        assert max(small.valid.shape) == 48  # MARGIN of 1.5 pixels for each of 32
        found = draw(image, raster.gsd, size=8, area=(1.0, 1.0), num_views=1)
        whole = FloatPixels(*image.read()).cut(
            tuple(found["box"][0]), 8, Image.Resampling.BICUBIC
        )
        whole = whole.mirrored(vertical=found["flip"][0], horizontal=found["flip"][1])
        assert np.abs(found["image"][0] - whole.values).mean() < 0.03
        assert image.pixels(2.9).valid.shape == (512, 512)


def test_a_raster_that_breaks_is_a_bad_image(tmp_path):
    pytest.importorskip("rasterio", reason=REASON)
    from xsmae.data.raster import open_raster

    path = write(tmp_path / "a.tif", land(64, 64))
    with open_raster(path) as raster:
        path.write_bytes(path.read_bytes()[:600])
        with pytest.raises(BadImageError):
            draw(RasterImage(raster, (0, 0, 64, 64)), 1.0)


@pytest.mark.parametrize("poison", [0.0, 1e9, np.nan])
def test_a_whole_image_is_resized_by_its_valid_pixels(poison):
    valid = np.ones((20, 24), bool)
    valid[:7, :11] = False
    values = np.where(valid[..., None], values_of(20, 24), np.float32(poison))
    image = marked(Record(values, (1.0, 2.0), None, "a", valid))
    for size in (1, 3, 5, 10, 20, 37):
        found, gsd = square(image, np.array([1.0, 2.0]), size)
        np.testing.assert_allclose(gsd, np.array([1, 2]) * 20 / size)
        assert np.nanmin(found) >= values[valid].min()
        assert np.nanmax(found) <= values[valid].max()
    quarters, _ = square(image, 1.0, 5)
    inside = valid[:, 2:22].reshape(5, 4, 5, 4).mean((1, 3))
    np.testing.assert_array_equal(np.isnan(quarters[..., 0]), inside < 0.5)
    block, good = values[4:8, 10:14], valid[4:8, 10:14]
    np.testing.assert_allclose(quarters[1, 2], block[good].mean(0), rtol=1e-5)


def test_an_image_has_a_value_at_every_size_or_at_none():
    valid = np.zeros((16, 16), bool)
    valid[5, 6] = True
    record = Record(values_of(16, 16), 1.0, None, "a", valid)
    for size in (2, 4, 16, 40):
        found, _ = square(marked(record), 1.0, size)
        kept = found[~np.isnan(found)].reshape(-1, 2)
        assert len(kept)
        np.testing.assert_allclose(kept, np.tile(record.image[5, 6], (len(kept), 1)))
    valid[5, 6] = False
    with pytest.raises(BadImageError, match="no pixel"):
        square(marked(record), 1.0, 4)
