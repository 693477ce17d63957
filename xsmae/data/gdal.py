"""Where rasters are opened: rasterio, GDAL's settings, and datasets kept open.

rasterio is imported when the first raster is opened, and only here; the rest of the
package runs without it.

A dataset cannot be pickled, does not survive a fork and serves one thread at a time.
So a raster is a name and facts (`raster.py`), and its dataset is borrowed from this
process for each reading: one that is idle, or one that is opened then.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from xsmae.errors import BadImageError, UserError, printable
from xsmae.process.log import LOG

if TYPE_CHECKING:
    import rasterio

MAX_IDLE = 32  # datasets that are kept open; each takes a file and some memory

# Threads within one dataset did not pay (0.84 times one thread). The cache is of each
# process. Damage that libjpeg would only warn of is an error.
_LOCAL = {
    "GDAL_CACHEMAX": 32 * 2**20,  # rasterio takes bytes, GDAL's own option megabytes
    "GDAL_NUM_THREADS": 1,
    "GDAL_ERROR_ON_LIBJPEG_WARNING": True,
}
_REMOTE_PREFIXES = (
    "/vsicurl", "/vsis3", "/vsigs", "/vsiaz", "/vsiadls", "/vsioss", "/vsiswift",
    "/vsiwebhdfs",
)  # fmt: skip
# No listing of the folder, hence neither .msk nor .ovr beside a remote raster; and no
# waiting without end. What GDAL has read is forgotten with the dataset: it may be the
# first half of an answer that was cut.
_REMOTE = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "VSI_CACHE": True,
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": True,
    "GDAL_HTTP_MAX_RETRY": 5,
    "GDAL_HTTP_RETRY_DELAY": 1,
    "GDAL_HTTP_CONNECTTIMEOUT": 10,
    "GDAL_HTTP_LOW_SPEED_TIME": 30,
    "GDAL_HTTP_LOW_SPEED_LIMIT": 1,
    "CPL_VSIL_CURL_NON_CACHED": ":".join(f"{name}/" for name in _REMOTE_PREFIXES),
}
# Seconds before a remote read is tried again. GDAL itself asks again after an answer
# such as 503, but not after one that was cut.
WAITS = (1.0, 4.0)
_TIFFS = (".tif", ".tiff")

_SUBDATASET = re.compile("[A-Z][A-Z0-9_]+:")  # such as NETCDF:file.nc:variable


class Name(NamedTuple):
    """Which dataset: GDAL's name, the overview (None: the raster), size and mtime."""

    path: str
    level: int | None = None
    stamp: tuple[int, int] | None = None


def import_rasterio() -> Any:
    """The module rasterio; UserError if it is not installed."""
    try:
        import rasterio
    except ImportError as error:
        # A wheel whose libraries do not load is an ImportError too.
        raise UserError(
            f"rasters need rasterio ({error}): pip install 'xsmae[geo]'"
        ) from None
    return rasterio


def dataset_name(path: str | os.PathLike) -> str:
    """What GDAL opens: the absolute path of a file, or a URL or /vsi... as it is."""
    text = os.fspath(path)
    if "://" in text or text.startswith("/vsi") or _SUBDATASET.match(text):
        return text
    return os.path.abspath(os.path.expanduser(text))


def is_file(name: str) -> bool:
    """True for a name of `dataset_name` that is a path on this machine."""
    return name.startswith("/") and not name.startswith("/vsi")


def is_remote(name: str) -> bool:
    """True for a dataset that is read through the network."""
    return "://" in name or any(prefix in name for prefix in _REMOTE_PREFIXES)


def stamp_of(name: str) -> tuple[int, int] | None:
    """Size in bytes and time of change in ns of a local file; None for others."""
    try:
        found = os.stat(name)
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns


def settings(name: str) -> dict[str, Any]:
    """GDAL's settings for a dataset, except those that the user has set.

    The user sets them as environment variables, or with a `rasterio.Env` around.
    """
    from rasterio import env

    wanted = dict(_LOCAL)
    if is_remote(name):
        wanted |= _REMOTE
        if name.lower().partition("?")[0].endswith(_TIFFS):
            # GDAL asks for no sidecars then.
            wanted["CPL_VSIL_CURL_ALLOWED_EXTENSIONS"] = ",".join(_TIFFS)
    around = env.getenv() if env.hasenv() else {}
    return {k: v for k, v in wanted.items() if k not in os.environ and k not in around}


