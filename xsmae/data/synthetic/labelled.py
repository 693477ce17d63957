"""Synthetic scenes with the land of every pixel: segmentation without a download."""

from __future__ import annotations

from xsmae.data.masks import MaskRecord
from xsmae.data.records import BaseSource, fingerprint
from xsmae.data.synthetic.canvas import LAND
from xsmae.data.synthetic.source import RenderedOnce, SyntheticSource

# Of each class: field, grass, tree, sand, paved, building, water.
COLOURS = (
    (190, 150, 90), (130, 190, 90), (20, 90, 30), (240, 220, 130), (120, 120, 120),
    (200, 40, 40), (40, 90, 220),
)  # fmt: skip


class LandSource(BaseSource):
    """The images of a `SyntheticSource`, with a class of `canvas.LAND` for every pixel.

    A pixel has the class of the largest share of its ground, see `Scene.render_land`.
    Every image is a scene of its own: use another `seed` for held-out data. The
    arguments are those of `SyntheticSource`.
    """

    class_names = LAND
    colours = COLOURS

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
        self._images = SyntheticSource(
            num_images,
            seed=seed,
            size=size,
            gsd=gsd,
            gsd_spread=gsd_spread,
            cache_mib=cache_mib * 3 / 4,
        )
        self.bands = self._images.bands
        self._masks = RenderedOnce(cache_mib / 4, image_bytes=self._images.size**2)

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of everything that determines images and masks."""
        return fingerprint((type(self).__name__, self._images.fingerprint), LAND)

    def id(self, index: int) -> str:
        """The seed and the index."""
        return self._images.id(index)

    def scene(self, index: int) -> str:
        """The id, since every image shows another place."""
        return self.id(index)

    def raster(self, index: int) -> None:
        """None: the images are no rasters."""
        del index

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> MaskRecord:
        record = self._images[index]
        scene, window = self._images.scene(index), self._images.window(index)
        mask = self._masks.get(index, lambda: scene.render_land(**window))
        gsd = (record.gsd, record.gsd)
        return MaskRecord(record.image, gsd, None, record.id, mask=mask)

    def __repr__(self) -> str:
        return f"LandSource of {self._images!r}"
