"""The command xsmae search: its files, images as queries, scenes that are gone."""

import base64
import csv
import html.parser
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

import xsmae
from tests.support.chip_tables import write_table
from tests.support.encoders import make_encoder
from tests.support.rasters import REASON, land, write
from xsmae import cli
from xsmae.errors import UserError
from xsmae.figures import hits as figure
from xsmae.figures.hit_map import first_longitude
from xsmae.figures.hits import Tile, hit_sheet
from xsmae.scenes import search_files
from xsmae.scenes.hits import Chip, as_hit
from xsmae.scenes.thumbnails import EMPTY, read_pictures

rasterio = pytest.importorskip("rasterio", reason=REASON)

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>&\"'"


def call(*words):
    return cli.main(["xsmae", "search", *map(str, words)])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    return make_encoder(folder, depth=1, position="gsd", reference_gsd=10.0)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    rng = np.random.default_rng(0)
    data = rng.integers(1, 256, (3, 48, 64)).astype(np.uint8)
    data[:, :16] //= 4
    path = tmp_path_factory.mktemp("scenes") / "scene.tif"
    return write(path, data, photometric="rgb")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory, encoder, scene):
    out = tmp_path_factory.mktemp("embedded")
    words = [scene, f"--encoder={encoder}", f"--out={out}", "--chip_size=16"]
    assert cli.main(["xsmae", "embed", *map(str, words)]) == 0
    return out


def cut(scene, path, window, **options):
    """A window of the scene as a file of its own."""
    top, left, height, width = window
    with rasterio.open(scene) as raster:
        data = raster.read()[:, top : top + height, left : left + width]
        dx, _, x, _, dy, y = raster.transform[:6]
    place = (dx, 0, x + dx * left, 0, dy, y + dy * top)
    options = {"transform": place, "photometric": "rgb"} | options
    return write(path, data, **options)


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text of each script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data


def data_of(path):
    """The page, and the data that it shows."""
    page = Page(path.read_text())
    data, code = page.scripts
    assert "JSON.parse" in code
    return page, json.loads(data)


def test_the_command(tmp_path, embedded, scene, capsys):
    out = tmp_path / "found"
    place = next(iter(xsmae.search(embedded, "scene_16_32", k=1))).centre
    words = [f"--embeddings={embedded}", f"--out={out}", "--k=3"]
    assert call(*words, "--point", f"{place[0]},{place[1]}", "--not", "scene_0_0") == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:3] == ["rank", "score", "id"]
    assert printed[1].split()[0] == "1"
    assert "scene_16_32" in printed[1]
    names = ["hits.csv", "hits.geojson", "contact_sheet.png", "map.html"]
    assert printed[4:] == [str(out / name) for name in names]
    hits = xsmae.search(embedded, place, unlike="scene_0_0", k=3)
    with (out / "hits.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [hit.id for hit in hits]
    assert float(rows[0]["score"]) == pytest.approx(hits[0].score, abs=1e-6)
    assert float(rows[0]["longitude"]) == pytest.approx(place[0])
    assert (rows[0]["row"], rows[0]["col"]) == ("16", "32")
    assert float(rows[0]["ground_x_m"]) == pytest.approx(160, rel=0.01)
    told = json.loads((out / "hits.geojson").read_text())
    assert [f["id"] for f in told["features"]] == [hit.id for hit in hits]
    shape = told["features"][0]["geometry"]
    assert shape == hits[0].outline.geojson()
    assert told["features"][0]["properties"]["source"] == str(scene)
    with Image.open(out / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 300
    _, data = data_of(out / "map.html")
    assert [hit["id"] for hit in data["hits"]] == [hit.id for hit in hits]
    ring = np.array(data["hits"][0]["rings"][0])
    np.testing.assert_allclose(ring, hits[0].outline.rings[0], atol=1e-7)
    with rasterio.open(scene) as raster:
        pixels = np.moveaxis(raster.read()[:, 16:32, 32:48], 0, -1)
    kind, _, content = data["hits"][0]["image"].partition(",")
    assert kind == "data:image/jpeg;base64"
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))), float)
    assert seen.shape == pixels.shape
    assert abs(seen.mean() - pixels.mean()) < 3


def test_the_map_needs_no_network_and_shows_names_as_text(tmp_path, embedded):
    vectors = np.random.default_rng(0).normal(size=(3, 8))
    folder = tmp_path / "tables"
    places = [(10.0, 47.0), (10.1, 47.0), None]
    write_table(folder / "a.parquet", vectors, places, source=EVIL)
    xsmae.search(folder, "a_0_0", out=tmp_path / "out")
    page, data = data_of(tmp_path / "out" / "map.html")
    assert {hit["source"] for hit in data["hits"]} == {EVIL}
    last = next(hit for hit in data["hits"] if hit["centre"] is None)
    assert last["rings"] == []
    assert last["image"] is None
    assert "does not exist" in last["reason"]
    # The tags are those of the page of any other search.
    xsmae.search(embedded, "scene_0_0", out=tmp_path / "other")
    other, _ = data_of(tmp_path / "other" / "map.html")
    assert page.tags == other.tags
    assert not {"img", "link", "iframe", "object", "base"} & {t for t, _ in page.tags}
    assert not any({"src", "href", "onerror"} & set(fields) for _, fields in page.tags)
    text = (tmp_path / "out" / "map.html").read_text()
    urls = set(re.findall(r"https?://[^\s\"']+", text))
    assert urls == {"http://www.w3.org/2000/svg"}  # the name of SVG, not a place
    assert "innerHTML" not in text
    assert "default-src 'none'" in dict(page.tags)["meta"]["content"]


