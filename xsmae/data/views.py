"""Boxes, crops and their GSD: two scales of the same ground.

The GSD of a view is the source's GSD times the number of source pixels that one pixel
of the view spans, per axis. If a view of `size` pixels shows an area fraction f of an
image of n pixels, its GSD (geometric mean of the axes) is gsd * sqrt(f * n) / size.

With areas drawn log-uniformly from [a, b], the GSD of view 1 is log-uniform too. Boxes
that do not fit are drawn again, so the largest ones are rarer. The ratio of view 2's
GSD to view 1's is also log-uniform. View 2's GSD is a product of the two, so its
distribution peaks in the middle. A run plots its GSDs in `figures/gsd.png`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys

import numpy as np
from PIL import Image

from xsmae.data.photometric import Photometric
from xsmae.data.picture import Picture, Pixels
from xsmae.data.raster_views import FloatPixels, FloatView, RasterImage

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
AREA_DISTRIBUTIONS = ("uniform", "log_uniform")
VIEW2_SOURCES = ("source", "view1")
VIEW2_BOXES = ("sample", "batch")


@dataclasses.dataclass(frozen=True)
class Box:
    """A rectangle in pixels; edges may lie between pixels."""

    top: float
    left: float
    bottom: float
    right: float

    @property
    def height(self) -> float:
        return self.bottom - self.top

    @property
    def width(self) -> float:
        return self.right - self.left

    def within(self, frame: Box, unit: Box) -> Box:
        """This box after the map that takes the rectangle `unit` to `frame`."""
        scale_y, scale_x = frame.height / unit.height, frame.width / unit.width
        return Box(
            frame.top + (self.top - unit.top) * scale_y,
            frame.left + (self.left - unit.left) * scale_x,
            frame.top + (self.bottom - unit.top) * scale_y,
            frame.left + (self.right - unit.left) * scale_x,
        )

    def mirrored(self, frame: Box, *, vertical: bool, horizontal: bool) -> Box:
        """This box after mirroring the `frame` that contains it."""
        top, bottom, left, right = self.top, self.bottom, self.left, self.right
        if vertical:
            total = frame.top + frame.bottom
            top, bottom = total - bottom, total - top
        if horizontal:
            total = frame.left + frame.right
            left, right = total - right, total - left
        return Box(top, left, bottom, right)

    def to_array(self) -> np.ndarray:
        """[4] float32: top, left, bottom, right."""
        # dataclasses.astuple would make slow deep copies.
        return np.array((self.top, self.left, self.bottom, self.right), np.float32)


def draw_box(
    rng: np.random.Generator,
    frame: Box,
    *,
    area: tuple[float, float],
    ratio: tuple[float, float],
    distribution: str,
) -> Box:
    """Draws a random box in `frame`: a fraction of its area, and a width/height ratio.

    The ratio is log-uniform. A box that does not fit is drawn again. After ten tries,
    the result is the largest central box of an allowed ratio. This is torchvision's
    RandomResizedCrop without rounding to whole pixels.
    """
    for _ in range(10):
        if distribution == "uniform":
            fraction = rng.uniform(*area)
        else:
            fraction = math.exp(rng.uniform(*np.log(area)))
        aspect = math.exp(rng.uniform(*np.log(ratio)))
        pixels = fraction * frame.height * frame.width
        height, width = math.sqrt(pixels / aspect), math.sqrt(pixels * aspect)
        if height <= frame.height and width <= frame.width:
            top = frame.top + rng.uniform() * (frame.height - height)
            left = frame.left + rng.uniform() * (frame.width - width)
            return Box(top, left, top + height, left + width)
    aspect = min(max(frame.width / frame.height, ratio[0]), ratio[1])
    width = min(frame.width, frame.height * aspect)
    height = width / aspect
    top = frame.top + (frame.height - height) / 2
    left = frame.left + (frame.width - width) / 2
    return Box(top, left, top + height, left + width)


def cut(image: np.ndarray, box: Box, size: int, interpolation: str) -> np.ndarray:
    """The area of `box` as [size, size] pixels, resampled once with antialiasing."""
    return np.asarray(_cut(Pixels(Image.fromarray(image)), box, size, interpolation))


def _cut(
    pixels: Pixels | FloatPixels, box: Box, size: int, interpolation: str
) -> Image.Image | FloatView:
    edges = (box.top, box.left, box.bottom, box.right)
    return pixels.cut(edges, size, INTERPOLATIONS[interpolation])


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The random draws of a sample.

    boxes: one per view, in source pixels. vertical, horizontal: True if the views are
    mirrored. displayed: view 2's box in pixels of view 1 before mirroring, if it was
    drawn there.
    """

    boxes: list[Box]
    vertical: bool
    horizontal: bool
    displayed: Box | None


