"""Fixtures that more than one file needs; a core a worker; programs compiled once."""

import os
import shutil
import tempfile

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

# `make test-faults` asks for it: ten times hypothesis's own number of cases.
settings.register_profile("faults", max_examples=1000, deadline=None)

# A failed assert says what it compared, also in what tests share.
pytest.register_assert_rewrite("tests.support")

# An axis that is missing is a mistake or goes without saying; here it must be said, in
# what tests start too. Set before anything imports jax.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

# Half of the suite's time would be compiling what another test has compiled: workers
# and what they start share what they have. Set before anything imports jax.
COMPILED = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
_cache = pytest.StashKey[str]()


def pytest_configure(config):
    """XLA's threads wait for each other: two workers on the same two cores are slower
    than each on one of them, which what they start is on too."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        config.stash[_cache] = tempfile.mkdtemp(prefix="xsmae-compiled-")
        os.environ |= COMPILED | {"JAX_COMPILATION_CACHE_DIR": config.stash[_cache]}
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if os.path.exists("/dev/nvidiactl"):
        return  # compiling for a GPU takes as many threads as there are
    if worker.removeprefix("gw").isdigit() and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker[2:]) % len(cores)]})


def pytest_unconfigure(config):
    if _cache in config.stash:
        shutil.rmtree(config.stash[_cache])


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
