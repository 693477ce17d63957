"""Runs on one device equal runs that share the batch and the state over several."""

import numpy as np
import pytest

from tests.support.devices import run_on_devices


@pytest.fixture(scope="module")
def alone():
    return run_on_devices("tests.support.steps_on_devices", 1)


@pytest.mark.parametrize(
    "devices",
    [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4)), 8],
)
def test_one_device_equals_several(alone, devices):
    """Every method has the same losses, parameters and features, to rounding.

    The batch is divided over all devices, the state over up to four.
    """
    found = run_on_devices("tests.support.steps_on_devices", devices)
    assert (alone["devices"], found["devices"]) == (1, devices)
    # The rows of similarities are divided; each device has only the whole vectors.
    rows = 4 * (2 * alone["batch"]) ** 2
    for one, several in zip(alone["contrastive"], found["contrastive"], strict=True):
        assert rows <= one
        assert several < 4 * rows / devices
    for run in alone.keys() - {"devices", "batch", "contrastive"}:
        one, several = alone[run], found[run]
        shared = min(4, devices) if "fsdp 4" in run else 1
        assert one["kernel"] == [2, 16, 64]
        assert several["kernel"] == [2, 16, 64 // shared]
        if shared > 1:
            # Weights are gathered for both passes; no product is divided like them.
            # Each use of the encoder gathers its weights again: view 1, two coarse
            # views, the teacher.
            uses = 4 if run.startswith("scale_distill") else 1
            exchanged = several["exchanged"]
            assert f"all-to-all {shared}" not in exchanged
            gathered = exchanged[f"all-gather {shared}"] / exchanged["parameters"]
            assert 1 / 2 < gathered <= 2 * uses
        for name in one.keys() - {"kernel", "exchanged"}:
            # Adam's first updates are signs. Rounding can flip them if a gradient is
            # almost zero, so the tolerance has an absolute part.
            np.testing.assert_allclose(
                one[name], several[name], rtol=2e-4, atol=1e-4, err_msg=f"{run} {name}"
            )
