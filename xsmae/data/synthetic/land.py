"""The ten kinds of land of the synthetic world, all made of the same materials.

The kinds differ in layout, not in colour: each scene draws its own season, soils,
roofs, water, sun, haze and exposure, in the same way for all kinds. The seasons are so
wide, and the kinds have so much in common, that mean and contrast say little.

A kind is one function that paints the given ground samples. It draws a few numbers from
the scene's generator; everything that varies over the ground comes from hashes of the
position.
"""

from collections.abc import Callable

import numpy as np

from xsmae.data.synthetic.canvas import Canvas, Colour, Materials
from xsmae.data.synthetic.ground import Array, Cells, Ground, band, crowns, inside, wave

Rng = np.random.Generator


def _clip(share: Array) -> Array:
    return np.minimum(np.maximum(share, 0), 1)


def _edge(cells: Cells) -> Array:
    """Metres to the nearest side of the cell."""
    across = cells.size_u / 2 - np.abs(cells.u)
    return np.minimum(across, cells.size_v / 2 - np.abs(cells.v))


def _countryside(
    canvas: Canvas,
    ground: Ground,
    material: Materials,
    rng: Rng,
    *,
    tilled: tuple[float, float] = (0, 0.8),
    wood: tuple[float, float] = (0, 0.9),
) -> None:
    """Parcels of crops, bare soil, grass and woods.

    tilled, wood: the least and the largest share of the parcels; woods are grown on
    grass first. A scene draws its share, and that of the bare fields among the tilled.
    """
    share = rng.uniform(*tilled)
    crop = share * rng.uniform(0.3, 1)
    grown = rng.uniform(*wood)
    frame = ground.turned(rng.random())
    size = rng.uniform(38, 60), rng.uniform(55, 110)
    parcels = Cells(frame, *size, 10, stagger=True)
    strength, lane = rng.uniform(0.2, 0.45), rng.uniform(12, 20)
    verge = rng.uniform(0.8, 2.0)
    kind, vigour = parcels.random(0), parcels.random(1)
    mottle = ground.texture((60, 22, 8, 3), 20)
    edge = _edge(parcels)
    lengthwise = parcels.random(2) < 0.5
    across = np.where(lengthwise, parcels.u, parcels.v)
    rows = wave(across, 2.4 + 3.6 * parcels.random(3), frame.footprint)
    worked = kind < share
    cover = np.where(kind < crop, 0.3 + 0.6 * vigour, 0.08 + 0.15 * vigour)
    cover = cover + strength * rows + 0.14 * mottle
    canvas.paint(1, material.soil, 0.9 + 0.2 * vigour + 0.08 * mottle)
    canvas.paint(_clip(cover) * worked, material.crop, 0.85 + 0.3 * parcels.random(4))
    # Wheel tracks of machines run in pairs through the crop.
    passes = np.abs(across - lane * np.floor(across / lane) - lane / 2)
    tracks = band(passes - 0.9, 0.3, frame.footprint)
    canvas.paint(0.6 * tracks * worked, material.soil, 0.85)
    canvas.paint(~worked, material.grass, 0.85 + 0.3 * vigour + 0.13 * mottle)
    canvas.paint(inside(edge - verge, frame.footprint), material.grass, 0.9)
    _scatter(canvas, frame, rng)
    spacing = rng.uniform(5, 9)
    # Neighbouring woods grow together, or leave a ride between them.
    rim = inside(rng.uniform(-3, 3) - edge + 3 * mottle, 1.5) * (kind > 1 - grown)
    if rim.any():
        _woods(canvas, ground, material, 40, spacing, rim)


def _scatter(canvas: Canvas, ground: Ground, rng: Rng) -> None:
    """Small things, bright or dark: rocks, bales of straw, cattle, troughs, sheets."""
    cells = Cells(ground, *rng.uniform(8, 24, 2).tolist(), 25, stagger=True)
    share = max(0.0, rng.uniform(-0.3, 0.5))
    tone, spread = rng.uniform(30, 230), rng.uniform(0, 1)
    half = rng.uniform(0.4, 1.6)
    half = half * (0.6 + 0.8 * cells.random(0)), half * (0.6 + 0.8 * cells.random(1))
    grey = tone + spread * (130 * cells.random(2) - tone / 2)
    there = cells.random(3) < share
    canvas.build(cells, half, (grey, 0.97 * grey, 0.9 * grey), height=1, there=there)


