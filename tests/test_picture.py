"""Pictures decoded as finely as needed: exact boxes, approximate pixels."""

import contextlib
import io
import itertools
import math

import numpy as np
import pytest
from PIL import ExifTags, Image

from xsmae.data.folder import FolderSource
from xsmae.data.images import MAX_PIXELS, decode
from xsmae.data.picture import MARGIN, open_picture
from xsmae.data.pipeline import make_batches
from xsmae.data.records import BaseSource
from xsmae.data.synthetic.source import Scene
from xsmae.data.views import ViewSampler
from xsmae.errors import BadImageError

SIZE = 32
VARIANTS = list(itertools.product(("source", "view1"), ("sample", "batch")))
SIDES = (518, 455)  # height and width, not multiples of 8


def create_sampler(**changes):
    settings = {
        "num_views": 2,
        "size": SIZE,
        "area": (0.25, 1.0),
        "area2": (0.25, 0.75),
        "ratio": (3 / 4, 4 / 3),
        "area_distribution": "log_uniform",
        "view2_from": "source",
        "view2_box": "sample",
        "interpolation": "bicubic",
        "interpolation2": "bilinear",
        "horizontal_flip": 0.5,
        "vertical_flip": 0.5,
    }
    return ViewSampler(**{**settings, **changes})


def opened(data, min_side=1, **crop):
    return open_picture(data, min_side=min_side, max_pixels=MAX_PIXELS, **crop)


def encode(pixels, file_format="JPEG", **options):
    buffer = io.BytesIO()
    quality = {"quality": 90} if file_format == "JPEG" else {}
    Image.fromarray(pixels).save(buffer, file_format, **{**quality, **options})
    return buffer.getvalue()


def exif(orientation):
    found = Image.Exif()
    found[ExifTags.Base.Orientation] = orientation
    return found


def views(image, seed, **changes):
    rngs = (np.random.default_rng((seed, stream)) for stream in range(2))
    names = ("rng", "batch_rng")
    return create_sampler(**changes)(image, 0.5, **dict(zip(names, rngs, strict=True)))


def both(data, seed, **changes):
    """The sample of the picture, and the sample of its full pixels."""
    with opened(data) as picture:
        sample = views(picture, seed, **changes)
    return sample, views(decode(data, min_side=1), seed, **changes)


def places(height, width):
    return np.mgrid[:height, :width].astype(float)


def smooth(height, width):
    y, x = places(height, width) / height
    bands = (127 + 100 * np.sin(5 * x + 3 * y), 127 + 100 * np.cos(4 * y - x), 90 * x)
    return np.stack(bands, axis=-1).astype(np.uint8)


def scene(height, width):
    world = Scene(seed=5, index=3, label=6)
    return world.render(top=-99.0, left=-99.0, height=height, width=width, gsd=0.5)


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def stripes(height, width):
    """Stripes from wide to one pixel, to show aliasing."""
    x = places(height, width)[1] - width / 2
    wave = 127.5 + 127.5 * np.sin(x * x * math.pi / width)
    return np.repeat(wave[..., None], 3, axis=-1).astype(np.uint8)


def colours(height, width):
    """A linear ramp in each band, so that a value gives its position."""
    y, x = places(height, width)
    bands = (255 * y / height, 255 * x / width, 0 * x)
    return np.stack(bands, axis=-1).round().astype(np.uint8)


# What does not change


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_boxes_gsds_and_flips_are_those_of_the_whole_image(file_format, variant):
    data = encode(colours(*SIDES), file_format)
    view2_from, view2_box = variant
    for seed in range(4):
        sample, expected = both(data, seed, view2_from=view2_from, view2_box=view2_box)
        for name in ("box", "gsd", "flip"):
            np.testing.assert_array_equal(sample[name], expected[name])


@pytest.mark.parametrize("side", [64, 91])
@pytest.mark.parametrize("view2_from", ["source", "view1"])
@pytest.mark.parametrize("pixels", [scene, noise])
def test_views_of_small_images_are_bit_for_bit_the_same(side, view2_from, pixels):
    """No pixel of a view spans 2 * MARGIN pixels of the image."""
    data = encode(pixels(side, side))
    for seed in range(8):
        sample, expected = both(data, seed, view2_from=view2_from)
        np.testing.assert_array_equal(sample["image"], expected["image"])


def test_whole_decode_is_that_of_images():
    data = encode(noise(*SIDES), exif=exif(6))
    with opened(data) as picture:
        assert picture.shape == (SIDES[1], SIDES[0], 3)
        np.testing.assert_array_equal(picture.decode(), decode(data))


# Errors of the pixels


