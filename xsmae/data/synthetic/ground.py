"""Noise, rows, cells and trees on the ground of the synthetic world.

Everything here depends only on the ground position. It is averaged approximately, in
closed form, over a square footprint around that position. Pixels use only float32
`+ - * /`, `sqrt`, `floor`, comparisons and integer hashes. IEEE arithmetic defines
those exactly, so a scene has the same bits on every machine and in every window.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

Array = np.ndarray


def hashed(column: Array, row: Array, key: int) -> Array:
    """Uniform float32 in [0, 1) for integer cells; arguments broadcast."""
    bits = column.astype(np.uint32) * np.uint32(0x9E3779B1)
    bits = bits ^ (row.astype(np.uint32) * np.uint32(0x85EBCA77))
    bits = bits ^ np.uint32(key * 0xC2B2AE3D & 0xFFFFFFFF)
    # The finalizer "lowbias32" (C. Wellons, hash-prospector).
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    bits = bits ^ (bits >> np.uint32(16))
    return (bits >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


@dataclasses.dataclass(frozen=True)
class Ground:
    """Sample positions in one frame of the ground, and the footprint around each.

    `u` (to the right) and `v` (down) are metres and broadcast to [rows, columns].
    `footprint_u/v` are the sides of the box to average over. `light` points from the
    sun along the ground, in metres of shadow per metre of height. `key` seeds the
    hashes.
    """

    u: Array
    v: Array
    footprint_u: float
    footprint_v: float
    light: tuple[float, float]
    key: int

    @property
    def footprint(self) -> float:
        """The side of the footprint, one number for both directions."""
        return math.sqrt(self.footprint_u * self.footprint_v)

    def turned(self, turn: float) -> "Ground":
        """The same samples in a frame turned by about `turn` x 180 degrees."""
        # Half-angle form of sine and cosine: exact arithmetic, no libm.
        t = 2 * turn - 1
        c, s = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
        # This box has the same variance along each axis as the turned box.
        squares = self.footprint_u**2, self.footprint_v**2
        return dataclasses.replace(
            self,
            u=c * self.u + s * self.v,
            v=c * self.v - s * self.u,
            footprint_u=math.sqrt(c * c * squares[0] + s * s * squares[1]),
            footprint_v=math.sqrt(s * s * squares[0] + c * c * squares[1]),
            light=(
                c * self.light[0] + s * self.light[1],
                c * self.light[1] - s * self.light[0],
            ),
        )

    def moved(self, u: float | Array, v: float | Array) -> "Ground":
        """The same samples in a frame with its origin at (u, v) of this one."""
        return dataclasses.replace(self, u=self.u - u, v=self.v - v)

    def noise(self, wavelength: float, salt: int) -> Array:
        """Smooth noise in [-1, 1], mean 0, [rows, columns]; not for turned frames.

        It fades out as the footprint approaches the wavelength (metres).
        """
        kept = blur(self.footprint / wavelength)
        if not kept:
            return np.zeros((self.v.shape[0], self.u.shape[1]), np.float32)
        column, across = _lattice(self.u[0] / (wavelength / 2))
        row, down = _lattice(self.v[:, 0] / (wavelength / 2))
        columns = np.arange(column.min(), column.max() + 2)
        rows = np.arange(row.min(), row.max() + 2)
        knots = hashed(columns[None], rows[:, None], self.key + salt)
        knots = (knots * 2 - 1) * np.float32(kept)
        above = knots.take(row - rows[0], axis=0)
        below = knots.take(row + 1 - rows[0], axis=0)
        lines = above + (below - above) * down[:, None]
        left = lines.take(column - columns[0], axis=1)
        right = lines.take(column + 1 - columns[0], axis=1)
        return left + (right - left) * across

    def texture(self, wavelengths: Sequence[float], salt: int) -> Array:
        """Noise of several wavelengths with equal weights, about [-1, 1]."""
        layers = (self.noise(w, salt + i) for i, w in enumerate(wavelengths))
        return sum(layers) * (1 / math.sqrt(len(wavelengths)))


def _lattice(t: Array) -> tuple[Array, Array]:
    """The knot before `t`, and a smooth weight for the next knot."""
    knot = np.floor(t)
    t = t - knot
    return knot.astype(np.int32), t * t * (3 - 2 * t)


def blur(periods: float | Array) -> float | Array:
    """Approximate amplitude of a sine averaged over `periods`: 1 at 0, 0 from 1 on."""
    left = np.maximum(1 - periods * periods, 0)
    return left * (1 - 0.5 * periods * periods)


def wave(phase: Array, period: float | Array, footprint: float) -> Array:
    """Parabolic sine in [-1, 1] along `phase` (metres), averaged over the footprint."""
    t = phase / period
    t = t - np.floor(t)
    half = np.abs(2 * t - 1)  # 1 at the period's ends, 0 in its middle
    arch = np.where(half > 0.5, 8 * (1 - half) ** 2 - 1, 1 - 8 * half * half)
    return arch * np.float32(blur(footprint / period))


def band(t: Array, half_width: float | Array, footprint: float) -> Array:
    """The share of the footprint around `t` within +-half_width, all in metres."""
    # The overlap is the distance between its two ends.
    after = np.minimum(np.maximum(t + footprint / 2, -half_width), half_width)
    before = np.minimum(np.maximum(t - footprint / 2, -half_width), half_width)
    return (after - before) * (1 / footprint)


def inside(distance: Array, footprint: float) -> Array:
    """The share of the footprint where `distance` < 0, all in metres."""
    return np.minimum(np.maximum(0.5 - distance * (1 / footprint), 0), 1)


class Cells:
    """A grid of cells over a frame, each cell with its own random numbers.

    `u`, `v` are metres from the cell's centre. `stagger` moves every column of cells by
    its own amount, so that rows do not line up.
    """

    def __init__(
        self,
        ground: Ground,
        size_u: float,
        size_v: float,
        salt: int,
        *,
        stagger: bool = False,
    ) -> None:
        self.ground, self.size_u, self.size_v = ground, size_u, size_v
        self._key = ground.key + 131 * salt
        column, self.u, self._columns = self._along(ground.u, size_u)
        v = ground.v
        if stagger:
            move = hashed(self._columns, np.zeros(1, np.int32), self._key)
            v = v + move.take(column - self._columns[0]) * size_v
        row, self.v, self._rows = self._along(v, size_v)
        self._column, self._row = column, row
        index = (row - self._rows[0]) * len(self._columns)
        self._index = (index + (column - self._columns[0])).astype(np.intp)

    @staticmethod
    def _along(t: Array, size: float) -> tuple[Array, Array, Array]:
        cell = np.floor(t * (1 / size))
        numbers = cell.astype(np.int32)
        every = np.arange(numbers.min(), numbers.max() + 2, dtype=np.int32)
        return numbers, t - (cell + 0.5) * size, every

    def without(self, street: float) -> Ground:
        """The frame without a strip of this width between cells, the gaps closed."""
        wide, deep = self.size_u - street, self.size_v - street
        u = np.minimum(np.maximum(self.u, -wide / 2), wide / 2) + wide / 2
        v = np.minimum(np.maximum(self.v, -deep / 2), deep / 2) + deep / 2
        return dataclasses.replace(
            self.ground,
            u=u + self._column.astype(np.float32) * wide,
            v=v + self._row.astype(np.float32) * deep,
        )

    def table(self, salt: int) -> Array:
        """Uniform numbers in [0, 1) for every cell of the window, flattened."""
        key = self._key + 17 * salt + 1
        return hashed(self._columns[None], self._rows[:, None], key).ravel()

    def at(self, table: Array, right: int = 0, down: int = 0) -> Array:
        """The table's value for each sample's cell, or for the cell's neighbour."""
        return table[right + down * len(self._columns) :].take(self._index)

    def random(self, salt: int) -> Array:
        """Uniform numbers in [0, 1) per cell, at every sample."""
        return self.at(self.table(salt))

    def box(
        self,
        half_u: float | Array,
        half_v: float | Array,
        u: float | Array = 0,
        v: float | Array = 0,
    ) -> Array:
        """Coverage of a box around (u, v) in each cell; the box must fit in it."""
        across = band(self.u - u, half_u, self.ground.footprint_u)
        return across * band(self.v - v, half_v, self.ground.footprint_v)


