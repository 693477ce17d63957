"""The source of GeoTIFFs: records, labels, splits, bands, and what is refused."""

import json
import pickle
import re

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

import xsmae
from tests.support.encoders import MODEL
from tests.support.rasters import REASON, land, write
from xsmae import load_config
from xsmae.bands import BANDS, UNITS, Bands
from xsmae.cli import embed
from xsmae.data.catalogue import open_source
from xsmae.data.folder import FolderSource
from xsmae.data.geotiff_source import GeotiffSource
from xsmae.data.pipeline import check_bands
from xsmae.data.records import Subset
from xsmae.data.sensors import wavelengths_of
from xsmae.data.survey import survey
from xsmae.errors import UserError
from xsmae.evaluation.evaluate import subject_of
from xsmae.evaluation.features import extract, image_statistics
from xsmae.evaluation.tables import create_tables
from xsmae.run.choices import settle
from xsmae.run.pictures import shown_bands
from xsmae.weights.description import describe_encoder, new_network
from xsmae.weights.encoder import Encoder

pytest.importorskip("rasterio", reason=REASON)

NAMES = ("red", "green", "nir")


@pytest.fixture
def scenes(tmp_path):
    """Two folders of four small rasters of three named bands, and a table of them."""
    root = tmp_path / "scenes"
    rows = ["path,label,gsd"]
    for folder in ("field", "roof"):
        (root / folder).mkdir(parents=True)
        for i in range(4):
            data = land(48, 40) + np.uint8(i)
            write(root / folder / f"{i}.tif", data, descriptions=NAMES)
            rows.append(f"scenes/{folder}/{i}.tif,{folder[0]},{2 + i}")
    (tmp_path / "table.csv").write_text("\n".join(rows))
    return root


def test_small_rasters_are_records_of_their_own(scenes):
    source = GeotiffSource(scenes, labels="folder")
    assert len(source) == 8
    assert source.bands == NAMES
    assert (source.dtype, source.class_names) == ("float32", ("field", "roof"))
    record = source[5]
    assert (record.id, record.label) == ("roof/1.tif", 1)
    expected = np.moveaxis(land(48, 40) + np.uint8(1), 0, -1) / np.float32(255)
    np.testing.assert_allclose(record.image, expected, rtol=1e-6)
    assert record.valid.all()
    np.testing.assert_allclose(record.gsd, 10.0, rtol=2e-3)
    assert source.path(5) == scenes / "roof/1.tif"


def test_a_large_raster_has_windows_that_cover_it(tmp_path):
    tiles = {"tiled": True, "blockxsize": 64, "blockysize": 64}
    write(tmp_path / "a.tif", land(192, 128), **tiles)
    source = GeotiffSource(tmp_path, window=64)
    assert [source.id(i) for i in range(3)] == ["a.tif@0,0", "a.tif@0,64", "a.tif@64,0"]
    whole = np.zeros((192, 128, 3), np.float32)
    for i in range(len(source)):
        top, left = map(int, source.id(i).partition("@")[2].split(","))
        whole[top : top + 64, left : left + 64] = source[i].image
    np.testing.assert_allclose(whole, np.moveaxis(land(192, 128), 0, -1) / 255)


def test_bands_are_chosen_by_name_and_in_order(scenes):
    source = GeotiffSource(scenes, bands=("nir", "red"))
    assert source.bands == ("nir", "red")
    whole = GeotiffSource(scenes)[2].image
    np.testing.assert_array_equal(source[2].image, whole[..., [2, 0]])
    assert source.fingerprint != GeotiffSource(scenes).fingerprint
    with pytest.raises(UserError, match=r"swir.*red.*green.*nir"):
        GeotiffSource(scenes, bands=("swir", "red"))


def test_a_table_gives_labels_and_gsd(scenes):
    source = GeotiffSource(scenes.parent / "table.csv", labels="table")
    assert source.class_names == ("f", "r")
    assert [source[i].gsd for i in range(4)] == [(2, 2), (3, 3), (4, 4), (5, 5)]
    assert list(source.labels) == [0] * 4 + [1] * 4