def test_where_the_map_begins():
    assert first_longitude([]) == -180
    assert first_longitude([10.0]) == -170
    assert first_longitude([10.0, 20.0]) == 195 - 360
    # Across the antimeridian: 170 to 190 degrees east.
    assert first_longitude([170.0, -170.0]) == 0
    assert first_longitude([-100.0, 100.0, 179.0, -179.0]) == 0


def test_an_image_finds_the_chip_that_it_shows(
    tmp_path, embedded, scene, encoder, capsys
):
    chip = cut(scene, tmp_path / "chip.tif", (16, 32, 16, 16))
    wide = cut(scene, tmp_path / "wide.tif", (12, 24, 24, 32))  # the same middle
    words = [f"--embeddings={embedded}", f"--encoder={encoder}", "--k=2"]
    for path in (chip, wide):
        assert call(*words, f"--image={path}", f"--out={tmp_path}/out") == 0
        first = capsys.readouterr().out.splitlines()[1].split()
        assert first[:3] == ["1", "1.0000", "scene_16_32"]
    hits = xsmae.search(embedded, chip, encoder=encoder)
    assert hits[0].score == pytest.approx(1, abs=1e-5)
    # Without a CRS the GSD must be given, and it changes the vector.
    plain = cut(scene, tmp_path / "plain.tif", (16, 32, 16, 16), crs=None)
    with pytest.raises(UserError, match="gsd"):
        xsmae.search(embedded, plain, encoder=encoder)
    found = [
        xsmae.search(embedded, plain, encoder=encoder, gsd=gsd)[0].score
        for gsd in (10.0, 80.0)
    ]
    assert found[0] == pytest.approx(1, abs=1e-4)
    assert found[1] < 0.9999
    mixed = xsmae.search(embedded, ["scene_16_32"], unlike=wide, encoder=encoder)
    assert mixed[0].score == pytest.approx(1, abs=1e-5)
    window, unnamed = (16, 32, 16, 16), tmp_path / "unnamed.tif"
    cut(scene, unnamed, window, photometric="minisblack")
    names = ["red", "green", "blue"]
    first, other = (
        xsmae.search(embedded, unnamed, encoder=encoder, bands=bands)[0].score
        for bands in (names, names[::-1])
    )
    assert first == pytest.approx(1, abs=1e-5)
    assert other < 0.9999


def test_images_that_cannot_be_queries(tmp_path, embedded, scene, encoder, capsys):
    chip = cut(scene, tmp_path / "chip.tif", (16, 32, 16, 16))
    small = cut(scene, tmp_path / "small.tif", (16, 24, 15, 40))
    empty = write(
        tmp_path / "empty.tif", np.zeros((3, 16, 16), np.uint8), nodata=0,
        photometric="rgb",
    )  # fmt: skip
    bands = write(tmp_path / "bands.tif", land(16, 16, bands=2))
    other = make_encoder(tmp_path / "other", depth=2)
    own = [f"--encoder={encoder}"]
    for words, match in (
        ([f"--image={chip}"], "--encoder"),
        ([f"--image={chip}", f"--encoder={other}"], "cannot be compared"),
        ([f"--image={chip}", "--encoder=nowhere"], "nowhere"),
        ([f"--image={small}", *own], "15 x 40"),
        ([f"--image={empty}", *own], "no pixel"),
        ([f"--image={bands}", *own], "band_1"),
        ([f"--image={tmp_path}/gone.tif", *own], "gone.tif"),
        ([f"--image={chip}", *own, "--exclude_query"], "exclude_query"),
        (["--id=scene_0_0", "--sensor=naip"], "sensor"),
        (["--id=scene_0_0", *own], "encoder"),
        (["--id=scene_0_0", "--point=here"], "point=here"),
        (["--not=scene_0_0"], "nothing"),
        (["--id=scene_0_0", "--not=a.tif"], "a.tif"),
        (["--id=scene_0_0", "--bbox=1,2,3"], "bbox"),
    ):
        out = tmp_path / "out"
        assert call(f"--embeddings={embedded}", f"--out={out}", *words) == 2, words
        said = capsys.readouterr().err
        assert match in said
        assert said.count("\n") == 1
        assert not out.exists()
    assert call("--id=scene_0_0") == 2
    assert "--embeddings" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path, embedded, capsys):
    (tmp_path / "file").write_text("")
    words = [f"--embeddings={embedded}", "--id=scene_0_0", f"--out={tmp_path}/file"]
    assert call(*words) == 2
    assert "--out" in capsys.readouterr().err


