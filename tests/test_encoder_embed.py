"""Embedding many images: every type and size, and unusable images."""

import numpy as np
import pytest
from PIL import Image

from tests.test_encoder import MODEL, SIZE, build, refused
from xsmae.bands import BANDS, Bands
from xsmae.data.folder import FolderSource
from xsmae.data.records import Subset
from xsmae.data.square import square
from xsmae.evaluation.features import extract
from xsmae.weights import embedding
from xsmae.weights.description import describe_encoder
from xsmae.weights.encoder import Encoder

GSD = np.array([0.5, 1.0, 3.0, 2.0, 0.7], np.float32)


def make_encoder(bands=BANDS, **changes):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    described = describe_encoder(
        {**MODEL, **changes}, image_size=SIZE, bands=Bands(bands, mean, std), run={}
    )
    return Encoder(build(**changes), described)


@pytest.fixture(scope="module")
def encoder():
    return make_encoder()


def some_images(height=SIZE, width=SIZE, count=5):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, height, width, 3), np.uint8)


def near(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_batches_change_nothing(encoder, batch_size):
    images = some_images()
    found = encoder.embed(images, GSD, batch_size=batch_size)
    assert isinstance(found, np.ndarray)
    near(found, encoder(images, gsd=GSD))
    near(encoder.embed(images, 1.5, batch_size, "cls"), encoder(
        images, gsd=1.5, pooling="cls"
    ))  # fmt: skip


def test_the_gsd_follows_the_size(encoder):
    """The central square of an oblong image, at three times the resolution."""
    images = some_images(3 * SIZE, 3 * SIZE + 10)
    small = images[:, :, 5:-5].reshape(5, SIZE, 3, SIZE, 3, 3).mean((2, 4))
    found = encoder.embed(images, GSD)
    expected = encoder((small / 255).astype(np.float32), gsd=3 * GSD)
    np.testing.assert_allclose(found, expected, atol=0.02)  # rounded to 8 bits
    per_axis = np.stack([GSD, GSD], axis=1)
    np.testing.assert_array_equal(encoder.embed(images, per_axis), found)


def test_arrays_pictures_and_files_in_any_mixture(encoder, tmp_path):
    images = some_images(20, 30)
    Image.fromarray(images[3]).save(tmp_path / "d.png")
    Image.fromarray(images[4]).save(tmp_path / "e.png")
    mixture = [
        images[0], (images[1] / 255).astype(np.float32), Image.fromarray(images[2]),
        tmp_path / "d.png", str(tmp_path / "e.png"),
    ]  # fmt: skip
    expected = encoder.embed(images, GSD)
    found = encoder.embed(mixture, GSD, batch_size=3)
    np.testing.assert_allclose(found, expected, atol=0.02)
    rows = [0, 2, 3, 4]  # all except the fractions, which are not rounded to 8 bits
    near(found[rows], expected[rows])
    near(encoder.embed(tmp_path / "d.png", GSD[3]), expected[3:4])
    near(encoder.embed(mixture[2], GSD[2]), expected[2:3])


def test_a_picture_is_left_as_it_was(encoder):
    picture = Image.fromarray(some_images(20, 30)[0])
    picture.getexif()[0x0112] = 6  # a rotated photograph
    encoder.embed([picture], 1.0)
    assert picture.size == (30, 20)


def test_bands_of_files_in_another_order():
    images = some_images()
    other = make_encoder(bands=("blue", "red", "green"))
    pictures = [Image.fromarray(image) for image in images]
    near(other.embed(pictures, 1.0), other.embed(images[..., [2, 0, 1]], 1.0))
    more = make_encoder(bands=("blue", "red", "swir"))
    refused("image 0: .*red, green, blue.*blue, red, swir", more.embed, pictures, 1.0)


def test_bands_that_are_no_picture_are_resized_one_by_one():
    images = some_images(30, 24)
    whole, gsd = square(images[0], 2.0, 8)
    assert gsd == 2.0 * 24 / 8
    several = np.concatenate([images[0], images[1][..., :1]], axis=-1)
    found, _ = square(several, 2.0, 8)
    np.testing.assert_array_equal(found[..., :3], whole)
    assert found.shape == (8, 8, 4)
    fractions, _ = square(several / 255, 2.0, 8)
    assert fractions.dtype == np.float32
    # 8-bit images are rounded once per axis.
    np.testing.assert_allclose(fractions, found / 255, atol=1.01 / 255)
    enlarged, _ = square((several > 127).astype(np.float64), 2.0, 50)
    assert (enlarged.min(), enlarged.max()) == (0, 1)


def test_a_source_has_its_own_gsd_and_the_features_of_evaluations(encoder, tmp_path):
    for number, image in enumerate(some_images(40, 50)):
        (tmp_path / "class").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "class" / f"{number}.png")
    source = FolderSource(tmp_path, gsd=0.3)
    features, _ = extract(
        lambda images, gsd: {"mean": encoder(images, gsd=gsd)},
        source, np.arange(5), size=SIZE, batch_size=2,
    )  # fmt: skip
    near(encoder.embed(source, batch_size=2), features["mean"])
    near(encoder.embed(Subset(source, np.array([4, 1]))), features["mean"][[4, 1]])
    refused("gsd=1.0.* records", encoder.embed, source, 1.0)
    (tmp_path / "class" / "3.png").write_bytes(b"broken")
    refused("class/3.png: not a readable", encoder.embed, source)


