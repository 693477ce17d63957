"""The source of semantic segmentation: images, and a class for every pixel.

Images are 8-bit pictures or rasters of any bands. `synthetic/labelled.py` has the
source of the built-in world. `cli/check_masks.py` reads either before a training.
"""

from __future__ import annotations

import dataclasses
import operator
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from xsmae.bands import BANDS, UNITS
from xsmae.data.geotiff_source import units_of
from xsmae.data.gsd import GSD_HELP, check_gsd
from xsmae.data.images import MAX_PIXELS, open_image, orientation, to_rgb
from xsmae.data.mask_classes import IGNORE, read_classes
from xsmae.data.mask_files import read_mask
from xsmae.data.mask_listing import PICTURES, Pair, list_pairs
from xsmae.data.raster import Raster, open_raster
from xsmae.data.records import BaseSource, Record, fingerprint
from xsmae.data.splits import split_indices
from xsmae.errors import BadImageError, UserError, printable

if TYPE_CHECKING:
    from jaxtyping import UInt8

__all__ = ["MaskRecord", "MaskSource", "Segmentation"]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MaskRecord(Record):
    """A decoded record with mask: uint8 [height, width], a class or `IGNORE`.

    Pixels without a value are `IGNORE`. gsd: always (y, x). label: None.
    """

    mask: UInt8[np.ndarray, "height width"]


class Segmentation(Protocol):
    """What segmentation needs from a source; it must be picklable.

    `source[i]` raises a UserError that names the file if the image or its mask cannot
    be used: with few masks, none is passed over. `bands`, `dtype`, `units`, `id`,
    `path`, `notes` and `fingerprint` are those of `records.Source`.
    """

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class; a mask has their places."""

    @property
    def colours(self) -> tuple[tuple[int, int, int], ...]:
        """Red, green and blue of each class, for pictures; empty if there are none."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> MaskRecord: ...

    def scene(self, index: int) -> str:
        """The place that the image is a part of. Images of a scene stay together."""

    def raster(self, index: int) -> Raster | None:
        """The opened raster of the image; None if it is none."""


