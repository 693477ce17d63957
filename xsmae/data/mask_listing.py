"""Which mask belongs to which image: folders with equal stems, or a table."""

from __future__ import annotations

import os
import pathlib
import re
from typing import NamedTuple

from xsmae.data.files import check_folder, file_size
from xsmae.data.geotiff_listing import SUFFIXES as RASTERS
from xsmae.data.geotiff_listing import TABLES
from xsmae.data.gsd import check_gsd
from xsmae.data.tables import PATH_COLUMNS, column_of, confined, read_table, shown
from xsmae.errors import UserError, printable

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
MASKS = (".png", ".tif", ".tiff")
IMAGES_FOLDER, MASKS_FOLDER = "images", "masks"


class Pair(NamedTuple):
    """An image and its mask.

    scene: the place that the image is a part of; None if nobody says. gsd: metres per
    pixel, from a table. sizes: bytes of both files.
    """

    id: str
    image: str
    mask: str
    scene: str | None
    gsd: float | None
    sizes: tuple[int, int]


def list_pairs(
    root: str | os.PathLike,
    *,
    images: str | None,
    masks: str | None,
    scene: str | None,
) -> tuple[pathlib.Path, list[Pair], list[str]]:
    """The folder, the pairs in order, and notes; see `MaskSource` for the arguments.

    UserError for an image without a mask, for two of one stem, for pictures and rasters
    together, and for anything wrong with a table.
    """
    path = pathlib.Path(root).expanduser().absolute()
    if path.is_file() and path.name.lower().endswith(TABLES):
        if images is not None or masks is not None:
            raise UserError(
                f"images={images}, masks={masks} with the table {path}: its columns "
                "say where the files are; leave them out"
            )
        pairs, notes, folder = _of_table(path), [], path.parent
    else:
        folder = check_folder(path)
        pairs, notes = _of_folders(
            folder, images or IMAGES_FOLDER, masks or MASKS_FOLDER
        )
    pictures = [p for p in pairs if _suffix(p.image) in PICTURES]
    if 0 < len(pictures) < len(pairs):
        raster = next(p for p in pairs if p not in pictures)
        raise UserError(
            f"{len(pictures)} images are JPEG, PNG or WebP (first "
            f"{pictures[0].image!r}) and {len(pairs) - len(pictures)} are rasters "
            f"(first {raster.image!r}); expected one kind"
        )
    if scene is not None:
        if path.is_file() and any(pair.scene is not None for pair in pairs):
            raise UserError(
                f"{path} has a column scene and scene={scene!r} is given too; remove "
                "one of them"
            )
        pairs = _with_scenes(pairs, scene)
    return folder, pairs, notes


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _of_folders(
    root: pathlib.Path, images: str, masks: str
) -> tuple[list[Pair], list[str]]:
    stems = {}
    for kind, folder, suffixes in (
        ("image", images, (*PICTURES, *RASTERS)),
        ("mask", masks, MASKS),
    ):
        if not (root / folder).is_dir():
            raise UserError(
                f"{root} has no folder {folder!r}; expected the {kind}s in it, or name "
                f"another with --config.data.{kind}s=FOLDER"
            )
        stems[kind] = _stems(root / folder, suffixes, kind)
    if not stems["image"]:
        raise UserError(
            f"no image ({', '.join((*PICTURES, *RASTERS))}) in {root / images} or its "
            "sub-folders"
        )
    missing = [stem for stem in stems["image"] if stem not in stems["mask"]]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(stems['image'])} images have no mask, the first "
            f"{printable(stems['image'][missing[0]])!r}; expected "
            f"{printable(str(root / masks / missing[0]))}.png or .tif"
        )
    pairs = []
    for stem, name in sorted(stems["image"].items()):
        image, mask = f"{images}/{name}", f"{masks}/{stems['mask'][stem]}"
        scene = stem.rpartition("/")[0] or None
        sizes = file_size(root / image), file_size(root / mask)
        pairs.append(Pair(stem, image, mask, scene, None, sizes))
    alone = sorted(stems["mask"].keys() - stems["image"].keys())
    notes = []
    if alone:
        notes = [f"{len(alone)} masks have no image, the first {printable(alone[0])!r}"]
    return pairs, notes


def _stems(folder: pathlib.Path, suffixes: tuple[str, ...], kind: str) -> dict:
    """Path below the folder without its suffix -> path with it."""
    found, seen = {}, set()
    for here, inner, files in os.walk(folder, followlinks=True):
        if os.path.realpath(here) in seen:  # a link to what was listed, or a loop
            inner.clear()
            continue
        seen.add(os.path.realpath(here))
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(files):
            if name.startswith(".") or _suffix(name) not in suffixes:
                continue
            path = os.path.relpath(os.path.join(here, name), folder)
            path = pathlib.PurePath(path).as_posix()
            stem = os.path.splitext(path)[0]
            if stem in found:
                raise UserError(
                    f"{folder} has two {kind}s of one name, {printable(found[stem])!r} "
                    f"and {printable(path)!r}; keep one"
                )
            found[stem] = path
    return found


def _of_table(table: pathlib.Path) -> list[Pair]:
    header, rows = read_table(table)
    names = (PATH_COLUMNS, ("mask",), ("scene",), ("gsd",))
    columns = [column_of(header, known) for known in names]
    if None in columns[:2]:
        raise UserError(
            f"{table} has the columns {shown(header)}; expected path and mask, and "
            "scene and gsd if you like"
        )
    root, real_root = table.parent, os.path.realpath(table.parent)
    lines: dict[str, int] = {}
    pairs = []
    for line, row in rows:
        where = f"line {line} of {table}"
        image, mask, scene, gsd = ("" if c is None else row[c] for c in columns)
        image, mask = (confined(p, root, real_root, where) for p in (image, mask))
        for name, known in ((image, (*PICTURES, *RASTERS)), (mask, MASKS)):
            if _suffix(name) not in known:
                raise UserError(
                    f"{where}: {name!r}; expected a file with one of {', '.join(known)}"
                )
        if image in lines:
            raise UserError(
                f"{where}: {image!r} is also on line {lines[image]}; list each image "
                "once"
            )
        lines[image] = line
        sizes = file_size(root / image), file_size(root / mask)
        if min(sizes) < 0:
            gone = image if sizes[0] < 0 else mask
            raise UserError(f"{where}: {gone!r} does not exist in {root}")
        found = check_gsd(gsd, where) if columns[3] is not None else None
        pairs.append(Pair(image, image, mask, scene or None, found, sizes))
    return pairs


def _with_scenes(pairs: list[Pair], pattern: str) -> list[Pair]:
    """The pairs with the scene that a pattern with one group finds in their ids."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"scene={pattern!r} is no regular expression: {error}"
        ) from None
    if compiled.groups != 1:
        raise UserError(
            f"scene={pattern!r} has {compiled.groups} groups; expected one around the "
            "part of the id that is the scene, as in '(.+)_[0-9]+'"
        )
    found = []
    for pair in pairs:
        match = compiled.fullmatch(pair.id)
        if match is None or not match[1]:
            raise UserError(
                f"scene={pattern!r} does not match the id {printable(pair.id)!r}; "
                "expected a pattern for whole ids"
            )
        found.append(pair._replace(scene=match[1]))
    return found
