"""The benchmark of large rasters runs, and reads what it says."""

import json
import multiprocessing
import time

import numpy as np
import pytest

from tests.support.rasters import REASON

rasterio = pytest.importorskip("rasterio", reason=REASON)

from benchmarks import raster_pipeline  # noqa: E402 - it imports rasterio

SIDE = 1100


@pytest.fixture
def paths(monkeypatch, tmp_path):
    monkeypatch.setattr(raster_pipeline, "RENDERED", 60)
    monkeypatch.setattr(raster_pipeline, "REPEATED", 300)
    monkeypatch.setattr(raster_pipeline, "COUNTS", dict.fromkeys(COUNTS, 1))
    return raster_pipeline.write_rasters(tmp_path, SIDE)


COUNTS = raster_pipeline.COUNTS


def test_the_rasters_are_alike_except_for_their_blocks(paths):
    blocks, contents = [], []
    for path in paths.values():
        with rasterio.open(path) as raster:
            blocks.append(raster.block_shapes[0])
            contents.append(raster.read())
    assert blocks == [(512, 512), (1, SIDE)]
    np.testing.assert_array_equal(*contents)
    np.testing.assert_array_equal(contents[0][:, :300], contents[0][:, 600:900])
    assert contents[0].shape == (4, SIDE, SIDE)


def test_a_line_a_case_and_a_table(paths):
    found = raster_pipeline.measure_reading(paths, side=SIDE, rounds=2)
    cases = [json.loads(json.dumps(case)) for case in found]
    assert [case["layout"] for case in cases] == ["tiled", "striped"]
    for case in cases:
        assert min(case[name] for name in (*COUNTS, "ratio_opened")) > 0
    assert len(raster_pipeline.table(cases).splitlines()) == 2 + len(cases)
    assert {"date", "device", "gdal"} < raster_pipeline.machine().keys()


def test_the_peak_of_a_reader_is_seen():
    with raster_pipeline.peaks_of_readers() as peaks:
        process = multiprocessing.get_context("spawn").Process(
            target=time.sleep, args=(20,)
        )
        process.start()
        begin = time.monotonic()
        while process.pid not in peaks and time.monotonic() - begin < 15:
            time.sleep(0.1)
        process.kill()
        process.join()
    assert 1 < peaks[process.pid] < 1000  # MB
