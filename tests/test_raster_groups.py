"""Windows that are read together: the same bits, decoded once, in bounded memory."""

import json
import pickle
import threading
import time
from collections import Counter

import numpy as np
import pytest

from tests.support.rasters import REASON, land, write
from tests.test_pipeline import SAMPLER, NoiseSource, assert_same, batches, column
from xsmae import load_config
from xsmae.data import gdal, geotiff, raster_kept
from xsmae.data.geotiff_scene import shared_reads
from xsmae.data.geotiff_source import GeotiffSource
from xsmae.data.mix import Mix
from xsmae.data.order import GroupOrder
from xsmae.data.raster import open_raster
from xsmae.data.raster_kept import windows_here
from xsmae.errors import BadImageError, UserError
from xsmae.process.signals import StopRequest

rasterio = pytest.importorskip("rasterio", reason=REASON)

TILES = {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"}
STRIPS = {"blockysize": 1, "compress": "deflate"}
UINT16 = {"scales": (1e-4,) * 3, "offsets": (-0.1,) * 3}


def noise(height, width, dtype="uint16"):
    rng = np.random.default_rng(0)
    return rng.integers(1, 250, (3, height, width)).astype(dtype)


def with_gap(data, value):
    data[:, 20:90, 30:70] = value
    return data


def gap():
    mask = np.full((150, 200), 255, np.uint8)
    mask[20:90, 30:70] = 0
    return mask


def alpha():
    return np.concatenate([noise(150, 200, "uint8"), gap()[None]])


COLOURS = ("red", "green", "blue", "alpha")
KINDS = {
    "tiles": (noise(150, 200), {**TILES, **UINT16}),
    "bands": (noise(150, 200), {**TILES, **UINT16, "interleave": "band"}),
    "strips": (noise(150, 200), {**STRIPS, **UINT16}),
    "nodata": (with_gap(noise(150, 200), 0), {**TILES, **UINT16, "nodata": 0}),
    "floats": (with_gap(noise(150, 200, "float32"), np.nan), TILES),
    "wide": (noise(150, 200, "uint32"), {**STRIPS, **UINT16}),
    "mask": (noise(150, 200, "uint8"), {**TILES, "mask": gap()}),
    "beside": (noise(150, 200), {**TILES, **UINT16, "mask": gap(), "internal": False}),
    "alpha": (alpha(), {**STRIPS, "photometric": "rgb", "alpha": "yes"}),
    "overviews": (noise(150, 200), {**TILES, **UINT16, "overviews": (2, 4)}),
}


@pytest.fixture
def path(tmp_path):
    yield tmp_path / "a.tif"
    windows_here().forget(str(tmp_path / "a.tif"))
    gdal.close(str(tmp_path / "a.tif"))


def written(path, kind="tiles"):
    data, options = KINDS[kind]
    return write(path, data, **options)


def grouped(path, **options):
    return GeotiffSource(path, **{"window": 32, "min_valid": 0.0, **options})


def windows(source, index):
    """The window of a record, and those of its group."""
    with source.open(index) as record:
        return record.image.window, record.image.group


@pytest.fixture
def reads(monkeypatch):
    """A list that gets the group of every read."""
    found, read = [], raster_kept.read_group

    def counted(dataset, group, *rest):
        found.append(group)
        time.sleep(0.01)  # so that threads meet
        return read(dataset, group, *rest)

    monkeypatch.setattr(raster_kept, "read_group", counted)
    return found


# The same bits


@pytest.mark.parametrize("size", [None, 16, (5, 40)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_group_changes_no_bit(path, kind, size, monkeypatch):
    monkeypatch.setattr(raster_kept, "PIECE", 4096)  # of several pieces
    source = grouped(written(path, kind))
    assert source.groups is not None
    for index in range(len(source)):
        window, group = windows(source, index)
        with open_raster(path) as raster:  # which forgets all
            expected = raster.read(window, size)
        for found in (raster.read(window, size, group=group) for _ in range(2)):
            for one, other in zip(found, expected, strict=True):
                assert one.dtype == other.dtype
                np.testing.assert_array_equal(one, other)
    if kind not in ("tiles", "bands", "strips", "wide", "overviews"):
        assert 0 < np.mean([source[i].valid.mean() for i in range(len(source))]) < 1


def test_values_are_those_of_the_file(path):
    source = grouped(written(path, "strips"))
    whole = np.zeros((150, 200, 3), np.float32)
    for i in range(len(source)):
        (top, left, height, width), _ = windows(source, i)
        whole[top : top + height, left : left + width] = source[i].image
    expected = np.moveaxis(KINDS["strips"][0].astype(np.float32), 0, -1) / 10_000
    np.testing.assert_array_equal(whole, expected - np.float32(0.1))


def test_chosen_bands_and_windows_of_no_group_are_read_alone(path, reads):
    with open_raster(written(path)) as raster:
        group = [(0, 0, 32, 32), (0, 32, 32, 32)]
        band = raster.read(group[0], bands=raster.bands[1:2], group=group)[0]
        np.testing.assert_array_equal(band, raster.read(group[0])[0][..., 1:2])
        other = raster.read((5, 5, 8, 8), group=group)[0]
        np.testing.assert_array_equal(other, raster.read((5, 5, 8, 8))[0])
    assert reads == []


def test_a_damaged_block_spoils_no_more_windows_than_without_groups(path):
    def usable(source, index):
        try:
            return source[index].image.tobytes()
        except BadImageError:
            return None

    written(path)
    content = bytearray(path.read_bytes())
    with rasterio.open(path) as raster:
        # GDAL tells where the bytes of a block are.
        offset = int(raster.get_tag_item("BLOCK_OFFSET_1_1", "TIFF", bidx=1))
    content[offset : offset + 16] = b"\xff" * 16
    path.write_bytes(content)
    # Windows of 24 px reach over the edges of blocks of 64.
    source, alone = (grouped(path, window=24, crops_per_read=n) for n in (8, 1))
    assert source.groups is not None
    found = [usable(source, i) for i in range(len(source))]
    assert found == [usable(alone, i) for i in range(len(alone))]
    assert found.count(None) == 16


# Once, in bounded memory


def test_a_group_is_read_once(path, reads):
    source = grouped(written(path))
    order = np.argsort(source.groups, kind="stable")
    for index in order:
        source[index]
    assert len(reads) == source.groups.max() + 1 == 9
    assert sum(map(len, reads)) == len(source)


def test_threads_that_want_a_group_read_it_once(path, reads):
    source = grouped(written(path))
    first = np.flatnonzero(source.groups == source.groups[0])
    expected = [source[i].image for i in first]
    windows_here().forget(str(path))
    reads.clear()
    found = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: source[i].image}))
        for i in first
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1
    for index, image in zip(first, expected, strict=True):
        np.testing.assert_array_equal(found[index], image)


