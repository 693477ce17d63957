"""The image sizes of an evaluation, and the GSD that the encoder gets for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from xsmae.data.records import Source
from xsmae.errors import BadImageError, UserError
from xsmae.evaluation.features import spread
from xsmae.evaluation.rows import CROP

SCALES = (12.5, 25.0, 50.0, 100.0)  # percent; Scale-MAE, Reed et al. 2023
BASE_SIZE = 256  # pixels; also Scale-MAE
GSD_POLICIES = ("true", "fixed")
PROBES = 32  # images that are read to find the usual size


@dataclasses.dataclass(frozen=True)
class Scale:
    """One image size of an evaluation.

    percent: of the base size. size: pixels. gsd_factor: the GSD after resizing is
    multiplied by this before the encoder gets it; 1 except for the policy `fixed`.
    resized: the pixels to which the whole square is resized, if its central `size`
    pixels are cut then; None if the whole square is resized to `size`.
    """

    percent: float
    size: int
    gsd_factor: float
    resized: int | None = None


def base_size(source: Source) -> int:
    """256 px, or the images' side if that is smaller."""
    return min(BASE_SIZE, usual_side(source))


def usual_side(source: Source) -> int:
    """The shorter side of the images: the median of a few."""
    sides = []
    for index in spread(len(source), PROBES):
        try:
            sides.append(min(source[int(index)].image.shape[:2]))
        except BadImageError:
            continue
    if not sides:
        raise UserError(
            f"none of {PROBES} images of {source!r} can be used, expected at least 1: "
            "give other images"
        )
    return int(np.median(sides))


def create_scales(
    percents: Sequence[float], *, base: int, patch_size: int, gsd_policy: str = "true"
) -> list[Scale]:
    """`percents` of `base` pixels, rounded to multiples of the patch size.

    gsd_policy: `true` gives the encoder the GSD of each scale; `fixed` gives it the GSD
    of 100 % at every scale. Raises UserError if a scale is out of range, is smaller
    than one patch or has the same size as another.
    """
    check_percents(percents, gsd_policy)
    sizes = {p: p / 100 * base for p in percents}
    small = [p for p in percents if sizes[p] < patch_size]
    if small:
        raise UserError(
            f"a scale of {small[0]:g} % of {base} px is {sizes[small[0]]:g} px, "
            f"expected at least one patch of {patch_size} px: remove it from scales, "
            "give a larger base_size, or an encoder with a smaller patch"
        )
    sizes = {p: _multiple(size, patch_size) for p, size in sizes.items()}
    if len(set(sizes.values())) < len(percents):
        text = ", ".join(f"{p:g} % is {s} px" for p, s in sizes.items())
        raise UserError(
            f"two scales have the same size ({text}, in patches of {patch_size} px): "
            "remove one of them from scales"
        )
    # The size of 100 %, even if 100 % is not evaluated.
    whole = _multiple(base, patch_size)
    return [
        Scale(p, s, s / whole if gsd_policy == "fixed" else 1.0)
        for p, s in sizes.items()
    ]


def check_percents(percents: Sequence[float], gsd_policy: str) -> None:
    """Raise UserError for scales out of range, or for an unknown policy."""
    if gsd_policy not in GSD_POLICIES:
        raise UserError(f"gsd={gsd_policy}, expected one of {', '.join(GSD_POLICIES)}")
    wrong = [p for p in percents if not 0 < p <= 1000]
    if wrong or not percents:
        raise UserError(
            f"scales={','.join(map(str, wrong)) or '(none)'}, expected percent above 0 "
            "and up to 1000, such as 12.5,25,50,100"
        )


def create_several(percents: Sequence[float], **how) -> list[Scale]:
    """`create_scales`, for an evaluation across scales, which needs two or more."""
    if len(percents) < 2:
        raise UserError(
            f"scales={','.join(f'{p:g}' for p in percents) or '(none)'}, expected 2 or "
            "more to measure across scales, such as 12.5,25,50,100"
        )
    return create_scales(percents, **how)


def _multiple(size: float, patch_size: int) -> int:
    """The nearest multiple of the patch size, at least one patch; halves round up."""
    return max(1, int(size / patch_size + 0.5)) * patch_size


@dataclasses.dataclass(frozen=True)
class Sizing:
    """How a task chooses the sizes of its images.

    percents: the scales if none are given. base_size(source): pixels at 100 %.
    create_scales: that function, or another one with its arguments. resize, crop: see
    `rows.Protocol`; resize None: as in other evaluations.
    """

    percents: tuple[float, ...] = (100.0,)
    base_size: Callable[[Source], int] = base_size
    create_scales: Callable[..., list[Scale]] = create_scales
    resize: str | None = None
    crop: str = CROP


USUAL = Sizing()
