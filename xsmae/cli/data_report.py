"""The report of `xsmae check-data`: what it says, as JSON and as text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xsmae.data.geotiff_source import GeotiffSource
from xsmae.data.records import Source
from xsmae.data.sensors import find_sensor
from xsmae.data.survey import PERCENTILES, Survey, settings_of
from xsmae.errors import UserError

SHOWN = 20  # entries printed of a long list; report.json has all
# Normalised values are far from zero mean and unit variance beyond these.
FAR_MEAN, FAR_STD = 0.5, 2.0
# Whose statistics they are, mean and std of each band.
Known = tuple[str, Sequence[float], Sequence[float]]
COLUMNS = ("min", *(f"p{p}" for p in PERCENTILES), "max", "mean", "std", "valid")


def describe(parts: dict[str, Survey]) -> dict[str, Any]:
    """The findings about `data`, and about `test` if there is one, as JSON."""
    data, test = parts["data"], parts.get("test")
    held_out = ids_of(test)
    counted = data.counted(held_out)
    report = {"schema": 1, "source": repr(data.source), "images": len(data.source)}
    report["notes"] = data.source.notes()
    for name, values in (
        ("height", [image.shape[0] for image in data.images]),
        ("width", [image.shape[1] for image in data.images]),
        ("gsd", [image.gsd for image in data.images]),
    ):
        low, middle, high = np.quantile(values, (0, 0.5, 1)).tolist()
        report[name] = {"min": low, "median": middle, "max": high}
    report["classes"] = data.classes()
    report["units"] = data.source.units
    report["bands"] = data.bands(held_out) if counted else {}
    report["mean"], report["std"] = (
        data.statistics(held_out) if counted else (None, None)
    )
    report["statistics_of"] = len(counted)
    report["identical"] = data.identical()
    if test:
        report["test"] = {"source": repr(test.source), "classes": test.classes()}
        pairs = data.also_in(test)
        report["identical_in_test"] = [p for p in pairs if p[0] not in held_out]
    report["rejected"] = {
        f"{name}: {key}": reason
        for name, part in parts.items()
        for key, reason in part.rejected.items()
    }
    if isinstance(data.source, GeotiffSource):
        report["rejected_rasters"] = dict(data.source.index.rejected)
    report["warnings"] = []
    return report


def ids_of(part: Survey | None) -> set[str]:
    """The ids of all images of a part, those that cannot be used too."""
    return {part.source.id(i) for i in range(len(part.source))} if part else set()


def known_statistics(source: Source, config: Mapping[str, Any]) -> Known | None:
    """The config's mean and std, or else those published for the sensor.

    UserError unless there is one number per band.
    """
    mean, std = config.get("mean"), config.get("std")
    if mean is not None and std is not None:
        for name, numbers in (("mean", mean), ("std", std)):
            if len(numbers) != len(source.bands):
                raise UserError(
                    f"{name} has {len(numbers)} values, expected {len(source.bands)}, "
                    f"one per band: {', '.join(source.bands)}"
                )
        return "the mean and std given", mean, std
    sensor = find_sensor(config["data"].get("sensor"))
    if sensor is None or sensor.mean is None:
        return None
    if not set(source.bands) <= set(sensor.bands):
        return None
    places = [sensor.bands.index(band) for band in source.bands]
    mean, std = ([numbers[i] for i in places] for numbers in (sensor.mean, sensor.std))
    return f"the mean and std published for {sensor.name}", mean, std


def misfits(
    bands: Mapping[str, Mapping[str, float]],
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, tuple[float, float]]:
    """Band -> mean and std of its normalised values, if they are far from 0 and 1."""
    found = {}
    for (name, row), centre, spread in zip(bands.items(), mean, std, strict=True):
        normalised = (row["mean"] - centre) / spread, row["std"] / spread
        if abs(normalised[0]) > FAR_MEAN or not (
            1 / FAR_STD <= normalised[1] <= FAR_STD
        ):
            found[name] = normalised
    return found


def warning_of(whose: str, found: Mapping[str, tuple[float, float]]) -> str:
    """One line: which bands are far off, by how much, and what to do."""
    bands = ", ".join(
        f"{name} mean {mean:.2f} std {std:.2f}" for name, (mean, std) in found.items()
    )
    return (
        f"values normalised with {whose} are far from mean 0 and std 1: {bands}; check "
        "sensor, scale and offset, or train with --config.mean and --config.std below"
    )


def command_of(
    name: str,
    config: Mapping[str, Any],
    fields: Mapping[str, Sequence[str]],
    source: Source,
    statistics: tuple[Sequence[float], Sequence[float]],
) -> tuple[list[str], list[str]]:
    """The command that pretrains on these images, one flag a line; and warnings.

    name: of the config. fields: the arguments --data.FIELD=VALUE, and those of the
    parts.
    """
    lines, warnings = [f"xsmae pretrain --config={shlex.quote(name)}"], []
    for part, arguments in fields.items():
        prefix = part if part == "data" else f"knn.{part}"
        for argument in arguments:
            flag, equals, value = argument.partition("=")
            no, field = re.fullmatch(rf"--?(no)?{part}[.](.*)", flag).groups("")
            if part != "data" and field not in config["knn"][part]:
                warnings.append(
                    f"{flag} is left out of the command: a run has no field "
                    f"{prefix}.{field}"
                )
                continue
            flag = f"--{no}config.{prefix}.{field}"
            lines.append(flag + (f"={shlex.quote(value)}" if equals else ""))
    if source.dtype != "uint8":
        lines.append(f"--config.bands={_quoted(repr(source.bands))}")
    for name, numbers in settings_of(*statistics, source.dtype).items():
        shown = [f"{x:.4f}" if source.dtype == "uint8" else f"{x:.6g}" for x in numbers]
        last = "," if len(shown) == 1 else ""  # as Python writes a tuple
        lines.append(f"--config.{name}='({', '.join(shown)}{last})'")
    return lines, warnings


def _quoted(text: str) -> str:
    """Text with single quotes for a shell, readable where it can be."""
    return shlex.quote(text) if set('"$`\\!') & set(text) else f'"{text}"'


def as_text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = [report["source"], *report["notes"]]
    if "test" in report:
        lines.append(f"test: {report['test']['source']}")
    for name, unit in (("width", "px"), ("height", "px"), ("gsd", "m/px")):
        found = report[name]
        spread = f"{found['median']:g} {unit}"
        if found["min"] != found["max"]:
            spread += f" (median), from {found['min']:g} to {found['max']:g}"
        lines.append(f"{name:8}{spread}")
    if report["bands"]:
        lines += _table(report)
    classes = report["classes"]
    if classes:
        low, high = min(classes.values()), max(classes.values())
        several = f"{low} to {high}" if low < high else f"{low}"
        lines.append(f"{len(classes)} classes of {several} images")
        lines += _some(f"  {count:7} {name}" for name, count in classes.items())
    groups = report["identical"]
    lines.append(f"{len(groups)} groups of images with the same pixels")
    lines += _some("  " + " = ".join(ids[:SHOWN]) for ids in groups)
    if "test" in report:
        pairs = report["identical_in_test"]
        lines.append(f"{len(pairs)} images have the pixels of a test image")
        lines += _some(f"  {one} = {other}" for one, other in pairs)
    if report.get("rejected_rasters"):
        lines.append(f"{len(report['rejected_rasters'])} rasters cannot be used")
        lines += _some(f"  {k}: {why}" for k, why in report["rejected_rasters"].items())
    if report.get("without_place"):
        lines.append(f"{len(report['without_place'])} rasters have no place on a map")
        lines += _some(f"  {k}: {why}" for k, why in report["without_place"].items())
    lines.append(f"{len(report['rejected'])} images cannot be used")
    lines += _some(f"  {key}: {reason}" for key, reason in report["rejected"].items())
    lines += [f"warning: {text}" for text in report["warnings"]]
    if report.get("command"):
        lines += ["to train on them:", ""]
        lines.append(" \\\n    ".join(report["command"]))
    return "\n".join(lines)


def _table(report: dict[str, Any]) -> list[str]:
    """min, percentiles, max, mean, std and valid part of each band."""
    outside = " outside the test part" if "test" in report else ""
    width = max(len(name) for name in ("band", *report["bands"]))
    heads = [f"{name[1:]}%" if name[0] == "p" else name for name in COLUMNS]
    lines = [
        f"valid pixels of {report['statistics_of']} images{outside}, in "
        f"{report['units']}:",
        f"  {'band':{width}}" + "".join(f"{head:>10}" for head in heads),
    ]
    for band, row in report["bands"].items():
        cells = [f"{row[n]:.1%}" if n == "valid" else _number(row[n]) for n in COLUMNS]
        lines.append(f"  {band:{width}}" + "".join(f"{cell:>10}" for cell in cells))
    return lines


def _number(value: float) -> str:
    """Four digits; whole numbers up to a million."""
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.4g}"


def _some(lines: Any) -> list[str]:
    lines = list(lines)
    more = len(lines) - SHOWN
    return lines[:SHOWN] + ([f"  and {more} more: report.json"] if more > 0 else [])