def test_splits_are_of_rasters_not_of_windows(tmp_path):
    tiles = {"tiled": True, "blockxsize": 32, "blockysize": 32}
    for i in range(10):
        write(tmp_path / f"{i}.tif", land(64, 64), **tiles)
    parts = {
        part: GeotiffSource(tmp_path, window=32, split=part, test_fraction=0.3)
        for part in ("train", "test")
    }
    of = {
        part: {source.id(i).partition("@")[0] for i in range(len(source))}
        for part, source in parts.items()
    }
    assert [len(parts[part]) for part in parts] == [28, 12]
    assert not of["train"] & of["test"]
    assert len(of["train"] | of["test"]) == 10


def test_rasters_of_other_bands_are_refused_by_name(scenes):
    write(
        scenes / "roof" / "z.tif", land(48, 40), descriptions=("red", "green", "swir")
    )
    with pytest.raises(UserError, match=r"roof/z.tif.*swir.*red.*green.*nir"):
        GeotiffSource(scenes)
    chosen = GeotiffSource(scenes, bands=("red", "green"))
    assert len(chosen) == 9


def test_a_raster_without_a_label_is_refused(scenes):
    write(scenes / "loose.tif", land(48, 40), descriptions=NAMES)
    with pytest.raises(UserError, match=r"loose.tif has no label.*labels=folder"):
        GeotiffSource(scenes, labels="folder")
    with pytest.raises(UserError, match=r"labels='class'.*none, table, folder"):
        GeotiffSource(scenes, labels="class")


def test_units_say_what_the_values_are(tmp_path, scenes):
    assert GeotiffSource(scenes).units == "digital numbers 0-255 divided by 255"
    (tmp_path / "b").mkdir()
    write(tmp_path / "b/a.tif", land(48, 40, dtype="uint16"))
    with pytest.raises(UserError, match="scale"):
        GeotiffSource(tmp_path / "b")
    scaled = GeotiffSource(tmp_path / "b", scale=1e-4, offset=-0.1)
    assert "* 0.0001 + -0.1" in scaled.units
    other = GeotiffSource(tmp_path / "b", scale=1e-4)
    assert scaled.fingerprint != other.fingerprint


def test_it_pickles_and_a_part_of_it_is_a_source(scenes):
    source = GeotiffSource(scenes, labels="folder")
    source[0]
    copy = pickle.loads(pickle.dumps(source))
    assert repr(copy) == repr(source)
    np.testing.assert_array_equal(copy[3].image, source[3].image)
    part = Subset(source, np.array([6, 1]))
    assert (part.dtype, part.units, len(part)) == ("float32", source.units, 2)
    np.testing.assert_array_equal(part[0].image, source[6].image)


def test_it_is_opened_by_name(scenes):
    source = open_source("geotiff", root=str(scenes), labels="folder", split="test",
                         test_fraction=0.25)  # fmt: skip
    assert len(source) == 2