@pytest.mark.parametrize(
    ("pixels", "mean", "levels", "decibels"),
    [
        (smooth, 0.4, 0.5, 50),
        (scene, 1.5, 3.0, 37),
        (noise, 2.0, 4.0, 35),
        (stripes, 5.0, 10.0, 26),
    ],
)
def test_views_are_near_those_of_the_whole_image(pixels, mean, levels, decibels):
    """Limits on the mean absolute error: `levels` for each view, `mean` over all."""
    errors = []
    for side in (300, 520, 1030):
        data = encode(pixels(side, side))
        for seed in range(6):
            sample, expected = both(data, seed)
            off = sample["image"].astype(float) - expected["image"]
            assert ((off**2).mean((1, 2, 3)) < 255**2 / 10 ** (decibels / 10)).all()
            errors.extend(np.abs(off).mean((1, 2, 3)))
    assert max(errors) < levels
    assert np.mean(errors) < mean


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_views_of_other_formats_are_bit_for_bit_the_same(file_format):
    data = encode(scene(*SIDES), file_format)
    for seed in range(3):
        sample, expected = both(data, seed)
        np.testing.assert_array_equal(sample["image"], expected["image"])


@pytest.mark.parametrize(
    ("finest", "step"),
    [
        (1.0, 1),
        (2 * MARGIN - 0.01, 1),
        (2 * MARGIN, 2),
        (4 * MARGIN - 0.01, 2),
        (4 * MARGIN, 4),
        (8 * MARGIN, 8),
        (1e9, 8),
    ],
)
def test_decodes_no_finer_than_needed(finest, step):
    height, width = SIDES
    with opened(encode(noise(*SIDES))) as picture:
        pixels = picture.pixels(finest)
    assert pixels.step == step
    assert pixels.rgb.size == (math.ceil(width / step), math.ceil(height / step))
    with opened(encode(noise(*SIDES), "PNG")) as picture:
        assert picture.pixels(finest).step == 1


# Positions of the pixels


@pytest.mark.parametrize("sides", [(521, 457), (512, 448), (1031, 900)])
def test_nothing_moves(sides):
    """Also if the last reduced pixel extends beyond the edge."""
    y, x = places(*sides) / [[[sides[0]]], [[sides[1]]]]
    waves = 127 + 60 * np.sin(20 * y) + 60 * np.sin(20 * x)
    data = encode(np.repeat(waves[..., None], 3, axis=-1).astype(np.uint8))
    for seed in range(6):
        sample, expected = both(data, seed)
        for view, other in zip(sample["image"], expected["image"], strict=True):
            off = view[..., 0].astype(float) - other[..., 0]
            slopes = np.stack(np.gradient(other[..., 0].astype(float))).reshape(2, -1)
            # The shift, in pixels of the view, that explains the difference best.
            step = np.linalg.lstsq(slopes.T, off.ravel(), rcond=None)[0]
            assert np.abs(step).max() < 0.02


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("sides", [SIDES, (512, 448)])
def test_turned_images_are_upright(orientation, sides):
    data = encode(colours(*sides), exif=exif(orientation))
    sample, expected = both(data, orientation)
    off = sample["image"].astype(float) - expected["image"]
    assert np.abs(off.mean(axis=(1, 2))).max() < 0.5
    np.testing.assert_array_equal(sample["box"], expected["box"])
    with opened(data) as picture:
        # Turned, odd sides would start with a part of a reduced pixel.
        reduced = orientation == 1 or sides != SIDES
        assert picture.pixels(1e9).step == (8 if reduced else 1)


def test_window_counts_as_the_image():
    """Also if it starts and ends inside a reduced pixel."""
    data, crop = encode(colours(*SIDES)), {"box": (101.0, 83.0, 250.0, 301.0)}
    whole = decode(data)[83:384, 101:351]
    for seed in range(4):
        with opened(data, **crop) as picture:
            assert picture.shape == (301, 250, 3)
            sample = views(picture, seed)
        expected = views(whole, seed)
        np.testing.assert_array_equal(sample["box"], expected["box"])
        off = sample["image"].astype(float) - expected["image"]
        assert np.abs(off.mean(axis=(1, 2))).max() < 0.3
    with opened(data, **crop) as picture:
        np.testing.assert_array_equal(picture.decode(), whole)


def test_small_window_is_bit_for_bit_the_same():
    data = encode(noise(*SIDES))
    with opened(data, box=(101.0, 83.0, 60.0, 70.0)) as picture:
        sample = views(picture, 1)
    expected = views(decode(data)[83:153, 101:161], 1)
    np.testing.assert_array_equal(sample["image"], expected["image"])


