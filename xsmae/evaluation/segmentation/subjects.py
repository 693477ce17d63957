"""The encoders and controls of an evaluation of segmentation."""

from __future__ import annotations

import dataclasses

import ml_collections

from xsmae.configs import common
from xsmae.errors import UserError
from xsmae.evaluation.evaluate import Subject, subject_of
from xsmae.evaluation.reading import Kind, read_by
from xsmae.evaluation.segmentation.heads import STATISTICS_SIDE, Head
from xsmae.evaluation.segmentation.parts import MaskParts
from xsmae.evaluation.subjects import FrozenEncoder, pixel_control, random_encoder


def subject_of_masks(
    encoder: Subject,
    parts: MaskParts,
    *,
    config: ml_collections.ConfigDict | None,
    name: str | None,
    **how,
) -> FrozenEncoder:
    """The encoder or control to measure, for the images of `parts`.

    how: `seed` and `missing_bands` of `evaluate`. Raises UserError if it does not
    fit.
    """
    if encoder == "thumbnail":
        raise UserError(
            "encoder=thumbnail has one feature per image, segmentation needs one per "
            "pixel: give statistics or another encoder"
        )
    if encoder == "statistics":
        return _statistics(parts, name)
    if config is not None and parts.train.dtype == "uint8":
        # The config of segmentation is for rasters; pictures are read as usual.
        config = config.copy_and_resolve_references()
        for field in ("dtype", "units", "wavelengths"):
            if field in config:
                del config[field]
        config.bands = common.get_common("corrected", "base").bands
    return subject_of(encoder, source=parts.train, config=config, name=name, **how)


def _statistics(parts: MaskParts, name: str | None = None) -> FrozenEncoder:
    """The control that knows the values around each pixel and no network."""
    side = f"{STATISTICS_SIDE} x {STATISTICS_SIDE} px"
    control = pixel_control("statistics")
    reading = read_by(
        "statistics", parts.bands, Kind.of(parts.train), missing_bands="refuse"
    )
    return dataclasses.replace(
        control,
        name=name or f"statistics (mean, std, min, max in {side})",
        digest=f"{control.digest[:12]}{STATISTICS_SIDE:04}",
        reading=reading,
    )


def controls_of(
    encoder: FrozenEncoder, parts: MaskParts, head: Head, seed: int, missing_bands: str
) -> list[FrozenEncoder]:
    """What is measured alongside: random weights and, for linear, statistics."""
    found = []
    if encoder.kind == "encoder":
        how = {"missing_bands": missing_bands, "source": parts.train}
        found.append(random_encoder(encoder.info, seed=seed, **how))
    if head.name == "linear" and encoder.kind != "statistics":
        found.append(_statistics(parts))
    return found
