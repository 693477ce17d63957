"""Features on disk: computed once per batch, and checked when they are read."""

from __future__ import annotations

import functools
import hashlib
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from xsmae.data.records import Source, fingerprint
from xsmae.errors import OutsideTrainingWarning, UserError
from xsmae.evaluation.features import encode_batches
from xsmae.evaluation.scales import Scale
from xsmae.evaluation.subjects import FrozenEncoder
from xsmae.process.files import atomic_write
from xsmae.process.log import LOG

VERSION = 1  # raise it when the same encoder and images give different features
EVERY = 10.0  # seconds between progress lines
MAPPED = {"F16": "<f2", "F32": "<f4", "U8": "u1", "I64": "<i8"}  # names of the format


class Features:
    """The features of one part at one scale: usable images only, in source order.

    positions: [n], positions in the source. gsd: [n, 2] metres per pixel that the
    encoder got. pixels: [n, 16] digests of the images before resizing. computed: how
    many images were encoded now rather than read from the cache, in `seconds`.
    """

    def __init__(self, folder: Path, *, computed: int, seconds: float):
        self._files = sorted(folder.glob("[0-9]*.safetensors"))
        # Sort and remove duplicates. A replacement for a damaged file may follow later
        # images, and two processes that started together may have written the same.
        _, self._order = np.unique(self._joined("positions"), return_index=True)
        self.positions, self.gsd, self.pixels = (
            self.feature(name) for name in ("positions", "gsd", "pixels")
        )
        self.computed, self.seconds = computed, seconds

    def feature(self, name: str) -> np.ndarray:
        """[n, width] float32, read from disk. Only one is in memory at a time."""
        joined = self._joined(name)
        in_order = np.array_equal(self._order, np.arange(len(joined)))
        return joined if in_order else joined[self._order]

    def _joined(self, name: str) -> np.ndarray:
        shapes = [_shape(file, name) for file in self._files]
        rows = np.cumsum([0, *(shape[0] for shape in shapes)])
        joined = None
        for file, start, stop in zip(self._files, rows, rows[1:], strict=False):
            part = read(file, name)
            if joined is None:
                joined = np.empty((rows[-1], *part.shape[1:]), part.dtype)
            joined[start:stop] = part
        return joined


def _other_scales(extract: Callable[..., Features]) -> Callable[..., Features]:
    """Silence OutsideTrainingWarning: evaluations use other GSDs on purpose."""

    @functools.wraps(extract)
    def without_warning(*args, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OutsideTrainingWarning)
            return extract(*args, **options)

    return without_warning


