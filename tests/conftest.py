"""Fixtures that more than one file needs."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def image_folder(tmp_path):
    """A folder of 24 JPEGs of 40 px in two classes; the class is the colour."""
    root = tmp_path / "images"
    rng = np.random.default_rng(0)
    for index in range(24):
        name, colour = (
            ("field", (90, 140, 60)) if index % 2 else ("roof", (150, 90, 70))
        )
        pixels = rng.normal(colour, 12, (40, 40, 3)).clip(0, 255).astype(np.uint8)
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / name / f"{index:02}.jpg", quality=95)
    return root
