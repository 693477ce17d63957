"""fMoW (Christie et al. 2018, arXiv 1711.07846) as it is distributed.

    <root>/<split>/<category>/<category>_<n>/<category>_<n>_<t>_rgb.jpg
                                             <category>_<n>_<t>_rgb.json
                                             <category>_<n>_<t>_msrgb.jpg, .json

The JSON has `gsd` (metres per pixel) and `bounding_boxes`: one dict or a list of dicts,
each with `box` [x, y, width, height] in pixels and a `category`. `rgb` (pan-sharpened)
and `msrgb` show the same scene at different GSDs. A source reads one of the two.
"""

import json
import math
import os
import pathlib
import sys
from typing import Any, NamedTuple

import numpy as np

from xsmae.data.files import FileSource, Listing, check_folder, file_size
from xsmae.data.gsd import check_gsd
from xsmae.data.images import MAX_PIXELS, MIN_SIDE
from xsmae.data.splits import split_indices
from xsmae.data.tables import read_listing
from xsmae.errors import BadImageError, UserError

KINDS = ("rgb", "msrgb")

# JSONs to try before reporting that the data set has no GSD.
_GSD_PROBES = 8


class Metadata(NamedTuple):
    """The fields used from one JSON; `box` is x, y, width, height, or None."""

    gsd: float
    box: tuple[float, float, float, float] | None


def read_metadata(path: pathlib.Path, category: str) -> Metadata:
    """Reads the JSON beside an image.

    Args:
      path: the JSON.
      category: the image's folder. The first box of this category is used, or else
        the first box that is not a `false_detection`.

    Returns:
      the GSD in metres per pixel, and the box.

    Raises:
      BadImageError: no or broken JSON, no valid GSD, a malformed box.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BadImageError(f"its {path.name} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadImageError(f"its {path.name} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise BadImageError(f"its {path.name} is not a JSON object")
    gsd = content.get("gsd")
    if not _is_number(gsd) or gsd <= 0:
        raise BadImageError(
            f"its {path.name} has gsd {gsd!r}; expected metres per pixel above 0"
        )
    return Metadata(float(gsd), _choose_box(content, category, path.name))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _choose_box(
    content: dict[str, Any], category: str, name: str
) -> tuple[float, float, float, float] | None:
    boxes = content.get("bounding_boxes") or []
    if isinstance(boxes, dict):
        boxes = [boxes]
    if not isinstance(boxes, list) or not all(isinstance(b, dict) for b in boxes):
        raise BadImageError(
            f"its {name} has bounding_boxes that are not a list of objects"
        )
    chosen = next((b for b in boxes if b.get("category") == category), None) or next(
        (b for b in boxes if b.get("category") != "false_detection"), None
    )
    if chosen is None:
        return None
    box = chosen.get("box")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise BadImageError(
            f"its {name} has the box {box!r}; expected [x, y, width, height]"
        )
    x, y, width, height = map(float, box)
    return x, y, width, height


class _FmowFiles(FileSource):
    """fMoW images with their JSONs; GSDs in the listing override those of the JSONs."""

    def __init__(
        self,
        root: pathlib.Path,
        listing: Listing,
        *,
        crop: bool,
        context: float,
        min_side: int,
        max_pixels: int,
    ):
        if not (math.isfinite(context) and context >= 0):
            raise UserError(f"context is {context}, expected a fraction of 0 or more")
        super().__init__(
            root,
            listing,
            min_side=min_side,
            max_pixels=max_pixels,
            options=(crop, context),
        )
        self._crop, self._context = crop, context
        if listing.gsds is None:
            self._check_some_gsd()

    def metadata(self, index: int) -> Metadata:
        """Reads a record's JSON; BadImageError if it cannot be used."""
        name = pathlib.PurePosixPath(self.id(index))
        # <category>/<category>_<n>/<file>
        category = name.parts[-3] if len(name.parts) >= 3 else ""
        return read_metadata(self.path(index).with_suffix(".json"), category)

    def _gsd_and_crop(self, index: int) -> tuple[float, dict[str, Any]]:
        gsds = self._listing.gsds
        if gsds is not None and not self._crop:
            return super()._gsd_and_crop(index)
        metadata = self.metadata(index)
        gsd = metadata.gsd if gsds is None else float(gsds[index])
        if not self._crop:
            return gsd, {}
        return gsd, {"box": metadata.box, "context": self._context}

    def _check_some_gsd(self) -> None:
        reasons = []
        for index in range(min(len(self), _GSD_PROBES)):
            try:
                self.metadata(index)
                return
            except BadImageError as error:
                reasons.append(f"{self.id(index)}: {error}")
        raise UserError(
            f"no GSD for the first {len(reasons)} images, {reasons[0]}; put fMoW's "
            "JSONs beside the images, or give metres per pixel with "
            "--config.data.gsd=..."
        )


