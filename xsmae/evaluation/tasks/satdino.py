"""The sizes and the normalisation of SatDINO's kNN (arXiv 2508.21402).

The paper's description leaves details open. They are decided as in its published code,
satdino/eval_knn.py:

- 100 % is the images' own side, of the data set: the median of some training images.
- A crop is scale x side, rounded, then rounded down to whole patches, but at least one
  patch. So two scales of small images may have equal sizes; both count in the average.
- The shorter side is resized to round(crop x 256 / 224) px, so a crop shows the central
  7/8 of the side at every scale. Resizing is bicubic with antialiasing.
- The feature is the class token after the final norm, if the encoder has one. k is 20,
  the temperature 0.07. The headline is the average over 12.5, 25, 50 and 100 %.

Decided here, because neither says it:

- Mean and standard deviation of each band are those of the training images, so that the
  test images decide nothing: of up to `MEASURED` evenly spaced ones.
- An encoder that reads the GSD gets that of the resized image.
- Controls see the same crops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from xsmae.errors import UserError
from xsmae.evaluation.parts import Parts
from xsmae.evaluation.scales import (
    SCALES,
    Scale,
    Sizing,
    check_percents,
    usual_side,
)
from xsmae.evaluation.subjects import FrozenEncoder, measured
from xsmae.evaluation.variants import normalized_by

K, TEMPERATURE = 20, 0.07
MEASURED = 4096  # images
RESIZED, CROPPED = 256, 224  # px, as in evaluations on ImageNet


def create_satdino_scales(
    percents: Sequence[float], *, base: int, patch_size: int, gsd_policy: str = "true"
) -> list[Scale]:
    """The crops of the scales, like `scales.create_scales`; base: px at 100 %."""
    check_percents(percents, gsd_policy)
    if len(set(percents)) < len(percents):
        raise UserError(
            f"scales={','.join(f'{p:g}' for p in percents)}, expected each scale once"
        )

    def sizes(percent: float) -> tuple[int, int]:
        crop = max(1, round(percent / 100 * base) // patch_size) * patch_size
        return crop, round(crop * RESIZED / CROPPED)

    _, whole = sizes(100)
    scales = []
    for percent in percents:
        crop, resized = sizes(percent)
        factor = resized / whole if gsd_policy == "fixed" else 1.0
        scales.append(Scale(percent, crop, factor, resized))
    return scales


SIZING = Sizing(
    percents=SCALES,
    base_size=usual_side,
    create_scales=create_satdino_scales,
    resize="bicubic (Pillow), with antialiasing",
    crop=f"central {CROPPED}/{RESIZED} of the largest central square",
)


def check_8_bit(parts: Parts) -> None:
    """Raise UserError for rasters, which SatDINO does not read."""
    if parts.train.dtype != "uint8":
        raise UserError(
            f"{parts.name} has {parts.train.dtype} rasters, but SatDINO's protocol is "
            "for 8-bit images: use the standard protocol of kNN"
        )


def normalize_by_data(
    parts: Parts, should_stop: Callable[[], bool]
) -> Callable[[FrozenEncoder], FrozenEncoder]:
    """Makes encoders normalise by mean and standard deviation of the training images.

    Pixel controls stay as they are.
    """

    @functools.cache
    def statistics() -> dict[str, list[float]]:
        train = parts.train
        return measured(train, train.bands, most=MEASURED, should_stop=should_stop)

    def adapt(encoder: FrozenEncoder) -> FrozenEncoder:
        if encoder.weights is None:
            return encoder
        return normalized_by(encoder, **statistics())

    return adapt
