"""What `xsmae check-data` does with images that have masks."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from xsmae.bands import Bands
from xsmae.data.catalogue import build_masks
from xsmae.data.mask_survey import MaskSurvey, survey_masks
from xsmae.errors import UserError, printable
from xsmae.process.files import write_json

SHOWN = 20  # entries printed of a long list; report.json has all
UNUSABLE = 3  # the exit status


def check_masks(
    config: ml_collections.ConfigDict,
    out: Path,
    samples: int,
    should_stop: Callable[[], bool],
) -> int:
    """Read both parts, print and write; returns 3 if an image or a mask is unusable."""
    parts = {"train": config.train, "test": config.test}
    if config.train.to_dict() == config.test.to_dict():
        parts = {"all": config.train}
    surveys = {name: _survey(name, data, should_stop) for name, data in parts.items()}
    first, *others = (found.source.class_names for found in surveys.values())
    if any(names != first for names in others):
        raise UserError(
            f"the training part has the classes {', '.join(first)}, the test part "
            f"{', '.join(others[0])}; expected the same: give both --data.classes=FILE"
        )
    report = describe(surveys)
    text = printable(as_text(report))
    print(text)
    pictured = next((s for s in surveys.values() if s.images), None)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "report.json", report)
        (out / "report.md").write_text(f"# Data\n\n```\n{text}\n```\n")
        if pictured is not None:
            _draw(out / "contact_sheet.png", pictured, samples)
    except OSError as error:
        raise UserError(
            f"cannot write to {out}: {error.strerror}; give another --out"
        ) from None
    sheet = "" if pictured is None else ", contact_sheet.png"
    print(f"\n{out}/report.md, report.json{sheet}")
    if report["rejected"]:
        print(
            f"xsmae: {len(report['rejected'])} images or masks cannot be used: repair "
            "or remove them",
            file=sys.stderr,
        )
        return UNUSABLE
    return 0


def describe(surveys: dict[str, MaskSurvey]) -> dict[str, Any]:
    """The findings about each part, and about what two parts share, as JSON."""
    report: dict[str, Any] = {"schema": 1, "parts": {}, "rejected": {}}
    for name, found in surveys.items():
        report["parts"][name] = _part(found)
        report["rejected"] |= {f"{name}: {k}": v for k, v in found.rejected.items()}
    if len(surveys) == 2:
        train, test = surveys.values()
        report["between"] = {
            "ground": train.overlaps(test),
            "pixels": train.identical(test),
            "scenes": sorted(train.scenes() & test.scenes()),
        }
    return report


def _part(found: MaskSurvey) -> dict[str, Any]:
    pixels = found.pixels()
    counted = pixels[:-1].sum()
    part = {
        "source": repr(found.source),
        "notes": found.source.notes(),
        "images": len(found.source),
        "classes": {
            name: {"pixels": int(n), "share": float(n / max(counted, 1))}
            for name, n in zip(found.source.class_names, pixels, strict=False)
        },
        "ignored": float(pixels[-1] / max(pixels.sum(), 1)),
    }
    for name, values in (
        ("height", [image.shape[0] for image in found.images]),
        ("width", [image.shape[1] for image in found.images]),
        ("gsd", [np.sqrt(np.prod(image.gsd)) for image in found.images]),
    ):
        if values:
            low, middle, high = np.quantile(values, (0, 0.5, 1)).tolist()
            part[name] = {"min": low, "median": middle, "max": high}
    return part


def as_text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines, parts = [], report["parts"]
    for name, part in parts.items():
        lines += [f"{name}: {part['source']}", *(f"  {n}" for n in part["notes"])]
        for field, unit in (("width", "px"), ("height", "px"), ("gsd", "m/px")):
            if field in part:
                lines.append(f"  {field:8}{_spread(part[field], unit)}")
    classes = list(next(iter(parts.values()))["classes"])
    wide = max(len(name) for name in (*classes, "ignored"))
    lines.append("shares of the labelled pixels, in %")
    lines.append(" " * (wide + 2) + "".join(f"{name:>8}" for name in parts))
    rows = {c: [p["classes"][c]["share"] for p in parts.values()] for c in classes}
    rows["ignored"] = [part["ignored"] for part in parts.values()]
    for name, shares in rows.items():
        cells = "".join(f"{100 * share:8.2f}" for share in shares)
        lines.append(f"  {name:{wide}}{cells}")
    lines[-1] += "  of all pixels"
    for name, part in parts.items():
        never = [c for c in classes if not part["classes"][c]["pixels"]]
        if never:
            lines.append(f"never in {name}: {', '.join(never)}")
    if "between" in report:
        lines += _between(report["between"])
    lines.append(f"{len(report['rejected'])} images or masks cannot be used")
    lines += _some(f"  {key}: {why}" for key, why in report["rejected"].items())
    return "\n".join(lines)


def _between(found: dict[str, Any]) -> list[str]:
    lines = []
    if found["ground"] is None:
        lines.append(
            "overlap on the ground: not known, since the images have no CRS; compared "
            "by their pixels"
        )
    else:
        lines.append(f"{len(found['ground'])} pairs of images of both parts overlap")
        lines += _some(
            f"  {one} and {other}: {share:.1%} of the smaller one"
            for one, other, share in found["ground"]
        )
    pairs = found["pixels"]
    lines.append(f"{len(pairs)} images have the pixels of a test image")
    lines += _some(f"  {one} = {other}" for one, other in pairs)
    lines.append(f"{len(found['scenes'])} scenes are in both parts")
    return lines + _some(f"  {scene}" for scene in found["scenes"])


def _spread(found: dict[str, float], unit: str) -> str:
    text = f"{found['median']:g} {unit}"
    if found["min"] != found["max"]:
        text += f" (median), from {found['min']:g} to {found['max']:g}"
    return text


def _some(lines: Any) -> list[str]:
    lines = list(lines)
    more = len(lines) - SHOWN
    return lines[:SHOWN] + ([f"  and {more} more: report.json"] if more > 0 else [])


def _survey(name: str, data: Any, should_stop: Callable[[], bool]) -> MaskSurvey:
    try:
        source = build_masks(data.to_dict())
    except UserError as error:
        raise UserError(str(error).replace("--config.data.", "--data.")) from None
    start = last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 5 or done == total:
            last = now
            speed = done / max(now - start, 1e-9)
            print(f"{name}: {done}/{total}, {speed:.1f} images/s", flush=True)

    return survey_masks(source, progress=progress, should_stop=should_stop)


def _draw(path: Path, found: MaskSurvey, samples: int) -> None:
    from xsmae.figures.mask_sheet import mask_sheet

    rows = np.linspace(0, len(found.images) - 1, min(samples, len(found.images)))
    chosen = [found.images[row].index for row in rows.round().astype(int)]
    source = found.source
    bands = Bands(source.bands, *found.statistics(), dtype=source.dtype)
    mask_sheet(path, source, chosen, bands)
