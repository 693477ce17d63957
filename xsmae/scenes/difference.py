"""The difference of two embedded scenes of the same ground: 1 - cosine, per cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xsmae.data import gdal
from xsmae.errors import BadImageError, UserError, printable
from xsmae.scenes.embedded import EmbeddedGrid, apply

if TYPE_CHECKING:
    from jaxtyping import Float, Int

SLACK = 1e-6  # of a stride, for rounding


@dataclasses.dataclass(frozen=True, eq=False)
class Match:
    """Finds the cells of a second scene at the centres of chips of a first one.

    warped: the scenes have different CRS.
    """

    first: EmbeddedGrid
    second: EmbeddedGrid
    warped: bool

    @classmethod
    def of(cls, first: EmbeddedGrid, second: EmbeddedGrid) -> Match:
        """UserError if the scenes cannot be compared, or have no common ground."""
        if (first.crs is None) != (second.crs is None):
            lacks, has = (first, second) if first.crs is None else (second, first)
            raise UserError(
                f"{printable(lacks.name)} has no place on Earth, "
                f"{printable(has.name)} has one: give two scenes of the same ground"
            )
        if first.crs is None and (first.pixels, first.shape) != (
            second.pixels, second.shape,
        ):  # fmt: skip
            raise UserError(
                f"{printable(first.name)} and {printable(second.name)} have no place "
                f"on Earth, and {first.pixels[0]} x {first.pixels[1]} and "
                f"{second.pixels[0]} x {second.pixels[1]} pixels in {first.shape} and "
                f"{second.shape} cells: only scenes of one size can be compared"
            )
        found = cls(first, second, _differ(first.crs, second.crs))
        columns = np.arange(first.shape[1])
        for row in range(first.shape[0]):
            if (found.cells(np.full(len(columns), row), columns)[0] >= 0).any():
                return found
        raise UserError(
            f"{printable(first.name)} and {printable(second.name)} have no common "
            "ground: give two scenes of the same place"
        )

    @property
    def same(self) -> bool:
        """True if both scenes have the same grid."""
        first, second = self.first, self.second
        if first.crs is None:
            return True
        return (
            not self.warped
            and first.shape == second.shape
            and np.allclose(first.down, second.down)
            and np.allclose(first.across, second.across)
            and first.transform.almost_equals(second.transform, 1e-6)
        )

    def cells(
        self, rows: Int[np.ndarray, " n"], columns: Int[np.ndarray, " n"]
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Row and column of the second scene's nearest cells, -1 where it has none."""
        if self.same:
            return rows, columns
        first, second = self.first, self.second
        x, y = apply(first.transform, first.across[columns], first.down[rows])
        if self.warped:
            x, y = self._warp(x, y)
        x, y = apply(~second.transform, x, y)
        found = [
            _nearest(centres, at, step)
            for centres, at, step in (
                (second.down, y, second.stride[0]),
                (second.across, x, second.stride[1]),
            )
        ]
        inside = (found[0] >= 0) & (found[1] >= 0)
        return np.where(inside, found[0], -1), np.where(inside, found[1], -1)

    def _warp(self, x, y) -> np.ndarray:
        from rasterio import warp

        try:
            with gdal.gdal(self.second.crs):
                return np.array(warp.transform(self.first.crs, self.second.crs, x, y))
        except BadImageError as error:
            raise UserError(
                f"{printable(self.first.name)} cannot be placed in the CRS of "
                f"{printable(self.second.name)} ({error})"
            ) from None


def _differ(one: str | None, other: str | None) -> bool:
    from rasterio.crs import CRS

    if one == other:
        return False
    return CRS.from_user_input(one) != CRS.from_user_input(other)


def _nearest(
    centres: Float[np.ndarray, " cells"], at: Float[np.ndarray, " n"], stride: int
) -> Int[np.ndarray, " n"]:
    """The nearest centre of each place, -1 if it is farther than half a stride."""
    at = np.where(np.isfinite(at), at, np.inf)
    middles = (centres[1:] + centres[:-1]) / 2
    found = np.searchsorted(middles, at)
    near = np.abs(at - centres[found]) <= stride * (0.5 + SLACK)
    return np.where(near, found, -1)


def differences(
    match: Match, scratch: Path, should_stop: Callable[[], bool]
) -> Float[np.ndarray, "rows columns"]:
    """1 - cosine of each cell of the first scene, NaN where one has no vector.

    scratch: a file that gets the vectors of the second scene, as a grid.
    """
    first, second = match.first, match.second
    width = first.emb["emb:dimensions"]
    there = np.zeros(second.shape, bool)
    vectors = np.memmap(scratch, np.float32, "w+", shape=(*second.shape, width))
    for block in second.blocks():
        if should_stop():
            raise KeyboardInterrupt
        vectors[block.rows, block.columns] = block.vectors
        there[block.rows, block.columns] = True
    found = np.full(first.shape, np.nan, np.float32)
    for block in first.blocks():
        if should_stop():
            raise KeyboardInterrupt
        rows, columns = match.cells(block.rows, block.columns)
        known = (rows >= 0) & there[rows, columns]
        others = vectors[rows[known], columns[known]]
        away = _one_minus_cosine(block.vectors[known], others)
        found[block.rows[known], block.columns[known]] = away
    return found


def _one_minus_cosine(one, other) -> Float[np.ndarray, " n"]:
    """Of vectors of unit length; 1 for vectors of zeros, which have no direction."""
    # Half the squared distance is the same, and 0 for equal vectors.
    away = ((one - other) ** 2).sum(axis=1) / 2
    return np.where(one.any(axis=1) & other.any(axis=1), away, 1)
