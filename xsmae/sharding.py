"""Sharding: the batch is divided over all devices, the state only over `fsdp`."""

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
# Smaller arrays are replicated: biases and norms, even those of ViT-H's 32 stacked
# blocks. Gathering them would add most of the gathers but almost no bytes.
MIN_DIVIDED = 2**18


def create_mesh(
    batch_size: int,
    axes: str = "data:-1",
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh of all devices, or of `devices`, with the axes `data` and `fsdp`.

    `axes` is `NAME:SIZE,...`; -1 means all remaining devices, a missing axis has size
    1. Raises UserError for any other format, if the product of the sizes is not the
    number of devices, or if `batch_size` is not a multiple of it.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _sizes(axes, len(devices))
    if batch_size % len(devices):
        raise UserError(
            f"batch_size={batch_size}, expected a multiple of the {len(devices)} "
            "devices: change batch_size"
        )
    # With the default Explicit axes, z @ z.T of a batch-sharded z is an error.
    return jax.make_mesh(
        sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """A sharding that puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_batch(mesh: Mesh) -> NamedSharding:
    """A sharding that divides the leading axis over the devices."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def of_state(mesh: Mesh, shapes: Any) -> Any:
    """The sharding of each array of a state: its longest axis divided over `fsdp`.

    Arrays that are small, or have no axis divisible by `fsdp`, are replicated.
    """
    return jax.tree.map(lambda x: NamedSharding(mesh, _divided(mesh, x.shape)), shapes)


def whole_where_used(weight: Any) -> Any:
    """Gathers a weight that is divided over `fsdp`; its gradient is divided again.

    Without this, XLA may divide the products in the same way as the weights. Outside
    `on_mesh` and without `fsdp`, it returns `weight` unchanged.
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
    """The function, traced with the mesh that `whole_where_used` needs."""

    @functools.wraps(function)
    def traced(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def put_whole(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Puts an array that every process has on the devices, each with its own part."""
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def put_batch(
    batch: dict[str, np.ndarray], sharding: NamedSharding
) -> dict[str, jax.Array]:
    """Puts this process's part of a batch on its devices; one global array a field."""
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
    hint = "expected data:SIZE,fsdp:SIZE (-1 in one means all remaining devices)"
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
