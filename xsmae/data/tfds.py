"""The source of a prepared TFDS data set; `records.py` says what a source is."""

import contextlib
import math
import operator
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from xsmae.bands import BANDS
from xsmae.data.images import MAX_PIXELS, MIN_SIDE
from xsmae.data.picture import open_picture
from xsmae.data.records import (
    GSD_HELP,
    BaseSource,
    Record,
    check_gsd,
    decoded,
    fingerprint,
)
from xsmae.data.splits import split_indices
from xsmae.errors import BadImageError, UserError


class TfdsSource(BaseSource):
    """A TFDS data set that has been prepared as ArrayRecord; no TensorFlow needed.

    Reads the features `image` (encoded; decoded by `images.decode`), and if present
    `label`, `filename` (the id; else `<split>/<position>`), `gsd` and `box`. Nothing is
    downloaded or prepared here.

    Splits: where the data set has more than one of its own, as our fMoW has `train` and
    `val`, `split` picks one by name and "all" joins them in sorted order. Where it has
    one (EuroSAT, RESISC45, UC Merced), "train" and "test" are the published rule over
    all its records; the constructor then reads them once, undecoded, for ids and labels
    (about 15,000 records a second). A list of ids works for both.

    Args:
      name: `name`, `name/config` or `name/config:version`; the newest version if none.
      data_dir: the folder that TFDS prepared into.
      split, test_fraction: see above and `splits`.
      gsd: metres per pixel of every image, where the data has no `gsd` feature.
      crop, context: where there is a `box` feature with an area: cut it out with this
        fraction of its side added on each side; as `fmow.FmowSource`.
      min_side, max_pixels: see `images.decode`.

    Raises:
      UserError: not prepared, not ArrayRecord, no image, no GSD, a bad split.
    """

    bands = BANDS

    def __init__(
        self,
        name: str,
        *,
        data_dir: str | os.PathLike,
        split: str = "all",
        test_fraction: float = 0.1,
        gsd: float | None = None,
        crop: bool = True,
        context: float = 0.25,
        min_side: int = MIN_SIDE,
        max_pixels: int = MAX_PIXELS,
    ):
        import tensorflow_datasets as tfds  # slow, and not needed by other sources

        builder = _prepared_builder(name, data_dir)
        features, splits = dict(builder.info.features), builder.info.splits
        if not isinstance(features.get("image"), tfds.features.Image):
            raise UserError(
                f"{name} has no 'image' feature, but {', '.join(features)}; choose a "
                "config of RGB images"
            )
        self._has_gsd = "gsd" in features
        if self._has_gsd == (gsd is not None):
            raise UserError(
                f"{name} has a gsd per image and gsd={gsd} is given too; leave it out"
                if self._has_gsd
                else f"{name} has no gsd feature and no gsd is given: {GSD_HELP}"
            )
        self._gsd = None if gsd is None else check_gsd(gsd, "gsd")
        # A label that is no ClassLabel (a text, a mask) has no names.
        self._class_names = tuple(getattr(features.get("label"), "names", ()))
        self._crop, self._context = crop, context
        self._min_side, self._max_pixels = min_side, max_pixels

        own = split in splits and (len(splits) > 1 or split not in ("train", "test"))
        if not own and len(splits) > 1 and split in ("train", "test"):
            raise UserError(
                f"{name} has no split {split!r}, but {', '.join(sorted(splits))}; "
                "choose one of them"
            )
        self._splits = [split] if own else sorted(splits)
        if not sum(splits[key].num_examples for key in self._splits):
            raise UserError(f"{name} in {data_dir} has no records; prepare it again")
        self._name = name
        self._data = builder.as_data_source(
            split="+".join(self._splits),
            decoders={"image": tfds.decode.SkipDecoding()},
        )
        self._indices = np.arange(len(self._data))
        self._check(0)  # a missing or damaged file fails here rather than in the run
        self._scanned: tuple[list[str], np.ndarray | None] | None = None
        if not own and split != "all":
            ids, labels = self._scan()
            self._indices = split_indices(ids, labels, split, test_fraction)
            self._scanned = (
                [ids[i] for i in self._indices],
                None if labels is None else labels[self._indices],
            )
        # TFDS's own numbers stand for the content: reading every record of fMoW only
        # for a fingerprint would take half an hour.
        self._fingerprint = fingerprint(
            (type(self).__name__, builder.info.full_name, self._gsd, crop, context),
            *(
                (key, splits[key].num_bytes, *splits[key].shard_lengths)
                for key in self._splits
            ),
            self._indices,
        )

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over name, version, sizes, shards, GSD and indices."""
        return self._fingerprint

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of every label; empty without labels."""
        return self._class_names

    @property
    def labels(self) -> np.ndarray | None:
        """int64 [len(self)]; read, undecoded, on first use. None without labels."""
        if not self._class_names:
            return None
        self._scanned = self._scanned or self._scan()
        return self._scanned[1]

    def id(self, index: int) -> str:
        """The file name that the data set gives, or its position."""
        if self._scanned:
            return self._scanned[0][index]
        position = int(self._indices[index])
        try:
            return self._id(self._read(position), position)
        except BadImageError:
            return self._id({}, position)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        with self.open(index) as record:
            return decoded(record)

    @contextlib.contextmanager
    def open(self, index: int) -> Iterator[Record]:
        """The record with its image undecoded, see `records.Source`."""
        position = int(self._indices[operator.index(index)])
        record = self._read(position)
        gsd = float(record["gsd"]) if self._has_gsd else self._gsd
        if not (math.isfinite(gsd) and gsd > 0):
            raise BadImageError(f"gsd is {gsd}; expected metres per pixel above 0")
        limits = {"min_side": self._min_side, "max_pixels": self._max_pixels}
        box = None
        if self._crop and np.any(record.get("box", 0)):
            box = tuple(map(float, record["box"]))
        with open_picture(
            record["image"], box=box, context=self._context, **limits
        ) as picture:
            label = int(record["label"]) if self._class_names else None
            yield Record(picture, gsd, label, self._id(record, position))

    def _read(self, position: int) -> dict[str, Any]:
        try:
            record = self._data[position]
        except MemoryError:
            raise
        # array_record and TFDS raise RuntimeError, ValueError, KeyError and others.
        except Exception as error:
            reason = str(error).partition(";")[0]
            raise BadImageError(f"the prepared file is damaged: {reason}") from error
        # What array_record gives beyond the end of a file that is cut short.
        if any(value is None for value in record.values()):
            raise BadImageError("the prepared file is damaged: it is cut short")
        return record

    def _check(self, position: int) -> dict[str, Any]:
        try:
            return self._read(position)
        except BadImageError as error:
            raise UserError(
                f"record {position} of {self._name}: {error}; prepare it again"
            ) from error

    def _id(self, record: dict[str, Any], position: int) -> str:
        name = record.get("filename")
        if name is None:
            return f"{'+'.join(self._splits)}/{position}"
        return name.decode() if isinstance(name, bytes) else str(name)

    def _scan(self) -> tuple[list[str], np.ndarray | None]:
        ids, labels = [], []
        for position in self._indices:
            record = self._check(int(position))
            ids.append(self._id(record, int(position)))
            labels.append(record.get("label"))
        return ids, np.array(labels) if self._class_names else None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} images, fingerprint={self.fingerprint})"
        )


def _prepared_builder(name: str, data_dir: str | os.PathLike) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    data_dir = str(pathlib.Path(data_dir).expanduser().absolute())
    how = "prepare it once: " + (
        f"python -m xsmae.data.fmow_tfds --root=FMOW --data_dir={data_dir}"
        if name.startswith("fmow")
        else f"tfds build {name} --file_format=array_record --data_dir={data_dir} "
        "(TFDS's own data sets need TensorFlow for that, once)"
    )
    try:
        # From the prepared files alone: tfds.builder() would look for code, and
        # tfds.data_source() would download what is not there.
        builder = read_only_builder.builder_from_files(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError, OSError):
        raise UserError(f"no prepared {name!r} in {data_dir}; {how}") from None
    file_format = builder.info.file_format
    if file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise UserError(
            f"{name} in {data_dir} is prepared as {getattr(file_format, 'value', None)}"
            f", expected array_record; {how}"
        )
    return builder
