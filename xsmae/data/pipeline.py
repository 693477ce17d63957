"""Turns a source into batches: the grain graph and the limit on bad images."""

from __future__ import annotations

import dataclasses
import gc
import math
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np
from absl import flags

from xsmae.data.order import shuffled
from xsmae.data.records import Source
from xsmae.data.views import ViewSampler
from xsmae.errors import BadImageError, UserError

DRAWS = 20  # of views with enough valid pixels, before an image counts as bad
SHOWN = 20  # most bad images to name when a run stops


def allowed_rejections(num_images: int, max_fraction: float) -> int:
    """How many bad images a run tolerates, at most all images except one.

    A fraction above 0 allows at least one bad image, so that a single file does not
    stop a run on a small data set. 0 allows none.
    """
    allowed = math.floor(max_fraction * num_images + 1e-6)  # 0.29 * 100 < 29
    if max_fraction > 0:
        allowed = max(allowed, 1)
    return min(allowed, num_images - 1)


def draws_of(
    seed: int, position: int, *, batch_size: int
) -> dict[str, np.random.Generator]:
    """The two random generators of `ViewSampler` for one position of a run."""
    # The stream numbers 0 and 1 keep the two kinds of draws apart.
    return {
        "rng": np.random.default_rng((seed, 0, position)),
        "batch_rng": np.random.default_rng((seed, 1, position // batch_size)),
    }


@dataclasses.dataclass(frozen=True)
class LoadViews:
    """Reads the image of a position in the run and draws its views.

    The draws depend only on (seed, position). The next good image of the source
    replaces a bad one. After `max_tries` bad images in a row, the sample is blank and
    its `index` is -1. `RejectedImages.check` turns that into an error.

    min_valid: the smallest valid part of every view of a raster. Views with less are
    drawn again; an image that has none is bad.
    """

    source: Source
    sampler: ViewSampler
    seed: int
    batch_size: int
    max_tries: int
    min_valid: float = 0.0

    def __call__(self, position: int, index: int) -> dict[str, np.ndarray]:
        sample = None
        used = -1
        for candidate in range(index, index + self.max_tries):
            try:
                sample = self._views(candidate % len(self.source), position)
            except BadImageError:
                continue
            used = candidate % len(self.source)
            break
        if sample is None:
            views, size = self.sampler.num_views, self.sampler.size
            shape = (views, size, size, len(self.source.bands))
            sample = {
                "image": np.zeros(shape, self.source.dtype),
                "box": np.zeros((views, 4), np.float32),
                "gsd": np.ones((views, 2), np.float32),
                "flip": np.zeros(2, bool),
            }
            if self.source.dtype != "uint8":
                sample["valid"] = np.zeros(shape[:3], bool)
        sample["index"] = np.int64(used)
        sample["requested"] = np.int64(index)
        return sample

    def _views(self, index: int, position: int) -> dict[str, np.ndarray]:
        draws = draws_of(self.seed, position, batch_size=self.batch_size)
        step = position // self.batch_size
        with self.source.open(index) as record:
            for _ in range(DRAWS):
                sample = self.sampler(record.image, record.gsd, step=step, **draws)
                if "valid" not in sample:
                    return sample
                if sample["valid"].mean(axis=(1, 2)).min() >= self.min_valid:
                    return sample
                # The whole batch has one box 2, in every draw.
                again = draws_of(self.seed, position, batch_size=self.batch_size)
                draws["batch_rng"] = again["batch_rng"]
        raise BadImageError(
            f"no view in {DRAWS} draws has {self.min_valid:.0%} valid pixels"
        )


def make_batches(
    source: Source,
    sampler: ViewSampler,
    *,
    seed: int,
    batch_size: int,
    start_step: int,
    num_steps: int,
    max_rejected_fraction: float,
    min_valid: float = 0.0,
    num_workers: int = 0,
    num_threads: int = 4,
    prefetch: int = 4,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batches of steps `start_step` to `num_steps` of a run.

    Every epoch shuffles the images again; those of a group stay together (`order`). A
    batch may span two epochs. The images and crops of a step depend only on `seed` and
    the step, not on the workers, the threads, the number of processes or where the run
    was resumed. Every process gets an equal part of each global batch; together the
    parts are the batch of a single process. Raises UserError if the source has fewer
    images than a batch.
    """
    check_batch_size(source, batch_size)
    if batch_size % process_count:
        raise UserError(
            f"batch_size={batch_size}, expected a multiple of the {process_count} "
            "processes: change --config.batch_size"
        )
    load = LoadViews(
        source,
        sampler,
        seed,
        batch_size,
        max_tries=allowed_rejections(len(source), max_rejected_fraction) + 1,
        min_valid=min_valid,
    )
    epochs = math.ceil(num_steps * batch_size / len(source))
    local = batch_size // process_count
    dataset = (
        shuffled(source, seed=seed, epochs=max(epochs, 1))
        .map_with_index(load)
        # Local batch number step * process_count + process is one process's part of the
        # global batch, so a slice of the local batches is this process's share.
        .batch(local, drop_remainder=True)[process_index::process_count]
    )
    dataset = dataset[start_step:num_steps]
    iterator = dataset.to_iter_dataset(
        grain.ReadOptions(
            num_threads=0 if num_workers else num_threads,
            prefetch_buffer_size=prefetch,
        )
    )
    if num_workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain passes the flags to its workers
        iterator = iterator.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=num_workers, per_worker_buffer_size=prefetch
            ),
            worker_init_fn=_leave_interrupts_to_the_parent,
        )
        return _owned(iter(iterator))
    return iter(iterator)


def _owned(iterator: grain.DatasetIterator) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batches of worker processes and frees their shared memory.

    Grain removes the shared memory of a batch when its arrays are deleted. At the end
    of a run, a device buffer or a reference cycle may still hold the last arrays, and
    Python reports a leak at exit. So this function unlinks the names of yielded
    segments at once; the memory stays valid for its users. Prefetched batches are in a
    reference cycle (the traceback of a StopIteration), so it is collected at the end.
    """
    try:
        for batch in iterator:
            for array in batch.values():
                segment = getattr(array, "shm", None)
                if segment is not None:
                    segment.unlink()
                    array._unlink_on_del = False  # grain has no public way to set it
            yield batch
    finally:
        iterator.close()
        gc.collect()


def check_batch_size(source: Source, batch_size: int) -> None:
    """Raises UserError if the source has fewer images than a batch."""
    if len(source) < batch_size:
        raise UserError(
            f"{source!r} has {len(source)} images, expected at least one batch of "
            f"{batch_size}: add images or lower --config.batch_size"
        )


def check_bands(source: Source, config: Mapping[str, Any]) -> None:
    """Raises UserError unless the config describes the source's images.

    Its `bands` must be the source's, in order, and its `dtype` (uint8 if it has none)
    and `units` the source's too, and `figures.colours` three of its bands. What is
    None has not been chosen yet.
    """
    dtype, units = config.get("dtype", "uint8"), config.get("units")
    if dtype is not None and dtype != source.dtype:
        raise UserError(
            f"the config is for {dtype} images, but {source!r} has {source.dtype}: use "
            "a config of its kind, geotiff for rasters and folder for 8-bit images"
        )
    if units is not None and units != source.units:
        raise UserError(
            f"units={units!r}, but {source!r} has {source.units!r}: give the sensor, "
            "scale and offset that mean and std were measured with"
        )
    bands = config.get("bands")
    if bands is not None and tuple(bands) != source.bands:
        unknown = [band for band in bands if band not in source.bands]
        raise UserError(
            f"bands={', '.join(bands)}, but {source!r} has {', '.join(source.bands)}"
            + (f" and no {', '.join(unknown)}" if unknown else "")
            + ": name all bands of the source in its order with "
            f'--config.bands="{source.bands}", and give mean and std in that order'
        )
    colours = config.get("figures", {}).get("colours")
    if colours is None:
        return
    if source.dtype == "uint8":
        raise UserError(
            f"figures.colours={', '.join(colours)} is for rasters, 8-bit images are "
            "shown as they are: leave it out"
        )
    if len(colours) != 3 or not set(colours) <= set(source.bands):
        raise UserError(
            f"figures.colours={', '.join(colours)}, expected three of "
            f"{', '.join(source.bands)}"
        )


def _leave_interrupts_to_the_parent(worker_index: int, worker_count: int) -> None:
    """Ignores Ctrl-C, which reaches every process of a terminal; the parent decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