def test_statistics_are_of_valid_pixels(tmp_path):
    data = np.stack([land(40, 40)[0], land(40, 40)[1]])
    data[:, :, :10] = 0
    write(tmp_path / "a.tif", data, nodata=0)
    mean, std = survey(GeotiffSource(tmp_path)).statistics()
    values = data[:, :, 10:].reshape(2, -1) / 255
    np.testing.assert_allclose(mean, values.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(std, values.std(axis=1), rtol=1e-5)


def test_a_config_of_another_kind_is_refused(scenes, image_folder):
    rasters = GeotiffSource(scenes)
    of_images = load_config("folder", {"data.root": str(image_folder)})
    of_rasters = load_config("geotiff", {"data.root": str(scenes)})
    with pytest.raises(UserError, match=r"uint8 images.*float32.*geotiff"):
        check_bands(rasters, of_images)
    with pytest.raises(UserError, match=r"float32 images.*uint8"):
        check_bands(FolderSource(image_folder, gsd=1.0), of_rasters)
    check_bands(rasters, of_rasters)
    of_rasters.units = "reflectance"
    with pytest.raises(UserError, match=r"units='reflectance'.*divided by 255"):
        check_bands(rasters, of_rasters)


@pytest.fixture
def tiles(tmp_path):
    """Tiles of reflectance in two classes, told apart by B08; some lack pixels."""
    rng = np.random.default_rng(0)
    for name, level in (("field", 4000), ("roof", 1000)):
        (tmp_path / "tiles" / name).mkdir(parents=True)
        for i in range(10):
            data = rng.integers(900, 1100, (4, 16, 16)).astype(np.uint16)
            data[3] += level
            data[:, : i % 3, :5] = 0
            bands = {"descriptions": ("B02", "B03", "B04", "B08"), "nodata": 0}
            write(tmp_path / "tiles" / name / f"{i}.tif", data, **bands)
    return {
        "source": "geotiff", "root": str(tmp_path / "tiles"), "labels": "folder",
        "sensor": "sentinel2_l2a", "test_fraction": 0.3,
    }  # fmt: skip


def parts_of(tiles, **fields):
    return tuple(open_source(tiles, split=part, **fields) for part in ("train", "test"))


def encoder_of(*names, units="surface reflectance", dtype="float32"):
    """A tiny encoder with random weights; of rasters by default."""
    info = {
        "architecture": {**MODEL, "patch_size": 8, "depth": 1}, "image_size": 16,
        "bands": names, "mean": [0.1] * len(names), "std": [0.02] * len(names),
        "units": units, "dtype": dtype,
    }  # fmt: skip
    return Encoder.random(info, seed=1)  # the control has seed 0


def test_knn_of_an_encoder_of_some_bands_and_its_controls(tiles, tmp_path):
    """An encoder of three bands by their other names, on tiles of four."""
    train, test = parts_of(tiles)
    encoder = encoder_of("red", "nir", "blue")
    where = {"cache": tmp_path / "cache", "results": tmp_path / "rows.jsonl"}
    with pytest.raises(UserError, match=r"nir.*B02, B03, B04, B08.*missing_bands=mean"):
        xsmae.evaluate(encoder, train, test, k=3, **where)
    encoder = encoder_of("red", "B08", "blue")
    rows = xsmae.evaluate(encoder, train, test, k=3, progress=False, **where)
    kinds = {row.encoder["kind"]: row for row in rows}
    assert kinds.keys() == {"encoder", "random", "statistics", "thumbnail"}
    assert kinds["statistics"].value == kinds["thumbnail"].value == 1
    data = rows[0].protocol.data
    assert data["bands"] == ["B02", "B03", "B04", "B08"]
    assert (data["dtype"], data["units"]) == ("float32", "surface reflectance")
    assert kinds["encoder"].encoder["bands"] == ["B04", "B08", "B02"]
    assert kinds["statistics"].encoder["bands"] == data["bands"]
    said = kinds["encoder"].encoder["normalization"]
    assert said.startswith("(x - [0.1, 0.1, 0.1]) / [0.02, 0.02, 0.02] of B04 as red,")
    assert "surface reflectance, 0 where" in said
    of_three = xsmae.evaluate(
        "statistics", *parts_of(tiles, bands=("B04", "B03", "B02")), k=3, **where
    )
    assert of_three[0].encoder["bands"] == ["B04", "B03", "B02"]
    assert of_three[0].protocol.key != rows[0].protocol.key
    headings = {table.heading for table in create_tables([*rows, *of_three])}
    assert any("B04, B03, B02" in heading for heading in headings)


def test_pixels_without_a_value_are_0_after_normalisation(tiles):
    encoder, (train, _) = encoder_of("B08", "B03"), parts_of(tiles)
    index = next(i for i in range(len(train)) if not train[i].valid.all())
    record = train[index]
    normal = (record.image[..., [3, 1]] - np.float32(0.1)) / np.float32(0.02)
    normal[~record.valid] = 0
    tokens = encoder.network(normal[None], gsd=np.ones((1, 2), np.float32))
    features, _ = extract(
        subject_of(encoder, source=train).encode, train, np.array([index]),
        size=16, batch_size=4,
    )  # fmt: skip
    expected = np.asarray(tokens[:, 1:].mean(1))
    np.testing.assert_allclose(features["mean"], expected, rtol=1e-4, atol=1e-5)
    found = extract(image_statistics, train, np.array([index]), size=16, batch_size=1)
    values = record.image[record.valid]
    expected = [values.mean(0), values.std(0), values.min(0), values.max(0)]
    np.testing.assert_allclose(
        found[0]["statistics"][0], np.concatenate(expected), rtol=1e-4
    )


@pytest.mark.parametrize(
    ("task", "subject"),
    [
        ("linear_probe_published", "thumbnail"),
        ("linear_probe_published", "encoder"),
        ("finetune", "encoder"),
    ],
)
def test_trainings_on_crops_of_rasters(task, subject, tiles, capsys):
    recipe = {"epochs": 2.0, "warmup_epochs": 0.0, "batch_size": 7}
    if subject == "encoder":
        subject = encoder_of("B08", "B03")
    (row,) = xsmae.evaluate(
        subject, *parts_of(tiles), task=task, recipe=recipe, controls=False
    )
    assert re.search(r"step 4/4 .* loss 0\.[0-9]+", capsys.readouterr().out)
    assert (row.num_train, row.num_test) == (14, 6)


def test_images_that_an_encoder_cannot_read_are_refused(tiles, image_folder):
    parts = parts_of(tiles)
    for encoder, message in (
        (encoder_of("B04", units="top-of-atmosphere reflectance"),
         r"top-of-atmosphere.*these are float32 rasters \(surface.*sensor"),
        (encoder_of(*BANDS, units=UNITS, dtype="uint8"),
         r"8-bit images.*float32 rasters \(surface reflectance\)"),
        (encoder_of("B12"), r"B12.*B02, B03, B04, B08.*under other names"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            xsmae.evaluate(encoder, *parts, k=3)
    with pytest.raises(UserError, match=r"B12, expected B02.*to fine-tune"):
        xsmae.evaluate(
            encoder_of("B04", "B12"), *parts, task="finetune", missing_bands="mean"
        )
    some = open_source(tiles, split="test", bands=("B03", "B02"))
    with pytest.raises(UserError, match=r"B04, B08 .*test part.*B03, B02"):
        xsmae.evaluate("statistics", parts[0], some)
    unnamed = open_source(tiles, labels="none")
    with pytest.raises(UserError, match=r"0 class.*--data.labels=folder"):
        xsmae.evaluate("statistics", unnamed, unnamed)
    images = [FolderSource(image_folder, gsd=1.0, split=p) for p in ("train", "test")]
    with pytest.raises(UserError, match=r"float32 rasters.*8-bit images"):
        xsmae.evaluate(encoder_of("B04"), *images, k=3)


def test_the_units_of_8_bits_fit_both_kinds_of_images(tmp_path):
    """8-bit rasters of four bands, and pictures of the same red, green and blue."""
    data = land(16, 16, 4)
    write(tmp_path / "0.tif", data, descriptions=("red", "green", "blue", "nir"))
    Image.fromarray(np.moveaxis(data[:3], 0, -1)).save(tmp_path / "0.png")
    (tmp_path / "list.txt").write_text("0.png")  # a TIFF is a picture too
    chosen = {"split": str(tmp_path / "list.txt"), "min_side": 16}
    pictures = FolderSource(tmp_path, gsd=1.0, **chosen)
    rasters = GeotiffSource(tmp_path, gsd=1.0)
    for dtype in ("uint8", "float32"):
        encoder = encoder_of("red", "green", "blue", units=UNITS, dtype=dtype)
        one, other = (
            extract(
                subject_of(encoder, source=source).encode, source, np.arange(1),
                size=16, batch_size=1,
            )[0]["mean"]
            for source in (rasters, pictures)
        )  # fmt: skip
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_embed_and_a_random_encoder_on_rasters(tiles, tmp_path, capsys):
    encoder_of("B08", "B03").save(tmp_path / "encoder")
    fields = [f"--data.{name}={value}" for name, value in tiles.items()][1:]
    argv = [f"--encoder={tmp_path / 'encoder'}", f"--out={tmp_path / 'x.parquet'}"]
    assert embed.main(["embed", "--data=geotiff", *fields, *argv]) == 0
    assert ": 20 images" in capsys.readouterr().out
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    source = open_source(tiles)
    expected = xsmae.load_encoder(tmp_path / "encoder").embed(source, progress=False)
    np.testing.assert_allclose(
        np.stack(table["embedding"].to_numpy()), expected, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(table["gsd"].to_numpy(), 10, rtol=2e-3)
    random = subject_of("random:tiny,depth=1,patch_size=8", source=source)
    mean, std = survey(source).statistics()
    assert random.info["bands"] == ["B02", "B03", "B04", "B08"]
    np.testing.assert_allclose(random.info["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(random.info["std"], std, rtol=1e-5)


def test_bands_of_a_preset_are_chosen_by_its_names(tmp_path):
    data = land(16, 16, 13, "uint16")
    write(tmp_path / "a.tif", data)
    source = GeotiffSource(tmp_path, sensor="eurosat_ms", bands=("B8A", "B04"))
    assert source.bands == ("B8A", "B04")
    expected = np.moveaxis(data[[12, 3]], 0, -1) / 10000
    np.testing.assert_allclose(source[0].image, expected, rtol=1e-6)
    with pytest.raises(UserError, match=r"nir.*B8A"):
        GeotiffSource(tmp_path, sensor="eurosat_ms", bands=("B8A", "nir"))
    assert source.units == "top-of-atmosphere reflectance"
    other = GeotiffSource(tmp_path, sensor="eurosat_ms", scale=2e-4)
    assert other.units == "uint16 numbers * 0.0002 + 0"


@pytest.mark.parametrize(
    ("colours", "said"),
    [(("nir", "red"), "expected three of red"), (("a", "red", "nir"), "a, red, nir")],
)
def test_the_colours_of_figures_are_bands(colours, said, scenes, image_folder):
    config = load_config("geotiff", {"figures.colours": colours})
    with pytest.raises(UserError, match=said):
        check_bands(GeotiffSource(scenes), config)
    pictures = load_config("folder", {"figures.colours": ("red", "green", "blue")})
    with pytest.raises(UserError, match="is for rasters"):
        check_bands(FolderSource(image_folder, gsd=1.0), pictures)


def test_figures_show_the_chosen_bands(scenes):
    fields = {"bands": NAMES, "mean": (0.5,) * 3, "std": (0.1,) * 3}
    config = load_config("geotiff", {"figures.colours": ("nir", "red", "green")})
    config.update(fields)
    assert shown_bands(config).colours() == (2, 0, 1)
    with config.unlocked():
        del config.figures["colours"]
    assert shown_bands(config).colours() == (0, 1, 2)


@pytest.mark.parametrize("method", ["sat_mae", "scale_mae", "cross_scale_mae"])
def test_pretraining_on_rasters(method, scenes, tmp_path):
    """A run from files to encoder: what was chosen, the pictures, kNN, embedding."""
    data = np.moveaxis(GeotiffSource(scenes)[0].image, -1, 0)
    data = (data * 255).astype(np.uint8)
    data[:, :, :8] = 0
    write(scenes / "field/0.tif", data, descriptions=NAMES, nodata=0)
    config = load_config(
        f"geotiff:method={method},size=tiny",
        {
            "data.root": str(scenes), "data.labels": "folder",
            "data.test_fraction": 0.25,
            "batch_size": 4, "num_steps": 2, "views.size": 16, "model.patch_size": 8,
            "model.embed_dim": 16, "model.depth": 1, "model.num_heads": 2,
            "model.decoder_embed_dim": 16, "model.decoder_depth": 1,
            "model.decoder_num_heads": 2, "knn.k": 2,
            "optim.warmup_steps": 0,
        },
    )  # fmt: skip
    if method == "sat_mae":
        config.model.update(
            channel_groups=(("red", "green"), ("nir",)), group_dim=8,
            decoder_group_dim=8,
        )  # fmt: skip
    workdir = xsmae.pretrain(config, tmp_path / "run")
    saved = json.loads((workdir / "config.json").read_text())
    assert tuple(saved["bands"]) == NAMES
    assert saved["units"] == "digital numbers 0-255 divided by 255"
    rows = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert np.isfinite(losses).all()
    assert any("knn_full/accuracy_mean" in row for row in rows)
    drawn = {path.name.partition("_0")[0] for path in (workdir / "figures").iterdir()}
    assert drawn == {"crops.png", "gsd.png", "losses.png", "reconstructions"}
    encoder = xsmae.load_encoder(workdir)
    assert (encoder.bands.names, encoder.bands.dtype) == (NAMES, "float32")
    source = xsmae.open_source("geotiff", root=str(scenes))
    features = encoder.embed(source, progress=False)
    assert features.shape == (8, 16)
    assert np.isfinite(features).all()
    with pytest.raises(UserError, match="uint8"):
        encoder(np.zeros((1, 16, 16, 3), np.uint8), gsd=10.0)


def test_wavelengths_travel_from_the_sensor_to_the_card(tmp_path):
    """Through encoder.json, an encoder in memory and an export; null if unknown."""
    names = ("B4", "B08", "haze")
    sensor = "sentinel2_l2a"
    data = land(40, 40, dtype="uint16")
    write(tmp_path / "a.tif", data, descriptions=("B04", "B08", "B11"))
    source = GeotiffSource(tmp_path, sensor=sensor, bands=("B11", "B04"))
    assert source.wavelengths == (1613.7, 664.6)
    assert wavelengths_of(sensor, names) == (664.6, 832.8, None)
    assert wavelengths_of(None, names) == wavelengths_of("naip", ("nir",)) == ()
    config, _ = settle(
        load_config("geotiff:mae,size=tiny", {"data.root": str(tmp_path)}), source
    )
    assert config.wavelengths == (1613.7, 664.6)
    config.model.update(embed_dim=16, depth=1, num_heads=2, patch_size=8)
    info = describe_encoder(config.model, image_size=16, bands=Bands.of(config), run={})
    assert info["wavelengths"] == [1613.7, 664.6]
    encoder = Encoder(new_network(info), info)
    assert encoder.bands.wavelengths == (1613.7, 664.6)
    assert Encoder.random(info, seed=0).info["wavelengths"] == [1613.7, 664.6]
    notes = xsmae.export(encoder, tmp_path / "timm", format="timm")
    assert any("in their units (surface reflectance)" in note for note in notes)
    text = (tmp_path / "timm/README.md").read_text()
    assert "| wavelengths in nm | 1613.7, 664.6 |" in text
    bare = {**info, "wavelengths": [None, None]}
    assert Encoder(new_network(info), bare).digest == encoder.digest
    for wrong, said in (([500.0], "1 values of wavelengths"), ([0, 1], "nm above 0")):
        encoder.info["wavelengths"] = wrong
        encoder.save(tmp_path / "wrong")
        with pytest.raises(UserError, match=said):
            xsmae.load_encoder(tmp_path / "wrong")
