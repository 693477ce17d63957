"""Which devices hold what: the mesh of a config, and how the state is divided."""

import jax
import pytest
from jax.sharding import AbstractMesh
from xsmae.configs import common

from xsmae.errors import UserError
from xsmae.sharding import MIN_DIVIDED, create_mesh, of_state
from xsmae.trainer import create_trainer


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
    """ViT-H, corrected, over 4: what is not divided is too small to matter."""
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
            # The stacked layers stay together: each is gathered when it is its turn.
            assert leaf.shape[axis] == max(leaf.shape)
    assert whole > 3 * 600e6  # parameters and two moments
    assert a_device < whole / 4 * 1.005