@pytest.mark.parametrize("progressive", [False, True])
def test_grey_and_progressive_are_reduced_too(progressive):
    grey = colours(*SIDES)[..., 0]
    data = encode(grey, progressive=progressive)
    with opened(data) as picture:
        pixels = picture.pixels(8.0)
    assert (pixels.step, pixels.rgb.mode) == (4, "RGB")
    sample, expected = both(data, 3)
    assert np.abs(sample["image"].astype(float) - expected["image"]).mean() < 1


def test_first_picture_of_several_is_reduced():
    pixels, preview = colours(*SIDES), Image.new("RGB", (64, 64))
    data = encode(pixels, "MPO", save_all=True, append_images=[preview])
    sample, expected = both(data, 0)
    assert np.abs(sample["image"].astype(float) - expected["image"]).mean() < 1


# The same images are refused


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("kept", [0.3, 0.95])
def test_truncated_is_refused_in_the_same_words(file_format, kept):
    data = encode(noise(*SIDES), file_format)
    data = data[: int(kept * len(data))]
    with pytest.raises(BadImageError) as whole:
        decode(data)
    with pytest.raises(BadImageError) as reduced, opened(data) as picture:
        views(picture, 0)
    assert str(reduced.value) == str(whole.value)


def test_jpeg_without_its_last_byte_is_refused():
    data = encode(noise(*SIDES))[:-1]
    with pytest.raises(BadImageError, match="truncated"), opened(data) as picture:
        picture.pixels(1e9)


def test_limits_are_those_of_the_whole_image():
    data = encode(noise(*SIDES))
    with opened(data, min_side=455) as picture:
        assert picture.pixels(1e9).rgb.size == (57, 65)
    with pytest.raises(BadImageError, match="min_side=456"), opened(data, min_side=456):
        pass
    with (
        pytest.raises(BadImageError, match=f"max_pixels={math.prod(SIDES) - 1}"),
        open_picture(data, min_side=1, max_pixels=math.prod(SIDES) - 1),
    ):
        pass


def test_errors_of_the_caller_stay_what_they_are():
    with pytest.raises(ZeroDivisionError), opened(encode(noise(64, 64))):
        raise ZeroDivisionError


# Through sources and batches


@pytest.fixture
def folder(tmp_path):
    """Six JPEGs of 300 px, the third one truncated."""
    for index in range(6):
        data = encode(np.roll(scene(300, 300), 40 * index, axis=1))
        (tmp_path / f"{index}.jpg").write_bytes(data[: -1 if index != 2 else -999])
    for index in (0, 1, 3, 4, 5):
        path = tmp_path / f"{index}.jpg"
        path.write_bytes(path.read_bytes() + b"\xd9")
    return tmp_path


def batches(folder, **changes):
    arguments = {"num_threads": 0, "start_step": 0, **changes}
    return list(
        make_batches(
            FolderSource(folder, gsd=0.5),
            create_sampler(),
            seed=3,
            batch_size=3,
            num_steps=4,
            max_rejected_fraction=0.5,
            **arguments,
        )
    )


@pytest.mark.parametrize(
    "changes", [{"num_threads": 4}, {"num_workers": 2}, {"start_step": 2}]
)
def test_batches_are_the_same_however_they_are_read(folder, changes):
    found = batches(folder, **changes)
    expected = batches(folder)[-len(found) :]
    assert len(found) == 4 - changes.get("start_step", 0)
    for one, other in zip(found, expected, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    replaced = [batch["index"] != batch["requested"] for batch in batches(folder)]
    assert np.sum(replaced) == 2  # the broken one, in each of two epochs


def test_the_opened_record_and_the_decoded_one_agree(folder):
    source = FolderSource(folder, gsd=0.5)
    whole = source[1]
    with source.open(1) as record:
        assert record.image.shape == whole.image.shape
        assert (record.gsd, record.label, record.id) == (0.5, None, "1.jpg")
    with pytest.raises(BadImageError, match="truncated"):
        source[2]
    with contextlib.ExitStack() as stack:
        record = stack.enter_context(source.open(2))
        with pytest.raises(BadImageError, match="truncated"):
            record.image.pixels(1.0)


def test_a_source_without_files_gives_its_pixels():
    class Pixels(BaseSource):
        def __getitem__(self, index):
            return f"record {index}"

    with Pixels().open(3) as record:
        assert record == "record 3"
    assert Pixels().path(3) is None
    assert Pixels().notes() == []


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_tiffs_are_upright(orientation):
    """Pillow turns them itself; they must be turned only once."""
    pixels = colours(*SIDES)
    data = encode(pixels, "TIFF", exif=exif(orientation))
    expected = decode(encode(pixels, "PNG", exif=exif(orientation)))
    np.testing.assert_array_equal(decode(data), expected)
    with opened(data) as picture:
        assert picture.shape == expected.shape
        np.testing.assert_array_equal(picture.pixels(9.0).rgb, expected)