@dataclasses.dataclass(frozen=True)
class Crowns:
    """Trees: the share of each sample that they cover and shade, their brightness."""

    cover: Array
    brightness: Array
    shadow: Array


def crowns(
    ground: Ground,
    spacing: float,
    salt: int,
    *,
    jitter: float = 0.3,
    radius: tuple[float, float] = (0.4, 0.7),
    share: float = 1.0,
    height: float = 0.5,
) -> Crowns:
    """Round crowns on a grid of `spacing` metres; a tree stands at `share` of the grid.

    `jitter` (in each direction), `radius` and `height` are in units of `spacing`. A
    crown and its shadow are complete if jitter + radius + length of shadow <= 1.
    """
    cells = Cells(ground, spacing, spacing, salt)
    move_u = (cells.table(0) * 2 - 1) * (jitter * spacing)
    move_v = (cells.table(1) * 2 - 1) * (jitter * spacing)
    size = (radius[0] + (radius[1] - radius[0]) * cells.table(2)) * spacing
    # A missing tree is a tree of size zero.
    flatness = np.where(cells.table(3) < share, 1 / (size * size), np.float32(1e6))
    tone = 0.78 + 0.44 * cells.table(4)
    light_u, light_v = ground.light
    fall_u, fall_v = light_u * height * spacing, light_v * height * spacing
    mean_radius = spacing * (radius[0] + radius[1]) / 2
    slope = 0.4 / (mean_radius * math.sqrt(light_u**2 + light_v**2))

    dome = shade = brightness = np.float32(-1e3)
    # Trees stand on the corners of cells, so four of them can reach a sample.
    for right, down in ((0, 0), (1, 0), (0, 1), (1, 1)):
        du = cells.u - cells.at(move_u, right, down) - (right - 0.5) * spacing
        dv = cells.v - cells.at(move_v, right, down) - (down - 0.5) * spacing
        flat = cells.at(flatness, right, down)
        top = 1 - (du * du + dv * dv) * flat
        lit = cells.at(tone, right, down) * (
            1 - (du * (light_u * slope) + dv * (light_v * slope))
        )
        brightness = np.where(top > dome, lit, brightness)
        dome = np.maximum(dome, top)
        du, dv = du - fall_u, dv - fall_v
        shade = np.maximum(shade, 1 - (du * du + dv * dv) * flat)
    # 1 - (d / r)^2 falls by 2 / r per metre at the rim; this scales it to a distance.
    rim = -mean_radius / 2
    cover = inside(dome * rim, ground.footprint)
    shadow = inside(shade * rim, ground.footprint) * (1 - cover)
    brightness = brightness * (0.6 + 0.4 * np.maximum(dome, 0))
    return Crowns(cover, brightness, shadow)