@contextlib.contextmanager
def gdal(name: str) -> Iterator[dict[str, Any]]:
    """GDAL with our settings, which it yields; its errors are a BadImageError."""
    rasterio = import_rasterio()
    from rasterio._err import CPLE_BaseError  # GDAL's own, which rasterio lets escape

    try:
        ours = settings(name)
        with rasterio.Env(**ours):
            yield ours
    except (rasterio.errors.RasterioError, CPLE_BaseError, OSError) as error:
        raise BadImageError(
            f"{printable(name)}: cannot be read: {reason(error)}"
        ) from error


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[Any]:
    """rasterio, to write `path` with our settings; its errors are a UserError."""
    rasterio = import_rasterio()
    from rasterio._err import CPLE_BaseError

    where = os.fspath(path)
    try:
        with rasterio.Env(**settings(where)), warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            yield rasterio
    except (rasterio.errors.RasterioError, CPLE_BaseError, OSError) as error:
        raise UserError(
            f"{printable(where)}: cannot be written: {reason(error)}"
        ) from error


def reason(error: BaseException) -> str:
    """What GDAL said first, in one line: "Read failed" says nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return printable(text if len(text) <= 200 else text[:197] + "...")


_warnings = threading.Lock()


def open_dataset(name: Name) -> rasterio.DatasetReader:
    """Open a dataset within `gdal`; errors are rasterio's, whatever is in the file."""
    rasterio = import_rasterio()
    options = {} if name.level is None else {"overview_level": name.level}
    # Filters are of the whole process: one thread at a time.
    with _warnings, warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        try:
            return rasterio.open(name.path, **options)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            # Python's parsers, of text in a header.
            raise rasterio.errors.RasterioIOError(reason(error)) from error


class _Idle:
    """The datasets of one process that nobody reads, the last used ones last."""

    def __init__(self):
        self.pid = os.getpid()
        self.lock = threading.Lock()
        self.datasets: list[tuple[Name, rasterio.DatasetReader]] = []

    def take(self, name: Name) -> rasterio.DatasetReader | None:
        with self.lock:
            for place in reversed(range(len(self.datasets))):
                if self.datasets[place][0] == name:
                    return self.datasets.pop(place)[1]
        return None

    def give(self, name: Name, dataset: rasterio.DatasetReader) -> None:
        with self.lock:
            self.datasets.append((name, dataset))
            evicted = self.datasets[:-MAX_IDLE]
            del self.datasets[:-MAX_IDLE]
        for _, old in evicted:
            old.close()

    def close(self, path: str) -> None:
        with self.lock:
            closed = [d for n, d in self.datasets if n.path == path]
            self.datasets = [(n, d) for n, d in self.datasets if n.path != path]
        for dataset in closed:
            dataset.close()


_idle = _Idle()
_inherited: list[_Idle] = []  # of parents; closing one here could wait for its locks


def _idle_here() -> _Idle:
    global _idle
    if _idle.pid != os.getpid():
        _inherited.append(_idle)
        _idle = _Idle()
    return _idle


@contextlib.contextmanager
def borrowed(name: Name) -> Iterator[rasterio.DatasetReader]:
    """A dataset for this thread alone, within `gdal`; it is idle afterwards.

    After an error it is closed.
    """
    with gdal(name.path) as ours:
        dataset = _idle_here().take(name)
        if dataset is None:
            if name.stamp is not None and stamp_of(name.path) != name.stamp:
                raise BadImageError(
                    f"{printable(name.path)}: the file is not the one that was opened "
                    "(other size or time of change); open it again"
                )
            LOG.debug(f"GDAL opens {name.path}, level {name.level}, with {ours}")
            dataset = open_dataset(name)
        try:
            yield dataset
        except BaseException:
            dataset.close()
            raise
        _idle_here().give(name, dataset)


def retried(read: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a raster that is tried again where the network fails it."""

    @functools.wraps(read)
    def tried(raster, *args, **options):
        for wait in WAITS if is_remote(raster.path) else ():
            try:
                return read(raster, *args, **options)
            except BadImageError as error:
                if "HTTP" in str(error):  # GDAL has asked again itself
                    raise
                LOG.debug(f"{error}; tried again in {wait} s")
                close(raster.path)
                time.sleep(wait)
        return read(raster, *args, **options)

    return tried


def close(path: str) -> None:
    """Close the idle datasets of a path, in this process."""
    _idle_here().close(path)


def idle() -> list[Name]:
    """The datasets that are kept open, in this process."""
    here = _idle_here()
    with here.lock:
        return [name for name, _ in here.datasets]
