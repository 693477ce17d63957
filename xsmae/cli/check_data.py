"""xsmae check-data --data=folder --data.root=DIR --data.gsd=0.5

Reads every image as pretraining would, prints counts, sizes, GSDs, classes, mean and
standard deviation, duplicates and unusable images, and writes a report and a contact
sheet to --out. The exit status is 3 if too many images are unusable for pretraining.

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

from xsmae.bands import Bands
from xsmae.cli.arguments import parse_flags
from xsmae.cli.check_masks import check_masks
from xsmae.cli.command import run, stoppable
from xsmae.cli.evaluation import define_data, parts_of, split_parts
from xsmae.data.catalogue import MASK_SOURCES, build_source
from xsmae.data.pipeline import allowed_rejections
from xsmae.data.survey import Survey, survey
from xsmae.errors import UserError, printable
from xsmae.process.files import write_json
from xsmae.run.workdir import check_outside_data

SHOWN = 20  # entries printed of a long list; report.json has all
TOO_MANY = 3


def define_flags(values: flags.FlagValues) -> None:
    """The flags of this command."""
    define_data(values)
    flags.DEFINE_string(
        "out", "data_report", "The folder of the report.", flag_values=values
    )
    flags.DEFINE_integer(
        "samples", 24, "Images on the contact sheet, evenly spaced.", flag_values=values
    )


def check(argv: list[str], should_stop: Callable[[], bool]) -> int:
    """Read, print and write; returns 3 if too many images are unusable for training."""
    fields, rest = split_parts(argv)
    values = flags.FlagValues()
    define_flags(values)
    parse_flags(values, rest)
    config = parts_of(values, fields, doc=__doc__)
    if values.samples < 1:
        raise UserError(f"samples={values.samples}, expected 1 or more")
    out = Path(values.out)
    check_outside_data(out, config.data, flag="--out")
    if config.data.source in MASK_SOURCES:
        return check_masks(config, out, values.samples, should_stop)
    parts = {"data": _survey("data", config.data, should_stop)}
    # Without labels nothing is measured, so there is no test part unless it is given.
    wanted = parts["data"].source.class_names or fields["test"]
    if wanted and config.test.to_dict() != config.data.to_dict():
        parts["test"] = _survey("test", config.test, should_stop)
    if not parts["data"].images:
        raise UserError(
            f"no image of {parts['data'].source!r} can be read, e.g. {_first(parts)}: "
            "give other images with --data.root"
        )
    report = describe(parts)
    # Not by id, because a mix may repeat a record.
    rejected = len(parts["data"].source) - len(parts["data"].images)
    allowed = allowed_rejections(
        len(parts["data"].source), config.input.max_rejected_fraction
    )
    report["too_many_rejected"] = rejected > allowed
    text = printable(as_text(report))
    print(text)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "report.json", report)
        (out / "report.md").write_text(f"# Data\n\n```\n{text}\n```\n")
        _draw(out / "contact_sheet.png", parts["data"], values.samples)
    except OSError as error:
        raise UserError(
            f"cannot write to {out}: {error.strerror}; give another --out"
        ) from None
    print(f"\n{out}/report.md, report.json, contact_sheet.png")
    if report["too_many_rejected"]:
        print(
            f"xsmae: {rejected} of {report['images']} images cannot be used, and "
            f"training stops at more than {allowed}: repair or remove them, or raise "
            "--config.input.max_rejected_fraction in training",
            file=sys.stderr,
        )
        return TOO_MANY
    return 0


def describe(parts: dict[str, Survey]) -> dict[str, Any]:
    """The findings about `data`, and about `test` if there is one, as JSON."""
    data, test = parts["data"], parts.get("test")
    held_out = {test.source.id(i) for i in range(len(test.source))} if test else set()
    counted = [i for i in data.images if data.source.id(i.index) not in held_out]
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
    return report


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
    if report["mean"]:
        outside = " outside the test part" if "test" in report else ""
        lines.append(f"from {report['statistics_of']} images{outside}:")
        for name in ("mean", "std"):
            numbers = ", ".join(f"{value:.4f}" for value in report[name])
            lines.append(f"  --config.{name}='({numbers})'")
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
    lines.append(f"{len(report['rejected'])} images cannot be used")
    lines += _some(f"  {key}: {reason}" for key, reason in report["rejected"].items())
    return "\n".join(lines)


def _survey(name: str, data: Any, should_stop: Callable[[], bool]) -> Survey:
    try:
        source = build_source(data.to_dict())
    except UserError as error:
        raise UserError(str(error).replace("--config.data.", f"--{name}.")) from None
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

    return survey(source, progress=progress, should_stop=should_stop)


def _some(lines: Any) -> list[str]:
    lines = list(lines)
    more = len(lines) - SHOWN
    return lines[:SHOWN] + ([f"  and {more} more: report.json"] if more > 0 else [])


def _first(parts: dict[str, Survey]) -> str:
    key, reason = next(iter(parts["data"].rejected.items()))
    return f"{key}: {reason}"


def _draw(path: Path, data: Survey, samples: int) -> None:
    from xsmae.figures.contact_sheet import contact_sheet

    rows = np.linspace(0, len(data.images) - 1, min(samples, len(data.images)))
    chosen = [data.images[row].index for row in rows.round().astype(int)]
    source = data.source
    bands = Bands(source.bands, *data.statistics(), dtype=source.dtype)
    contact_sheet(path, [source[i] for i in chosen], source.class_names, bands)


def main(argv: list[str] | None = None) -> int:
    """Run `xsmae check-data`; returns the exit status."""
    return run(stoppable(check), argv, doc=__doc__, sections={"Flags": define_flags})
