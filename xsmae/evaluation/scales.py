"""The sizes at which images are evaluated, and the GSD that an encoder is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from xsmae.data.records import Source
from xsmae.errors import BadImageError, UserError
from xsmae.evaluation.features import spread

SCALES = (12.5, 25.0, 50.0, 100.0)  # percent; Scale-MAE, Reed et al. 2023
BASE_SIZE = 256  # pixels, as there
GSD_POLICIES = ("true", "fixed")
PROBES = 32  # images looked at for their size


@dataclasses.dataclass(frozen=True)
class Scale:
    """One size of evaluation.

    percent: of the base size. size: pixels. gsd_factor: by what the GSD after resizing
    is multiplied before the encoder is told it, 1 but for the policy `fixed`.
    """

    percent: float
    size: int
    gsd_factor: float


def base_size(source: Source) -> int:
    """256 px, or the images' own side where that is less: the median of a few."""
    sides = []
    for index in spread(len(source), PROBES):
        try:
            sides.append(min(source[int(index)].image.shape[:2]))
        except BadImageError:
            continue
    if not sides:
        raise UserError(
            f"none of the {PROBES} images looked at of {source!r} can be used: give "
            "other images"
        )
    return min(BASE_SIZE, int(np.median(sides)))


def create_scales(
    percents: Sequence[float], *, base: int, patch_size: int, gsd_policy: str = "true"
) -> list[Scale]:
    """The sizes of `percents` of `base` pixels, to the nearest multiple of the patch.

    gsd_policy: `true`, each scale's own GSD; `fixed`, at every scale that of 100 %.
    Raises UserError where a scale is less than one patch, repeats another one's size,
    or makes no sense.
    """
    if gsd_policy not in GSD_POLICIES:
        raise UserError(f"gsd={gsd_policy}, expected one of {', '.join(GSD_POLICIES)}")
    wrong = [p for p in percents if not 0 < p <= 1000]
    if wrong or not percents:
        raise UserError(
            f"scales={','.join(map(str, wrong)) or '(none)'}, expected percent above 0 "
            "and up to 1000, such as 12.5,25,50,100"
        )
    sizes = {p: p / 100 * base for p in percents}
    small = [p for p in percents if sizes[p] < patch_size]
    if small:
        raise UserError(
            f"a scale of {small[0]:g} % of {base} px is {sizes[small[0]]:g} px, less "
            f"than one patch of {patch_size} px: leave it out of scales, give a larger "
            "base_size, or an encoder with a smaller patch"
        )
    sizes = {p: _multiple(size, patch_size) for p, size in sizes.items()}
    if len(set(sizes.values())) < len(percents):
        text = ", ".join(f"{p:g} % is {s} px" for p, s in sizes.items())
        raise UserError(
            f"two scales have one size ({text}, in patches of {patch_size} px): leave "
            "one of them out of scales"
        )
    # That of 100 %, whether it is evaluated or not.
    whole = _multiple(base, patch_size)
    return [
        Scale(p, s, s / whole if gsd_policy == "fixed" else 1.0)
        for p, s in sizes.items()
    ]


def _multiple(size: float, patch_size: int) -> int:
    """The nearest multiple, of two the larger, at least one patch."""
    return max(1, int(size / patch_size + 0.5)) * patch_size
