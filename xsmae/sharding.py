"""The devices of a run: the batch is divided over them, the state is on each."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xsmae.errors import UserError


def create_mesh(batch_size: int) -> Mesh:
    """A mesh of all devices with one axis, `data`.

    Raises UserError where `batch_size` does not divide over them.
    """
    devices = jax.device_count()
    if batch_size % devices:
        raise UserError(
            f"batch_size={batch_size} does not divide over {devices} devices: use a "
            f"multiple of {devices}"
        )
    # Auto axes: under the Explicit default, z @ z.T of a batch-sharded z is an error.
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def by_batch(mesh: Mesh) -> NamedSharding:
    """The leading axis is divided over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(
    batch: dict[str, np.ndarray], sharding: NamedSharding
) -> dict[str, jax.Array]:
    """This process's part of a batch to its devices, as one global array a field."""
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