@dataclasses.dataclass(frozen=True)
class ViewSampler:
    """Draws the views of a sample; the fields are those of `config.views`."""

    num_views: int
    size: int
    area: tuple[float, float]
    ratio: tuple[float, float]
    area_distribution: str
    interpolation: str
    horizontal_flip: float
    vertical_flip: float
    # For view 2; a sampler of one view ignores them.
    area2: tuple[float, float] = (0.25, 0.75)
    view2_from: str = "source"
    view2_box: str = "sample"
    interpolation2: str = "bicubic"
    # See `Photometric`.
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    band_gain: float = 0.0
    photometric_ramp: int = 0

    @functools.cached_property
    def photometric(self) -> Photometric:
        """What changes the values of the views, whatever their boxes."""
        return Photometric(
            brightness=self.brightness,
            contrast=self.contrast,
            saturation=self.saturation,
            band_gain=self.band_gain,
            ramp=self.photometric_ramp,
        )

    def __post_init__(self):
        for name, known in (
            ("area_distribution", AREA_DISTRIBUTIONS),
            ("view2_from", VIEW2_SOURCES),
            ("view2_box", VIEW2_BOXES),
            ("interpolation", tuple(INTERPOLATIONS)),
            ("interpolation2", tuple(INTERPOLATIONS)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"views.{name}={getattr(self, name)!r}, expected one of "
                    f"{', '.join(known)}"
                )
        if self.size < 1:
            raise ValueError(f"views.size={self.size}, expected pixels above 0")
        largest = sys.float_info.max
        for name, upper in (("area", 1.0), ("area2", 1.0), ("ratio", largest)):
            value = getattr(self, name)
            numbers = all(isinstance(end, int | float) for end in value)
            if not (numbers and len(value) == 2 and 0 < value[0] <= value[1] <= upper):
                raise ValueError(
                    f"views.{name}={value}, expected (low, high) with "
                    f"0 < low <= high <= {upper:g}"
                )
        for name in ("horizontal_flip", "vertical_flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"views.{name}={getattr(self, name)}, expected a probability"
                )
        self.photometric.strength(0)  # its fields are checked when it is created

    def draw(
        self,
        shape: tuple[int, int],
        *,
        rng: np.random.Generator,
        batch_rng: np.random.Generator,
    ) -> Drawn:
        """Draws the boxes of the views of an image of `shape` (height, width)."""
        draw = {"ratio": self.ratio, "distribution": self.area_distribution}
        whole = Box(0.0, 0.0, float(shape[0]), float(shape[1]))
        boxes = [draw_box(rng, whole, area=self.area, **draw)]
        vertical = rng.uniform() < self.vertical_flip
        horizontal = rng.uniform() < self.horizontal_flip
        displayed = None
        if self.num_views == 2:
            box_rng = batch_rng if self.view2_box == "batch" else rng
            shown = Box(0.0, 0.0, float(self.size), float(self.size))
            if self.view2_box == "batch" or self.view2_from == "view1":
                # Draw in the pixels of view 1, so that one box can serve a whole batch.
                displayed = draw_box(box_rng, shown, area=self.area2, **draw)
                mirrored = displayed.mirrored(
                    shown, vertical=vertical, horizontal=horizontal
                )
                boxes.append(mirrored.within(boxes[0], shown))
            else:
                boxes.append(draw_box(box_rng, boxes[0], area=self.area2, **draw))
        return Drawn(boxes, vertical, horizontal, displayed)

    def __call__(
        self,
        image: np.ndarray | Picture | RasterImage,
        gsd: float | tuple[float, float],
        *,
        rng: np.random.Generator,
        batch_rng: np.random.Generator,
        step: int = 0,
    ) -> dict[str, np.ndarray]:
        """The views of one image of `gsd` metres per pixel, or (y, x).

        image: uint8 [height, width, 3], or not decoded yet.

        Returns `image` [views, size, size, 3] uint8; `box` [views, 4], (top, left,
        bottom, right) in source pixels; `gsd` [views, 2], metres per pixel (y, x) of
        each view; `flip` [2], True if the views are mirrored (vertically,
        horizontally). `rng` belongs to the sample; `batch_rng` is shared by a batch.
        `step` of the run decides how strong photometric changes are, if they ramp up.
        A `Picture` is decoded once, as finely as the views need. The views of a
        `RasterImage` are float32 [views, size, size, bands], with `valid` [views, size,
        size], which pixels have a value. Raises BadImageError.
        """
        drawn = self.draw(image.shape[:2], rng=rng, batch_rng=batch_rng)
        boxes, vertical, horizontal = drawn.boxes, drawn.vertical, drawn.horizontal
        from_view1 = self.num_views == 2 and self.view2_from == "view1"
        from_source = boxes[:1] if from_view1 else boxes
        if isinstance(image, Picture | RasterImage):
            sides = [side for b in from_source for side in (b.height, b.width)]
            pixels = image.pixels(min(sides) / self.size)
        else:
            pixels = Pixels(Image.fromarray(image))
        views = [
            _flip(_cut(pixels, box, self.size, how), vertical, horizontal)
            for box, how in zip(
                from_source, (self.interpolation, self.interpolation2), strict=False
            )
        ]
        if from_view1:
            pixels = _as_pixels(views[0])
            views.append(_cut(pixels, drawn.displayed, self.size, self.interpolation2))
        down, across = gsd if isinstance(gsd, tuple) else (gsd, gsd)
        stacked, strength = _stacked(views), self.photometric.strength(step)
        if strength:
            stacked["image"] = self.photometric(
                stacked["image"],
                stacked.get("valid"),
                # Its own stream, so that boxes are the same without these changes.
                rng=rng.spawn(1)[0],
                strength=strength,
            )
        return {
            **stacked,
            "box": np.stack([b.to_array() for b in boxes]),
            "gsd": np.array(
                [
                    (down * b.height / self.size, across * b.width / self.size)
                    for b in boxes
                ],
                np.float32,
            ),
            "flip": np.array([vertical, horizontal]),
        }


def _as_pixels(view: Image.Image | FloatView) -> Pixels | FloatPixels:
    if isinstance(view, FloatView):
        return FloatPixels(view.values, view.valid)
    return Pixels(view)


def _stacked(views: list[Image.Image] | list[FloatView]) -> dict[str, np.ndarray]:
    if isinstance(views[0], FloatView):
        return {
            "image": np.stack([view.values for view in views]),
            "valid": np.stack([view.valid for view in views]),
        }
    return {"image": np.stack([np.asarray(view) for view in views])}


def _flip(
    image: Image.Image | FloatView, vertical: bool, horizontal: bool
) -> Image.Image | FloatView:
    if isinstance(image, FloatView):
        return image.mirrored(vertical=vertical, horizontal=horizontal)
    # Pillow mirrors the memory. Copying a mirrored array into a batch would take 20
    # times as long.
    if vertical:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if horizontal:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image
