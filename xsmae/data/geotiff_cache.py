"""What an index of windows knows of each raster, kept in one file.

A row counts as long as the raster's files are those that it was made from: their sizes
and times of change, those of masks and overviews beside it, and its first bytes. A
raster on the network has no time of change: it is opened, and its header compared.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from xsmae.data import gdal
from xsmae.data.geotiff_listing import BESIDE, Entry
from xsmae.data.raster import Raster
from xsmae.errors import UserError
from xsmae.process.files import atomic_write
from xsmae.process.log import LOG

VERSION = 2  # raise it whenever the same rasters and settings give another row
_HEAD = 4096  # bytes: a GeoTIFF's header, where it is written for the cloud

Row = dict[str, Any]


class IndexCache:
    """The rows by their rasters' ids; with no path they are kept in memory alone."""

    def __init__(self, path: Path | None, settings: dict[str, Any]):
        self._path = path
        self._settings = json.dumps(settings, sort_keys=True)
        self._rows: dict[str, Row] = {}
        if path is not None and path.exists():
            self._rows = self._load(path)

    def _load(self, path: Path) -> dict[str, Row]:
        try:
            content = json.loads(path.read_text())
            rows, written = content["rows"], content["sha256"]
            known = content["version"], content["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            rows, written, known = None, None, None
        if rows is None or _digest(rows) != written:
            LOG.warning(f"{path} is damaged: the rasters are looked at again")
            return {}
        if known != (VERSION, self._settings):
            LOG.info(f"{path} was made with other settings: it is made anew")
            return {}
        return rows

    def find(self, entry: Entry, made_of: str) -> Row | None:
        """The row of a raster, if it was made of the same files."""
        row = self._rows.get(entry.id)
        return row if row is not None and row["made_of"] == made_of else None

    def put(self, entry: Entry, row: Row) -> None:
        """Remember a row."""
        self._rows[entry.id] = row

    def files_of(self, entry: Entry) -> tuple[str, ...]:
        """The files that the raster had when its row was made, besides itself."""
        return tuple(self._rows.get(entry.id, {}).get("files", ()))

    def save(self) -> None:
        """Write the file whole or not at all."""
        if self._path is None:
            return
        content = {
            "version": VERSION,
            "settings": self._settings,
            "sha256": _digest(self._rows),
            "rows": self._rows,
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self._path) as temporary:
                temporary.write_text(json.dumps(content))
        except OSError as error:
            raise UserError(
                f"cannot write the index {self._path}: {error.strerror}; free space or "
                "give another cache"
            ) from None


def made_of(entry: Entry, files: tuple[str, ...]) -> str:
    """A digest of a local raster's files, and of what a table says of it."""
    beside = [entry.path + suffix for suffix in BESIDE]
    stamps = [
        (name, gdal.stamp_of(name)) for name in sorted({entry.path, *files, *beside})
    ]
    try:
        with open(entry.path, "rb") as file:
            head = hashlib.sha256(file.read(_HEAD)).hexdigest()
    except OSError:
        head = None
    # Names relative to the raster, so that a folder can be moved.
    folder = os.path.dirname(entry.path)
    stamps = [(os.path.relpath(name, folder), stamp) for name, stamp in stamps]
    return _digest([stamps, head, entry.gsd, entry.bands])


def made_of_header(entry: Entry, raster: Raster) -> str:
    """A digest of an opened raster's header, and of what a table says of it."""
    header = [raster.shape, raster.dtype, raster.crs, list(raster.transform)[:6]]
    header += [raster.bands, raster.nodata, raster.block_shape]
    return _digest([header, entry.gsd, entry.bands])


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
