"""The mesh of a config, and how batch and state are divided over devices."""

import json

import jax
import pytest
from jax.sharding import AbstractMesh
from xsmae.configs import common

from tests.support.devices import run_on_devices
from xsmae.errors import UserError
from xsmae.sharding import MIN_DIVIDED, create_mesh, of_state
from xsmae.trainer import create_trainer

# Programs on eight devices that share a worker's single core take minutes. So one
# process on all cores makes all meshes of eight devices.
MESHES = {
    "data:-1": (8, 1),
    "data:8": (8, 1),
    "data:8,fsdp:1": (8, 1),
    "data:-1,fsdp:1": (8, 1),
    "data:4,fsdp:2": (4, 2),
    "fsdp:2,data:4": (4, 2),
    "data:-1,fsdp:4": (2, 4),
    "data:4,fsdp:-1": (4, 2),
    "fsdp:8": (1, 8),
    "fsdp:-1": (1, 8),
}
REFUSED = (
    "data:2", "fsdp:4", "data:16", "data:2,fsdp:2", "data:4,fsdp:4", "data:3,fsdp:-1",
    "data:-1,fsdp:3", "data:-1,fsdp:16", "data:-1,fsdp:-1", "data:-2,fsdp:-4",
)  # fmt: skip


@pytest.fixture(scope="module")
def on_eight():
    """The results for each (axes, batch size) on eight devices."""
    cases = [(axes, 16) for axes in (*MESHES, *REFUSED)] + [("data:-1", 12)]
    found = run_on_devices("tests.support.meshes_on_devices", 8, json.dumps(cases))
    return dict(zip(cases, found, strict=True))


@pytest.mark.parametrize("axes", MESHES)
def test_axes_of_a_mesh_of_eight(axes, on_eight):
    found = on_eight[axes, 16]
    sizes = dict(zip(("data", "fsdp"), MESHES[axes], strict=True))
    assert found["sizes"] == [list(item) for item in sizes.items()]
    # With any axes, each device has its own part of the batch.
    assert found["parts"] == [[2 * i, 2 * i + 1] for i in range(8)]


@pytest.mark.parametrize("axes", REFUSED)
def test_axes_that_eight_devices_cannot_have(axes, on_eight):
    said = on_eight[axes, 16]["refused"]
    assert f"mesh={axes!r} on 8 device(s)" in said


def test_a_batch_that_does_not_divide_over_eight(on_eight):
    said = on_eight["data:-1", 12]["refused"]
    assert "batch_size=12" in said
    assert "8 devices" in said


@pytest.mark.parametrize(
    ("axes", "devices", "sizes"),
    [
        ("data:-1", 1, (1, 1)),
        ("data:1,fsdp:1", 1, (1, 1)),
        ("fsdp:-1", 1, (1, 1)),
        ("data:-1,fsdp:1", 1, (1, 1)),
    ],
)
def test_axes_of_the_mesh(axes, devices, sizes):
    mesh = create_mesh(8, axes, devices=jax.devices()[:devices])
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp"), sizes, strict=True))


@pytest.mark.parametrize(
    "axes",
    [
        "", "data", "data:", "data:x", "data:2", "data:0", "data:-2", "data:-1,fsdp:-1",
        "data:1,data:1", "data:1,tensor:1", "data:-1,fsdp:2", "data:1;fsdp:1",
    ],
)  # fmt: skip
def test_axes_that_cannot_be(axes):
    with pytest.raises(UserError, match=r"mesh=.*expected data:SIZE,fsdp:SIZE"):
        create_mesh(8, axes, devices=jax.devices()[:1])


def test_the_state_of_a_huge_network_is_divided():
    """ViT-H, corrected, over 4 devices: the undivided rest is too small to matter."""
    config = common.get_common("corrected", "huge")
    config.model.reference_gsd = 1.0
    config.batch_size = 8 * jax.device_count()
    shapes = create_trainer(config, num_images=100).state_shapes()
    mesh = AbstractMesh((64, 4), ("data", "fsdp"))
    leaves = jax.tree.leaves(shapes)
    places = jax.tree.leaves(of_state(mesh, shapes))
    whole, a_device = 0, 0
    for leaf, place in zip(leaves, places, strict=True):
        whole += leaf.size
        a_device += leaf.size // (4 if "fsdp" in place.spec else 1)
        if leaf.size >= MIN_DIVIDED:
            axis = list(place.spec).index("fsdp")
            # The layer axis is not divided: layers are gathered one after the other.
            assert leaf.shape[axis] == max(leaf.shape)
    assert whole > 3 * 600e6  # the parameters and two moments
    assert a_device < whole / 4 * 1.005