def _woods(
    canvas: Canvas,
    ground: Ground,
    material: Materials,
    salt: int,
    spacing: float,
    where: Array,
) -> None:
    """A closed canopy of crowns, `spacing` metres apart, over smaller ones."""
    canvas.paint(0.85 * where, material.tree, 0.42)
    lower = crowns(ground, spacing * 0.61, salt, share=0.9)
    canvas.paint(lower.cover * where, material.tree, 0.72 * lower.brightness)
    canvas.plant(crowns(ground, spacing, salt + 1, share=0.85), material.tree, where)


def annual_crop(canvas: Canvas, ground: Ground, material: Materials, rng: Rng) -> None:
    """Fields with rows of crops, some of them bare."""
    _countryside(canvas, ground, material, rng, tilled=(0.7, 1), wood=(0, 0.35))


def meadow(canvas: Canvas, ground: Ground, material: Materials, rng: Rng) -> None:
    """Mottled grassland between hedges, with single trees and footpaths."""
    frame = ground.turned(rng.random())
    bend = 7 * ground.noise(90, 1)
    parcels = Cells(
        frame.moved(bend, bend),
        rng.uniform(45, 70),
        rng.uniform(50, 100),
        11,
        stagger=True,
    )
    mottle = ground.texture((80, 30, 11, 4, 2), 20)
    canvas.paint(1, material.grass, 0.8 + 0.4 * parcels.random(0) + 0.16 * mottle)
    canvas.paint(rng.uniform(0.3, 0.9) * _clip(1.6 * mottle - 0.4), material.soil)
    path = np.abs(ground.noise(70, 30) + 0.3 * ground.noise(25, 31)) * 30 - 0.8
    canvas.paint(0.7 * inside(path, ground.footprint), material.sand, 0.9)
    _scatter(canvas, frame, rng)
    hedge = inside(_edge(parcels) - rng.uniform(1.5, 3), 1.5)
    hedge = hedge * (parcels.random(1) < 0.75)
    canvas.paint(0.6 * hedge, material.tree, 0.6)
    canvas.plant(crowns(ground, 4.2, 41, share=0.9), material.tree, hedge)
    share, spacing = rng.uniform(0.02, 0.3), rng.uniform(9, 16)
    single = crowns(ground, spacing, 42, share=share, radius=(0.2, 0.4))
    canvas.plant(single, material.tree)


def forest(canvas: Canvas, ground: Ground, material: Materials, rng: Rng) -> None:
    """Closed canopy with clearings and sometimes a track."""
    mottle = ground.texture((50, 18, 7, 3), 20)
    bare = rng.random()
    canvas.paint(1, material.soil, 0.9 + 0.15 * mottle)
    canvas.paint(_clip(bare + 0.25 * mottle), material.grass, 0.9 + 0.15 * mottle)
    track = ground.turned(rng.random())
    line = track.v - rng.uniform(-30, 30) + 10 * ground.noise(100, 30)
    width = rng.uniform(1.5, 3) if rng.random() < 0.5 else -9.0
    canvas.paint(inside(np.abs(line) - width, track.footprint), material.sand, 0.9)
    _scatter(canvas, track, rng)
    open_land = ground.noise(120, 31) + 0.3 * ground.noise(30, 32)
    closed = inside((open_land - rng.uniform(0.3, 0.9)) * 12, 2)
    closed = closed * (1 - inside(np.abs(line) - width - 1, 2))
    _woods(canvas, ground, material, 43, rng.uniform(4, 10), closed)


