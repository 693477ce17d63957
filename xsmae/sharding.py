"""The devices of a run: the batch is divided over all, the state over `fsdp` alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xsmae.errors import UserError

AXES = ("data", "fsdp")
# Arrays with fewer numbers are on every device: biases and norms, of ViT-H's 32 blocks
# too, of which a gather each would be most of the gathers and none of the bytes.
MIN_DIVIDED = 2**18


def create_mesh(
    batch_size: int,
    axes: str = "data:-1",
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh of all devices, or of `devices`, with the axes `data` and `fsdp`.

    `axes` is `NAME:SIZE,...`; -1 is what the others leave, an axis that is not named is
    1. Raises UserError where it is not so, where the sizes do not make up the devices,
    or where `batch_size` does not divide over them.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _sizes(axes, len(devices))
    if batch_size % len(devices):
        raise UserError(
            f"batch_size={batch_size} does not divide over {len(devices)} devices: use "
            f"a multiple of {len(devices)}"
        )
    # Auto axes: under the Explicit default, z @ z.T of a batch-sharded z is an error.
    return jax.make_mesh(
        sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def by_batch(mesh: Mesh) -> NamedSharding:
    """The leading axis is divided over the devices."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def of_state(mesh: Mesh, shapes: Any) -> Any:
    """Where each array of a state lies: its longest axis divided over `fsdp`.

    An array too small, or without an axis that `fsdp` divides, is on every device.
    """
    return jax.tree.map(lambda x: NamedSharding(mesh, _divided(mesh, x.shape)), shapes)


def whole_where_used(weight: Any) -> Any:
    """A weight that every device has at this point, gathered over `fsdp` where divided.

    Its gradient is divided again. Without being told, XLA may divide the products as
    the weights are. Within `on_mesh`; elsewhere, and without `fsdp`, it is `weight`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.shape.get("fsdp", 1) == 1:
        return weight
    return _whole(weight)


@jax.custom_vjp
def _whole(weight):
    return jax.lax.with_sharding_constraint(weight, PartitionSpec())


def _divided_gradient(_, gradient):
    place = _divided(jax.sharding.get_abstract_mesh(), gradient.shape)
    return (jax.lax.with_sharding_constraint(gradient, place),)


_whole.defvjp(lambda weight: (_whole(weight), None), _divided_gradient)


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """The function, traced where `whole_where_used` knows the mesh."""

    @functools.wraps(function)
    def traced(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def put_whole(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process has to the devices, each its own part."""
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def put_batch(
    batch: dict[str, np.ndarray], sharding: NamedSharding
) -> dict[str, jax.Array]:
    """This process's part of a batch to its devices, as one global array a field."""
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def _divided(mesh: Mesh, shape: tuple[int, ...]) -> PartitionSpec:
    parts = mesh.shape["fsdp"]
    axes = [axis for axis, size in enumerate(shape) if size % parts == 0]
    if parts == 1 or math.prod(shape) < MIN_DIVIDED or not axes:
        return PartitionSpec()
    longest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*(None,) * longest, "fsdp")


def _sizes(axes: str, devices: int) -> list[int]:
    """The size of each of `AXES`."""
    hint = "expected data:SIZE,fsdp:SIZE, one of them -1 for what is left"
    try:
        parts = [part.split(":") for part in axes.split(",")]
        given = {name: int(size) for name, size in parts}
    except ValueError:
        raise UserError(f"mesh={axes!r}, {hint}") from None
    sizes = [given.get(name, 1) for name in AXES]
    if -1 in sizes:
        rest = devices // -math.prod(sizes)
        sizes = [rest if size == -1 else size for size in sizes]
    known = given.keys() <= {*AXES} and len(given) == len(parts)
    if not known or min(sizes) < 1 or math.prod(sizes) != devices:
        raise UserError(f"mesh={axes!r} on {devices} device(s), {hint}")
    return sizes