class FmowSource(_FmowFiles):
    """One split of fMoW, sorted by path; the id is the path below the split's folder.

    Labels are numbered over the category folders of all splits under `root`, so they
    are the same in every split. A broken or missing JSON raises a BadImageError for its
    record.

    Args:
      root: the folder that contains `train`, `val`, ...
      split: the name of a folder in it.
      kind: "rgb" or "msrgb".
      crop: cut out the bounding box with its context; False: the whole image.
      context: fraction of the box's side to add on each side, clipped to the image. A
        window below `min_side` grows to it.
      gsd: metres per pixel of every image, overriding the JSONs.
      min_side, max_pixels: see `images.decode`.

    Raises:
      UserError: no such folder, no images, no GSD.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        *,
        split: str = "train",
        kind: str = "rgb",
        crop: bool = True,
        context: float = 0.25,
        gsd: float | None = None,
        min_side: int = MIN_SIDE,
        max_pixels: int = MAX_PIXELS,
    ):
        root = check_folder(root)
        _check_kind(kind)
        folders = _folders(root)
        if split not in folders:
            raise UserError(
                f"{root} has no folder {split!r}, found {', '.join(folders) or 'none'};"
                " give fMoW's root and one of its splits"
            )
        # A category contains folders. The unlabelled test set contains files instead.
        names = sorted(
            {
                category
                for folder in folders
                for category in _folders(root / folder)
                if _folders(root / folder / category)
            }
        )
        folder = root / split
        sizes = {}
        for category in _folders(folder):
            for place in _folders(folder / category):
                sizes |= _images(folder, f"{category}/{place}", kind)
        if not sizes:
            raise UserError(
                f"no <category>/<category>_<n>/*_{kind}.jpg in {folder}; give fMoW's "
                f"root, or another kind ({' or '.join(KINDS)})"
            )
        ids = sorted(sizes)
        listing = Listing(
            ids,
            [sizes[name] for name in ids],
            np.array([names.index(name.split("/")[0]) for name in ids]),
            tuple(names),
            None if gsd is None else np.full(len(ids), check_gsd(gsd, "gsd")),
        )
        super().__init__(
            folder,
            listing,
            crop=crop,
            context=context,
            min_side=min_side,
            max_pixels=max_pixels,
        )


class FmowCsvSource(_FmowFiles):
    """The fMoW images that a CSV lists, as SatMAE distributes such tables.

    The table follows the rules of `tables.CsvSource` (columns, labels, paths inside the
    root, splits). The GSD comes from its `gsd` column, or else from `gsd`, or else from
    the JSON beside each image.

    Args:
      csv_path, root, split, test_fraction: see `tables.CsvSource`.
      kind, crop, context, gsd, min_side, max_pixels: see `FmowSource`. A path of the
        other kind is a UserError.

    Raises:
      UserError: anything wrong with the table, no GSD, a path of the other kind.
    """

    def __init__(
        self,
        csv_path: str | os.PathLike,
        *,
        root: str | os.PathLike | None = None,
        split: str = "all",
        test_fraction: float = 0.1,
        kind: str = "rgb",
        crop: bool = True,
        context: float = 0.25,
        gsd: float | None = None,
        min_side: int = MIN_SIDE,
        max_pixels: int = MAX_PIXELS,
    ):
        _check_kind(kind)
        folder, listing = read_listing(csv_path, root=root, gsd=gsd)
        other = [name for name in listing.ids if not name.endswith(f"_{kind}.jpg")]
        if other:
            raise UserError(
                f"{len(other)} of {len(listing.ids)} paths in {csv_path} do not end in "
                f"_{kind}.jpg, the first is {other[0]!r}; list one kind of image, and "
                "set kind to it"
            )
        sidecars = [
            file_size((folder / name).with_suffix(".json")) for name in listing.ids
        ]
        listing = listing._replace(
            sizes=[
                (*size, sidecar)
                for size, sidecar in zip(listing.sizes, sidecars, strict=True)
            ]
        )
        chosen = split_indices(listing.ids, listing.labels, split, test_fraction)
        super().__init__(
            folder,
            listing.take(chosen),
            crop=crop,
            context=context,
            min_side=min_side,
            max_pixels=max_pixels,
        )


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise UserError(f"kind is {kind!r}, expected {' or '.join(KINDS)}")


def _folders(folder: pathlib.Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.is_dir() and not entry.name.startswith(".")
        )


def _images(folder: pathlib.Path, place: str, kind: str) -> dict[str, tuple[int, int]]:
    """Path below `folder` -> bytes of the image and of its JSON (-1: missing)."""
    with os.scandir(folder / place) as entries:
        images = [
            pathlib.Path(entry.path)
            for entry in entries
            if entry.name.endswith(f"_{kind}.jpg") and not entry.name.startswith(".")
        ]
    return {
        f"{place}/{image.name}": (
            file_size(image),
            file_size(image.with_suffix(".json")),
        )
        for image in images
    }
