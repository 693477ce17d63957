"""Shared by all figures: colours, axes, images, scale bars, saving."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from xsmae.bands import Bands
from xsmae.figures.fonts import drawable, families
from xsmae.process.files import atomic_write

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped
    from matplotlib.axes import Axes

    Gsd = float | tuple[float, float]  # metres per pixel, or (y, x)

# One colour per view in every figure: Okabe and Ito's blue, orange, green and purple,
# which colour-blind readers can tell apart.
VIEW_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
NEUTRAL, ALARM = "#555555", "#D55E00"
DPI = 150
LEGEND = {"fontsize": 9, "frameon": False}


def to_pixels(
    images: Float[np.ndarray, "... bands"], bands: Bands
) -> Float[np.ndarray, "... bands"]:
    """Normalised images as colours in 0-1; NaN (from a diverged model) is black."""
    return in_colour(np.nan_to_num(bands.denormalize(images)), bands)


def in_colour(
    images: Shaped[np.ndarray, "... bands"],
    bands: Bands,
    places: Sequence[int] | None = None,
) -> Shaped[np.ndarray, "... 3"]:
    """Images as they are shown: red, green and blue of many bands.

    places: the bands that are shown; None means `Bands.colours`. 8-bit images stay what
    they are. Values of rasters have no fixed range: black and white are two standard
    deviations of a band from its mean.
    """
    if images.dtype == np.uint8:
        return images
    if bands.dtype == "uint8":
        return images.clip(0, 1)
    places = list(bands.colours() if places is None else places)
    mean, std = np.float32(bands.mean)[places], np.float32(bands.std)[places]
    return ((images[..., places] - mean) / (4 * std) + 0.5).clip(0, 1)


def show(ax: Axes, image: np.ndarray) -> None:
    """Draw an image without a frame."""
    ax.imshow(image)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def per_axis(gsd: Gsd) -> tuple[float, float]:
    """Metres per pixel along y and x."""
    return gsd if isinstance(gsd, tuple) else (gsd, gsd)


def end_of(name: str, longest: int) -> str:
    """The end of a name, where names of images differ; cut names start with `...`."""
    return name if len(name) <= longest else f"...{name[3 - longest :]}"


def title_with_gsd(
    ax: Axes, name: str, gsd: Sequence[float], shape: Sequence[int]
) -> None:
    """Set the title: name, GSD (two numbers if the axes differ) and ground size."""
    y, x = (number(value) for value in gsd)
    ground = " × ".join(number(g * n) for g, n in zip(gsd, shape, strict=False))
    text = y if x == y else f"{y} × {x}"
    ax.set_title(f"{name}\n{text} m/px, {ground} m", fontsize=10)


def scale_bar(ax: Axes, width: int, gsd: float) -> None:
    """Draw a bar under the image: 1, 2 or 5 times a power of ten metres."""
    length = round_length(0.4 * width * gsd)
    place = ax.get_xaxis_transform()
    bar = {"color": "black", "linewidth": 4, "solid_capstyle": "butt", "clip_on": False}
    ax.plot([-0.5, length / gsd - 0.5], [-0.035, -0.035], transform=place, **bar)
    # Use the axis label, because the layout reserves room for it.
    ax.set_xlabel(metres(length), loc="left", labelpad=10, fontsize=10)
    ax.set_xlim(-0.5, width - 0.5)


def round_length(limit: float) -> float:
    """The largest of 1, 2 or 5 times a power of ten that is at most `limit`."""
    power = 10.0 ** math.floor(math.log10(limit))
    return max(digit * power for digit in (1, 2, 5) if digit * power <= limit)


def metres(length: float) -> str:
    """A length as text, in km from 1000 m on."""
    return f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"


def label_axes(ax: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Label a plot over steps or counts, with a light grid."""
    ax.set_title(title, fontsize=11)
    ax.set_xlabel(xlabel, fontsize=9)
    ax.set_ylabel(ylabel, fontsize=9)
    ax.tick_params(labelsize=9)
    ax.xaxis.set_major_locator(
        MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    )
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)


def geometric_mean(gsd: np.ndarray) -> np.ndarray:
    """One GSD from those of an image's two axes (the last dimension)."""
    return np.sqrt(np.prod(np.asarray(gsd, np.float64), axis=-1))


def number(value: float) -> str:
    """Three significant digits, never in exponential notation."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def save(fig: Figure, path: str | os.PathLike) -> None:
    """Write a PNG atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Show names of files and classes literally, in any script, without formulas.
    for text in fig.findobj(Text):
        text.set_parse_math(False)
        text.set_fontfamily(families(text.get_text()))
        text.set_text(drawable(text.get_text()))
    with atomic_write(path) as temporary:
        fig.savefig(temporary, format="png", dpi=DPI, bbox_inches="tight")
