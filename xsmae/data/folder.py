"""The source that reads a folder of images.

Other sources: `tables.py` reads a CSV that lists images, `fmow.py` fMoW as it is
distributed, `tfds.py` prepared TFDS data sets.
"""

import collections
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from xsmae.data.files import FileSource, Listing, check_folder, file_size
from xsmae.data.gsd import GSD_HELP, check_gsd
from xsmae.data.images import MAX_PIXELS, MIN_SIDE, SUFFIXES
from xsmae.data.records import number
from xsmae.data.splits import split_indices
from xsmae.data.tables import gsds_from_csv
from xsmae.errors import UserError

# If all first-level folders have these names, they are splits, not classes.
_TRAIN_PARTS = ("train", "training")
_TEST_PARTS = ("val", "valid", "validation", "test", "testing")


class FolderSource(FileSource):
    """Every JPEG, PNG, WebP and TIFF under a folder, sorted by path.

    The id is the path relative to `root`. If the images lie in sub-folders, the
    first-level sub-folder is the class. If all lie directly in `root`, there are no
    labels. A mixture is a UserError. Folders of splits that contain folders of classes
    (`train/A`, `val/A`) are a UserError too. Suffixes match in upper and lower case.
    Hidden files and folders (a leading dot) are ignored. Links to files and folders are
    followed, even out of the root, since the user made them. Each real folder is read
    once, so that a loop of links ends.

    Args:
      root: the folder.
      gsd: metres per pixel of every image. Give either this or `gsd_csv`.
      gsd_csv: a CSV with the columns `path` (relative to `root`) and `gsd` that lists
        every image of the folder. Other rows are ignored.
      split, test_fraction: see `splits`.
      min_side, max_pixels: see `images.decode`.

    Attributes:
      left_out: suffix -> number of files without an image suffix.

    Raises:
      UserError: no such folder, no images, no valid GSD, a mixture, a bad split.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        *,
        gsd: float | None = None,
        gsd_csv: str | None = None,
        split: str = "all",
        test_fraction: float = 0.1,
        min_side: int = MIN_SIDE,
        max_pixels: int = MAX_PIXELS,
    ):
        root = check_folder(root)
        if (gsd is None) == (gsd_csv is None):
            found = "neither gsd nor gsd_csv is" if gsd is None else "both are"
            raise UserError(
                f"{found} given for {root}: {GSD_HELP} for all images, or with "
                "--config.data.gsd_csv=FILE, a table with the columns path,gsd"
            )
        found, self.left_out = _images_below(root)
        if not found:
            others = f" ({_counted(self.left_out)} there)" if self.left_out else ""
            raise UserError(
                f"no image ({', '.join(SUFFIXES)}) in {root} or its sub-folders"
                f"{others}; give the folder that contains the images"
            )
        ids = sorted(found)
        if gsd is not None:
            gsds = np.full(len(ids), check_gsd(gsd, "gsd"))
        else:
            gsds = gsds_from_csv(gsd_csv, ids, root=root)
        labels, names = _folder_labels(root, ids)
        sizes = [(found[name],) for name in ids]
        listing = Listing(ids, sizes, labels, names, gsds)
        chosen = split_indices(ids, labels, split, test_fraction)
        super().__init__(
            root, listing.take(chosen), min_side=min_side, max_pixels=max_pixels
        )

    def notes(self) -> list[str]:
        """The number of files left out because of their suffixes."""
        if not self.left_out:
            return []
        return [f"left out: {_counted(self.left_out)} without an image suffix"]


def _images_below(
    root: pathlib.Path,
) -> tuple[dict[str, int], collections.Counter[str]]:
    """Returns relative path -> size in bytes, and suffix -> number of other files."""
    found, others = {}, collections.Counter()
    seen = set()
    folders, links = [""], []
    while folders or links:
        # Links come last, so that a folder is found under its own name first.
        folder = folders.pop() if folders else links.pop()
        real = os.path.realpath(root / folder)
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(
                f"{root / folder} cannot be listed ({error.strerror}); make it readable"
            ) from None
        for entry in entries:
            path = f"{folder}/{entry.name}".lstrip("/")
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(path)
            elif entry.name.lower().endswith(SUFFIXES):
                found[path] = file_size(entry.path)
            else:
                others[os.path.splitext(entry.name)[1].lower()] += 1
        # Of two links to one folder, the first in sorted order counts.
        links.sort(reverse=True)
    return found, others


def _counted(others: collections.Counter[str]) -> str:
    """E.g. `12 files (9 .json, 3 without a suffix)`, most frequent suffixes first."""
    shown = sorted(others.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{n} {suffix or 'without a suffix'}" for suffix, n in shown[:5]]
    parts += ["..."] if len(shown) > 5 else []
    total = others.total()
    return f"{total} file{'s' if total > 1 else ''} ({', '.join(parts)})"


def _folder_labels(
    root: pathlib.Path, ids: Sequence[str]
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    loose = [name for name in ids if "/" not in name]
    if len(loose) == len(ids):
        return None, ()
    if loose:
        raise UserError(
            f"{root} has {len(loose)} images directly in it (first {loose[0]!r}) and "
            f"{len(ids) - len(loose)} in sub-folders; expected all in sub-folders (one "
            "per class) or none: move them, or list the images in a CSV"
        )
    _refuse_splits(root, ids)
    return number([name.split("/")[0] for name in ids])


def _refuse_splits(root: pathlib.Path, ids: Sequence[str]) -> None:
    """UserError if the first-level folders are splits that contain class folders."""
    parts = sorted({name.split("/")[0] for name in ids})
    nested = any(name.count("/") > 1 for name in ids)
    if not nested or any(p.lower() not in _TRAIN_PARTS + _TEST_PARTS for p in parts):
        return
    train = next((p for p in parts if p.lower() in _TRAIN_PARTS), parts[0])
    test = next((p for p in parts if p != train), None)
    message = (
        f"{root} has splits ({', '.join(parts)}) with folders in them, expected one "
        f"folder per class: give one split with --config.data.root={root / train}"
    )
    if test is not None:
        message += (
            f"; an evaluation takes two, with --train.root={root / train} "
            f"--train.split=all --test.root={root / test} --test.split=all"
        )
    raise UserError(message)