def test_few_bytes_are_kept_the_last_used_ones(path, monkeypatch):
    source = grouped(written(path))
    kept = 32 * 32 * 3 * 2
    monkeypatch.setattr(raster_kept, "MAX_BYTES", 6 * kept)
    here = windows_here()
    for index in np.argsort(source.groups, kind="stable"):
        _, group = windows(source, index)
        source[index]
        assert here.nbytes <= 6 * kept
        assert here.nbytes == sum(k.nbytes for k in here.windows.values())
        newest = [key.box for key in here.windows][-len(group) :]
        assert set(newest) == set(group)
    assert len(here.windows) >= 4


def test_a_group_that_is_too_large_to_keep_is_read_alone(path, monkeypatch, reads):
    source = grouped(written(path))
    expected = source[0].image
    windows_here().forget(str(path))
    monkeypatch.setattr(raster_kept, "LARGEST", 4 * 32 * 32 * 3 * 2 - 1)
    np.testing.assert_array_equal(source[0].image, expected)
    assert len(reads) == 1  # the first
    assert windows_here().nbytes == 0


def test_closing_forgets_and_a_changed_file_is_not_mixed_up(path):
    written(path)
    window, group = windows(grouped(path), 0)
    with open_raster(path) as raster:
        raster.read(window, group=group)
        assert windows_here().nbytes > 0
        before = raster
    assert windows_here().nbytes == 0
    raster.read(window, group=group)
    write(path, KINDS["tiles"][0] + np.uint16(1), **KINDS["tiles"][1], tags=None)
    with open_raster(path) as raster:
        assert raster.stamp != before.stamp
        found = raster.read(window, group=group)[0]
        np.testing.assert_array_equal(found, raster.read(window)[0])


