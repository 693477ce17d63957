"""An opened image: its size is known at once, its pixels are decoded at need.

A view of 128 px does not need all of a 2048-px image. A JPEG can be decoded at a half,
a quarter or an eighth of its sides. This skips most of the arithmetic but still reads
all bits. If the pixels are still much too fine, whole blocks can be averaged before
resampling. Both steps keep at least `MARGIN` pixels for every pixel of the finest view.
If a pixel of a view spans fewer than 2 * MARGIN pixels, neither step happens, and the
view is bit for bit the view of the whole image.

Errors against views of the whole image, in 8-bit levels (mean absolute error over many
views, then of the worst view; JPEGs of quality 90; the tests check these limits): 0.3
and 0.5 for smooth images (PSNR above 50 dB); 1.2 and 3 for scenes with the detail of
aerial images (46 dB on average, 37 at worst); 1.5 and 4 for white noise. Only values
are inexact, not positions: boxes are exact, in fractions of a reduced pixel. PNG, WebP
and TIFF are decoded whole and give exactly the views of the whole image.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from xsmae.data.images import context_window, open_image, orientation, to_rgb

# Pixels kept for every pixel of a view. With 1, fine detail aliases (errors of 2 to 4
# levels in scenes). With 2 (0.5 levels), most views of 128 px need all pixels of a
# 1024-px image.
MARGIN = 1.5
_STEPS = (8, 4, 2)  # the reductions of libjpeg that Pillow offers
_LOSSY = ("JPEG", "MPO")  # an MPO contains several JPEGs


@dataclasses.dataclass(frozen=True)
class Pixels:
    """RGB pixels, each `step` image pixels wide, that start at (top, left) of an image.

    margin: pixels to keep per pixel of a view when whole blocks are averaged first;
    None: average no blocks.
    """

    rgb: Image.Image
    step: int = 1
    top: int = 0
    left: int = 0
    margin: float | None = None

    def cut(
        self,
        box: tuple[float, float, float, float],
        size: int,
        resample: Image.Resampling,
    ) -> Image.Image:
        """The area of `box` as size x size pixels, resampled with antialiasing.

        box: top, left, bottom, right in image pixels.
        """
        top, left, bottom, right = box
        return self.rgb.resize(
            (size, size),
            resample,
            # Rounding may put an edge slightly outside, and Pillow refuses that.
            box=(
                max((left - self.left) / self.step, 0.0),
                max((top - self.top) / self.step, 0.0),
                min((right - self.left) / self.step, float(self.rgb.width)),
                min((bottom - self.top) / self.step, float(self.rgb.height)),
            ),
            reducing_gap=self.margin,
        )


class Picture:
    """An opened and checked image file, upright, or a window of it.

    window: left, top, right, bottom in whole pixels; this part is used as the image.
    """

    def __init__(
        self, image: Image.Image, window: tuple[int, int, int, int] | None = None
    ):
        self._image = image
        turn = orientation(image)
        self._upright = turn == 1
        # Orientations 5 to 8 are quarter turns, with or without mirroring.
        width, height = image.size[::-1] if turn > 4 else image.size
        self._window = window or (0, 0, width, height)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, 3 at full size."""
        left, top, right, bottom = self._window
        return bottom - top, right - left, 3

    def decode(self) -> np.ndarray:
        """All pixels: uint8 [height, width, 3], writable. Raises BadImageError."""
        rgb = to_rgb(self._image)
        whole = self._window == (0, 0, *rgb.size)
        return np.array(rgb if whole else rgb.crop(self._window))

    def pixels(self, finest: float) -> Pixels:
        """Pixels for views whose pixels span `finest` image pixels or more.

        This decodes the image, so call it only once. Raises BadImageError.
        """
        step = self._reduce(finest)
        rgb = to_rgb(self._image)
        left, top, right, bottom = self._window
        # Round outwards to whole reduced pixels.
        left, top = left // step, top // step
        outer = (left, top, -(-right // step), -(-bottom // step))
        if outer != (0, 0, *rgb.size):
            rgb = rgb.crop(outer)
        left, top = left * step - self._window[0], top * step - self._window[1]
        margin = MARGIN if self._image.format in _LOSSY else None
        return Pixels(rgb, step, top, left, margin)

    def _reduce(self, finest: float) -> int:
        """Sets a JPEG to decode at 1/step of its sides; returns the step."""
        width, height = self._image.size
        for step in _STEPS if self._image.format in _LOSSY else ():
            # The last reduced pixel may extend beyond the edge. Turning the image would
            # put it first and shift all others.
            fits = self._upright or width % step == height % step == 0
            if finest >= MARGIN * step and fits:
                self._image.draft(None, (width // step, height // step))
                return step
        return 1


@contextlib.contextmanager
def open_picture(
    source: bytes | pathlib.Path,
    *,
    min_side: int,
    max_pixels: int,
    box: tuple[float, float, float, float] | None = None,
    context: float = 0.0,
) -> Iterator[Picture]:
    """Opens an image file, or the part that `images.crop_with_context` cuts out of it.

    source, min_side, max_pixels: see `images.decode`. box, context: see
    `images.crop_with_context`; box None: the whole image. Raises BadImageError.
    """
    with open_image(source, min_side=min_side, max_pixels=max_pixels) as image:
        picture = Picture(image)
        if box is not None:
            window = context_window(
                picture.shape, box, context=context, min_side=min_side
            )
            picture = Picture(image, window)
        yield picture
