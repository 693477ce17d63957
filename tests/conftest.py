"""Fixtures that more than one file needs, and a core for each of several workers."""

import os

import numpy as np
import pytest
from PIL import Image


def pytest_configure():
    """XLA's threads wait for each other: two workers on the same two cores are slower
    than each on one of them, which what they start is on too."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker.removeprefix("gw").isdigit() and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker[2:]) % len(cores)]})


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
