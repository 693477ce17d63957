"""kNN by SatDINO's protocol: sizes, crops, normalisation, and rows of their own."""

import dataclasses
import re

import numpy as np
import pytest
from PIL import Image

from tests.support.encoders import counting_encoder, make_encoder, tiny_encoder
from tests.support.sources import Fingerprinted, HeldOut
from xsmae.cli import knn
from xsmae.data.square import central
from xsmae.errors import UserError
from xsmae.evaluation.evaluate import evaluate
from xsmae.evaluation.rows import read
from xsmae.evaluation.scales import usual_side
from xsmae.evaluation.subjects import measured
from xsmae.evaluation.tables import create_tables, markdown
from xsmae.evaluation.tasks.catalogue import create_task
from xsmae.evaluation.tasks.satdino import create_satdino_scales
from xsmae.evaluation.variants import normalized_by
from xsmae.weights.encoder import Encoder, load_encoder

TRAIN, TEST = Fingerprinted(30), HeldOut(15, seed=1)


def measured_rows(encoder, folder, **options):
    how = {"task": "knn_satdino", "controls": False, "cache": folder / "cache"}
    return evaluate(encoder, TRAIN, TEST, **how | options)


# Sizes and crops


@pytest.mark.parametrize(
    ("side", "patch", "expected"),
    [
        # RESISC45 and UC Merced, WHU-RS19, EuroSAT: crop, resized.
        (256, 16, [(32, 37), (64, 73), (128, 146), (256, 293)]),
        (256, 8, [(32, 37), (64, 73), (128, 146), (256, 293)]),
        (600, 16, [(64, 73), (144, 165), (288, 329), (592, 677)]),
        (64, 16, [(16, 18), (16, 18), (32, 37), (64, 73)]),
        (64, 8, [(8, 9), (16, 18), (32, 37), (64, 73)]),
    ],
)
def test_sizes_of_the_published_data_sets(side, patch, expected):
    scales = create_satdino_scales((12.5, 25, 50, 100), base=side, patch_size=patch)
    assert [(scale.size, scale.resized) for scale in scales] == expected
    assert {scale.gsd_factor for scale in scales} == {1.0}


def test_the_fixed_gsd_is_that_of_100_percent():
    scales = create_satdino_scales(
        (25, 100), base=600, patch_size=16, gsd_policy="fixed"
    )
    # After resizing 600 to 165 and 677 px, the GSD is 600 / 165 and 600 / 677 times.
    factors = [600 / scale.resized * scale.gsd_factor for scale in scales]
    assert factors == pytest.approx([600 / 677] * 2)


@pytest.mark.parametrize(
    ("percents", "said"),
    [((50, 50), "scales=50,50, expected each"), ((0, 50), "above 0"), ((), "above 0")],
)
def test_wrong_scales(percents, said):
    with pytest.raises(UserError, match=said):
        create_satdino_scales(percents, base=64, patch_size=8)


def test_the_usual_side_has_no_limit():
    class Large(Fingerprinted):
        def __getitem__(self, index):
            record = super().__getitem__(index)
            image = np.zeros((600, 700, 3), np.uint8)
            return dataclasses.replace(record, image=image)

    assert usual_side(Large(5)) == 600