def test_gdal_keeps_blocks_between_two_reads(path, monkeypatch):
    monkeypatch.delenv("GDAL_CACHEMAX", raising=False)
    from rasterio._env import get_gdal_config

    written(path)
    with gdal.gdal(str(path)):
        assert get_gdal_config("GDAL_CACHEMAX") == 32 * 2**20  # bytes


# Which windows are a group


def cells(rows, columns, side=256):
    return [
        (side * i, side * j, side, side) for i in range(rows) for j in range(columns)
    ]


@pytest.mark.parametrize(
    ("boxes", "block", "most", "expected"),
    [
        (cells(2, 4), (512, 512), 8, [[0, 1, 4, 5], [2, 3, 6, 7]]),
        (cells(2, 4), (512, 512), 2, [[0, 4], [1, 5], [2, 6], [3, 7]]),
        (cells(2, 4), (256, 256), 8, [[i] for i in range(8)]),
        (cells(2, 4), (64, 64), 8, [[i] for i in range(8)]),
        (cells(2, 4), (1, 1024), 8, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        # Far apart, and groups of nearly the same size.
        (cells(1, 9), (16, 2304), 4, [[0, 3, 6], [1, 4, 7], [2, 5, 8]]),
        (cells(4, 4), (1024, 1024), 8, [list(range(0, 16, 2)), list(range(1, 16, 2))]),
        (cells(1, 3), (512, 512), 1, [[0], [1], [2]]),
    ],
)
def test_windows_of_the_same_blocks_share_a_read(boxes, block, most, expected):
    assert shared_reads(boxes, block, most) == expected


def test_groups_of_a_source(path):
    source = grouped(written(path), crops_per_read=4)
    sizes = np.bincount(source.groups)
    assert (sizes.sum(), sizes.max()) == (len(source), 4)
    for index in range(len(source)):
        window, group = windows(source, index)
        same = np.flatnonzero(source.groups == source.groups[index])
        assert window in group
        assert list(group) == [windows(source, i)[0] for i in same]
    assert grouped(path, crops_per_read=1).groups is None
    assert grouped(path, window=64).groups is None  # of whole blocks
    with pytest.raises(UserError, match=r"crops_per_read=0.*1 or more"):
        grouped(path, crops_per_read=0)


def test_files_of_one_window_have_no_groups(tmp_path):
    for i in range(3):
        write(tmp_path / f"{i}.tif", land(48, 40))
    assert GeotiffSource(tmp_path).groups is None


# The order


class Grouped(NoiseSource):
    """Images of noise in groups of 3, and a rest."""

    @property
    def groups(self):
        return np.arange(self.size) * 7 % self.size // 3


def test_an_epoch_has_every_image_once_and_its_groups_together():
    source = Grouped(200)
    order = GroupOrder(source.groups, seed=3)
    epochs = [[order(200 * epoch + i) for i in range(200)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(200))
        groups = source.groups[epoch]
        assert np.count_nonzero(np.diff(groups)) == groups.max()
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = GroupOrder(source.groups, seed=3)
    assert [again(i) for i in range(599, 399, -1)] == epochs[2][::-1]
    assert [pickle.loads(pickle.dumps(order))(i) for i in range(200)] == epochs[0]
    other = GroupOrder(source.groups, seed=4)
    assert [other(i) for i in range(200)] != epochs[0]


def test_groups_are_nearly_anywhere():
    order = GroupOrder(np.arange(300) // 3, seed=0)
    firsts = [order(300 * epoch) // 3 for epoch in range(200)]
    assert np.bincount(firsts, minlength=100).max() < 9
    assert 40 < np.mean(firsts) < 60


def test_images_without_groups_keep_their_order():
    found = column(batches(num_steps=5), "requested")
    first, second = [4, 6, 9, 7, 5, 3, 1, 8, 2, 0], [8, 1, 3, 7, 9, 0, 5, 4, 2, 6]
    assert list(found) == first + second  # grain's shuffle, before there were groups


@pytest.mark.parametrize("threads", [0, 4])
def test_threads_and_resuming_change_nothing(threads):
    source = Grouped(10)
    whole = batches(source)
    assert_same(batches(source, num_threads=threads, start_step=2), whole[2:])
    assert sorted(column(whole, "requested")[:10]) == list(range(10))


def test_parts_of_the_processes_put_together_are_the_batch():
    source = Grouped(10)
    parts = [batches(source, process_index=i, process_count=2) for i in range(2)]
    for whole, *halves in zip(batches(source), *parts, strict=True):
        for name in whole:
            joined = np.concatenate([half[name] for half in halves])
            np.testing.assert_array_equal(joined, whole[name], err_msg=name)


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(path, workers):
    source = grouped(written(path))
    source[0]  # windows are kept here, and a dataset is open
    expected = batches(source)
    found = batches(source, num_workers=workers, prefetch=1, start_step=1)
    assert_same(found, expected[1:])
    alone = grouped(path, crops_per_read=1)
    for batch in found:
        for index in batch["index"]:
            np.testing.assert_array_equal(source[index].image, alone[index].image)


def test_views_of_a_grouped_raster_are_those_of_the_raster_alone(path):
    source, alone = grouped(written(path)), grouped(path, crops_per_read=1)
    for index in range(0, len(source), 5):
        views = []
        for one in (source, alone):
            rngs = {"rng": np.random.default_rng(index), "batch_rng": None}
            with one.open(index) as record:
                views.append(SAMPLER(record.image, record.gsd, **rngs))
        assert_same(views[:1], views[1:])


# Stopping while rasters are looked at


def test_a_signal_stops_the_index_and_what_was_found_is_kept(tmp_path, monkeypatch):
    root, cache = tmp_path / "scenes", tmp_path / "index.json"
    root.mkdir()
    for i in range(3):
        write(root / f"{i}.tif", land(48, 40))
    look = geotiff.look
    with StopRequest() as request:

        def last(*arguments):
            request.signal = 2
            return look(*arguments)

        monkeypatch.setattr(geotiff, "look", last)
        with pytest.raises(KeyboardInterrupt):
            GeotiffSource(root, cache=cache)
    assert list(json.loads(cache.read_text())["rows"]) == ["0.tif"]
    monkeypatch.undo()
    assert len(GeotiffSource(root, cache=cache)) == 3


def test_the_config_has_the_field():
    assert load_config("geotiff").data.crops_per_read == 8


def test_a_mix_has_the_groups_of_its_parts(tmp_path):
    """Windows of a repetition stay together, apart from those of the others."""
    for name, size in (("a", (128, 128)), ("b", (64, 64))):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "0.tif", noise(*size), **TILES, **UINT16)
    parts = {
        name: GeotiffSource(tmp_path / name, window=32, gsd=1.0) for name in ("a", "b")
    }
    mix = Mix(parts, weights=[1, 1])
    assert (len(parts["a"]), len(parts["b"]), len(mix)) == (16, 4, 32)
    groups = mix.groups
    assert sorted(set(groups)) == list(range(groups.max() + 1))
    for group in range(groups.max() + 1):
        ids = [mix.id(i) for i in np.flatnonzero(groups == group)]
        assert len(ids) == 4 == len(set(ids))
        assert len({name[0] for name in ids}) == 1
    found = batches(mix, num_steps=8)
    assert Counter(column(found, "index").tolist()) == Counter(range(32))
    together = groups[column(found, "index")].reshape(8, 4)
    assert (together == together[:, :1]).all()
    alone = {
        name: GeotiffSource(tmp_path / name, window=64, gsd=1.0) for name in ("a", "b")
    }
    assert Mix(alone, weights=[1, 1]).groups is None