def orchard(canvas: Canvas, ground: Ground, material: Materials, rng: Rng) -> None:
    """Trees of one size planted in a grid, in blocks."""
    spacing, frame = rng.uniform(4.5, 8), ground.turned(rng.random())
    mottle = ground.texture((60, 22, 8, 3), 20)
    canvas.paint(1, material.soil, 0.95 + 0.12 * mottle)
    strips = _clip(0.5 + 0.4 * wave(frame.v, spacing, frame.footprint) + 0.25 * mottle)
    canvas.paint(strips * rng.random(), material.grass)
    wide, deep = (rng.integers(7, 13, 2) * spacing).tolist()
    street = rng.uniform(1, 5)
    blocks = Cells(frame, wide + street, deep + street, 12)
    edge = _edge(blocks) - street / 2
    path = (material.sand, material.soil, material.grass)[int(rng.integers(3))]
    canvas.paint(inside(edge, frame.footprint), path, 0.95)
    _scatter(canvas, frame, rng)
    # Trees stand on the corners of their cells, half a cell from the sides of a block.
    grid = blocks.without(street).moved(spacing / 2, spacing / 2)
    small = rng.uniform(0.2, 0.4)
    trees = crowns(
        grid,
        spacing,
        44,
        jitter=0.05,
        radius=(small, small + 0.08),
        share=rng.uniform(0.8, 1),
    )
    # Some blocks are cleared.
    planted = blocks.random(0) > rng.uniform(-0.3, 0.3)
    canvas.plant(trees, material.tree, inside(-edge, frame.footprint) * planted)


def residential(canvas: Canvas, ground: Ground, material: Materials, rng: Rng) -> None:
    """Streets with houses in gardens along them."""
    frame = ground.turned(rng.random())
    wide, deep, street = rng.uniform(14, 21), rng.uniform(19, 27), rng.uniform(6, 9)
    block = int(rng.integers(4, 8)) * wide + street, 2 * deep + street
    variety, density = rng.random(), rng.uniform(0.85, 1)
    blocks = Cells(frame.moved(rng.uniform(0, 40), rng.uniform(0, 40)), *block, 13)
    plots = Cells(blocks.without(street), wide, deep, 14)
    mottle = ground.texture((40, 14, 5, 2), 20)
    canvas.paint(1, material.grass, 0.9 + 0.2 * plots.random(0) + 0.14 * mottle)
    canvas.paint(_clip(plots.random(1) * 1.6 - 1), material.soil, 1 + 0.1 * mottle)
    edge = _edge(blocks)
    canvas.paint(inside(edge - street / 2, frame.footprint), material.concrete, 0.9)
    canvas.paint(inside(edge - street / 2 + 1.3, frame.footprint), material.asphalt)
    # A drive beside the house, and a car on some of the drives.
    side = wide / 2 - 2
    drive = plots.box(1.4, deep / 2, side)
    kept = inside(street / 2 - edge, frame.footprint)
    canvas.paint(drive * (plots.random(2) < 0.7) * kept, material.concrete)
    _cars(canvas, plots, 3, (0.9, 2.2), 0.4, at=(side, deep * 0.3 * _sign(plots, 4)))
    half = (wide / 2 - 2) * (0.55 + 0.3 * plots.random(5)), 3.6 + 2 * plots.random(6)
    canvas.build(
        plots,
        half,
        material.roof(plots.random(7), variety),
        at=(-1.5, 2.5 * (2 * plots.random(8) - 1)),
        height=5,
        there=(plots.random(9) < density) * kept,
        ridge=0.16,
    )
    shed = 1.2 + plots.random(11), 1.2 + 1.5 * plots.random(12)
    canvas.build(
        plots,
        shed,
        material.roof(plots.random(13), 1),
        at=(-wide * 0.3, deep * 0.36 * _sign(plots, 14)),
        height=2,
        there=(plots.random(15) < 0.35) * kept,
    )
    trees = crowns(ground, 9, 45, share=rng.uniform(0.1, 0.8), radius=(0.2, 0.45))
    canvas.plant(trees, material.tree, kept)