def test_a_crop_is_bicubic_and_central():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (64, 80, 3), np.uint8)
    found, gsd = central(image, 2.0, 32, resized=37)
    square = Image.fromarray(image[:, 8:72])
    whole = np.asarray(square.resize((37, 37), Image.Resampling.BICUBIC))
    # round(2.5) is 2, as in torchvision's CenterCrop.
    np.testing.assert_array_equal(found, whole[2:34, 2:34])
    assert gsd == pytest.approx(2 * 64 / 37)
    # 293 - 256 = 37: half of it is 18.5, which rounds to 18.
    image = rng.integers(0, 255, (256, 256, 3), np.uint8)
    found, _ = central(image, 2.0, 256, resized=293)
    whole = Image.fromarray(image).resize((293, 293), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(found, np.asarray(whole)[18:274, 18:274])


def test_encoders_get_the_crops_and_their_gsd(tmp_path):
    got = []

    def encode(images, gsd):
        got.append((images.shape[1:], gsd[:, 0].copy()))
        found = images.mean(axis=(1, 2))
        return {"cls": found, "mean": found}

    encoder = dataclasses.replace(
        counting_encoder([], encode=encode), patch_size=4, kind="fake"
    )
    rows = measured_rows(encoder, tmp_path, scales=(50, 100), batch_size=30)
    # Squares of 12 px: 6 px are one patch of 4, resized to 5; 12 px, resized to 14.
    assert [shape for shape, _ in got[::2]] == [(4, 4, 3), (12, 12, 3)]
    np.testing.assert_allclose(got[0][1], (1 + np.arange(30)) * 12 / 5, rtol=1e-6)
    np.testing.assert_allclose(got[2][1], (1 + np.arange(30)) * 12 / 14, rtol=1e-6)
    assert [row.scale for row in rows] == [50.0, 100.0, "average"]
    assert [row.value for row in rows] == [1.0] * 3


def test_scales_of_equal_size_count_twice(tmp_path):
    """EuroSAT's 12.5 and 25 % are both one patch of 16 px."""
    encoder = dataclasses.replace(counting_encoder([]), patch_size=8, kind="fake")
    rows = measured_rows(encoder, tmp_path, scales=(25, 50, 100))
    assert [row.size for row in rows] == [8, 8, 8, [8, 8, 8]]
    assert [row.scale for row in rows] == [25.0, 50.0, 100.0, "average"]
    assert len({row.identity for row in rows}) == 4


# Normalisation


def test_images_are_normalised_by_the_training_images(tmp_path):
    """The class token is that of an encoder with these numbers in its description."""
    whole = tiny_encoder()
    numbers = measured(TRAIN, TRAIN.bands)
    mean = np.mean([TRAIN[i].image for i in range(30)], axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(numbers["mean"], mean, rtol=1e-4)
    adapted = normalized_by(whole, **numbers)
    info = {**whole.weights.info, **numbers}
    expected = Encoder(whole.weights.network, info)
    images = np.random.default_rng(0).integers(0, 255, (2, 12, 12, 3), np.uint8)
    gsd = np.full((2, 2), 10.0, np.float32)
    found = adapted.encode(images, gsd)["cls"]
    np.testing.assert_allclose(
        found, expected.tokens(images, gsd=gsd)[:, 0], rtol=1e-5, atol=1e-6
    )
    usual = whole.encode(images, gsd)["cls"]
    assert np.abs(found - usual).max() > 1e-3
    assert adapted.digest == whole.digest
    rows = measured_rows(whole, tmp_path, scales=(100,), controls=True)
    of = {row.encoder["kind"]: row.encoder for row in rows}
    assert of["random"]["normalization"] == adapted.normalization
    assert str(numbers["mean"]) in adapted.normalization
    assert of["statistics"]["normalization"] == "none"


def test_bands_of_another_order_keep_their_numbers(tmp_path):
    make_encoder(tmp_path / "bgr", bands=("blue", "green", "red"))
    encoder = load_encoder(tmp_path / "bgr")
    rows = measured_rows(encoder, tmp_path, scales=(100,))
    numbers = measured(TRAIN, TRAIN.bands)
    (row,) = rows
    assert str(numbers["mean"][::-1]) in row.encoder["normalization"]
    assert str(numbers["std"][::-1]) in row.encoder["normalization"]


def test_the_cache_keeps_the_protocols_apart(tmp_path, capsys):
    how = {"scales": (100,), "feature": "cls", "k": 20}
    computed = []
    for task in ("knn_satdino", "knn") * 2:
        options = {} if task == "knn_satdino" else how
        scales = {"scales": (100,)}
        measured_rows(tiny_encoder(), tmp_path, task=task, **options | scales)
        computed.append("images/s" in capsys.readouterr().out)
    assert computed == [True, True, False, False]


# Rows


def test_rows_have_a_table_of_their_own(tmp_path):
    ours = measured_rows(tiny_encoder(), tmp_path, controls=True, base_size=32)
    usual = measured_rows(
        tiny_encoder(), tmp_path, controls=True, base_size=32, task="knn",
        feature="cls", scales=(12.5, 25, 50, 100),
    )  # fmt: skip
    assert {row.feature for row in ours} == {"cls", "statistics", "thumbnail"}
    average = next(row for row in ours if row.scale == "average")
    assert average.scales == [12.5, 25.0, 50.0, 100.0]
    assert average.protocol.options["k"] == 20
    tables = create_tables([*ours, *usual])
    assert [t.protocol.task for t in tables] == ["knn_satdino", "knn"]
    first, second = (markdown([table]) for table in tables)
    for fact in ("central 224/256", "bicubic", "mean and std of the training images"):
        assert fact in first
        assert fact not in second.replace("bicubic where enlarged", "")


# What is refused


def test_other_features_and_options_are_refused(tmp_path):
    for feature in ("mean", ("cls", "mean")):
        with pytest.raises(UserError, match="task=knn_satdino is for cls alone"):
            measured_rows(tiny_encoder(), tmp_path, feature=feature)
    with pytest.raises(UserError, match="knn_satdino has no option k"):
        create_task("knn_satdino", k=5)


def test_rasters_are_refused(tmp_path):
    class Raster(Fingerprinted):
        dtype, units = "float32", "reflectance"

    class Other(HeldOut):
        dtype, units = "float32", "reflectance"

    with pytest.raises(UserError, match=r"float32 rasters.* 8-bit images"):
        evaluate(
            "statistics", Raster(30), Other(15, seed=1), task="knn_satdino",
            cache=tmp_path, progress=False,
        )  # fmt: skip


FEW = ["--data=quickstart", "--data.num_images=40", "--data.size=32"]
FEW += ["--test.num_images=20"]


@pytest.mark.parametrize(
    "flag",
    ["--k=5", "--temperature=1", "--cross_scale", "--standardize", "--block=1"],
)
def test_flags_of_the_standard_protocol_are_refused(tmp_path, capsys, flag):
    rows = tmp_path / "rows.jsonl"
    arguments = ["--protocol=satdino", flag, *FEW, f"--results={rows}"]
    assert knn.main(["knn", "--encoder=statistics", *arguments]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    name = flag.partition("=")[0]
    assert re.search(f"{name} has no meaning for protocol=satdino", error), error
    assert not rows.exists()


def test_the_command(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    arguments = [
        "--protocol=satdino", "--encoder=random:tiny,depth=1,patch_size=8",
        f"--results={rows}", f"--cache={tmp_path / 'cache'}", *FEW,
    ]  # fmt: skip
    assert knn.main(["knn", *arguments]) == 0
    assert "average" in capsys.readouterr().out
    found = read(rows)
    assert {row.protocol.task for row in found} == {"knn_satdino"}
    assert {row.feature for row in found} == {"cls", "statistics", "thumbnail"}
    # 32 px at 12.5 % are 4 px: at least one patch.
    assert [row.size for row in found[:4]] == [8, 8, 16, 32]
    assert knn.main(["knn", *arguments, "--feature=mean"]) == 2
    assert "is for cls alone" in capsys.readouterr().err
