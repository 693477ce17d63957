"""The built-in world: synthetic, labelled aerial images at any GSD.

A `Scene` is one continuous piece of ground, so a finer and a coarser rendering of the
same window are two scales of the same place. `SyntheticSource` is a data set of such
scenes. It is the same on every machine, has any length, and needs no download.
"""

import functools
import hashlib
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from xsmae.bands import BANDS
from xsmae.data.records import BaseSource, Record
from xsmae.data.synthetic.canvas import Canvas, LandCanvas, Materials
from xsmae.data.synthetic.ground import Ground, hashed
from xsmae.data.synthetic.land import KINDS
from xsmae.errors import UserError

GENERATOR_VERSION = 2  # increase it whenever any pixel of any scene changes
CLASS_NAMES = tuple(KINDS)

FINEST_GSD, COARSEST_GSD = 0.01, 30.0  # metres per pixel that can be rendered

_GSD_RANGE = f"metres per pixel from {FINEST_GSD} to {COARSEST_GSD}"
_LARGEST_SAMPLE = 1.75  # metres; coarser pixels are averages of several samples
_MOST_SAMPLES = 4  # the most samples per pixel along each axis
_STRIP = 2**15  # samples painted at once, to stay in cache and bound the memory


class Scene:
    """One place of the synthetic world.

    Its ground frame is in metres, y down and x to the right. The object that the class
    is named after lies around the origin.
    """

    def __init__(self, seed: int, index: int, label: int) -> None:
        self.seed, self.index, self.label = seed, index, label

    def __repr__(self) -> str:
        return f"Scene(seed={self.seed}, index={self.index}, label={self.label})"

    @property
    def class_name(self) -> str:
        """The land use, one of `CLASS_NAMES`."""
        return CLASS_NAMES[self.label]

    def render(
        self,
        *,
        top: float,
        left: float,
        height: int,
        width: int,
        gsd: float | tuple[float, float],
    ) -> np.ndarray:
        """Renders the window that starts at (top, left): uint8 [height, width, 3].

        `top`, `left` are metres in the scene's frame, `gsd` metres per pixel (or y, x).
        Pixel (i, j) is approximately the average of the ground from top + i * gsd_y to
        top + (i + 1) * gsd_y, and likewise across. Raises UserError for an empty window
        or a GSD outside FINEST_GSD to COARSEST_GSD.
        """
        gsd = _checked_window(height, width, gsd)
        image = np.empty((height, width, 3), np.uint8)
        for rows, mean in self._strips(Canvas, top, left, height, width, gsd):
            mean = np.minimum(np.maximum(mean + 0.5, 0), 255)
            image[rows] = mean.transpose(1, 2, 0)
        return image

    def render_land(
        self,
        *,
        top: float,
        left: float,
        height: int,
        width: int,
        gsd: float | tuple[float, float],
    ) -> np.ndarray:
        """The land in the same window and pixels as `render`: uint8 [height, width].

        The number of the class in `canvas.LAND` that covers the largest share of the
        ground of the pixel, the first one if two are equal. Tree crowns hide what is
        below them, and shadows, lines and cars change nothing.
        """
        gsd = _checked_window(height, width, gsd)
        land = np.empty((height, width), np.uint8)
        for rows, share in self._strips(LandCanvas, top, left, height, width, gsd):
            land[rows] = share.argmax(axis=0)
        return land

    def _strips(
        self,
        canvas: type[Canvas],
        top: float,
        left: float,
        height: int,
        width: int,
        gsd: tuple[float, float],
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Rows of pixels, and the means of the canvas's planes over each pixel."""
        gsd_y, gsd_x = gsd
        samples_y, samples_x = _samples(gsd_y), _samples(gsd_x)
        y = _positions(top, height, gsd_y, samples_y)
        x = _positions(left, width, gsd_x, samples_x)
        rows = max(1, _STRIP // (samples_y * len(x)))
        for start in range(0, height, rows):
            strip = y[start * samples_y : (start + rows) * samples_y]
            planes = self._paint(canvas, strip, x, gsd_y / samples_y, gsd_x / samples_x)
            # Sum in a fixed order, so that the bits do not depend on the window's size.
            parts = (
                planes[:, i::samples_y, j::samples_x]
                for i in range(samples_y)
                for j in range(samples_x)
            )
            mean = functools.reduce(operator.add, parts) / (samples_y * samples_x)
            yield slice(start, start + rows), mean

    def _paint(
        self,
        kind: type[Canvas],
        y: np.ndarray,
        x: np.ndarray,
        step_y: float,
        step_x: float,
    ) -> np.ndarray:
        """The planes of every sample, float32 [planes, rows, columns].

        Of a `Canvas`: the light, 0 to 255 or more. Of a `LandCanvas`: shares of land.
        """
        rng = np.random.Generator(np.random.PCG64([self.seed, self.index, 1]))
        key = int(rng.integers(2**31))
        material = Materials(rng)
        sun = rng.uniform(-1, 1)
        length = rng.uniform(0.35, 1.1) * (-1 if rng.random() < 0.5 else 1)
        exposure, haze = rng.uniform(0.75, 1.25), rng.uniform(0, 0.4)
        vivid, shadow = rng.uniform(0.7, 1.15), rng.uniform(0.3, 0.65)
        warm, green = rng.uniform(-0.06, 0.06), rng.uniform(-0.03, 0.03)
        tint = np.array((1 + warm, 1 + green, 1 - warm), np.float32)[:, None, None]
        light = (sun * length, (1 - abs(sun)) * length)
        ground = Ground(x[None, :], y[:, None], step_x, step_y, light, key)
        canvas = kind((len(y), len(x)), shadow=shadow)
        KINDS[self.class_name](canvas, ground, material, rng)
        if kind is LandCanvas:
            return canvas.planes
        # Use only linear maps, so that averages over the ground stay averages.
        grey = (canvas.planes[0] + canvas.planes[1] + canvas.planes[2]) * (1 / 3)
        seen = grey + vivid * (canvas.planes - grey)
        veil = np.array((118, 124, 132), np.float32)[:, None, None]
        return exposure * tint * ((1 - haze) * seen + haze * veil)


class RenderedOnce:
    """Keeps the first images that are rendered, as many as fit into `mib`.

    A pickle has none of them: the receiving process renders them again.
    """

    def __init__(self, mib: float, *, image_bytes: int) -> None:
        self._most = int(mib * 2**20) // image_bytes
        self._images: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._images)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_images": {}}

    def get(self, index: int, render: Callable[[], np.ndarray]) -> np.ndarray:
        """The image at `index`, which is read-only."""
        image = self._images.get(index)
        if image is None:
            # No lock is needed: every thread stores the same image. A race can cost a
            # second rendering or a slot, but never gives a wrong image.
            image = render()
            image.setflags(write=False)
            if len(self._images) < self._most:
                self._images[index] = image
        return image


def _checked_window(
    height: int, width: int, gsd: float | tuple[float, float]
) -> tuple[float, float]:
    """The GSD along y and x; UserError for an empty window or a GSD out of range."""
    axes = gsd if isinstance(gsd, tuple) else (gsd, gsd)
    if not all(FINEST_GSD <= side <= COARSEST_GSD for side in axes):
        raise UserError(f"gsd: expected {_GSD_RANGE}, got {gsd}")
    if height < 1 or width < 1:
        raise UserError(f"expected a window of >= 1 pixel, got {height} x {width}")
    return axes


def _samples(gsd: float) -> int:
    return min(math.ceil(gsd / _LARGEST_SAMPLE - 1e-9), _MOST_SAMPLES)


def _positions(first: float, pixels: int, gsd: float, samples: int) -> np.ndarray:
    """The sample centres of a line of pixels, in metres, float32."""
    steps = (np.arange(pixels * samples) + 0.5) / samples
    # A grid of 1/1024 m gives a position the same number in every window.
    return (np.rint((first + steps * gsd) * 1024) / 1024).astype(np.float32)


class SyntheticSource(BaseSource):
    """Images of synthetic ground with their land use, for training and tests.

    Each `seed` makes a different world: use one for training and one for held-out data.
    Labels are balanced and shuffled. GSDs (metres per pixel) are log-uniform in
    [gsd / gsd_spread, gsd * gsd_spread]. A shorter source is the start of a longer one.
    The source caches up to `cache_mib` of images, since rendering one takes about 4 ms.
    Raises UserError for a bad argument.
    """

    bands = BANDS

    def __init__(
        self,
        num_images: int,
        *,
        seed: int = 0,
        size: int = 96,
        gsd: float = 1.0,
        gsd_spread: float = 2.0,
        cache_mib: float = 512,
    ) -> None:
        for name, value, least in (
            ("num_images", num_images, 1),
            ("seed", seed, 0),
            ("size", size, 32),
        ):
            if not isinstance(value, int | np.integer) or value < least:
                raise UserError(f"{name}: expected at least {least}, got {value!r}")
        if not 1 <= gsd_spread < math.inf:
            raise UserError(f"gsd_spread: expected a factor >= 1, got {gsd_spread}")
        if not FINEST_GSD * gsd_spread <= gsd <= COARSEST_GSD / gsd_spread:
            raise UserError(
                f"gsd: expected {_GSD_RANGE}, got {gsd} with gsd_spread={gsd_spread}"
            )
        if not 0 <= cache_mib < math.inf:
            raise UserError(f"cache_mib: expected at least 0, got {cache_mib}")
        self.num_images, self.seed, self.size = int(num_images), int(seed), int(size)
        self.gsd, self.gsd_spread = float(gsd), float(gsd_spread)
        self.cache_mib = float(cache_mib)
        self.class_names = CLASS_NAMES
        self.labels = self._labels()
        self._rendered = RenderedOnce(self.cache_mib, image_bytes=3 * self.size**2)

    def _labels(self) -> np.ndarray:
        """int64 labels; each run of len(CLASS_NAMES) images has every class once."""
        classes = len(CLASS_NAMES)
        runs = np.arange(-(-self.num_images // classes))[:, None]
        rank = hashed(np.arange(classes), runs, self.seed)
        return np.argsort(rank, axis=1, kind="stable").ravel()[: self.num_images]

    def __repr__(self) -> str:
        return (
            f"SyntheticSource({self.num_images}, seed={self.seed}, size={self.size}, "
            f"gsd={self.gsd}, gsd_spread={self.gsd_spread})"
        )

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of everything that determines the records."""
        said = f"{self!r} generator={GENERATOR_VERSION} classes={CLASS_NAMES}"
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return self.num_images

    def id(self, index: int) -> str:
        """The seed and the index."""
        return f"synthetic/{self.seed}/{self._checked(index)}"

    def scene(self, index: int) -> Scene:
        """The scene that the image shows, centred on its origin."""
        index = self._checked(index)
        return Scene(self.seed, index, int(self.labels[index]))

    def image_gsd(self, index: int) -> float:
        """Metres per pixel of one image."""
        rng = np.random.Generator(np.random.PCG64([self.seed, self._checked(index), 2]))
        # Rounded, so that the result does not depend on the platform's pow().
        return float(f"{self.gsd * self.gsd_spread ** rng.uniform(-1, 1):.5g}")

    def window(self, index: int) -> dict[str, Any]:
        """The arguments of `Scene.render` for one image."""
        gsd = self.image_gsd(index)
        half, size = self.size * gsd / 2, self.size
        return {"top": -half, "left": -half, "height": size, "width": size, "gsd": gsd}

    def __getitem__(self, index: int) -> Record:
        index = self._checked(index)
        window = self.window(index)
        image = self._rendered.get(index, lambda: self.scene(index).render(**window))
        label = int(self.labels[index])
        return Record(image=image, gsd=window["gsd"], label=label, id=self.id(index))

    def _checked(self, index: int) -> int:
        index = operator.index(index)
        if not 0 <= index < self.num_images:
            raise IndexError(f"index {index} of a source of {self.num_images} images")
        return index
