"""Mixed sources: exact shares, what must agree, labels and splits, a run from files."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

import xsmae
from tests.support.rasters import REASON, land, north_up, write
from xsmae import load_config
from xsmae.bands import UNITS
from xsmae.cli import check_data
from xsmae.data.catalogue import MixSource, missing_arguments, open_source
from xsmae.data.mix import epoch_counts
from xsmae.data.pipeline import check_bands, make_batches
from xsmae.data.survey import survey
from xsmae.data.views import ViewSampler
from xsmae.errors import BadImageError, UserError
from xsmae.run.choices import settle
from xsmae.run.knn import create_monitors
from xsmae.run.workdir import check_outside_data, differences
from xsmae.trainer import batches_of, create_sampler

pytest.importorskip("rasterio", reason=REASON)

NAMES = ("red", "green", "nir")
SMALL = {
    "batch_size": 4, "num_steps": 3, "views.size": 16, "model.patch_size": 8,
    "model.embed_dim": 16, "model.depth": 1, "model.num_heads": 2,
    "model.decoder_embed_dim": 16, "model.decoder_depth": 1,
    "model.decoder_num_heads": 2, "knn.k": 2, "optim.warmup_steps": 0,
    "figures.every": 0,
}  # fmt: skip


def pictures(root, count, *, side=40, classes=("field", "roof")):
    """A folder of JPEGs in two classes, each picture of its own colour."""
    for i in range(count):
        folder = root / classes[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (side, side), (20 * i % 256, 60 * (i % 2), 5 * i))
        image.save(folder / f"{i:02}.jpg")
    return root


@pytest.fixture
def folders(tmp_path):
    """The fields of two folders: 8 pictures at 0.5 m, and 3 larger ones at 2 m."""
    fine, coarse = pictures(tmp_path / "fine", 8), tmp_path / "coarse"
    pictures(coarse, 3, side=60, classes=("roof", "water"))
    return {
        "fine": {"source": "folder", "root": str(fine), "gsd": 0.5},
        "coarse": {"source": "folder", "root": str(coarse), "gsd": 2.0},
    }


@pytest.fixture
def scenes(tmp_path):
    """Two folders of rasters: 40 px at 10 m in UTM, and 64 px in degrees."""
    degrees = {"crs": "EPSG:4326", "transform": north_up(15, 45, 1e-4)}
    for name, side, options in (("utm", 40, {}), ("degrees", 64, degrees)):
        for i in range(4):
            folder = tmp_path / name / ("field", "roof")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            data = land(side, side) + np.uint8(i)
            write(folder / f"{i}.tif", data, descriptions=NAMES, **options)
    return {
        name: {"source": "geotiff", "root": str(tmp_path / name), "labels": "folder"}
        for name in ("utm", "degrees")
    }


def batches(source, **options):
    sampler = ViewSampler(
        num_views=1, size=8, area=(0.5, 1.0), ratio=(1.0, 1.0),
        area_distribution="uniform", interpolation="bilinear", horizontal_flip=0.5,
        vertical_flip=0.5,
    )  # fmt: skip
    options = {
        "seed": 3, "batch_size": 4, "start_step": 0, "num_steps": 9,
        "max_rejected_fraction": 0.2, **options,
    }  # fmt: skip
    return list(make_batches(source, sampler, **options))


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ((8, 3), (1, 1), [8, 8]),
        ((8, 3), (2, 1), [8, 4]),
        ((8, 3), (1, 2), [8, 16]),
        ((10, 10, 10), (1, 1, 1), [10, 10, 10]),
        ((100, 7), (0.9, 0.1), [101, 11]),
        ((1, 1000), (0.5, 0.25), [2000, 1000]),
    ],
)
def test_the_shortest_epoch_has_every_record(sizes, weights, expected):
    counts = epoch_counts(sizes, weights)
    assert counts == expected
    for count, size, weight in zip(counts, sizes, weights, strict=True):
        assert count >= size
        assert abs(count - sum(counts) * weight / sum(weights)) < 1


def test_records_of_a_part_are_repeated_evenly(folders):
    folders["coarse"]["weight"] = 2.0
    source = MixSource(folders)
    ids = [source.id(i) for i in range(len(source))]
    assert len(ids) == 24
    counts = {name: ids.count(name) for name in set(ids)}
    assert {n for i, n in counts.items() if i.startswith("fine/")} == {1}
    assert sorted(n for i, n in counts.items() if i.startswith("coarse/")) == [5, 5, 6]
    once = MixSource(folders, each_once=True)
    assert once.labels.tolist() == [1, 1, 2, *[0] * 4, *[1] * 4]
    assert sorted(once.id(i) for i in range(len(once))) == sorted(counts)
    assert source.notes()[0] == (
        "coarse: 66.7% of an epoch of 24 samples, 3 records 5.33 times each"
    )
    with pytest.raises(IndexError, match="24"):
        source.id(24)


def test_records_are_those_of_the_parts(folders):
    source = MixSource(folders)
    assert source.class_names == ("field", "roof", "water")
    parts = {name: open_source(fields) for name, fields in folders.items()}
    for i in range(len(source)):
        record = source[i]
        name, _, inner = record.id.partition("/")
        part = parts[name]
        place = [part.id(j) for j in range(len(part))].index(inner)
        np.testing.assert_array_equal(record.image, part[place].image)
        assert record.gsd == folders[name]["gsd"]
        assert source.path(i) == part.path(place)
        assert source.class_names[record.label] == inner.partition("/")[0]
        assert source.labels[i] == record.label


def test_shares_are_exact_in_every_epoch_and_do_not_depend_on_workers(folders):
    folders["fine"]["weight"] = 3.0
    source = MixSource(folders)  # 9 + 3 samples, 3 batches of an epoch
    found = batches(source)
    requested = np.concatenate([batch["requested"] for batch in found])
    for epoch in requested.reshape(3, 12):
        assert sorted(epoch) == list(range(12))
        assert sum(source.id(i).startswith("fine/") for i in epoch) == 9
    shown = np.concatenate([batch["gsd"] for batch in found])
    assert shown.max() / shown.min() > 4
    for others, start in (
        (batches(source, num_workers=2), 0),
        (batches(MixSource(folders), start_step=5), 5),
        (batches(pickle.loads(pickle.dumps(source)), num_threads=1), 0),
    ):
        for one, other in zip(found[start:], others, strict=True):
            for name in one:
                np.testing.assert_array_equal(one[name], other[name])


def test_a_bad_record_is_replaced_by_the_next_one_of_its_part(folders):
    folders["coarse"]["weight"] = 4.0
    source = MixSource(folders)
    bad = next(i for i in range(len(source)) if source.id(i).startswith("coarse/"))
    source.path(bad).write_bytes(b"<html>")
    with pytest.raises(BadImageError):
        source[bad]
    found = batches(source, max_rejected_fraction=0.5)
    used = np.concatenate([batch["index"] for batch in found])
    replaced = used != np.concatenate([batch["requested"] for batch in found])
    assert replaced.any()
    assert (used >= 0).all()
    assert source.id(bad) not in {source.id(i) for i in used}


def test_parts_must_agree(folders, scenes, tmp_path):
    with pytest.raises(UserError, match=r"parts.fine.*uint8.*parts.utm.*float32"):
        MixSource({"fine": folders["fine"], "utm": scenes["utm"]})
    chosen = {**scenes["utm"], "bands": ("nir", "red")}
    with pytest.raises(
        UserError, match=r"parts.degrees.*red, green, nir.*parts.utm.*nir, red.*bands"
    ):
        MixSource({**scenes, "utm": chosen})
    assert MixSource({**scenes, "utm": chosen}, bands=("nir", "red")).bands == (
        "nir", "red",
    )  # fmt: skip
    write(tmp_path / "utm/16.tif", land(40, 40, dtype="uint16"), descriptions=NAMES)
    scaled = {"source": "geotiff", "root": str(tmp_path / "utm/16.tif"), "scale": 0.01}
    with pytest.raises(
        UserError, match=r"parts.a has the units 'digital.*parts.b has 'uint16.*sensor"
    ):
        MixSource({"a": scenes["degrees"], "b": scaled})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"weight": 0.0}, r"parts.fine.weight=0.0.*above 0"),
        ({"weight": "2"}, r"parts.fine.weight='2'"),
        ({"source": "mix"}, r"parts.fine.*mix"),
        ({"source": "nothing"}, r"parts.fine.*'nothing'.*folder"),
        ({"sensor": "naip"}, r"parts.fine.*folder has no field sensor.*gsd"),
        ({"root": None}, r"parts.fine.*--config.data.parts.fine.root"),
    ],
)
def test_wrong_parts_are_named(change, expected, folders):
    folders["fine"] |= change
    with pytest.raises(UserError, match=expected):
        MixSource(folders)


def test_wrong_fields_of_a_mix(folders):
    with pytest.raises(UserError, match=r"parts is empty"):
        MixSource({})
    with pytest.raises(UserError, match=r"parts.a/b.*letters"):
        MixSource({"a/b": folders["fine"]})
    with pytest.raises(UserError, match=r"list.txt.*parts.NAME.split"):
        MixSource(folders, split="list.txt")
    with pytest.raises(UserError, match=r"parts.world.*split='test'.*knn.every=-1"):
        MixSource({"world": {"source": "synthetic", "num_images": 9}}, split="test")
    data = {"source": "mix", "parts": {"a": {"source": "folder"}}}
    assert missing_arguments(data) == ["parts.a.root"]


def test_splits_pass_to_the_parts(folders):
    parts = {
        split: MixSource(folders, split=split, test_fraction=0.5, each_once=True)
        for split in ("train", "test")
    }
    ids = {n: {s.id(i) for i in range(len(s))} for n, s in parts.items()}
    assert not ids["train"] & ids["test"]
    assert len(ids["train"] | ids["test"]) == 11
    assert {i.partition("/")[0] for i in ids["test"]} == {"fine", "coarse"}


def test_without_labels_in_a_part_there_are_none(scenes):
    scenes["utm"]["labels"] = "none"
    source = MixSource(scenes)
    assert (source.class_names, source.labels, source[0].label) == ((), None, None)
    assert "no labels are used: utm has none" in source.notes()


def test_wavelengths_are_those_that_the_parts_agree_on(tmp_path):
    data = land(40, 40, dtype="uint16")
    write(tmp_path / "a.tif", data, descriptions=("B04", "B08", "B11"))
    part = {"source": "geotiff", "root": str(tmp_path / "a.tif")}
    sentinel = {**part, "sensor": "sentinel2_l2a"}
    assert MixSource({"a": sentinel, "b": sentinel}).wavelengths == (
        664.6, 832.8, 1613.7,
    )  # fmt: skip
    own = {**part, "scale": 1e-4}
    assert MixSource({"a": own, "b": own}).wavelengths == ()


def test_repr_and_fingerprint_do_not_depend_on_the_place(folders, tmp_path):
    source = MixSource(folders)
    assert str(tmp_path) not in repr(source)
    assert "coarse 50.0%, fine 50.0%" in repr(source)
    backwards = MixSource(dict(reversed(folders.items())))
    assert repr(backwards) == repr(source)
    folders["fine"]["weight"] = 2.0
    assert MixSource(folders).fingerprint != source.fingerprint


def test_a_survey_counts_a_repeated_record_once(folders):
    folders["coarse"]["weight"] = 2.0
    found = survey(MixSource(folders))
    assert len(found.images) == 24
    assert found.identical() == []
    assert len(found.also_in(found)) == 11


def test_paths_of_parts_may_change_and_workdirs_lie_outside(folders, tmp_path):
    old = {"data": {"source": "mix", "parts": {"a": {"root": "x", "weight": 1}}}}
    new = {"data": {"source": "mix", "parts": {"a": {"root": "y", "weight": 2}}}}
    assert differences(old, new) == ["data.parts.a.weight was 1, is 2"]
    data = {"source": "mix", "parts": folders}
    with pytest.raises(UserError, match=r"fine/runs is inside the data folder"):
        check_outside_data(tmp_path / "fine/runs", data, flag="--workdir")
    check_outside_data(tmp_path / "runs", data, flag="--workdir")


def test_check_data_reads_a_mix(scenes, tmp_path, capsys):
    flags = ["--data=mix", f"--out={tmp_path / 'out'}", "--samples=4"]
    for part, name in (("geotiff", "utm"), ("geotiff2", "degrees")):
        flags += [f"--data.parts.{part}.root={scenes[name]['root']}"]
        flags += [f"--data.parts.{part}.labels=folder"]
    flags += ["--data.parts.geotiff.weight=2", "--data.test_fraction=0.5"]
    assert check_data.main(["check-data", *flags]) == 0
    printed = capsys.readouterr().out
    assert "geotiff: 66.7% of an epoch of 12 samples" in printed
    assert "test: MixSource(4 samples" in printed
    assert "2 classes of 6 images" in printed


def fields_of(parts):
    """The parts of a mix as overrides of a config, the first with the weight 2."""
    fields = {
        f"data.parts.{part}.{key}": value
        for part, values in parts.items()
        for key, value in values.items()
        if key != "source"
    }
    return fields | {f"data.parts.{min(parts)}.weight": 2.0, "data.test_fraction": 0.5}


def test_pretraining_on_mixed_rasters(scenes, tmp_path):
    """From a config to encoder.json: kNN, pictures and the range of GSDs."""
    parts = {"geotiff": scenes["utm"], "geotiff2": scenes["degrees"]}
    config = load_config(
        "mix:parts=geotiff+geotiff,mae,size=tiny", SMALL | fields_of(parts)
    )
    workdir = xsmae.pretrain(config, tmp_path / "run")
    saved = json.loads((workdir / "config.json").read_text())
    assert (saved["dtype"], tuple(saved["bands"])) == ("float32", NAMES)
    info = json.loads((workdir / "encoder/encoder.json").read_text())
    low, high = info["gsd_range"]
    assert high / low > 1.5
    assert info["run"]["knn"]["test_images"] == 4
    assert info["run"]["data_name"] == "utm+degrees"
    drawn = {path.name.partition("_0")[0] for path in (workdir / "figures").iterdir()}
    assert {"crops.png", "gsd.png", "losses.png", "reconstructions"} <= drawn


def test_settings_for_mixed_pictures_are_chosen_by_them(folders):
    parts = {"folder": folders["fine"], "folder2": folders["coarse"]}
    config = load_config("mix:parts=folder+folder,mae,size=tiny", fields_of(parts))
    source = open_source(config)
    check_bands(source, config)
    config, lines = settle(config, source)
    assert (config.dtype, config.units) == ("uint8", UNITS)
    assert (config.bands, len(config.mean)) == (("red", "green", "blue"), 3)
    assert any("dtype=uint8" in line for line in lines)
    for monitor in create_monitors(config, source):
        assert (len(monitor.train), len(monitor.test)) == (6, 5)
    sampler = create_sampler(config)
    batch = next(batches_of(config, source, sampler, 0, 1))
    assert (batch["image"].dtype, len(batch["image"])) == ("uint8", 8)


def test_the_parts_of_the_config_are_configs():
    with pytest.raises(UserError, match=r"'mix', expected some of csv.*geotiff"):
        load_config("mix:parts=mix")
    config = load_config("mix:parts=eurosat_ms+geotiff+geotiff+geotiff")
    assert sorted(config.data.parts) == [
        "eurosat_ms", "geotiff", "geotiff2", "geotiff3",
    ]  # fmt: skip