def industrial(canvas: Canvas, ground: Ground, material: Materials, rng: Rng) -> None:
    """Halls with large flat roofs in paved yards."""
    frame = ground.turned(rng.random())
    road = rng.uniform(8, 12)
    size = rng.uniform(55, 90), rng.uniform(42, 66)
    lots = Cells(
        frame.moved(rng.uniform(0, 30), rng.uniform(0, 30)), *size, 15, stagger=True
    )
    mottle = ground.texture((45, 15, 5, 2), 20)
    edge = _edge(lots)
    canvas.paint(1, material.asphalt, 0.95 + 0.1 * mottle)
    canvas.paint(lots.random(0), material.concrete, 0.95 + 0.1 * mottle)
    # Lots with bare or green ground beside the halls.
    wild = _clip(3 * mottle + rng.uniform(-2, 1) + 4 * lots.random(8) - 2)
    canvas.paint(wild, material.soil, 0.95 + 0.1 * mottle)
    canvas.paint(wild * lots.random(9), material.grass, 0.95 + 0.1 * mottle)
    canvas.paint(inside(edge - road / 2 - 2, frame.footprint), material.grass, 0.95)
    canvas.paint(inside(edge - road / 2, frame.footprint), material.asphalt)
    canvas.paint(0.8 * inside(edge - 0.12, frame.footprint), (225, 222, 210))
    wide = (size[0] - road) / 2 - 4
    deep = (size[1] - road) / 2 - 4
    half = wide * (0.55 + 0.4 * lots.random(1)), deep * (0.6 + 0.3 * lots.random(2))
    left, up = (half[0] - wide) * 0.8, (half[1] - deep) * 0.8
    roof = material.roof(lots.random(3), 1)
    ribs = 1 + 0.07 * wave(lots.u, 3 + 5 * lots.random(4), frame.footprint_u)
    roof = Colour([plane * ribs for plane in roof], roof.land)
    there = lots.random(5) < 0.92
    canvas.build(lots, half, roof, at=(left, up), height=9, there=there)
    # Rows of skylights and roof equipment, away from the roof's edge.
    on_roof = lots.box(half[0] - 2.5, half[1] - 2.5, left, up) * there
    lights = Cells(frame, 6, 9, 16)
    cover = lights.box(0.7, 2.6) * (lots.random(6) < 0.5)
    canvas.paint(cover * on_roof, material.roofs[0], 0.65 + 0.7 * lots.random(7))
    plant = lights.box(1.2, 1.4, 1.5) * (lights.random(0) < 0.12)
    canvas.paint(plant * on_roof, (196, 196, 192), 0.7 + 0.5 * lights.random(1))
    stored = Cells(frame, 3.4, 8, 17)
    yard = inside(road / 2 + 3 - edge, 1) * (
        1 - lots.box(half[0] + 2, half[1] + 2, left, up)
    )
    present = (stored.random(0) < rng.uniform(0.15, 0.5)) * yard
    colour = material.roof(stored.random(1), 1)
    canvas.build(stored, (1.25, 3.1), colour, height=2, there=present)
    trees = crowns(ground, 7, 48, share=rng.uniform(0.1, 0.6), radius=(0.25, 0.5))
    green = _clip(inside(edge - road / 2 - 3, 1) - inside(edge - road / 2, 1))
    canvas.plant(trees, material.tree, green)


