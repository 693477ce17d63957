"""The source that reads a prepared TFDS data set; `records.py` defines sources."""

import contextlib
import math
import operator
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from xsmae.bands import BANDS
from xsmae.data.gsd import GSD_HELP, check_gsd
from xsmae.data.images import MAX_PIXELS, MIN_SIDE
from xsmae.data.picture import open_picture
from xsmae.data.records import OpenedSource, Record, fingerprint
from xsmae.data.splits import split_indices
from xsmae.errors import BadImageError, UserError


class TfdsSource(OpenedSource):
    """A TFDS data set that was prepared as ArrayRecord; needs no TensorFlow.

    Reads the features `image` (encoded; decoded by `images.decode`), and if present
    `label`, `filename` (the id, otherwise `<split>/<position>`), `gsd` and `box`.
    Downloads and prepares nothing.

    If the data set has several splits of its own (our fMoW has `train` and `val`),
    `split` picks one by name and "all" joins them in sorted order. If it has one split
    (EuroSAT, RESISC45, UC Merced), "train" and "test" follow the published rule over
    all records. The constructor then reads every record once, undecoded, for ids and
    labels (about 15,000 records a second). A list of ids works in both cases.

    Args:
      name: `name`, `name/config` or `name/config:version`; the newest version by
        default.
      data_dir: the folder that TFDS prepared into.
      split, test_fraction: see above and `splits`.
      gsd: metres per pixel of every image, if the data has no `gsd` feature.
      crop, context: if a `box` feature has an area, cut it out with this fraction of
        its side added on each side, as in `fmow.FmowSource`.
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
                f"{name} has no 'image' feature, found {', '.join(features)}; choose a "
                "config of RGB images"
            )
        self._has_gsd = "gsd" in features
        if self._has_gsd == (gsd is not None):
            raise UserError(
                f"{name} has a gsd per image and gsd={gsd} is given too; remove it"
                if self._has_gsd
                else f"{name} has no gsd feature and gsd is not given: {GSD_HELP}"
            )
        self._gsd = None if gsd is None else check_gsd(gsd, "gsd")
        # Only a ClassLabel has names; the label may also be a text or a mask.
        self._class_names = tuple(getattr(features.get("label"), "names", ()))
        self._crop, self._context = crop, context
        self._min_side, self._max_pixels = min_side, max_pixels

        own = split in splits and (len(splits) > 1 or split not in ("train", "test"))
        if not own and len(splits) > 1 and split in ("train", "test"):
            raise UserError(
                f"{name} has no split {split!r}, found {', '.join(sorted(splits))}; "
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
        self._check(0)  # a missing or damaged file fails here, not during the run
        self._scanned: tuple[list[str], np.ndarray | None] | None = None
        if not own and split != "all":
            ids, labels = self._scan()
            self._indices = split_indices(ids, labels, split, test_fraction)
            self._scanned = (
                [ids[i] for i in self._indices],
                None if labels is None else labels[self._indices],
            )
        # TFDS's own numbers represent the content, since reading every record of fMoW
        # for a fingerprint takes half an hour.
        self._fingerprint = fingerprint(
            (type(self).__name__, builder.info.full_name, self._gsd, crop, context),
            *(
                (key, splits[key].num_bytes, *splits[key].shard_lengths)
                for key in self._splits
            ),
            self._indices,
        )

    @property
    def labels(self) -> np.ndarray | None:
        """int64 [len(self)]; read, undecoded, on first use. None without labels."""
        if not self._class_names:
            return None
        self._scanned = self._scanned or self._scan()
        return self._scanned[1]

    def id(self, index: int) -> str:
        """The file name from the data set, or the split and the position."""
        if self._scanned:
            return self._scanned[0][index]
        position = int(self._indices[index])
        try:
            return self._id(self._read(position), position)
        except BadImageError:
            return self._id({}, position)

    def __len__(self) -> int:
        return len(self._indices)

    @contextlib.contextmanager
    def open(self, index: int) -> Iterator[Record]:
        """A context with the record, its image undecoded; see `records.Source`."""
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
        # array_record returns None beyond the end of a truncated file.
        if any(value is None for value in record.values()):
            raise BadImageError("the prepared file is damaged: it is truncated")
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
        "(needs TensorFlow once, for TFDS's own data sets)"
    )
    try:
        # Read only the prepared files: tfds.builder() would look for code, and
        # tfds.data_source() would download missing files.
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