@_other_scales
def cached_features(
    encoder: FrozenEncoder,
    source: Source,
    scale: Scale,
    *,
    cache: Path,
    batch_size: int = 64,
    title: str = "features",
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = LOG.info,
) -> Features:
    """The features of every image of `source` at `scale`, from the cache if there.

    The cache has one file per batch, in a folder named after the encoder's digest, the
    source's fingerprint, the sizes and the GSD, of rasters the bands, dtype and units,
    and the encoder's use. Files are written atomically, so an extraction that was
    stopped or killed resumes after its last batch. A damaged file is reported and
    computed again. `say` gets the progress lines, which begin with
    `title`. Raises KeyboardInterrupt between batches once `should_stop()` is true, and
    UserError if no image can be used or a feature is not finite.
    """
    gsd = f"gsd{scale.gsd_factor:.6g}" if encoder.reads_gsd else "nogsd"
    resized = f"of-{scale.resized}px-bicubic" if scale.resized else "area"
    key = f"v{VERSION}-{source.fingerprint}-{scale.size}px-{resized}-{gsd}"
    if source.dtype != "uint8":
        values = fingerprint(source.bands, (source.units,))
        key = f"{key}-{source.dtype}-{values[:8]}"
    folder = cache / encoder.digest / f"{key}{encoder.use}"
    create_folder(folder)
    missing = unknown(folder, len(source), say)
    begin = last = time.monotonic()
    computed = 0
    batches = encode_batches(
        encoder.encode,
        source,
        missing,
        size=scale.size,
        batch_size=batch_size,
        resized=scale.resized,
        gsd_factor=scale.gsd_factor,
        should_stop=should_stop,
    )
    # A batch without a usable image does not appear here. It has no file, so its images
    # are read again next time.
    for batch, encoded in batches:
        place = np.searchsorted(missing, batch.index[0]) // batch_size
        covered = missing[place * batch_size : (place + 1) * batch_size]
        for name, value in encoded.items():
            if not np.isfinite(value).all():
                where = source.id(int(batch.index[0]))
                raise UserError(
                    f"{encoder.name} gives {name} features that are not finite in the "
                    f"batch that begins with {where!r}: give another checkpoint"
                )
        write(
            folder / f"{covered[0]:09}.safetensors",
            {
                **{k: np.asarray(v, np.float32) for k, v in encoded.items()},
                "positions": batch.index.astype(np.int64),
                "covered": covered.astype(np.int64),
                "gsd": batch.gsd,
                "pixels": batch.pixels,
            },
        )
        computed += len(batch.index)
        now = time.monotonic()
        if now - last > EVERY:
            done = (
                len(source) - len(missing) + min((place + 1) * batch_size, len(missing))
            )
            rate = computed / (now - begin)
            say(f"{title}: {done}/{len(source)}, {rate:.0f} images/s")
            last = now
    seconds = time.monotonic() - begin
    if not any(folder.glob("[0-9]*.safetensors")):
        raise UserError(f"none of the images of {source!r} can be used")
    rate = f", {computed / seconds:.0f} images/s" if computed else " (cached)"
    say(f"{title}: {len(source)}/{len(source)}{rate}")
    return Features(folder, computed=computed, seconds=seconds)


def create_folder(folder: Path) -> None:
    """Create a folder of the cache. Raises UserError if it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to the cache {folder}: {error.strerror}; give another "
            "--cache"
        ) from None


def unknown(folder: Path, total: int, say: Callable[[str], None]) -> np.ndarray:
    """The positions without features, ascending. Removes damaged files.

    Each file has a tensor `covered`: the positions that need not be computed again.
    """
    done = np.zeros(total, bool)
    for file in sorted(folder.glob("[0-9]*.safetensors")):
        try:
            with safe_open(file, framework="np") as content:
                names = content.keys()
                tensors = {name: content.get_tensor(name) for name in names}
                written = (content.metadata() or {}).get("sha256")
        except (SafetensorError, OSError, ValueError):
            written, tensors = None, {}
        if written is None or written != _digest(tensors):
            say(f"{file} is damaged: computing its features again")
            file.unlink()
            continue
        done[tensors["covered"]] = True
    return np.flatnonzero(~done)


def _digest(tensors: dict[str, np.ndarray]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(array)
    return found.hexdigest()


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a file atomically, with a digest of its content."""
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    try:
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata={"sha256": _digest(tensors)})
    except OSError as error:
        raise UserError(
            f"cannot write to the cache {path.parent}: {error.strerror}; free space "
            "or give another --cache"
        ) from None


def _shape(file: Path, name: str) -> tuple[int, ...]:
    with safe_open(file, framework="np") as content:
        return tuple(content.get_slice(name).get_shape())


def read(file: Path, name: str) -> np.ndarray:
    """A tensor of a file, in memory."""
    with safe_open(file, framework="np") as content:
        return content.get_tensor(name)


def mapped(file: Path, name: str) -> np.ndarray:
    """A tensor of a file, on disk: what is not asked for is not read."""
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        entry = json.loads(content.read(length))[name]
    kind, shape, (begin, _) = (entry[n] for n in ("dtype", "shape", "data_offsets"))
    # Little-endian and contiguous, by the format.
    return np.memmap(
        file, MAPPED[kind], mode="r", offset=8 + length + begin, shape=tuple(shape)
    )
