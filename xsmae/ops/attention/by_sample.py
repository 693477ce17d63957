"""Makes functions that treat samples independently work under vmap and sharding."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def by_sample(function: Callable[..., list[jax.Array]]) -> Callable:
    """Wraps a function of arrays that all have the batch as first axis.

    A kernel is opaque to XLA. With the batch divided over devices, every device would
    gather the whole batch. With this wrapper, each device calls `function` on its own
    samples; their other axes are not divided. `vmap` merges its axis into the batch.
    """
    divided = custom_partitioning(function)
    divided.def_partition(partition=_partitioned(function), sharding_rule=_rule)
    batched = jax.custom_batching.custom_vmap(divided)

    @batched.def_vmap
    def fold(size, in_batched, *arrays):
        arrays = [
            x if has_axis else jnp.broadcast_to(x, (size, *x.shape))
            for x, has_axis in zip(arrays, in_batched, strict=True)
        ]
        out = batched(*(x.reshape(-1, *x.shape[2:]) for x in arrays))
        out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return batched


def _partitioned(function):
    def partition(mesh, arguments, results):
        batch = arguments[0].sharding.spec[:1]
        own = NamedSharding(mesh, PartitionSpec(*batch))
        return mesh, function, *jax.tree.map(lambda _: own, (results, arguments))

    return partition


def _rule(mesh, arguments, results):
    """Shardy's rule: all arrays share the batch axis; no other axis may be divided."""
    terms, whole = [], []
    for index, array in enumerate((*arguments, *results)):
        names = [f"x{index}_{axis}" for axis in range(1, len(array.shape))]
        terms.append(" ".join(("b", *names)))
        whole.extend(names)
    left, right = terms[: len(arguments)], terms[len(arguments) :]
    rule = f"{', '.join(left)} -> {', '.join(right)}"
    return rule, {"need_replication_factors": tuple(whole)}
