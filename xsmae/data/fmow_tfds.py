"""fMoW as a TFDS data set, prepared once as ArrayRecord, without TensorFlow.

    python -m xsmae.data.fmow_tfds --root=FMOW --data_dir=TFDS [--kind=rgb]

copies the encoded images of `FMOW/train` and `FMOW/val`, with their GSD, bounding box
and label, into a few large files. Network file systems read these far faster than
700,000 small files. `tfds.TfdsSource("fmow/rgb", data_dir=TFDS, split="train")` then
gives the same records as `fmow.FmowSource` (in another order, with the GSD as float32).
`tfds.data_source("fmow/rgb", ...)` reads the files too.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from xsmae.data.fmow import KINDS, FmowSource
from xsmae.errors import BadImageError, UserError

SPLITS = ("train", "val")


class Fmow(tfds.core.GeneratorBasedBuilder):
    """Builds `fmow/rgb` or `fmow/msrgb` from a folder; see the module.

    Features: `image` (JPEG, as distributed), `label`, `filename` (the path below the
    split's folder), `gsd` (metres per pixel), `box` (x, y, width, height in pixels; all
    zero: no box). A record with an unusable JSON is skipped with a warning.

    Args:
      root: the folder that contains `train` and `val`.
      **kwargs: `config` ("rgb" or "msrgb") and `data_dir`, for TFDS.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=kind) for kind in KINDS]

    def __init__(self, *, root: str | os.PathLike, config: str = "rgb", **kwargs: Any):
        # TFDS asks for the label names in __init__, so the sources come first.
        self._sources = {
            split: FmowSource(root, split=split, kind=config) for split in SPLITS
        }
        super().__init__(config=config, file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        names = self._sources["train"].class_names
        return tfds.core.DatasetInfo(
            builder=self,
            description="Functional Map of the World, one kind of its images.",
            homepage="https://github.com/fMoW/dataset",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(None, None, 3), encoding_format="jpeg"
                    ),
                    "label": tfds.features.ClassLabel(names=names),
                    "filename": tfds.features.Text(),
                    "gsd": tfds.features.Scalar(np.float32),
                    "box": tfds.features.Tensor(shape=(4,), dtype=np.float32),
                }
            ),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        return {
            split: self._generate_examples(source)
            for split, source in self._sources.items()
        }

    def _generate_examples(
        self, source: FmowSource
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for index in range(len(source)):
            name = source.id(index)
            try:
                gsd, box = source.metadata(index)
            except BadImageError as error:
                logging.warning("left out: %s: %s", name, error)
                continue
            # TFDS copies a path byte for byte; encoding an array needs TensorFlow.
            yield (
                name,
                {
                    "image": source.path(index),
                    "label": int(source.labels[index]),
                    "filename": name,
                    "gsd": gsd,
                    "box": np.array(box or (0, 0, 0, 0), np.float32),
                },
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Prepares the data set; prints one line and returns 2 if the input is wrong."""
    parser = argparse.ArgumentParser(prog="python -m xsmae.data.fmow_tfds")
    parser.add_argument("--root", required=True, help="fMoW's root: train/ and val/")
    parser.add_argument("--data_dir", required=True, help="the folder to prepare into")
    parser.add_argument("--kind", default="rgb", choices=KINDS)
    args = parser.parse_args(argv)
    try:
        builder = Fmow(root=args.root, config=args.kind, data_dir=args.data_dir)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    builder.download_and_prepare()
    counts = {name: split.num_examples for name, split in builder.info.splits.items()}
    print(f"prepared {builder.info.full_name} in {args.data_dir}: {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
