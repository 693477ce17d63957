"""xsmae check-data --data=folder --data.root=DIR --data.gsd=0.5

Reads every image as pretraining would, and prints counts, sizes, GSDs, classes, values
of bands, duplicates, unusable images and the command that trains on them. Writes a
report, a contact sheet, histograms and, for rasters, a map of their footprints.

The exit status is 3 if too many images are unusable for pretraining.

For images with masks (--data=segmentation), prints the share of each class in both
parts, and what the parts share: ground, pixels, scenes. The exit status is 3 if an
image or a mask is unusable.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from xsmae.bands import Bands
from xsmae.cli.arguments import parse_flags
from xsmae.cli.check_masks import check_masks
from xsmae.cli.command import run, stoppable
from xsmae.cli.data_report import (
    Known,
    as_text,
    command_of,
    describe,
    ids_of,
    known_statistics,
    misfits,
    warning_of,
)
from xsmae.cli.evaluation import define_data, parts_of, split_parts
from xsmae.config import flatten, override, ranges_of
from xsmae.data.catalogue import MASK_SOURCES, build_source
from xsmae.data.footprints import find_footprints
from xsmae.data.geotiff_kinds import kinds_of_rasters
from xsmae.data.geotiff_source import GeotiffSource
from xsmae.data.pipeline import allowed_rejections
from xsmae.data.raster_options import OPTIONS
from xsmae.data.records import Source
from xsmae.data.sensors import find_sensor
from xsmae.data.survey import Survey, settings_of, survey
from xsmae.errors import UserError, printable
from xsmae.process.files import write_json
from xsmae.ranges import check_numbers
from xsmae.run.workdir import check_outside_data

TOO_MANY = 3
PIXELS = 2**20  # that percentiles and histograms are of
NAMES = 3  # rasters of a kind that are named


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    define_data(values)
    flags.DEFINE_string(
        "out", "data_report", "The folder of the report.", flag_values=values
    )
    flags.DEFINE_integer(
        "samples", 24, "Images on the contact sheet, evenly spaced.", flag_values=values
    )
    flags.DEFINE_list(
        "colours",
        None,
        "Three bands that the contact sheet shows as red, green and blue, such as "
        "B08,B04,B03. Default: true colour where the bands are known.",
        flag_values=values,
    )
    for name in ("mean", "std"):
        flags.DEFINE_string(
            name,
            None,
            f"Numbers as in --config.{name} of a run, to see if they fit. Default: "
            "those of --data, or those published for the sensor.",
            flag_values=values,
        )


def check(argv: list[str], should_stop: Callable[[], bool]) -> int:
    """Read, print and write; returns 3 if too many images are unusable for training."""
    fields, rest = split_parts(argv)
    values = flags.FlagValues()
    define_flags(values)
    parse_flags(values, rest)
    config = _with_statistics(parts_of(values, fields, doc=__doc__), values)
    if values.samples < 1:
        raise UserError(f"samples={values.samples}, expected 1 or more")
    out = Path(values.out)
    check_outside_data(out, config.data, flag="--out")
    if config.data.source in MASK_SOURCES:
        return check_masks(config, out, values.samples, should_stop)
    source = _open("data", config.data, should_stop)
    _check_colours(values.colours, source)
    known = known_statistics(source, config)
    parts = {"data": _read("data", source, should_stop)}
    # Without labels nothing is measured, so there is no test part unless it is given.
    wanted = source.class_names or fields["test"]
    if wanted and config.test.to_dict() != config.data.to_dict():
        test = _open("test", config.test, should_stop)
        parts["test"] = _read("test", test, should_stop)
    if not parts["data"].counted():
        raise UserError(
            f"no image of {source!r} can be read, e.g. {_first(parts)}: "
            "give other images with --data.root"
        )
    report = describe(parts)
    if report["bands"]:
        _compare(report, known)
        measured = report["mean"], report["std"]
        report["command"], more = command_of(
            values.data, config, fields, source, measured
        )
        report["warnings"] += more
    # Not by id, because a mix may repeat a record.
    rejected = len(source) - len(parts["data"].images)
    allowed = allowed_rejections(len(source), config.input.max_rejected_fraction)
    report["too_many_rejected"] = rejected > allowed
    try:
        out.mkdir(parents=True, exist_ok=True)
        drawn = _draw(out, parts, values, config, report)
        text = printable(as_text(report))
        print(text)
        write_json(out / "report.json", report)
        (out / "report.md").write_text(f"# Data\n\n```\n{text}\n```\n")
    except OSError as error:
        raise UserError(
            f"cannot write to {out}: {error.strerror}; give another --out"
        ) from None
    print(f"\n{out}/report.md, report.json, {', '.join(drawn)}")
    if report["too_many_rejected"]:
        print(
            f"xsmae: {rejected} of {report['images']} images cannot be used, and "
            f"training stops at more than {allowed}: repair or remove them, or raise "
            "--config.input.max_rejected_fraction in training",
            file=sys.stderr,
        )
        return TOO_MANY
    return 0


def _with_statistics(config: ConfigDict, values: flags.FlagValues) -> ConfigDict:
    """The config with --mean and --std, if they are given."""
    given = [name for name in ("mean", "std") if values[name].value is not None]
    if len(given) == 1:
        raise UserError(f"only --{given[0]} is given, expected --mean and --std")
    try:
        changes = [f"--config.{name}={values[name].value}" for name in given]
        config = override(config, changes, "config")
        check_numbers(flatten(config.to_dict()), ranges_of(config))
    except UserError as error:
        raise UserError(str(error).replace("--config.", "--")) from None
    return config


def _check_colours(colours: list[str] | None, source: Source) -> None:
    if colours is None:
        return
    if source.dtype == "uint8":
        raise UserError(
            "--colours is for rasters, 8-bit images are shown as they are: leave it out"
        )
    if len(colours) != 3 or not set(colours) <= set(source.bands):
        raise UserError(
            f"--colours={','.join(colours)}, expected three of {','.join(source.bands)}"
        )


def _open(name: str, data: Any, should_stop: Callable[[], bool]) -> Source:
    try:
        return build_source(data.to_dict())
    except UserError as error:
        if data.source == "geotiff" and data.root:
            _print_kinds(data.to_dict(), should_stop)
        raise UserError(str(error).replace("--config.data.", f"--{name}.")) from None


def _read(name: str, source: Source, should_stop: Callable[[], bool]) -> Survey:
    start = last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 5 or done == total:
            last = now
            print(
                f"{name}: {done}/{total}, {done / (now - start):.0f} images/s",
                flush=True,
            )

    return survey(source, pixels=PIXELS, progress=progress, should_stop=should_stop)


def _print_kinds(data: dict[str, Any], should_stop: Callable[[], bool]) -> None:
    """What rasters there are, and what stops each kind, where they do not fit."""
    options = {n: data[n] for n in OPTIONS if data.get(n) is not None}
    try:
        kinds = kinds_of_rasters(data["root"], should_stop=should_stop, **options)
    except UserError:
        return  # there are none
    if len(kinds) < 2:
        return
    total = sum(len(kind.names) for kind in kinds)
    print(f"{total} rasters of {len(kinds)} kinds; one run takes one kind:")
    for kind in kinds:
        named = ", ".join(kind.names[:NAMES])
        named += ", ..." if len(kind.names) > NAMES else ""
        what = kind.problem or f"usable, bands {','.join(kind.bands)}"
        print(printable(f"  {len(kind.names)}: {what} ({named})"))


def _compare(report: dict[str, Any], known: Known | None) -> None:
    """Add a warning where known statistics do not fit the values."""
    if known is None:
        return
    whose, mean, std = known
    report["normalised"] = {"with": whose, "mean": [*mean], "std": [*std]}
    found = misfits(report["bands"], mean, std)
    if found:
        report["warnings"].append(warning_of(whose, found))


def _first(parts: dict[str, Survey]) -> str:
    nothing = parts["data"].source.id(0), "no pixel has a value"
    key, reason = next(iter(parts["data"].rejected.items()), nothing)
    return f"{key}: {reason}"


def _draw(
    out: Path,
    parts: dict[str, Survey],
    values: flags.FlagValues,
    config: ConfigDict,
    report: dict[str, Any],
) -> list[str]:
    """Draw the pictures; returns their names. The report gets the footprints."""
    from xsmae.figures.contact_sheet import contact_sheet
    from xsmae.figures.footprints import footprints_map
    from xsmae.figures.histograms import histograms

    data, held_out = parts["data"], ids_of(parts.get("test"))
    source = data.source
    if not report["bands"]:
        held_out = set()  # the images are drawn, even if all are of the test part
    bands = Bands.of(
        {
            "bands": source.bands,
            "units": source.units,
            "dtype": source.dtype,
            **settings_of(*data.statistics(held_out), source.dtype),
        }
    )
    rows = np.linspace(0, len(data.images) - 1, min(values.samples, len(data.images)))
    chosen = [data.images[row].index for row in rows.round().astype(int)]
    contact_sheet(
        out / "contact_sheet.png",
        [source[i] for i in chosen],
        source.class_names,
        bands,
        values.colours,
    )
    sensor = find_sensor(config.data.get("sensor"))
    lengths = (
        {}
        if sensor is None
        else dict(zip(sensor.bands, sensor.wavelengths, strict=True))
    )
    histograms(
        out / "histograms.png",
        data.pixels(held_out),
        bands,
        [lengths.get(band) for band in source.bands],
    )
    drawn = ["contact_sheet.png", "histograms.png"]
    if isinstance(source, GeotiffSource):
        found, missing = find_footprints(source, held_out)
        report["footprints"] = {f.name: f.box for f in found}
        report["without_place"] = missing
        if found:
            footprints_map(out / "footprints.png", found, missing)
            drawn.append("footprints.png")
    return drawn


def main(argv: list[str] | None = None) -> int:
    """Run `xsmae check-data`; returns the exit status."""
    return run(stoppable(check), argv, doc=__doc__, sections={"Flags": define_flags})
