"""The validators of the formats of scenes read our files. `make test-peers` runs this.

gpio for GeoParquet, rio-cogeo for Cloud-Optimized GeoTIFF, and pystac for STAC items,
all offline. Items are checked by the schemas of STAC 1.1.0 and GeoJSON, which pystac
brings. The schemas of the extensions, `proj:` and `emb:`, are on the web: they are not
checked. DuckDB and GeoPandas read tables in tests/test_chip_table.py.
"""

import copy
import json
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from pystac.errors import STACValidationError
from pystac.validation import validate_dict
from rio_cogeo.cogeo import cog_validate

from tests.support.encoders import make_encoder
from tests.support.rasters import north_up
from tests.support.scenes import call, make_scene
from tests.test_maps import make_head, predict
from xsmae.scenes import chip_table

GPIO = os.environ.get("GPIO") or shutil.which("gpio")
ROTATED = (8.0, 3.0, 500_000.0, 3.0, -8.0, 5_000_000.0)
SCENES = {
    "large": {"height": 900, "width": 700},
    "rotated": {"height": 200, "width": 160, "transform": ROTATED},
    # Across the antimeridian.
    "far": {
        "height": 64, "width": 96, "crs": "EPSG:4326",
        "transform": north_up(179.5, -16, 0.01),
    },
}  # fmt: skip
NAMES = pytest.mark.parametrize("name", SCENES)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    return make_encoder(folder, depth=1, position="gsd", reference_gsd=10.0)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    return {
        name: make_scene(folder / f"{name}.tif", **options)
        for name, options in SCENES.items()
    }


@pytest.fixture(scope="module")
def tables(tmp_path_factory, encoder, scenes):
    out = tmp_path_factory.mktemp("tables")
    words = [f"--encoder={encoder}", f"--out={out}", "--chip_size=16"]
    assert call(scenes["large"], scenes["rotated"], *words) == 0
    interval = "--datetime=2020-06-01/2020-08-31"
    assert call(scenes["far"], *words, "--dtype=int8", interval) == 0
    return out


@pytest.fixture(scope="module")
def grids(tmp_path_factory, encoder, scenes):
    out = tmp_path_factory.mktemp("grids")
    words = [f"--encoder={encoder}", f"--out={out}", "--chip_size=16", "--unit=token"]
    assert call(scenes["large"], *words) == 0
    assert call(scenes["rotated"], *words, "--dtype=int8") == 0
    return out


def gpio(*words, status=0):
    """What gpio prints; it must end with a status."""
    # DuckDB finds its extensions there.
    home = {"HOME": str(Path(GPIO).absolute().parents[1])}
    done = subprocess.run(
        [GPIO, "check", *map(str, words)],
        env=os.environ | home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


@pytest.mark.skipif(GPIO is None, reason="gpio is not installed: make test-peers")
@NAMES
def test_gpio_finds_no_fault_in_a_table(tables, name):
    said = gpio("all", tables / f"{name}.parquet")
    assert "Version 1.1.0" in said
    assert "proper metadata covering" in said
    assert "ZSTD compression on geometry column" in said
    assert re.search(r"✓ [1-9]\d* checks passed", said)
    assert "✗" not in said


@pytest.mark.skipif(GPIO is None, reason="gpio is not installed: make test-peers")
def test_gpio_finds_row_groups_in_order(tmp_path, encoder, scenes, monkeypatch):
    monkeypatch.setattr(chip_table, "GROUP_BYTES", 2**16)
    words = [f"--encoder={encoder}", f"--out={tmp_path}/out", "--chip_size=16"]
    assert call(scenes["large"], *words) == 0
    path = tmp_path / "out" / "large.parquet"
    assert pyarrow.parquet.read_metadata(path).num_row_groups > 10
    assert "✓ Data appears to be spatially ordered" in gpio("spatial", path)
    # The same rows in any order.
    table = pyarrow.parquet.read_table(path)
    mixed = table.take(np.random.default_rng(0).permutation(len(table)))
    pyarrow.parquet.write_table(mixed, path, row_group_size=180)
    assert "✓ Data appears to be spatially ordered" not in gpio(
        "spatial", path, status=1
    )


@pytest.mark.parametrize("name", ["large", "rotated"])
def test_grids_of_tokens_are_cloud_optimized(grids, name):
    assert cog_validate(grids / f"{name}.tif", strict=True) == (True, [], [])


def test_maps_are_cloud_optimized(tmp_path, scenes):
    head = make_head(tmp_path / "head")
    out = tmp_path / "out"
    words = [f"--head={head}", f"--out={out}", "--probabilities"]
    assert predict(scenes["large"], *words) == 0
    for kind in ("classes", "probabilities"):
        path = out / f"large_{kind}.tif"
        assert cog_validate(path, strict=True) == (True, [], [])


@pytest.mark.parametrize(
    ("made", "name"),
    [*(("tables", name) for name in SCENES), ("grids", "large"), ("grids", "rotated")],
)
def test_items_are_valid(request, monkeypatch, made, name):
    def refused(*args):
        raise AssertionError("the validator asks the web")

    monkeypatch.setattr(socket.socket, "connect", refused)
    path = request.getfixturevalue(made) / f"{name}.json"
    item = json.loads(path.read_text())
    (schema,) = validate_dict(item, extensions=[])
    assert schema.endswith("v1.1.0/item-spec/json-schema/item.json")
    # The schemas refuse an item without a time.
    wrong = copy.deepcopy(item)
    wrong["properties"] |= {"datetime": None}
    wrong["properties"].pop("end_datetime", None)
    with pytest.raises(STACValidationError):
        validate_dict(wrong, extensions=[])