def test_negative_numbers_of_flags(tmp_path, capsys):
    vectors = np.random.default_rng(0).normal(size=(4, 8))
    places = [(-99.0 - 0.1 * i, -47.0) for i in range(4)]
    write_table(tmp_path / "a.parquet", vectors, places)
    words = [f"--embeddings={tmp_path}", f"--out={tmp_path}/out"]
    assert call(*words, "--point", "-99.1,-47", "--bbox", "-99.15,-48,-98,-46") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[1:3]] == ["a_32_0", "a_0_0"]
    assert "hits.csv" in lines[3]
    assert call(*words, "--point=-99.1,-47", "--not", "-99,-47", "--k=1") == 0


def picture_of(path, window):
    """The picture of a window of a file."""
    chip = chip_of(path, window)
    (picture,) = read_pictures([chip])
    return picture


def chip_of(path, window):
    row, col, height, width = window
    return Chip(
        number=0, id="x", outline=None, centre=None, source=str(path), time=None,
        crs=None, row=row, col=col, height=height, width=width, ground=(10.0, 10.0),
    )  # fmt: skip


def test_pictures_of_chips(tmp_path, scene):
    whole = picture_of(scene, (0, 0, 48, 64)).image
    with rasterio.open(scene) as raster:
        np.testing.assert_array_equal(whole, np.moveaxis(raster.read(), 0, -1))
    # Named bands are found; others are the first three, or grey.
    data = land(40, 40, bands=4)
    names = ("nir", "blue", "green", "red")
    named = write(tmp_path / "named.tif", data, descriptions=names)
    image = picture_of(named, (8, 0, 16, 32)).image
    np.testing.assert_array_equal(image, np.moveaxis(data[[3, 2, 1], 8:24, :32], 0, -1))
    grey = picture_of(write(tmp_path / "two.tif", data[:2]), (0, 0, 40, 40)).image
    np.testing.assert_array_equal(grey, np.stack([data[0]] * 3, axis=-1))
    # Large chips are made smaller, 16 bits without a scale are stretched.
    large = land(400, 200, dtype="uint16") * np.uint16(100)
    large[:, :100] = 0
    path = write(tmp_path / "large.tif", large, nodata=0)
    image = picture_of(path, (0, 0, 400, 200)).image
    assert image.shape == (160, 80, 3)
    assert (image[:38] == EMPTY).all()
    assert (image[42:].min(), image[42:].max()) == (0, 255)


def test_scenes_that_cannot_be_read_leave_a_reason(tmp_path, scene, monkeypatch):
    gone = tmp_path / "gone.tif"
    text = tmp_path / "text.tif"
    text.write_text("no raster")
    chips = [
        chip_of(gone, (0, 0, 8, 8)),
        chip_of(scene, (40, 0, 16, 16)),  # it has only 48 rows now
        chip_of(text, (0, 0, 8, 8)),
        chip_of(scene, (0, 0, 16, 16)),
    ]
    found = read_pictures(chips)
    assert [picture.image is None for picture in found] == [True, True, True, False]
    assert "does not exist" in found[0].reason
    assert "48" in found[1].reason
    assert found[2].reason
    tiles: list[Tile] = []
    monkeypatch.setattr(
        search_files, "hit_sheet", lambda path, drawn, title: tiles.extend(drawn)
    )
    hits = [as_hit(chip, rank, 1 / rank) for rank, chip in enumerate(chips, 1)]
    asked = [(chips[3], True), (chips[0], False)]
    search_files.write_files(tmp_path / "out", hits, asked, lambda line: None)
    assert [tile.query for tile in tiles] == [True, True] + [False] * 4
    assert [tile.title.split("\n")[0].split()[0] for tile in tiles] == [
        "query", "not", "1", "2", "3", "4",
    ]  # fmt: skip
    assert tiles[2].reason == found[0].reason


def test_the_sheet_has_a_tile_and_a_bar_for_each_hit(tmp_path, monkeypatch):
    image = np.full((20, 20, 3), 100, np.uint8)
    tiles = [Tile("1   0.5\n森_0_0", image, "", (160.0, 160.0), query=True)]
    tiles += [Tile(f"{i}", None, "it is gone " * 20, (40.0, 40.0)) for i in range(70)]
    drawn = []
    monkeypatch.setattr(figure, "save", lambda fig, path: drawn.append(fig))
    hit_sheet(tmp_path / "sheet.png", tiles, "hits")
    (fig,) = drawn
    bars = [ax.get_xlabel() for ax in fig.axes if ax.get_xlabel()]
    assert bars == ["50 m"] + ["10 m"] * (figure.MOST - 1)
    assert "60 tiles of 71" in fig.get_suptitle()
    assert fig.axes[1].texts[0].get_text().startswith("it is gone")
    monkeypatch.undo()
    hit_sheet(tmp_path / "sheet.png", tiles[:2], "hits")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] > 300
