"""Turns a source into batches: the grain graph and the limit on bad images."""

from __future__ import annotations

import dataclasses
import gc
import math
import signal
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from absl import flags

from xsmae.data.records import Source
from xsmae.data.views import ViewSampler
from xsmae.errors import BadImageError, UserError

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
    """

    source: Source
    sampler: ViewSampler
    seed: int
    batch_size: int
    max_tries: int

    def __call__(self, position: int, index: int) -> dict[str, np.ndarray]:
        sample = None
        used = -1
        for candidate in range(index, index + self.max_tries):
            draws = draws_of(self.seed, position, batch_size=self.batch_size)
            try:
                with self.source.open(candidate % len(self.source)) as record:
                    sample = self.sampler(record.image, record.gsd, **draws)
            except BadImageError:
                continue
            used = candidate % len(self.source)
            break
        if sample is None:
            views, size = self.sampler.num_views, self.sampler.size
            sample = {
                "image": np.zeros((views, size, size, 3), np.uint8),
                "box": np.zeros((views, 4), np.float32),
                "gsd": np.ones((views, 2), np.float32),
                "flip": np.zeros(2, bool),
            }
        sample["index"] = np.int64(used)
        sample["requested"] = np.int64(index)
        return sample


def make_batches(
    source: Source,
    sampler: ViewSampler,
    *,
    seed: int,
    batch_size: int,
    start_step: int,
    num_steps: int,
    max_rejected_fraction: float,
    num_workers: int = 0,
    num_threads: int = 4,
    prefetch: int = 4,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batches of steps `start_step` to `num_steps` of a run.

    Every epoch shuffles the images again. A batch may span two epochs. The images and
    crops of a step depend only on `seed` and the step, not on the workers, the threads,
    the number of processes or where the run was resumed. Every process gets an equal
    part of each global batch; together the parts are the batch of a single process.
    Raises UserError if the source has fewer images than a batch.
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
    )
    epochs = math.ceil(num_steps * batch_size / len(source))
    local = batch_size // process_count
    dataset = (
        grain.MapDataset.range(len(source))
        .seed(seed)
        .shuffle()
        .repeat(max(epochs, 1))
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


def check_bands(source: Source, bands: Sequence[str]) -> None:
    """Raises UserError unless `bands` are the source's bands, in its order."""
    if tuple(bands) != source.bands:
        unknown = [band for band in bands if band not in source.bands]
        raise UserError(
            f"bands={', '.join(bands)}, but {source!r} has {', '.join(source.bands)}"
            + (f" and no {', '.join(unknown)}" if unknown else "")
            + ": name all bands of the source in its order with "
            f'--config.bands="{source.bands}", and give mean and std in that order'
        )


def _leave_interrupts_to_the_parent(worker_index: int, worker_count: int) -> None:
    """Ignores Ctrl-C, which reaches every process of a terminal; the parent decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