def parking(canvas: Canvas, ground: Ground, material: Materials, rng: Rng) -> None:
    """Car parks: rows of marked bays with cars, planted strips, shops beside them."""
    frame = ground.turned(rng.random()).moved(rng.uniform(-9, 9), rng.uniform(-9, 9))
    bay, depth, aisle = rng.uniform(2.4, 2.8), rng.uniform(4.8, 5.4), rng.uniform(6, 7)
    module = bay * int(rng.integers(14, 24)), 2 * depth + aisle
    modules = int(rng.integers(1, 3)), int(rng.integers(2, 5))
    wide, deep = modules[0] * module[0], modules[1] * module[1]
    gap = rng.uniform(3, 26)
    lots = Cells(frame, wide + gap, deep + gap, 20)
    mottle = ground.texture((50, 17, 6, 2), 20)
    lot = inside(gap / 2 - _edge(lots), frame.footprint)
    canvas.paint(1, material.grass, 0.95 + 0.12 * mottle)
    canvas.paint(lot, material.asphalt, 1 + 0.1 * mottle)
    # The lots without the strips between them: one pattern of rows and bays.
    inner = lots.without(gap)
    rows = Cells(inner, *module, 18)
    # Two rows of bays lie back to back around the middle of each cell.
    bays = Cells(inner.moved(0, aisle / 2), bay, depth + aisle / 2, 19)
    marked = band(rows.v, depth, frame.footprint_v) * lot
    lines = band(bay / 2 - np.abs(bays.u), 0.09, frame.footprint_u)
    canvas.paint(0.9 * lines * marked, (232, 230, 222))
    canvas.paint(0.9 * band(rows.v, 0.09, frame.footprint_v) * lot, (232, 230, 222))
    end = inside(rows.size_u / 2 - np.abs(rows.u) - bay, frame.footprint_u)
    busy = rng.uniform(0.2, 0.95) + 0.3 * ground.noise(60, 30)
    for salt, sign in ((50, -1), (51, 1)):
        half = Cells(inner, bay, module[1], salt)
        there = (half.random(0) < busy) * (1 - end) * lot
        _cars(canvas, half, 1, (0.92, 2.2), 1, at=(0, sign * depth / 2), there=there)
    island = end * marked
    canvas.paint(island, material.grass, 0.95 + 0.1 * mottle)
    strip = band(rows.v, 1.2, frame.footprint_v) * (rng.random() < 0.5) * lot
    canvas.paint(strip, material.grass, 0.9)
    share = rng.uniform(0.2, 0.9)
    trees = crowns(frame, 5, 46, share=share, radius=(0.3, 0.5), jitter=0.15)
    canvas.plant(trees, material.tree, _clip(island + strip + 1 - lot))
    if gap > 14:
        shops = Cells(frame.moved(0, (deep + gap) / 2), wide + gap, deep + gap, 21)
        half = wide * (0.25 + 0.2 * shops.random(0)), gap / 2 - 3
        roof = material.roof(shops.random(1), 1)
        canvas.build(shops, half, roof, height=7, there=shops.random(2) < 0.8)


def _sign(cells: Cells, salt: int) -> Array:
    """+1 or -1 per cell."""
    return np.where(cells.random(salt) < 0.5, np.float32(-1), np.float32(1))


def _cars(
    canvas: Canvas,
    cells: Cells,
    salt: int,
    half: tuple[float | Array, float | Array],
    share: float,
    *,
    at: tuple[float | Array, float | Array],
    there: float | Array = 1,
) -> None:
    """Cars in a `share` of the cells: light, dark, or in one of a few colours."""
    choice = cells.random(salt)
    grey = 40 + 190 * ((choice * 53) % 1)
    hue = (choice * 7) % 1
    colour = [grey, grey * (0.75 + 0.25 * hue), grey * (0.7 + 0.32 * hue)]
    there = (cells.random(salt + 100) < share).astype(np.float32) * there
    canvas.build(cells, half, colour, at=at, height=1.3, there=there)
    glass = half[0] * 0.8, half[1] * 0.42
    canvas.paint(0.5 * cells.box(*glass, *at) * there, (38, 42, 48))