def test_fixed_positions_need_no_gsd():
    fixed, images = make_encoder(position="fixed"), some_images()
    near(fixed.embed(images), fixed(images))


def test_what_cannot_be_used_is_named(encoder, tmp_path):
    image = some_images()[0]
    (tmp_path / "text.png").write_text("no image")
    for item, said in (
        (tmp_path / "text.png", "text.png: not a readable"),
        (str(tmp_path / "gone.png"), "gone.png: the file does not exist"),
        (tmp_path, f"{tmp_path}: the file is not a regular file"),
        (Image.new("RGBA", (20, 20)), "image 1: partly transparent"),
        (Image.new("CMYK", (20, 20)), "image 1: mode CMYK"),
        (image[..., :2], r"image 1: images of shape \(1, 12, 12, 2\)"),
        (image.astype(np.int32), "image 1: images of dtype int32"),
        (7, "image 1: is of type int"),
    ):
        refused(said, encoder.embed, [image, item], 1.0)


@pytest.mark.parametrize(
    ("images", "options", "said"),
    [
        ([], {}, "no images"),
        (np.zeros((0, 12, 12, 3), np.uint8), {}, r"\(0, 12, 12, 3\)"),
        (np.zeros((12, 12, 3), np.uint8), {}, r"\(12, 12, 3\), expected"),
        (np.zeros((2, 12, 12, 4), np.uint8), {}, r"\(2, 12, 12, 4\)"),
        (iter([]), {}, "of type list_iterator"),
        (None, {}, "of type NoneType"),
        (some_images(), {"gsd": None}, "gsd is missing"),
        (some_images(), {"gsd": [1.0, 2.0]}, r"shape \(2,\) for 5 images"),
        (some_images(), {"gsd": -1}, "gsd=-1"),
        (some_images(), {"pooling": "max"}, "pooling='max'"),
        (some_images(), {"batch_size": 0}, "batch_size=0"),
        (some_images(), {"batch_size": 2.5}, "batch_size=2.5"),
    ],
)
def test_wrong_calls_are_refused(encoder, images, options, said):
    refused(said, encoder.embed, images, **{"gsd": 1.0} | options)


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_said_where_it_takes_long(encoder, capsys, monkeypatch, progress):
    encoder.embed(some_images(), 1.0, batch_size=2, progress=progress)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(embedding, "EVERY", 0.0)
    encoder.embed(some_images(), 1.0, batch_size=2, progress=progress)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" images")[0] for line in lines] == [
        f"embedded {done} of 5" for done in (2, 4, 5) if progress
    ]
