"""Shared fixtures; one core per worker; programs compiled fast and once."""

import importlib.metadata
import os
import shutil
import tempfile

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

# `make test-faults` uses this profile: ten times hypothesis's default of 100 cases.
settings.register_profile("faults", max_examples=1000, deadline=None)

# Show compared values of failed asserts in tests.support too.
pytest.register_assert_rewrite("tests.support")

# Raise if shapes broadcast with missing axes, which may be a mistake. Processes started
# by tests inherit this. Set before anything imports jax.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

# Half of the suite's time would be compiling the same programs again, so workers and
# their processes share a cache. Set before anything imports jax.
COMPILED = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
_cache = pytest.StashKey[str]()

# On CPUs, XLA compiles the tests' small programs in a fifth of the time if it optimises
# less. Values change by rounding. `XLA_FLAGS= make test` compiles as for users, which
# `make test-core` and `make test-peers` do.
FAST = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jax").startswith("0.10."):
    # The emitters cannot be switched off in jax 0.12: XLA ends at an unknown flag.
    FAST += " --xla_cpu_use_fusion_emitters=false"
ON_GPU = os.path.exists("/dev/nvidiactl")
if not ON_GPU:
    os.environ.setdefault("XLA_FLAGS", FAST)


def pytest_configure(config):
    """Pins each worker and its processes to one core.

    XLA's threads wait for each other, so two workers sharing two cores are slower.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        config.stash[_cache] = tempfile.mkdtemp(prefix="xsmae-compiled-")
        os.environ |= COMPILED | {"JAX_COMPILATION_CACHE_DIR": config.stash[_cache]}
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if ON_GPU:
        return  # compiling for a GPU uses all threads
    if worker.removeprefix("gw").isdigit() and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker[2:]) % len(cores)]})


def pytest_unconfigure(config):
    if _cache in config.stash:
        shutil.rmtree(config.stash[_cache])


@pytest.fixture
def image_folder(tmp_path):
    """A folder of 24 JPEGs of 40 px in two classes, each with its own colour."""
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
