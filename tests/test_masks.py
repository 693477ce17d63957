"""Images with masks: folders, tables, palettes, rasters, splits, refusals."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from xsmae.configs import chesapeake, dubai, segmentation, synthetic_land

from tests.support.rasters import DATA, REASON, UTM, north_up, unpack, write
from xsmae.data.catalogue import build_masks, build_source, open_source
from xsmae.data.mask_classes import IGNORE, MaskClasses, read_classes
from xsmae.data.masks import MaskSource
from xsmae.data.synthetic.labelled import LandSource
from xsmae.errors import UserError

rng = np.random.default_rng(0)
COLOURS = {"roof": [200, 0, 0], "road": [90, 90, 90], "lake": [0, 0, 255]}
CLASSES = {
    "classes": [{"name": name, "color": rgb} for name, rgb in COLOURS.items()],
    "ignored": [{"name": "unlabeled", "color": [255, 255, 255]}],
}
SHAPE = (36, 44)
MASK = rng.integers(0, 3, SHAPE).astype(np.uint8)
MASK[0, :5] = 255
RGB = np.array([*COLOURS.values(), *[[255] * 3] * 253], np.uint8)[MASK]


def rasterio_or_skip():
    return pytest.importorskip("rasterio", reason=REASON)


def save(path, numbers, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(numbers).save(path, **options)
    return path


def make(root, ids=("a", "b"), classes=CLASSES, mask=MASK):
    """A data set of PNG images and masks."""
    for i, name in enumerate(ids):
        image = np.full((*SHAPE, 3), 5 * i, np.uint8)
        save(root / f"images/{name}.png", image)
        save(root / f"masks/{name}.png", mask)
    (root / "classes.json").write_text(json.dumps(classes))
    return root


def refused(*texts, root=None, **options):
    """Opens a source and reads all of it; asserts a line with all texts."""
    options = {"gsd": 0.5, **options}
    with pytest.raises(UserError) as error:
        list(MaskSource(root, **options))
    line = str(error.value)
    assert "\n" not in line
    for text in texts:
        assert text in line, line


def test_a_folder_of_pictures(tmp_path):
    make(tmp_path, ("east/2", "east/1", "west/1"))
    save(tmp_path / "masks/north/9.png", MASK)
    (tmp_path / "images/.hidden.png").write_text("")
    source = MaskSource(tmp_path, gsd=0.5)
    assert [source.id(i) for i in range(3)] == ["east/1", "east/2", "west/1"]
    assert [source.scene(i) for i in range(3)] == ["east", "east", "west"]
    assert source.class_names == ("roof", "road", "lake")
    assert source.colours == tuple(map(tuple, COLOURS.values()))
    assert (source.bands, source.dtype) == (("red", "green", "blue"), "uint8")
    record = source[1]
    assert (record.image.shape, record.image.dtype) == ((*SHAPE, 3), np.uint8)
    assert (record.gsd, record.id, record.label) == ((0.5, 0.5), "east/2", None)
    np.testing.assert_array_equal(record.mask, MASK)
    assert record.mask.dtype == np.uint8
    assert source.path(0) == tmp_path / "images/east/1.png"
    assert source.raster(0) is None
    (note,) = source.notes()
    assert "1 masks" in note
    assert "north/9" in note
    with source.open(2) as opened:
        np.testing.assert_array_equal(opened.mask, MASK)
    again = pickle.loads(pickle.dumps(source))
    assert again.fingerprint == source.fingerprint
    np.testing.assert_array_equal(again[0].mask, MASK)
    other = CLASSES | {"classes": CLASSES["classes"][::-1]}
    (tmp_path / "classes.json").write_text(json.dumps(other))
    assert MaskSource(tmp_path, gsd=0.5).fingerprint != source.fingerprint
    assert "tmp" not in repr(source)


def grey(bits, tmp_path):
    """A grey PNG of few bits, which Pillow does not write."""
    import struct
    import zlib

    numbers = MASK % 3
    packed = np.zeros((SHAPE[0], SHAPE[1] * bits // 8), np.uint8)
    per_byte = 8 // bits
    for i in range(per_byte):
        packed |= (numbers[:, i::per_byte] << (8 - bits * (i + 1))).astype(np.uint8)
    raw = b"".join(b"\0" + row.tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", SHAPE[1], SHAPE[0], bits, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in (
        (b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b""),
    ):  # fmt: skip
        crc = struct.pack(">I", zlib.crc32(kind + data))
        content += struct.pack(">I", len(data)) + kind + data + crc
    (tmp_path / "masks/a.png").write_bytes(content)
    return numbers


@pytest.mark.parametrize("kind", ["colours", "palette", "binary", "grey 2", "grey 4"])
def test_png_masks_of_every_kind(kind, tmp_path):
    """Numbers are what the file holds, whatever Pillow shows them as."""
    path, expected = make(tmp_path, ("a",)) / "masks/a.png", MASK
    if kind == "colours":
        save(path, RGB)
    elif kind == "palette":
        image = Image.fromarray(MASK, "P")
        image.putpalette(rng.integers(0, 256, 768).astype(np.uint8).tobytes())
        image.save(path)
    elif kind == "binary":
        expected = MASK % 2
        Image.fromarray(expected * 255).convert("1").save(path)
    else:
        expected = grey(int(kind[-1]), tmp_path)
    np.testing.assert_array_equal(MaskSource(tmp_path, gsd=1)[0].mask, expected)


NLCD = {"classes": [{"index": 41, "name": "forest"}, {"index": 11, "name": "water"},
                    {"index": 300, "name": "other"}], "ignore_index": 0}  # fmt: skip


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32", "float64"])
def test_indices_need_no_order_and_the_list_says_which_class(dtype, tmp_path):
    rasterio_or_skip()
    make(tmp_path, ("a",), NLCD)
    (tmp_path / "masks/a.png").unlink()
    stored = np.array([41, 11, 300], dtype)[MASK % 3]
    stored[0, :5] = 0
    write(tmp_path / "masks/a.tif", stored[None])
    mask = MaskSource(tmp_path, gsd=1)[0].mask
    np.testing.assert_array_equal(mask[1:], MASK[1:])
    assert (mask[0, :5] == IGNORE).all()


def write_pair(root, name="a", *, image=None, mask=MASK, **options):
    """A raster of four bands and its mask as a GeoTIFF; options are of the mask."""
    (root / "images").mkdir(exist_ok=True)
    (root / "masks").mkdir(exist_ok=True)
    given = rng.integers(1, 200, (4, *SHAPE)) if image is None else image
    bands = ("red", "green", "blue", "nir")
    write(
        root / f"images/{name}.tif",
        given.astype(np.uint8),
        nodata=0,
        descriptions=bands,
    )
    mask = mask if mask.ndim == 3 else mask[None]
    write(root / f"masks/{name}.tif", mask, **options)
    (root / "classes.json").write_text(json.dumps(CLASSES))
    return root


def test_rasters_of_four_bands_and_nodata_of_both(tmp_path):
    rasterio_or_skip()
    image = rng.integers(1, 200, (4, *SHAPE))
    image[:, 7, 9:12] = 0
    mask = MASK.copy()
    mask[3, 3:6] = 99
    write_pair(tmp_path, image=image, mask=mask, nodata=99)
    source = MaskSource(tmp_path)
    assert source.bands == ("red", "green", "blue", "nir")
    assert source.dtype == "float32"
    record = source[0]
    np.testing.assert_allclose(record.gsd, (10, 10), rtol=1e-3)
    expected = MASK.copy()
    expected[3, 3:6] = expected[7, 9:12] = IGNORE
    np.testing.assert_array_equal(record.mask, expected)
    np.testing.assert_array_equal(record.valid, image.any(axis=0))
    np.testing.assert_allclose(record.image, np.moveaxis(image, 0, -1) / 255, atol=1e-7)
    two = MaskSource(tmp_path, bands=("nir", "red"))
    np.testing.assert_array_equal(two[0].image, record.image[..., [3, 0]])
    assert len({source.fingerprint, two.fingerprint}) == 2


@pytest.mark.parametrize("kind", ["colour table", "three bands", "no place", "png"])
@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_masks_of_rasters(kind, tmp_path):
    rasterio = rasterio_or_skip()
    if kind == "colour table":
        write_pair(tmp_path, photometric="palette")
        with rasterio.open(tmp_path / "masks/a.tif", "r+") as mask:
            mask.write_colormap(1, {0: (9, 0, 0, 255), 1: (8, 0, 0, 255)})
    elif kind == "three bands":
        write_pair(tmp_path, mask=np.moveaxis(RGB, -1, 0), photometric="rgb")
    elif kind == "no place":
        write_pair(tmp_path, crs=None, transform=None)
    else:
        write_pair(tmp_path)
        (tmp_path / "masks/a.tif").unlink()
        save(tmp_path / "masks/a.png", MASK)
    np.testing.assert_array_equal(MaskSource(tmp_path)[0].mask, MASK)


def test_scenes_are_never_divided(tmp_path):
    ids = [f"scene{s}_{i}" for s in range(10) for i in range(3)]
    make(tmp_path, ids)
    refused("split='train'", "scene0_0", "scene=", root=tmp_path, split="train")
    parts = {
        split: MaskSource(tmp_path, gsd=1, scene=r"(scene\d)_.*", split=split)
        for split in ("all", "train", "test")
    }
    scenes = {k: {s.scene(i) for i in range(len(s))} for k, s in parts.items()}
    assert [len(parts[k]) for k in parts] == [30, 24, 6]
    assert not scenes["train"] & scenes["test"]
    assert scenes["train"] | scenes["test"] == scenes["all"]
    (tmp_path / "list.txt").write_text("scene3_1\nscene0_2\n")
    listed = MaskSource(tmp_path, gsd=1, split="list.txt")
    assert [listed.id(i) for i in range(2)] == ["scene0_2", "scene3_1"]
    refused("(.+)-[0-9]", "scene0_0", root=tmp_path, scene="(.+)-[0-9]")
    refused("2 groups", root=tmp_path, scene="(a)(b)")
    refused("regular expression", root=tmp_path, scene="(a")
    (tmp_path / "list.txt").write_text("scene9_9\n")
    refused("scene9_9", root=tmp_path, split="list.txt")


def test_a_table(tmp_path):
    make(tmp_path, ("a", "b"))
    table = tmp_path / "pairs.csv"
    table.write_text(
        "image,mask,scene,gsd\nimages/b.png,masks/a.png,one,0.5\n"
        "images/a.png,masks/b.png,two,2\n"
    )
    source = MaskSource(table)
    assert [source.id(i) for i in range(2)] == ["images/b.png", "images/a.png"]
    assert [source.scene(i) for i in range(2)] == ["one", "two"]
    assert [source[i].gsd for i in range(2)] == [(0.5, 0.5), (2, 2)]
    refused("gsd=0.5", root=table)
    refused("images=x", root=table, gsd=None, images="x")
    refused("scene='(.)'", root=table, gsd=None, scene="(.)")
    for text, found in (
        ("image,mask\nimages/a.png,masks/c.png\n", "masks/c.png"),
        ("image,mask\nimages/a.png,../x.png\n", "../x.png"),
        ("image,mask\nimages/a.png,masks/a.jpg\n", "masks/a.jpg"),
        ("image,mask\nimages/a.png,masks/a.png\nimages/a.png,masks/b.png", "line 2"),
        ("image,label\nimages/a.png,1\n", "image, label"),
    ):
        table.write_text(text)
        refused(found, root=table)


def picture(root):
    make(root)
    return root / "masks/b.png"


# What is done to a good data set of two pairs, and what the line names.
BAD_PICTURES = {
    "another size": (
        lambda p: save(p, MASK[1:]), ("masks/b.png", "35 x 44", "36 x 44"),
    ),
    "unknown value": (
        lambda p: save(p, np.where(MASK == 1, 7, MASK).astype(np.uint8)),
        ("masks/b.png", "value 7", str((MASK == 1).sum()), "0, 1, 2, 255"),
    ),
    "unknown colour": (
        lambda p: save(p, np.where(RGB == 90, 91, RGB).astype(np.uint8)),
        ("masks/b.png", "colour (91, 91, 91)", "(90, 90, 90)"),
    ),
    "missing mask": (lambda p: p.unlink(), ("1 of 2", "b.png", "masks/b.png or .tif")),
    "a mask as JPEG": (
        lambda p: save(p, MASK, format="JPEG"), ("masks/b.png", "JPEG"),
    ),
    "alpha": (
        lambda p: save(p, np.dstack([RGB, MASK])), ("masks/b.png", "mode RGBA"),
    ),
    "16 bits": (
        lambda p: save(p, MASK.astype(np.uint16)), ("masks/b.png", "16 bits"),
    ),
    "cut": (
        lambda p: p.write_bytes(p.read_bytes()[:-30]), ("masks/b.png", "decoded"),
    ),
    "empty": (lambda p: p.write_bytes(b""), ("masks/b.png", "0 bytes")),
    "a bad image": (
        lambda p: (p.parent.parent / "images/b.png").write_text("<html>"),
        ("images/b.png", "not a readable"),
    ),
    "a turned image": (
        lambda p: turn(p.parent.parent / "images/b.png"), ("images/b.png", "EXIF", "3"),
    ),
    "two of one stem": (
        lambda p: p.rename(p.with_name("a.tif")), ("a.png", "a.tif"),
    ),
    "no folder": (lambda p: p.parent.rename(p.parent.with_name("x")), ("'masks'",)),
}  # fmt: skip


def turn(path):
    image = Image.open(path)
    exif = image.getexif()
    exif[0x0112] = 3
    image.save(path, exif=exif)


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pairs_are_refused_by_name(name, tmp_path):
    change, expected = BAD_PICTURES[name]
    change(picture(tmp_path))
    refused(*expected, root=tmp_path)


def test_three_bands_need_a_palette(tmp_path):
    make(tmp_path, ("a",), {"classes": ["roof", "road", "lake"]}, RGB)
    refused("masks/a.png", "three bands", "classes.json", root=tmp_path)


BAD_RASTERS = {
    "another size": (lambda r: write_pair(r, mask=MASK[:, 2:]), ("36 x 42", "36 x 44")),
    "another CRS": (
        lambda r: write_pair(r, crs="EPSG:32632"), ("EPSG:32632", "EPSG:32633"),
    ),
    "another transform": (
        lambda r: write_pair(r, transform=north_up(500_005, 5_000_000, 10)),
        ("500005", "500000", "0.5 pixels"),
    ),
    "another GSD": (
        lambda r: write_pair(r, transform=north_up(500_000, 5_000_000, 20)),
        ("(20,", "(10,"),
    ),
    "unknown value": (
        lambda r: write_pair(r, mask=np.where(MASK == 2, 2.5, MASK)), ("value 2.5",),
    ),
    "two bands": (lambda r: write_pair(r, mask=np.stack([MASK, MASK])), ("2 bands",)),
    "nodata is a class": (lambda r: write_pair(r, nodata=1), ("nodata is 1", "'road'")),
    "not a raster": (
        lambda r: (write_pair(r) / "masks/a.tif").write_bytes(b"II*\0 no raster"),
        ("cannot be read",),
    ),
    "mixed": (
        lambda r: (make(write_pair(r), ("b",))), ("images/b.png", "images/a.tif"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RASTERS)
def test_bad_masks_of_rasters_are_refused_by_name(name, tmp_path):
    rasterio_or_skip()
    change, expected = BAD_RASTERS[name]
    change(tmp_path)
    named = () if name == "mixed" else ("masks/a.tif",)
    refused(*named, *expected, root=tmp_path, gsd=None)


def test_rasters_that_do_not_fit_are_refused_by_name(tmp_path):
    rasterio_or_skip()
    write_pair(tmp_path, "a")
    write_pair(tmp_path, "b", image=np.ones((4, *SHAPE)))
    write(tmp_path / "images/b.tif", np.ones((2, *SHAPE), np.uint8), transform=UTM)
    refused("images/b.tif", "nir", root=tmp_path, gsd=None)
    refused("images/a.tif", "36 x 44", "1000", root=tmp_path, max_pixels=1000)
    (tmp_path / "images/a.tif").write_bytes(b"no raster")
    refused("images/a.tif", root=tmp_path)
    (tmp_path / "images/b.tif").write_bytes(b"no raster")
    refused("none of the 2", root=tmp_path)


BAD_CLASSES = {
    "not JSON": ("{", "JSON"),
    "no list": ('{"names": ["a"]}', "1 to 255"),
    "empty": ('{"classes": []}', "1 to 255"),
    "256 classes": (json.dumps({"classes": [str(i) for i in range(256)]}), "1 to 255"),
    "no name": ('{"classes": [{"index": 0}]}', "class 0"),
    "one name twice": ('{"classes": ["a", "b", "a"]}', "'a'"),
    "one index twice": (
        '{"classes": [{"name": "a", "index": 1}, {"name": "b", "index": 1}]}', "1 is",
    ),
    "ignore_index is a class": ('{"classes": ["a", "b"], "ignore_index": 1}', "1 is"),
    "index below 0": ('{"classes": [{"name": "a", "index": -1}]}', "-1"),
    "index is text": ('{"classes": [{"name": "a", "index": "0"}]}', "'0'"),
    "one colour twice": (
        json.dumps({"classes": [{"name": n, "color": [1, 2, 3]} for n in "ab"]}),
        "(1, 2, 3)",
    ),
    "an ignored colour is a class": (
        json.dumps({"classes": [{"name": "a", "color": [1, 2, 3]}],
                    "ignored": [{"color": [1, 2, 3]}]}),
        "(1, 2, 3)",
    ),
    "a class without a colour": (
        '{"classes": [{"name": "a", "color": [1, 2, 3]}, {"name": "b"}]}', "'b'",
    ),
    "a colour above 255": ('{"classes": [{"name": "a", "color": [1, 2, 300]}]}', "300"),
    "a colour of two": ('{"classes": [{"name": "a", "color": [1, 2]}]}', "[1, 2]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CLASSES)
def test_bad_classes_are_refused_by_name(name, tmp_path):
    text, expected = BAD_CLASSES[name]
    (make(tmp_path) / "classes.json").write_text(text)
    refused("classes.json", expected, root=tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["classes", "name", "index", "color", "ignored"]), inner
        )
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(content=JSON | st.fixed_dictionaries({"classes": st.lists(JSON, max_size=3)}))
def test_any_json_is_classes_or_one_line(content, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzzed_classes.json"
    path.write_text(json.dumps(content))
    try:
        found = read_classes(path)
    except UserError as error:
        found, line = None, str(error)
    if found is None:
        assert "\n" not in line
        assert "fuzzed_classes.json" in line
    else:
        assert len(set(found.numbers) | {found.ignore}) == len(found.names) + 1


def test_no_gsd_and_options_of_rasters(tmp_path):
    make(tmp_path)
    refused("gsd", root=tmp_path, gsd=None)
    refused("sensor='naip'", root=tmp_path, sensor="naip")
    refused("GSD is -1", root=tmp_path, gsd=-1)
    (tmp_path / "classes.json").unlink()
    refused("classes.json", "No such file", root=tmp_path)
    refused("folder of images", root=tmp_path / "nowhere")


def test_invalid_pixels_may_hold_anything():
    classes = MaskClasses(("a", "b"), (0, 1))
    stored = np.array([[0, 9], [1, 255]])
    valid = np.array([[True, False], [True, True]])
    assert classes.of(stored, "x", valid=valid).tolist() == [[0, 255], [1, 255]]
    with pytest.raises(UserError, match="value 9 at row 0, column 1"):
        classes.of(stored, "x")


def test_the_catalogue_keeps_masks_and_images_apart(tmp_path):
    make(tmp_path)
    assert isinstance(open_source("masks", root=tmp_path, gsd=1), MaskSource)
    assert isinstance(open_source(synthetic_land.get_config()), LandSource)
    for data, build, expected in (
        ({"source": "masks", "root": str(tmp_path)}, build_source, "folder"),
        ({"source": "folder", "root": str(tmp_path)}, build_masks, "synthetic_land"),
        ({"source": "masks"}, build_masks, "data.root"),
        ({"source": "mask"}, build_masks, "synthetic_land"),
    ):
        with pytest.raises(UserError, match=expected):
            build(data)
    with pytest.raises(UserError, match="rot"):
        open_source("masks", rot=1)


def test_the_pixel_counts_of_dubai(tmp_path):
    if not (DATA / "dubai_cc0.zip").exists():
        pytest.skip(f"{DATA / 'dubai_cc0.zip'} is not there")
    for part in ("classes.json", "test.txt", "images/tile_2/", "masks/tile_2/"):
        unpack("dubai_cc0.zip", tmp_path, f"dubai/{part}")
    root = tmp_path / "dubai"
    ids = [line for line in (root / "test.txt").read_text().split() if "tile_2" in line]
    (root / "test.txt").write_text("\n".join(ids))
    config = dubai.get_config()
    fields = dict(config.knn.test) | {"root": str(root), "gsd": 0.3}
    source = open_source(config, **fields)
    assert len(source) == 9
    assert {source.scene(i) for i in range(9)} == {"tile_2"}
    counts = sum(np.bincount(r.mask.ravel(), minlength=256) for r in source)
    told = json.loads((root / "classes.json").read_text())["pixel_counts"]["2"]
    counts = dict(zip(told, counts[[0, 1, 2, 3, 4, 255]].tolist(), strict=True))
    assert counts == told
    assert [*source.class_names, "ignore"] == list(told)


def test_the_pixel_counts_of_chesapeake(tmp_path):
    rasterio_or_skip()
    if not (DATA / "chesapeake.zip").exists():
        pytest.skip(f"{DATA / 'chesapeake.zip'} is not there")
    root = unpack("chesapeake.zip", tmp_path) / "chesapeake"
    config = chesapeake.get_config()
    told = json.loads((root / "classes.json").read_text())["pixel_counts_per_patch"]
    scenes = []
    for part in ("train", "test"):
        source = open_source(config, root=str(root), **config.knn[part])
        assert source.bands == ("red", "green", "blue", "nir")
        scenes.append({source.scene(i) for i in range(len(source))})
        assert len(source) == 8
        for record in source:
            counts = np.bincount(record.mask.ravel(), minlength=256)
            assert counts[[*range(6), 255]].tolist() == told[record.id]
    assert scenes == [{"m_3708020_sw_17_1"}, {"m_3708035_ne_17_1"}]


def test_the_general_config_reads_a_folder(tmp_path):
    make(tmp_path, [f"{scene}/{i}" for scene in "abcde" for i in range(2)])
    config = segmentation.get_config()
    train, test = (
        open_source(config, root=str(tmp_path), gsd=0.5, **config.knn[part])
        for part in ("train", "test")
    )
    assert (len(train), len(test)) == (8, 2)
