"""Sources of a few images whose colour gives their class."""

import numpy as np

from xsmae.data.records import BaseSource, Record
from xsmae.errors import BadImageError


class ColourSource(BaseSource):
    """Slightly noisy images; the class is the colour: red, green or blue."""

    bands = ("red", "green", "blue")
    class_names = ("red", "green", "blue")

    def __init__(self, size, bad=(), seed=0):
        self.size, self.bad, self.seed = size, frozenset(bad), seed
        self.labels = np.arange(size) % 3

    def __repr__(self):
        return f"ColourSource({self.size})"

    def __len__(self):
        return self.size

    def id(self, index):
        return f"{index}.png"

    def __getitem__(self, index):
        if index in self.bad:
            raise BadImageError("no image")
        rng = np.random.default_rng((self.seed, index))
        image = rng.integers(0, 60, (12, 16, 3), np.uint8)
        image[..., index % 3] += 150  # not from `labels`, which a test may change
        return Record(image, 1.0 + index, int(self.labels[index]), self.id(index))


class Fingerprinted(ColourSource):
    @property
    def fingerprint(self):
        return f"{self.size:08}{self.seed:08}"


class HeldOut(Fingerprinted):
    """The same images under other names, for a test part."""

    def id(self, index):
        return f"test/{index}.png"


class Permuted(Fingerprinted):
    """The same images with every label changed."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.labels = (self.labels + 1) % 3
