"""The canvas of a synthetic scene, and the scene's colours."""

from collections.abc import Sequence

import numpy as np

from xsmae.data.synthetic.ground import Array, Cells, Crowns, inside

# The classes of pixel labels. field: soil and crops; grass: verges and lawns too; sand:
# tracks and beaches; paved: asphalt, concrete and the cars on them; building: roofs,
# and containers under them in colour.
LAND = ("field", "grass", "tree", "sand", "paved", "building", "water")


class Colour(list):
    """Red, green, blue, 0 to 255; numbers, or an array of each.

    land: the class of `LAND` that it shows. A plain sequence of colours shows none: a
    line on a road leaves the road what it is.
    """

    def __init__(
        self, values: Sequence[float] | Sequence[Array], land: str | None = None
    ):
        super().__init__(values)
        self.land = land


class Canvas:
    """Three float32 planes of reflected light, 0 to 255, painted in layers.

    shadow: the part of the light that a full shadow takes away.
    """

    def __init__(self, shape: tuple[int, int], *, shadow: float) -> None:
        self.planes = np.zeros((3, *shape), np.float32)
        self.shadow = shadow

    def paint(
        self, cover: float | Array, colour: Sequence, tone: float | Array = 1
    ) -> None:
        """Paints `colour` x `tone` over the share `cover` of each sample."""
        for plane, value in zip(self.planes, colour, strict=True):
            plane += (value * tone - plane) * cover

    def shade(self, cover: Array) -> None:
        """Puts the share `cover` of each sample into shadow."""
        self.planes *= 1 - self.shadow * cover

    def plant(self, trees: Crowns, colour: Sequence, where: float | Array = 1) -> None:
        """Paints trees and their shadows, scaled by the share `where`."""
        self.shade(trees.shadow * where)
        self.paint(trees.cover * where, colour, trees.brightness)

    def build(
        self,
        cells: Cells,
        half: tuple[float | Array, float | Array],
        colour: Sequence,
        *,
        at: tuple[float | Array, float | Array] = (0, 0),
        height: float | Array = 5,
        there: float | Array = 1,
        ridge: float = 0,
    ) -> None:
        """Paints a box and its shadow in each cell (metres); `ridge`: roof contrast."""
        light_u, light_v = cells.ground.light
        fallen = [
            cells.box(*half, at[0] + light_u * height * t, at[1] + light_v * height * t)
            for t in (0.5, 1)
        ]
        roof = cells.box(*half, *at) * there
        self.shade(np.maximum(*fallen) * there * (1 - roof))
        tone = 1.0
        if ridge:
            footprint = cells.ground.footprint_v
            sunny = 1 - 2 * inside(cells.v - at[1], footprint)
            tone = 1 - ridge * (1 if light_v > 0 else -1) * sunny
        self.paint(roof, colour, tone)


class LandCanvas(Canvas):
    """The share of each class of `LAND` in every sample, painted in the same layers.

    Tones, shadows and colours without a class change nothing.
    """

    def __init__(self, shape: tuple[int, int], *, shadow: float) -> None:
        super().__init__(shape, shadow=shadow)
        self.planes = np.zeros((len(LAND), *shape), np.float32)

    def paint(
        self, cover: float | Array, colour: Sequence, tone: float | Array = 1
    ) -> None:
        """Covers the share `cover` of each sample with the colour's class."""
        del tone
        land = getattr(colour, "land", None)
        if land is None:
            return
        self.planes *= 1 - np.asarray(cover, np.float32)
        self.planes[LAND.index(land)] += cover

    def shade(self, cover: Array) -> None:
        """Nothing: land in shadow is the same land."""


def blend(first: Sequence[float], second: Sequence[float], share: float) -> list[float]:
    """Mixes two colours; `share` is the part of the second."""
    return [a + (b - a) * share for a, b in zip(first, second, strict=True)]


class Materials:
    """The colours of one scene, drawn for its season, soil and buildings.

    The ranges overlap: dry grass is as pale as concrete, wet soil as dark as asphalt.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        dry, bright, wet = rng.random(), rng.random(), rng.random()
        straw = blend((186, 168, 116), (136, 118, 92), rng.random())
        meadow = blend((74, 108, 50), (128, 146, 82), rng.random())
        self.grass = Colour(blend(meadow, straw, dry), "grass")
        ripe = blend((204, 180, 112), (142, 126, 80), rng.random())
        green = blend((58, 104, 48), (140, 160, 84), rng.random())
        self.crop = Colour(blend(green, ripe, rng.random()), "field")
        # From dark conifers over summer leaves to autumn and to bare branches.
        leaves = blend((40, 66, 44), (98, 122, 66), rng.random())
        brown = blend((158, 108, 52), (128, 114, 98), rng.random())
        self.tree = Colour(blend(leaves, brown, rng.random()), "tree")
        earth = blend((172, 116, 78), (206, 188, 156), rng.random())
        self.soil = Colour(blend(earth, (82, 70, 58), wet), "field")
        self.sand = Colour(blend(self.soil, (212, 198, 170), 0.6), "sand")
        asphalt = blend((66, 68, 74), (168, 162, 154), rng.random())
        self.asphalt = Colour(asphalt, "paved")
        concrete = blend((126, 124, 120), (208, 200, 188), rng.random())
        self.concrete = Colour(concrete, "paved")
        # Clear, green or muddy, or bright with the sky that it mirrors.
        clear = blend((34, 56, 66), (76, 102, 78), rng.random())
        muddy = blend((138, 122, 92), (152, 160, 166), rng.random())
        self.water = Colour(blend(clear, muddy, rng.random()), "water")
        tiles = blend((150, 84, 64), (172, 112, 84), rng.random())
        slate, pale = (96, 98, 106), blend((170, 160, 150), (206, 204, 200), bright)
        order = rng.permutation(3).tolist()
        self.roofs = [(tiles, slate, pale)[i] for i in order]

    def roof(self, choice: Array, variety: float) -> Colour:
        """Roof colours for uniform numbers: one kind at `variety` 0, all three at 1."""
        kind = (choice * (2.99 * variety)).astype(np.int32)
        tone = 0.85 + 0.3 * ((choice * 37) % 1)
        table = np.array(self.roofs, np.float32)
        planes = [table[:, channel].take(kind) * tone for channel in range(3)]
        return Colour(planes, "building")