def highway(canvas: Canvas, ground: Ground, material: Materials, rng: Rng) -> None:
    """A road with two carriageways across the country."""
    _countryside(canvas, ground, material, rng)
    frame = ground.turned(rng.random())
    frame = frame.moved(
        0, rng.uniform(-14, 14) + frame.u * frame.u * rng.uniform(0, 7e-4)
    )
    lanes, lane, median = int(rng.integers(2, 4)), 3.6, rng.uniform(2, 7)
    middle = median / 2 + 1 + lanes * lane / 2
    reach = median / 2 + lanes * lane + 4
    footprint = frame.footprint_v
    mottle = ground.texture((30, 9, 3), 21)
    far = np.abs(frame.v)
    verge = rng.uniform(3, 9)
    canvas.paint(inside(far - reach - verge, 2), material.grass, 0.95 + 0.12 * mottle)
    paved = inside(far - reach, footprint) * (1 - inside(far - median / 2, footprint))
    surface = material.concrete if rng.random() < 0.3 else material.asphalt
    canvas.paint(paved, surface, 1 + 0.05 * mottle)
    canvas.paint(band(far, 0.25, footprint), material.concrete)
    white = (235, 233, 226)
    for edge in (middle - lanes * lane / 2, middle + lanes * lane / 2):
        canvas.paint(band(far - edge, 0.12, footprint), white)
    dashes = Cells(frame, 12, 1e4, 23)
    dash = band(dashes.u, 2, frame.footprint_u)
    for i in range(1, lanes):
        line = middle + (i - lanes / 2) * lane
        canvas.paint(dash * band(far - line, 0.12, footprint), white)
    # Remove the median, so that every lane is a row of cells.
    inner = middle - lanes * lane / 2
    closed = frame.moved(0, np.where(frame.v < 0, np.float32(-inner), inner))
    traffic = Cells(closed, rng.uniform(18, 50), lane, 24)
    lorry = traffic.random(0) < 0.2
    half = np.where(lorry, np.float32(6), 2.3), np.where(lorry, np.float32(1.2), 0.9)
    spread = (traffic.random(1) - 0.5) * (traffic.size_u - 15)
    driven = np.abs(far - middle) < lanes * lane / 2
    _cars(canvas, traffic, 2, half, 0.5, at=(spread, 0), there=driven)


def _waterside(
    canvas: Canvas, ground: Ground, material: Materials, rng: Rng, distance: Array
) -> None:
    """Water where `distance` < 0 (metres), with a beach and a belt of trees beside."""
    ragged = 2.5 * ground.noise(16, 32) + ground.noise(6, 33)
    shore = distance + ragged
    footprint = ground.footprint
    belt, beach = rng.uniform(4, 14), rng.uniform(0.5, 5)
    canvas.paint(inside(shore - belt, 4), material.grass, 0.85 + 0.05 * ragged)
    trees = crowns(ground, rng.uniform(5, 8), 47, share=rng.uniform(0.2, 0.9))
    canvas.plant(trees, material.tree, inside(np.abs(shore - belt) - belt * 0.7, 2))
    canvas.paint(inside(shore - beach, footprint + 1), material.sand, 1 + 0.05 * ragged)
    deep = _clip(-shore * 0.12)
    ripple = ground.texture((50, 14, 5, 2.5), 34)
    tone = 1.18 - 0.2 * deep + rng.uniform(0.02, 0.12) * ripple
    canvas.paint(inside(shore, footprint), material.water, tone)


def river(canvas: Canvas, ground: Ground, material: Materials, rng: Rng) -> None:
    """A winding band of water with its banks."""
    _countryside(canvas, ground, material, rng)
    frame = ground.turned(rng.random())
    line = frame.v - rng.uniform(-10, 10) + 16 * ground.noise(150, 30)
    line = line + 7 * ground.noise(60, 31)
    width = rng.uniform(4, 15) * (1 + 0.3 * ground.noise(90, 35))
    _waterside(canvas, ground, material, rng, np.abs(line) - width)


def lake(canvas: Canvas, ground: Ground, material: Materials, rng: Rng) -> None:
    """Open water with one shore."""
    _countryside(canvas, ground, material, rng)
    radius = rng.uniform(60, 150)
    frame = ground.turned(rng.random()).moved(0, radius - rng.uniform(-14, 22))
    away = np.sqrt(frame.u * frame.u + frame.v * frame.v)
    bays = 14 * ground.noise(80, 30) + 6 * ground.noise(35, 31)
    _waterside(canvas, ground, material, rng, away - radius + bays)


Painter = Callable[[Canvas, Ground, Materials, Rng], None]

KINDS: dict[str, Painter] = {
    painter.__name__: painter
    for painter in (
        annual_crop,
        forest,
        highway,
        industrial,
        lake,
        meadow,
        orchard,
        parking,
        residential,
        river,
    )
}
