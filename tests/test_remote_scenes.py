"""Scenes behind HTTP: the same vectors as from a file, with faults of the server."""

import http.server
import json
import re
import threading
import time

import numpy as np
import pytest

import xsmae
from tests.support.encoders import make_encoder
from tests.support.rasters import REASON, north_up
from tests.support.scenes import call, make_scene
from xsmae.data import gdal
from xsmae.data.raster import open_raster
from xsmae.errors import BadImageError

rasterio = pytest.importorskip("rasterio", reason=REASON)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("encoder"), depth=1)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    place = {"crs": "EPSG:32633", "transform": north_up(500_000, 5_000_000, 10)}
    tiles = {"tiled": True, "blockxsize": 64, "blockysize": 64}
    folder = tmp_path_factory.mktemp("scenes")
    return make_scene(folder / "scene.tif", 300, 200, **place, **tiles)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short waits between tries."""
    monkeypatch.setattr(gdal, "WAITS", (0.05, 0.05))
    monkeypatch.setitem(gdal._REMOTE, "GDAL_HTTP_RETRY_DELAY", 0.05)


class Server:
    """Serves one file in ranges; faults[n] is what happens to the GET of number n.

    asked: method, path and range of each request. happened: the faults.
    """

    def __init__(self, content, faults=()):
        self.content, self.faults = content, dict(faults)
        self.asked, self.happened = [], []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                server.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        self._listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._listening.daemon_threads = True
        self._thread = threading.Thread(target=self._listening.serve_forever)
        self.url = f"http://127.0.0.1:{self._listening.server_port}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._listening.shutdown()
        self._listening.server_close()
        self._thread.join()

    def answer(self, request):
        told = request.headers.get("Range")
        number = sum(command == "GET" for command, _, _ in self.asked)
        self.asked.append((request.command, request.path, told))
        fault = self.faults.get("always")
        if request.command == "GET" and number in self.faults:
            fault = self.faults[number]
            self.happened.append(number)
        if fault == "busy":
            request.send_error(503)
            return
        if fault == "slow":
            time.sleep(0.5)
        body, status = self.content, 200
        if told:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", told).groups()
            last = min(int(last or len(body)), len(body) - 1)
            body, status = body[int(first) : last + 1], 206
        request.send_response(status)
        request.send_header("Accept-Ranges", "bytes")
        request.send_header("Content-Length", str(len(body)))
        if told:
            where = f"bytes {first}-{last}/{len(self.content)}"
            request.send_header("Content-Range", where)
        request.end_headers()
        if request.command == "HEAD":
            return
        if fault == "cut":
            body = body[: len(body) // 2]
            request.close_connection = True
        request.wfile.write(body)


@pytest.mark.parametrize(
    "faults",
    [
        {},
        {0: "busy", 1: "busy", 3: "busy"},
        {0: "cut"},
        {1: "cut", 3: "cut"},
        {0: "slow", 1: "slow"},
    ],
    ids=["none", "busy", "cut_header", "cut", "slow"],
)
def test_a_url_gives_the_vectors_of_the_file(encoder, scene, faults, request):
    expected = xsmae.embed(encoder, scene, chip_size=16)
    with Server(scene.read_bytes(), faults) as server:
        url = f"/vsicurl/{server.url}/{request.node.callspec.id}.tif"
        found = xsmae.embed(encoder, url, chip_size=16)
    np.testing.assert_array_equal(found.vectors, expected.vectors)
    assert server.happened == list(faults)


def test_a_server_that_fails_for_good(tmp_path, encoder, scene, monkeypatch, capsys):
    monkeypatch.setitem(gdal._REMOTE, "GDAL_HTTP_MAX_RETRY", 2)
    with Server(scene.read_bytes(), {"always": "busy"}) as server:
        url = f"/vsicurl/{server.url}/busy.tif"
        words = [url, scene, f"--encoder={encoder}", f"--out={tmp_path}"]
        assert call(*words, "--chip_size=16") == 3
    said = capsys.readouterr().out.splitlines()
    failed = [line for line in said if line.startswith(f"failed: {url}: ")]
    assert len(failed) == 1
    assert "503" in failed[0]
    listed = json.loads((tmp_path / "manifest.json").read_text())
    assert listed["failed"].keys() == {"busy"}
    assert listed["scenes"].keys() == {"scene"}
    assert 2 < len(server.asked) <= 12


def test_answers_that_are_always_cut(encoder, scene):
    """No vector comes from the half of an answer."""
    cut = dict.fromkeys(range(1, 200), "cut")
    with (
        Server(scene.read_bytes(), cut) as server,
        pytest.raises(BadImageError) as caught,
    ):
        xsmae.embed(encoder, f"/vsicurl/{server.url}/cut.tif", chip_size=16)
    assert "\n" not in str(caught.value)


def test_few_requests(scene):
    """Opening takes the header, and a window the blocks that it needs."""
    with (
        Server(scene.read_bytes()) as server,
        open_raster(f"/vsicurl/{server.url}/few.tif") as raster,
    ):
        opened = len(server.asked)
        raster.read((0, 0, 64, 200))
    assert {path for _, path, _ in server.asked} == {"/few.tif"}  # no sidecars
    assert opened <= 3
    assert len(server.asked) - opened <= 2  # four blocks, side by side


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("GDAL_HTTP_MAX_RETRY", "0")
    found = gdal.settings("/vsis3/bucket/a.tif")
    assert "GDAL_HTTP_MAX_RETRY" not in found
    assert found["CPL_VSIL_CURL_NON_CACHED"].startswith("/vsicurl/:/vsis3/:")