class MaskSource(BaseSource):
    """Images and masks of two folders with equal stems, or of a table.

    Images are all JPEG, PNG or WebP (uint8, red, green and blue) or all rasters
    (float32). The id is the path below the folder of images without its suffix; in a
    table, the path. Images keep their size.

    The scene of an image is the folder that it lies in, what `scene` finds in its id,
    or the column `scene` of a table. The rule of the splits ranks scenes, not images.

    Args:
      root: the folder, or a table with the columns path and mask, and scene and gsd if
        it likes; its paths are relative to it.
      images, masks: the folders below `root`; None: "images" and "masks".
      classes: see `mask_classes`; None: `classes.json` in the folder.
      gsd: metres per pixel; None: of the table, or of the rasters.
      scene: a regular expression with one group that matches an id.
      bands, sensor, scale, offset, nodata_rule: see `raster.open_raster`; for rasters.
      split: "all"; "train" or "test" by the rule, of scenes; or a list of ids, whose
        path may be relative to the folder.
      test_fraction: of the scenes, see `splits`.
      max_pixels: an image with more pixels is refused.

    Raises:
      UserError: bad options, an image without a mask, no GSD, bad classes, a bad split.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        *,
        images: str | None = None,
        masks: str | None = None,
        classes: str | os.PathLike | None = None,
        gsd: float | None = None,
        scene: str | None = None,
        bands: Sequence[str] | None = None,
        sensor: str | None = None,
        scale: float | Sequence[float] | None = None,
        offset: float | Sequence[float] | None = None,
        nodata_rule: str = "all",
        split: str = "all",
        test_fraction: float = 0.2,
        max_pixels: int = MAX_PIXELS,
    ):
        self._root, pairs, self._notes = list_pairs(
            root, images=images, masks=masks, scene=scene
        )
        self._classes = read_classes(
            self._root / "classes.json" if classes is None else classes
        )
        self._max_pixels = max_pixels
        self._options = {
            "bands": bands, "sensor": sensor, "scale": scale, "offset": offset,
            "nodata_rule": nodata_rule,
        }  # fmt: skip
        self._gsd = None if gsd is None else check_gsd(gsd, "gsd")
        self._pairs = _part(pairs, split, test_fraction, self._root)
        if any(pair.gsd is not None for pair in pairs) and gsd is not None:
            raise UserError(
                f"{root} has a column gsd and gsd={gsd} is given too; remove one of "
                "them"
            )
        self._of_rasters = not pairs[0].image.lower().endswith(PICTURES)
        self._rasters: dict[int, Raster] = {}
        if self._of_rasters:
            self._take_first_raster()
        else:
            self._take_pictures()
        self._fingerprint = fingerprint(
            (type(self).__name__, self._gsd, self.bands, self.units),
            dataclasses.astuple(self._classes)[:-1],
            [f"{name}={value}" for name, value in self._options.items()],
            *((p.id, p.scene, p.gsd, *p.sizes) for p in self._pairs),
        )

    def _take_pictures(self) -> None:
        given = {k: v for k, v in self._options.items() if v not in (None, "all")}
        if given:
            name, value = next(iter(given.items()))
            raise UserError(
                f"{name}={value!r} is for rasters, but the images are JPEG, PNG or "
                "WebP; leave it out"
            )
        if self._gsd is None and self._pairs[0].gsd is None:
            raise UserError(f"the GSD of {self._root} is not given: {GSD_HELP}")
        self.bands, self.dtype, self.units = BANDS, "uint8", UNITS

    def _take_first_raster(self) -> None:
        """Bands and units, of the first raster that can be opened."""
        self.dtype = "float32"
        for index in range(len(self._pairs)):
            try:
                first = self._raster(index)
            except BadImageError as error:
                reason = error
                continue
            self.bands, self.units = first.bands, units_of(first)
            self._notes += first.notes()
            return
        raise UserError(f"none of the {len(self._pairs)} rasters opens: {reason}")

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class; a mask has their places."""
        return self._classes.names

    @property
    def colours(self) -> tuple[tuple[int, int, int], ...]:
        """Red, green and blue of each class; empty if the classes have none."""
        return self._classes.colours

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of ids, scenes, sizes in bytes, classes and options."""
        return self._fingerprint

    def notes(self) -> list[str]:
        """Masks without an image, and what was decided about the first raster."""
        return list(self._notes)

    def id(self, index: int) -> str:
        """The image's path without its suffix; in a table, the path."""
        return self._pairs[index].id

    def scene(self, index: int) -> str:
        """The image's scene; its id if nobody says that it is a part of one."""
        pair = self._pairs[index]
        return pair.id if pair.scene is None else pair.scene

    def path(self, index: int) -> pathlib.Path:
        """The image's file."""
        return self._root / self._pairs[index].image

    def raster(self, index: int) -> Raster | None:
        """The opened raster of an image, None for pictures. Raises UserError."""
        try:
            return self._raster(index) if self._of_rasters else None
        except BadImageError as error:
            raise UserError(str(error)) from None

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> MaskRecord:
        index = operator.index(index)
        pair = self._pairs[index]
        path = self._root / pair.mask
        if self._of_rasters:
            image, valid, gsd = self._values(index)
        else:
            image, valid = self._picture(index), None
            gsd = (pair.gsd or self._gsd,) * 2
        mask = read_mask(
            path,
            self._classes,
            image.shape[:2],
            max_pixels=self._max_pixels,
            raster=self.raster(index),
        )
        if valid is not None:
            mask[~valid] = IGNORE
        return MaskRecord(image, gsd, None, pair.id, valid, mask=mask)

    def _picture(self, index: int) -> np.ndarray:
        path = self.path(index)
        try:
            with open_image(path, max_pixels=self._max_pixels) as image:
                image.load()  # the tag of a PNG may come after its pixels
                turn = orientation(image)
                if turn != 1:
                    raise BadImageError(
                        f"EXIF orientation {turn}: is its mask turned too? Save the "
                        "image upright"
                    )
                return np.array(to_rgb(image))
        except (BadImageError, OSError, SyntaxError) as error:
            raise UserError(f"{printable(str(path))}: {error}") from None

    def _raster(self, index: int) -> Raster:
        if index not in self._rasters:
            gsd = self._pairs[index].gsd or self._gsd
            self._rasters[index] = open_raster(
                self.path(index), gsd=gsd, **self._options
            )
        return self._rasters[index]

    def _values(self, index: int) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
        raster = self.raster(index)
        where, (height, width) = printable(raster.path), raster.shape
        if raster.bands != self.bands:
            raise UserError(
                f"{where}: bands {', '.join(raster.bands)}, others have "
                f"{', '.join(self.bands)}; choose bands that all have"
            )
        if height * width > self._max_pixels:
            raise UserError(
                f"{where}: {height} x {width} pixels, more than "
                f"max_pixels={self._max_pixels}; cut it into tiles of one scene"
            )
        try:
            return *raster.read((0, 0, height, width)), raster.known_gsd()
        except BadImageError as error:
            raise UserError(str(error)) from None

    def __repr__(self) -> str:
        scenes = len({self.scene(i) for i in range(len(self))})
        return (
            f"{type(self).__name__}({len(self)} images of {scenes} scenes, "
            f"{len(self.class_names)} classes, fingerprint={self.fingerprint})"
        )


def _part(
    pairs: list[Pair], split: str, test_fraction: float, root: pathlib.Path
) -> list[Pair]:
    """The pairs of a split: by scene, or by a list of ids."""
    if split not in ("all", "train", "test"):
        beside = root / split
        path = str(beside) if beside.is_file() else split
        chosen = split_indices([p.id for p in pairs], None, path, test_fraction)
        return [pairs[i] for i in chosen]
    if split == "all":
        return pairs
    alone = [pair.id for pair in pairs if pair.scene is None]
    if alone:
        raise UserError(
            f"split={split!r} keeps images of a scene together, but nobody says which "
            f"scene {printable(alone[0])!r} is of: give --config.data.scene=PATTERN "
            "('(.+)_[0-9]+'; '(.+)' if each image is a scene), or --train.split=FILE "
            "and --test.split=FILE with lists of ids"
        )
    scenes = sorted({pair.scene for pair in pairs})
    chosen = split_indices(scenes, None, split, test_fraction)
    inside = {scenes[i] for i in chosen}
    return [pair for pair in pairs if pair.scene in inside]
