"""Random brightness, contrast, saturation and gain of bands, for each view anew.

Every change multiplies by a factor drawn uniformly from 1 - h to 1 + h, where h is the
half-range of its field. 0 switches a change off. Pixels without a value stay as they
are, and do not count in means.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Shaped

CHANGES = ("brightness", "contrast", "saturation", "band_gain")
SATURATED = ("red", "green", "blue")  # the bands that have a saturation


@dataclasses.dataclass(frozen=True)
class Photometric:
    """The half-range of each change; the fields are those of `config.views`.

    ramp: steps in which the half-ranges grow linearly from 0; 0: no ramp.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    band_gain: float = 0.0
    ramp: int = 0

    def __post_init__(self):
        for name in CHANGES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"views.{name}={getattr(self, name)}, expected a half-range from "
                    "0 to 1"
                )
        if self.ramp < 0:
            raise ValueError(
                f"views.photometric_ramp={self.ramp}, expected steps, 0 or more"
            )

    def strength(self, step: int) -> float:
        """The part of each half-range that is used in a step, 0 to 1."""
        on = any(getattr(self, name) for name in CHANGES)
        if not on or not self.ramp:
            return float(on)
        return min(step / self.ramp, 1.0)

    def __call__(
        self,
        views: Shaped[np.ndarray, "views height width bands"],
        valid: Bool[np.ndarray, "views height width"] | None,
        *,
        rng: np.random.Generator,
        strength: float,
    ) -> Shaped[np.ndarray, "views height width bands"]:
        """Changed views, each with its own draws; of 8 bits they are rounded.

        The draws do not depend on which changes are on.
        """
        draws = rng.uniform(-strength, strength, (len(views), 3 + views.shape[-1]))
        changed = np.empty_like(views)
        for index, view in enumerate(views):
            known = None if valid is None else valid[index]
            # A row for each band: long rows are the fastest.
            rows = np.ascontiguousarray(
                view.reshape(-1, view.shape[-1]).T, dtype=np.float32
            )
            found = self._changed(
                rows, None if known is None else known.ravel(), draws[index]
            )
            if views.dtype == np.uint8:
                np.clip(np.rint(found, out=found), 0, 255, out=found)
            changed[index] = found.T.reshape(view.shape)
            if known is not None:
                changed[index][~known] = view[~known]
        return changed

    def _changed(
        self,
        rows: Float[np.ndarray, "bands pixels"],
        valid: Bool[np.ndarray, " pixels"] | None,
        draws: Float[np.ndarray, " draws"],
    ) -> Float[np.ndarray, "bands pixels"]:
        """Brightness and gain, then contrast around each band's mean, then saturation.

        Saturation is around the mean of the bands in each pixel.
        """
        brightness, contrast, saturation = (
            1 + getattr(self, name) * draw
            for name, draw in zip(CHANGES, draws[:3], strict=False)
        )
        gain = brightness * (1 + self.band_gain * draws[3:])
        known = rows if valid is None else rows[:, valid]
        shift = np.zeros_like(gain)
        if self.contrast and known.size:
            shift = gain * (1 - contrast) * known.mean(axis=1, dtype=np.float64)
            gain = gain * contrast
        rows = rows * gain.astype(np.float32)[:, None]
        rows += shift.astype(np.float32)[:, None]
        if self.saturation:
            grey = rows.mean(axis=0)
            rows = grey + np.float32(saturation) * (rows - grey)
        return rows
